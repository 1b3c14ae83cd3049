"""What each latent is like: how often it is on, how strongly, where it points, and whether it keeps the scale."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from prolu.evaluation.metrics import CodeSums
from prolu.runtime.files import write_atomically
from prolu.sae.autoencoder import SAE
from prolu.sae.scaling import normalise

LATENTS_FILE = "latents.safetensors"
"""In a run's folder."""

DENSITY_EDGES = tuple(10 ** (-n / 2) for n in range(10, 0, -1))
"""Inner edges of the histogram of densities: half decades from 1e-5 to 0.316. The first bin has all below."""

RESPONSE_TOKENS = 2048
"""Held-out tokens that a scale response looks at."""


class LatentFigures(NamedTuple):
    """One number a latent, [d_sae] each."""

    density: Tensor
    """Share of held-out tokens on which it is on."""
    mean_when_on: Tensor
    """Its mean there, normalised space; 0 if it never is."""
    encoder_decoder_cosine: Tensor
    """Cosine of its encoder column and its decoder row."""
    negative_bias: Tensor
    """Whether its `b_enc` is below 0; nan where an SAE has none."""

    def summary(self) -> dict[str, float]:
        """Share of negative biases, and the mean cosine of living latents (nan if none lives)."""
        living = self.density > 0
        return {
            "negative_bias_fraction": self.negative_bias.mean().item(),
            "encoder_decoder_cosine": self.encoder_decoder_cosine[living].mean().item(),
        }

    def density_histogram(self) -> list[int]:
        """Latents in each bin of `DENSITY_EDGES`, the first for all below, those never on included."""
        bins = torch.bucketize(self.density, torch.tensor(DENSITY_EDGES, dtype=self.density.dtype), right=True)
        return torch.bincount(bins, minlength=len(DENSITY_EDGES) + 1).tolist()

    def save(self, folder: Path) -> None:
        """Writes the run's file."""
        kept = {name: t.float().contiguous() for name, t in self._asdict().items() if name != "negative_bias"}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / LATENTS_FILE, save(kept))


def latent_figures(sae: SAE, code: CodeSums) -> LatentFigures:
    """From the weights of an SAE, and sums of its code."""
    weights = sae.weights
    cosine = encoder_decoder_cosine(sae)
    if "b_enc" in weights.own:
        negative = (weights.own["b_enc"] < 0).double().cpu()
    else:
        negative = torch.full_like(cosine, torch.nan)
    return LatentFigures(code.density, code.mean_when_on, cosine, negative)


@torch.no_grad()
def encoder_decoder_cosine(sae: SAE) -> Float[Tensor, " d_sae"]:
    """Return the cosine of each latent's encoder column W_enc[:, i] and decoder row W_dec[i], in float64 on the CPU."""
    weights = sae.weights
    return torch.nn.functional.cosine_similarity(weights.encoder.double(), weights.decoder.double(), dim=1).cpu()


class Response(NamedTuple):
    """What an SAE makes of inputs k times as far from b_dec."""

    gain: float
    """f_i(k v) / (k f_i(v)), a ratio of sums over the tokens that a latent is on at both; mean over latents.
    1: what is on keeps the scale of its input."""
    still_active: float
    """Of the (token, latent) pairs on at v, the share on at k v."""


@torch.no_grad()
def scale_response(
    sae: SAE,
    acts: Float[Tensor, "n ctx d_in"],
    scales: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0),
    n_tokens: int = RESPONSE_TOKENS,
) -> dict[float, Response]:
    """The response at each scale k to b_dec + k v, where v = x - b_dec for held-out x in the SAE's own space.

    The per-token scaling before the SAE is left out, since it would undo k. For ProLU the gain is 1 at every k
    (conditional linearity); for ReLU with a bias below 0 it is below 1 where k < 1, and above it where k > 1.

    Args:
        acts: raw activations; position 0 of each block is left out, since no text stands there.
    """
    flat = acts[:, 1:].flatten(0, 1)[:n_tokens].to(sae.W_dec)
    x = normalise(flat)[0] if sae.config.normalisation == "per_token" else flat
    v = x - sae.b_dec
    at_one = sae.encode_normalised(sae.b_dec + v)
    return {k: _response(at_one, sae.encode_normalised(sae.b_dec + k * v), k) for k in scales}


def _response(at_one: Tensor, at_k: Tensor, k: float) -> Response:
    both = (at_one > 0) & (at_k > 0)
    before = torch.where(both, at_one, 0).sum(0, dtype=torch.float64)
    after = torch.where(both, at_k, 0).sum(0, dtype=torch.float64)
    on = before > 0
    n_on = int((at_one > 0).sum())
    gain = (after[on] / (k * before[on])).mean().item()
    return Response(gain, int(both.sum()) / n_on if n_on else torch.nan)
