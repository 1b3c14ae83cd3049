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
        on = torch.gt(latents, 0, out=torch.empty_like(latents))
        fired = on.sum(0, dtype=torch.float64).long().cpu()
        self.n_tokens += len(latents)
        self._l0 += fired.sum().item()
        self._l1 += latents.sum(1).sum(dtype=torch.float64).item()
        self._sqrt_l1 += latents.sqrt().sum(1).sum(dtype=torch.float64).item()
        self.fired += fired

    def merge(self, other: "CodeSums") -> None:
        """Adds the other's tokens."""
        self.n_tokens += other.n_tokens
        self._l0 += other._l0
        self._l1 += other._l1
        self._sqrt_l1 += other._sqrt_l1
        self.fired += other.fired

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
        part = ReconstructionSums(x.shape[1])
        part._n, part._mean = len(x), x.mean(0)
        part._spread = (x - part._mean).square().sum().item()
        part._error = (x - recon).square().sum().item()
        self.merge(part)

    def merge(self, other: "ReconstructionSums") -> None:
        """Adds the other's tokens."""
        both, shift = self._n + other._n, other._mean - self._mean
        self._spread += other._spread + shift.square().sum().item() * self._n * other._n / both
        self._mean = self._mean + shift * other._n / both
        self._error += other._error
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
