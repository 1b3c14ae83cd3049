"""The common form: an SAE in terms that this library and all others share.

Libraries name and arrange the parameters of an SAE differently, and no other library has ProLU, our BatchTopK or our
JumpReLU with the parameter log(theta). Their inference is nevertheless one of four well-known architectures, which
every format can describe. `CommonForm` is an SAE written as one of these four. Each format then needs two conversions
only, between its own files and `CommonForm`, and knows nothing of our nonlinearities or of the other formats:

    SAE of ours  <-- common_form_of, sae_of -->  CommonForm  <-- a format's to_files, from_folder -->  its files

What the common form leaves out is what training needs: the gradient of ProLU, the bandwidth of JumpReLU. `round_trip`
keeps that beside an export.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prolu.sae.autoencoder import SAE
from prolu.sae.nonlinearities import (
    BatchTopK,
    Gated,
    GeneralisedProLU,
    JumpReLU,
    Nonlinearity,
    ReLU,
    Thresholded,
    TopK,
    nonlinearity_named,
)
from prolu.sae.saved_sae import SAEConfig
from prolu.sae.weights import Weights

PARAMETERS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
"""The parameters of each architecture beside the two matrices and b_dec, each of shape [d_sae]."""

UNIT_TOLERANCE = 1e-5
"""How far a decoder row's norm may be from 1, as in dictionary_learning's loader."""


@dataclass(frozen=True)
class CommonForm:
    """An SAE x_hat = f W_dec + b_dec, with latents f that its architecture gives from pre = (x - b_dec) W_enc + b_enc.

    standard   f = ReLU(pre)
    topk       f = the k largest of ReLU(pre)
    jumprelu   f = ReLU(pre) [pre > threshold]
    gated      f = [(x - b_dec) W_enc + b_gate > 0] ReLU(exp(r_mag) (x - b_dec) W_enc + b_mag)
    """

    architecture: str
    """standard, topk, jumprelu or gated."""
    W_enc: Tensor
    """The encoder, [d_in, d_sae]."""
    W_dec: Tensor
    """The decoder, [d_sae, d_in]."""
    b_dec: Tensor
    """The decoder bias, [d_in], which the encoder subtracts from its input."""
    own: dict[str, Tensor]
    """The architecture's own parameters: those of `PARAMETERS`."""
    k: int | None = None
    """The number of latents kept per token, for topk only."""

    def equals(self, other: "CommonForm") -> bool:
        """Say whether both have the same architecture, k, number formats and values, to the bit."""
        mine = self.tensors()
        theirs = other.tensors()
        if (self.architecture, self.k, mine.keys()) != (other.architecture, other.k, theirs.keys()):
            return False
        return all(t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]) for name, t in mine.items())

    def tensors(self) -> dict[str, Tensor]:
        """Return the encoder, the decoder, its bias and the own parameters of the nonlinearity, each by its name."""
        return {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_dec": self.b_dec} | self.own

    @property
    def d_in(self) -> int:
        """The width of the activations."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return self.W_enc.shape[1]


Own = dict[str, Tensor]
"""A nonlinearity's own parameters, by name."""


def _unchanged(own: Own) -> Own:
    return own


def _threshold_of_prolu(own: Own) -> Own:
    """ProLU(m, b) = ReLU(m) [m > ReLU(-b)]: the bias moves the gate, not the value, so b_enc becomes 0."""
    return {"b_enc": torch.zeros_like(own["b_enc"]), "threshold": torch.relu(-own["b_enc"])}


def _threshold_of_jumprelu(own: Own) -> Own:
    """Our parameter is the threshold, or its logarithm, so that no training step can make the threshold negative."""
    threshold = torch.relu(own["threshold"]) if "threshold" in own else own["log_threshold"].exp()
    return {"b_enc": own["b_enc"], "threshold": threshold}


def _threshold_of_batchtopk(own: Own) -> Own:
    """A latent of BatchTopK is active at its threshold, that of a JumpReLU only above it, so t becomes the next lower
    number.
    """
    threshold = own["threshold"]
    below = torch.nextafter(threshold, torch.tensor(-torch.inf, dtype=threshold.dtype))
    return {"b_enc": own["b_enc"], "threshold": below}


CONVERSIONS: dict[type[Nonlinearity], tuple[str, Callable[[Own], Own]]] = {
    ReLU: ("standard", _unchanged),
    TopK: ("topk", _unchanged),
    Gated: ("gated", _unchanged),
    Thresholded: ("jumprelu", _unchanged),
    GeneralisedProLU: ("jumprelu", _threshold_of_prolu),
    JumpReLU: ("jumprelu", _threshold_of_jumprelu),
    BatchTopK: ("jumprelu", _threshold_of_batchtopk),
}
"""For each of our nonlinearities, its architecture in the common form and what becomes of its parameters. One that is
missing here cannot be exported."""

NONLINEARITIES = {"standard": "relu", "jumprelu": "thresholded", "gated": "gated"}
"""Our nonlinearity for each architecture but topk, whose name holds its k. `thresholded` takes thresholds as they are:
`jumprelu` would need log(theta), and exp(log(theta)) is another number."""


def common_form_of(sae: SAE) -> CommonForm:
    """Return one of our SAEs in the common form.

    Latents are the same to the bit, except where TopK has ties: we keep all latents that share the k-th place, other
    libraries keep some of them.

    Raises:
        ValueError: No other library has its nonlinearity, or it is a transcoder.
    """
    if sae.is_transcoder:
        raise ValueError("a transcoder: this format holds SAEs only, whose input and output are at one hook")
    return encoder_form_of(sae)


def encoder_form_of(sae: SAE) -> CommonForm:
    """Return an SAE, or the encoder and decoder of a transcoder, in the common form; see `common_form_of`."""
    weights = sae.weights
    nonlinearity = nonlinearity_named(sae.config.nonlinearity)
    for kind, (architecture, converted) in CONVERSIONS.items():
        if isinstance(nonlinearity, kind):
            k = nonlinearity.selection.k if isinstance(nonlinearity, TopK) else None
            own = converted(dict(weights.own))
            return CommonForm(architecture, weights.encoder.T, weights.decoder, weights.b_dec, own, k)
    raise ValueError(f"nonlinearity {sae.config.nonlinearity!r}: no other library has it")


def sae_of(form: CommonForm, normalisation: str) -> SAE:
    """Return the SAE of ours that computes the same as a common form.

    Args:
        form: The common form.
        normalisation: How inputs are scaled first: per_token or none.
    """
    nonlinearity = f"topk({form.k})" if form.architecture == "topk" else NONLINEARITIES[form.architecture]
    config = SAEConfig(d_in=form.d_in, d_sae=form.d_sae, nonlinearity=nonlinearity, normalisation=normalisation)
    return sae_with(config, form, form.own)


def sae_with(config: SAEConfig, form: CommonForm, own: dict[str, Tensor]) -> SAE:
    """Return an SAE with the matrices and b_dec of a common form, and the given parameters of its nonlinearity."""
    # Our matrices lie latent-major: W_enc is stored transposed.
    return SAE(config, Weights(form.W_enc.T.contiguous(), form.W_dec.contiguous(), form.b_dec, own))


def tied(form: CommonForm) -> CommonForm:
    """Rewrite an encoder without input bias as one that subtracts b_dec, by adding b_dec W_enc to its biases.

    x W_enc + b = (x - b_dec) W_enc + (b + b_dec W_enc), up to the rounding of the new bias.
    """
    return _with_biases_shifted(form, b_dec_encoded(form))


def untied(form: CommonForm) -> CommonForm:
    """Rewrite an encoder that subtracts b_dec as one without input bias: the reverse of `tied`."""
    return _with_biases_shifted(form, -b_dec_encoded(form))


def b_dec_encoded(form: CommonForm) -> Tensor:
    """Return b_dec W_enc in fp64, with the same bits on every machine."""
    # A matmul sums in an order that depends on the machine. `round_trip` compares the shifted biases to the bit, so
    # the rows are added one after the other.
    total = torch.zeros(form.d_sae, dtype=torch.float64)
    for bias, row in zip(form.b_dec.double(), form.W_enc.double(), strict=True):
        total += bias * row
    return total


def with_unit_rows(form: CommonForm) -> CommonForm:
    """Scale decoder rows to norm 1 and move their norms into the encoder of a standard or topk SAE.

    The reconstruction is the same, of latents that are larger by these norms.
    """
    norms = torch.linalg.vector_norm(form.W_dec.double(), dim=1)
    norms = torch.where(norms > 0, norms, 1)  # a row of zeros stays one
    dtype = form.W_dec.dtype
    return replace(
        form,
        W_enc=(form.W_enc.double() * norms).to(dtype),
        W_dec=(form.W_dec.double() / norms[:, None]).to(dtype),
        own={"b_enc": (form.own["b_enc"].double() * norms).to(dtype)},
    )


def has_unit_rows(form: CommonForm) -> bool:
    """Say whether all decoder rows have norm 1, up to `UNIT_TOLERANCE`."""
    norms = torch.linalg.vector_norm(form.W_dec.double(), dim=1)
    return torch.allclose(norms, torch.ones_like(norms), rtol=UNIT_TOLERANCE, atol=0)


def _with_biases_shifted(form: CommonForm, shift: Tensor) -> CommonForm:
    own = dict(form.own)
    shifts = {"b_enc": shift, "b_gate": shift, "b_mag": shift}
    if "r_mag" in own:
        # A gated SAE multiplies by exp(r_mag) before it adds b_mag.
        shifts["b_mag"] = own["r_mag"].double().exp() * shift
    for name in own.keys() & shifts.keys():
        own[name] = (own[name].double() + shifts[name]).to(own[name].dtype)
    return replace(form, own=own)
