"""An SAE in the words that libraries share, between ours and each of theirs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prolu.sae.autoencoder import SAE, SAEConfig
from prolu.sae.nonlinearities import (
    BatchTopK,
    Gated,
    GeneralisedProLU,
    JumpReLU,
    ReLU,
    Thresholded,
    TopK,
    nonlinearity_named,
)
from prolu.sae.weights import Weights

OWN = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
"""Parameters of each architecture beside the two matrices and b_dec, [d_sae] each."""

UNIT_TOLERANCE = 1e-5
"""Of a decoder row's norm, relative: that of dictionary_learning's loader."""


@dataclass(frozen=True)
class Plain:
    """x_hat = f W_dec + b_dec, and f by architecture, with pre = (x - b_dec) W_enc + b_enc.

    standard   f = ReLU(pre)
    topk       f = the k largest of ReLU(pre)
    jumprelu   f = ReLU(pre) [pre > threshold]
    gated      f = [(x - b_dec) W_enc + b_gate > 0] ReLU(exp(r_mag) (x - b_dec) W_enc + b_mag)
    """

    architecture: str
    W_enc: Tensor
    """[d_in, d_sae]"""
    W_dec: Tensor
    """[d_sae, d_in]"""
    b_dec: Tensor
    own: dict[str, Tensor]
    k: int | None = None

    def equals(self, other: "Plain") -> bool:
        """Whether all is the same to the bit."""
        mine, theirs = ({"W_enc": p.W_enc, "W_dec": p.W_dec, "b_dec": p.b_dec} | p.own for p in (self, other))
        alike = (self.architecture, self.k, mine.keys()) == (other.architecture, other.k, theirs.keys())
        return alike and all(t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]) for name, t in mine.items())

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]


def plain_of(sae: SAE) -> Plain:
    """An SAE of ours; latents are the same to the bit, ties of TopK aside, which share a place here only."""
    weights, nonlinearity = sae.weights, nonlinearity_named(sae.config.nonlinearity)
    own, k = dict(weights.own), None
    if isinstance(nonlinearity, Gated):
        architecture = "gated"
    elif isinstance(nonlinearity, ReLU):
        architecture = "standard"
    elif isinstance(nonlinearity, TopK):
        architecture, k = "topk", nonlinearity.selection.k
    else:
        architecture = "jumprelu"
        if isinstance(nonlinearity, GeneralisedProLU):
            # ReLU(m) [m > ReLU(-b)]: no bias, so nothing is shifted.
            own = {"b_enc": torch.zeros_like(own["b_enc"]), "threshold": torch.relu(-own["b_enc"])}
        elif isinstance(nonlinearity, JumpReLU):
            own = {"b_enc": own["b_enc"], "threshold": own["log_threshold"].exp()}
        elif isinstance(nonlinearity, BatchTopK):
            # It is on at its threshold, the others are on above theirs.
            below = torch.nextafter(own["threshold"], torch.tensor(-torch.inf, dtype=own["threshold"].dtype))
            own = {"b_enc": own["b_enc"], "threshold": below}
        elif not isinstance(nonlinearity, Thresholded):
            raise ValueError(f"nonlinearity {sae.config.nonlinearity!r}: no other library has it")
    return Plain(architecture, weights.encoder.T, weights.decoder, weights.b_dec, own, k)


def sae_of(plain: Plain, normalisation: str) -> SAE:
    """The SAE of ours that computes the same."""
    names = {"standard": "relu", "topk": f"topk({plain.k})", "jumprelu": "thresholded", "gated": "gated"}
    config = SAEConfig(
        d_in=plain.d_in, d_sae=plain.d_sae, nonlinearity=names[plain.architecture], normalisation=normalisation
    )
    return SAE(config, Weights(plain.W_enc.T.contiguous(), plain.W_dec.contiguous(), plain.b_dec, plain.own))


def tied(plain: Plain) -> Plain:
    """What an encoder that does not subtract b_dec is as one that does: its biases gain b_dec W_enc, to rounding."""
    return _shifted(plain, b_dec_encoded(plain))


def untied(plain: Plain) -> Plain:
    """The reverse of `tied`."""
    return _shifted(plain, -b_dec_encoded(plain))


def b_dec_encoded(plain: Plain) -> Tensor:
    """b_dec W_enc in fp64, one row after the other, so that every machine finds the same bits."""
    total = torch.zeros(plain.d_sae, dtype=torch.float64)
    for bias, row in zip(plain.b_dec.double(), plain.W_enc.double(), strict=True):
        total += bias * row
    return total


def with_unit_rows(plain: Plain) -> Plain:
    """Decoder rows of norm 1, their norms in the encoder: the same reconstruction, of latents scaled by them."""
    norms = torch.linalg.vector_norm(plain.W_dec.double(), dim=1)
    norms, dtype = torch.where(norms > 0, norms, 1), plain.W_dec.dtype
    return replace(
        plain,
        W_enc=(plain.W_enc.double() * norms).to(dtype),
        W_dec=(plain.W_dec.double() / norms[:, None]).to(dtype),
        own={"b_enc": (plain.own["b_enc"].double() * norms).to(dtype)},
    )


def has_unit_rows(plain: Plain) -> bool:
    """Whether decoder rows have norm 1, to rounding."""
    norms = torch.linalg.vector_norm(plain.W_dec.double(), dim=1)
    return torch.allclose(norms, torch.ones_like(norms), rtol=UNIT_TOLERANCE, atol=0)


def _shifted(plain: Plain, by: Tensor) -> Plain:
    own = dict(plain.own)
    shifts = {"b_enc": by, "b_gate": by, "b_mag": own["r_mag"].double().exp() * by if "r_mag" in own else by}
    for name in own.keys() & shifts.keys():
        own[name] = (own[name].double() + shifts[name]).to(own[name].dtype)
    return replace(plain, own=own)
