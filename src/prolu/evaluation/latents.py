"""Figures of each latent: how often and how strongly it is active, where it points, how it responds to scale."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from prolu.evaluation.metrics import CodeSums
from prolu.runtime.files import first_line, write_atomically
from prolu.sae.autoencoder import SAE
from prolu.sae.scaling import normalise

LATENTS_FILE = "latents.safetensors"
"""The file's name in a run's folder."""

DENSITY_EDGES = tuple(10 ** (-n / 2) for n in range(10, 0, -1))
"""The inner edges of the histogram of densities: half decades from 1e-5 to 0.316. The first bin has all below."""

RESPONSE_TOKENS = 2048
"""The number of held-out tokens from which a scale response is computed."""


class LatentFigures(NamedTuple):
    """One number per latent, [d_sae] each."""

    density: Tensor
    """#{tokens: f_i > 0} / n_tokens, the fraction of held-out tokens on which the latent is active, from 0 to 1."""
    mean_when_on: Tensor
    """The mean of f_i over these tokens, in units of the SAE's input; 0 if there are none."""
    encoder_decoder_cosine: Tensor
    """The cosine of the encoder column W_enc[:, i] and the decoder row W_dec[i], from -1 to 1; nan for a transcoder, in
    which they are directions of two spaces."""
    negative_bias: Tensor
    """1 where b_enc < 0, otherwise 0; nan for an SAE without b_enc."""

    def summary(self) -> dict[str, float]:
        """Return the figures that are one number, by name.

        - `negative_bias_fraction` = #{i: b_enc_i < 0} / d_sae, from 0 to 1.
        - `encoder_decoder_cosine`: its mean over the latents that are active on any token; nan if none is. The others
          would pull it towards their starting weights.
        """
        ever_active = self.density > 0
        return {
            "negative_bias_fraction": self.negative_bias.mean().item(),
            "encoder_decoder_cosine": self.encoder_decoder_cosine[ever_active].mean().item(),
        }

    def density_histogram(self) -> list[int]:
        """Return the number of latents in each bin of `DENSITY_EDGES`; those that are never active are in the first."""
        bins = torch.bucketize(self.density, torch.tensor(DENSITY_EDGES, dtype=self.density.dtype), right=True)
        return torch.bincount(bins, minlength=len(DENSITY_EDGES) + 1).tolist()

    def save(self, folder: Path) -> None:
        """Write the file into a run's folder, which is created if need be."""
        # `negative_bias` is left out: the run's sae.safetensors has the biases themselves.
        kept = {name: t.float().contiguous() for name, t in self._asdict().items() if name != "negative_bias"}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / LATENTS_FILE, save(kept))


def densities_of(folder: Path) -> Float[Tensor, " d_sae"] | None:
    """Return the density of each latent of a saved run, in float64.

    Returns:
        None if the folder has no file of the latents, as those of the first version.

    Raises:
        ValueError: The file is damaged.
    """
    file = folder / LATENTS_FILE
    if not file.is_file():
        return None
    try:
        return load_file(file)["density"].double().flatten()
    except (OSError, SafetensorError, struct.error, ValueError, KeyError) as problem:
        raise ValueError(f"{file}: not a readable file of latents ({first_line(problem)})") from None


def density_quartiles(folder: Path) -> tuple[float, float, float] | None:
    """Return the quartiles of the densities of a saved run's latents, of those that were active on any token.

    Returns:
        None if no latent was active, or the folder has no file of the latents, as those of the first version.

    Raises:
        ValueError: The file is damaged.
    """
    density = densities_of(folder)
    alive = density[density > 0] if density is not None else None
    if alive is None or not len(alive):
        return None
    lower, median, upper = alive.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=alive.dtype)).tolist()
    return lower, median, upper


def latent_figures(sae: SAE, code: CodeSums) -> LatentFigures:
    """Return the figures of an SAE's latents, from its weights and the sums of its code over held-out tokens."""
    weights = sae.weights
    cosine = encoder_decoder_cosine(sae)
    if "b_enc" in weights.own:
        negative = (weights.own["b_enc"] < 0).double().cpu()
    else:
        negative = torch.full_like(cosine, torch.nan)
    return LatentFigures(code.density, code.mean_when_on, cosine, negative)


@torch.no_grad()
def encoder_decoder_cosine(sae: SAE) -> Float[Tensor, " d_sae"]:
    """Return the cosine of each latent's encoder column W_enc[:, i] and decoder row W_dec[i], in float64 on the CPU.

    For a transcoder it is nan: the two are directions of two spaces.
    """
    weights = sae.weights
    if sae.is_transcoder:
        return torch.full((weights.d_sae,), torch.nan, dtype=torch.float64)
    return torch.nn.functional.cosine_similarity(weights.encoder.double(), weights.decoder.double(), dim=1).cpu()


class Response(NamedTuple):
    """How the latents of an SAE change when the centred input v becomes k v."""

    gain: float
    """The mean over latents of sum f_i(k v) / (k sum f_i(v)), where the sums are over the tokens on which latent i is
    active at both scales. Without a unit; 1 if active latents are proportional to the input; nan if there are none."""
    still_active: float
    """#{(token, latent): f_i(v) > 0 and f_i(k v) > 0} / #{(token, latent): f_i(v) > 0}, from 0 to 1; nan if no latent
    is active at v."""


@torch.no_grad()
def scale_response(
    sae: SAE,
    acts: Float[Tensor, "n ctx d_in"],
    scales: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0),
    n_tokens: int = RESPONSE_TOKENS,
    *,
    first_too: bool = False,
) -> dict[float, Response]:
    """Return, for each scale k, how the latents respond to b_dec + k v instead of b_dec + v.

    v = x - b_dec for held-out activations x in the space that the SAE works in. For ProLU the gain is 1 at every k,
    since the gate shuts a latent but does not shift it. For ReLU with a bias below 0 it is below 1 where k < 1, and
    above 1 where k > 1.

    Args:
        sae: the SAE.
        acts: activations as the language model has them.
        scales: the values of k.
        n_tokens: how many of the tokens are used.
        first_too: whether position 0 of each block is used, where BOS stands in text.
    """
    flat = acts[:, 0 if first_too else 1 :].flatten(0, 1)[:n_tokens].to(sae.W_dec)
    # x is scaled to its norm first and then by k: an `encode` of raw k x would divide by the norm and so undo k.
    x = normalise(flat)[0] if sae.config.normalisation == "per_token" else flat
    v = x - sae.b_dec
    at_one = sae.encode_normalised(sae.b_dec + v)
    return {k: _response(at_one, sae.encode_normalised(sae.b_dec + k * v), k) for k in scales}


def _response(at_one: Tensor, at_k: Tensor, k: float) -> Response:
    both = (at_one > 0) & (at_k > 0)
    before = torch.where(both, at_one, 0).sum(0, dtype=torch.float64)
    after = torch.where(both, at_k, 0).sum(0, dtype=torch.float64)
    compared = before > 0
    gain = (after[compared] / (k * before[compared])).mean().item()
    n_active = int((at_one > 0).sum())
    return Response(gain, int(both.sum()) / n_active if n_active else torch.nan)
