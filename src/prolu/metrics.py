"""Running sums of what an SAE does to held-out activations: sums first, one division at the end.

No figure depends on how the tokens are cut into batches, beyond float64 rounding.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


class CodeSums:
    """Sparsity of latents f [n_tokens, d_sae]."""

    def __init__(self, d_sae: int):
        self.n_tokens = 0
        self._l0 = self._l1 = self._sqrt_l1 = 0.0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        """Tokens on which each latent was on."""

    def update(self, latents: Float[Tensor, "n d_sae"]) -> None:
        """Adds tokens."""
        on = latents > 0
        self.n_tokens += len(latents)
        self._l0 += on.sum().item()
        self._l1 += latents.sum(dtype=torch.float64).item()
        self._sqrt_l1 += latents.sqrt().sum(dtype=torch.float64).item()
        self.fired += on.sum(0).cpu()

    def figures(self) -> dict[str, float]:
        """Means per token of the number of latents on, of sum f and of sum sqrt(f); share never on."""
        return {
            "l0": self._l0 / self.n_tokens,
            "l1": self._l1 / self.n_tokens,
            "sqrt_l1": self._sqrt_l1 / self.n_tokens,
            "dead_fraction": (self.fired == 0).double().mean().item(),
        }


class ReconstructionSums:
    """Error of x_hat and spread of x, both [n_tokens, d_in], in float64, by Chan's merge."""

    def __init__(self, d_in: int):
        self._n = 0
        self._mean = torch.zeros(d_in, dtype=torch.float64)
        self._spread = 0.0
        self._error = 0.0

    def update(self, x: Float[Tensor, "n d_in"], recon: Float[Tensor, "n d_in"]) -> None:
        """Adds tokens."""
        x, recon = x.double().cpu(), recon.double().cpu()
        mean, n, both = x.mean(0), len(x), self._n + len(x)
        shift = mean - self._mean
        self._spread += (x - mean).square().sum().item() + shift.square().sum().item() * self._n * n / both
        self._mean += shift * n / both
        self._error += (x - recon).square().sum().item()
        self._n = both

    @property
    def mse(self) -> float:
        """Mean over tokens and dimensions of (x - x_hat)^2."""
        return self._error / (self._n * len(self._mean))

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean x||^2."""
        if self._spread == 0:
            return 0.0 if self._error == 0 else math.inf
        return self._error / self._spread


def cross_entropy_figures(clean: float, recon: float, zero: float) -> dict[str, float]:
    """Information lost, from mean cross-entropies in nats.

    degradation = recon - clean; recovered = (zero - recon) / (zero - clean).
    """
    lost = recon - clean
    return {
        "ce_clean": clean,
        "ce_recon": recon,
        "ce_zero": zero,
        "degradation": lost,
        "degradation_bits": lost / math.log(2),
        "recovered": (zero - recon) / (zero - clean) if zero != clean else math.nan,
    }
