"""Running sums of what an SAE does to held-out activations: sums first, one division at the end.

No figure depends on how the tokens are cut into batches, beyond float64 rounding.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

DENSE = 0.1
"""A latent on at more than this share of tokens is dense."""


class CodeSums:
    """Sparsity of latents f [n_tokens, d_sae]."""

    def __init__(self, d_sae: int):
        self.n_tokens = 0
        self._l0 = self._l1 = self._sqrt_l1 = 0.0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        """Tokens on which each latent was on."""
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        """Sum of each latent."""

    def update(self, latents: Float[Tensor, "n d_sae"]) -> None:
        """Adds tokens."""
        on = torch.gt(latents, 0, out=torch.empty_like(latents))
        fired = on.sum(0, dtype=torch.float64).long().cpu()
        self.n_tokens += len(latents)
        self._l0 += fired.sum().item()
        self._l1 += latents.sum(1).sum(dtype=torch.float64).item()
        self._sqrt_l1 += latents.sqrt().sum(1).sum(dtype=torch.float64).item()
        self.fired += fired
        self.total += latents.sum(0, dtype=torch.float64).cpu()

    def merge(self, other: "CodeSums") -> None:
        """Adds the other's tokens."""
        self.n_tokens += other.n_tokens
        self._l0 += other._l0
        self._l1 += other._l1
        self._sqrt_l1 += other._sqrt_l1
        self.fired += other.fired
        self.total += other.total

    def figures(self) -> dict[str, float]:
        """Means per token of the number of latents on, of sum f and of sum sqrt(f); shares never on, and dense."""
        return {
            "l0": self._l0 / self.n_tokens,
            "l1": self._l1 / self.n_tokens,
            "sqrt_l1": self._sqrt_l1 / self.n_tokens,
            "dead_fraction": (self.fired == 0).double().mean().item(),
            "dense_fraction": (self.density > DENSE).double().mean().item(),
        }

    @property
    def density(self) -> Float[Tensor, "d_sae"]:
        """Share of tokens on which each latent is on."""
        return self.fired.double() / self.n_tokens

    @property
    def mean_when_on(self) -> Float[Tensor, "d_sae"]:
        """Mean of each latent over the tokens on which it is on; 0 for those that never are."""
        return self.total / self.fired.clamp(min=1)


class ReconstructionSums:
    """Error of x_hat and spread of x, both [n_tokens, d_in], in float64, by Chan's merge."""

    def __init__(self, d_in: int):
        self._n = 0
        self._mean = torch.zeros(d_in, dtype=torch.float64)
        self._spread = self._error = 0.0
        self._norms = torch.zeros(2, dtype=torch.float64)  # of x, of x_hat
        self._squares = torch.zeros(2, dtype=torch.float64)  # x_hat . x, x_hat . x_hat

    def update(self, x: Float[Tensor, "n d_in"], recon: Float[Tensor, "n d_in"]) -> None:
        """Adds tokens."""
        x, recon = x.double().cpu(), recon.double().cpu()
        part = ReconstructionSums(x.shape[1])
        part._n, part._mean = len(x), x.mean(0)
        part._spread = (x - part._mean).square().sum().item()
        part._error = (x - recon).square().sum().item()
        part._norms = torch.stack([x.norm(dim=1).sum(), recon.norm(dim=1).sum()])
        part._squares = torch.stack([(recon * x).sum(), recon.square().sum()])
        self.merge(part)

    def merge(self, other: "ReconstructionSums") -> None:
        """Adds the other's tokens."""
        both, shift = self._n + other._n, other._mean - self._mean
        self._spread += other._spread + shift.square().sum().item() * self._n * other._n / both
        self._mean = self._mean + shift * other._n / both
        self._error += other._error
        self._norms, self._squares = self._norms + other._norms, self._squares + other._squares
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

    @property
    def norm_ratio(self) -> float:
        """Sum ||x_hat|| / sum ||x||: below 1, reconstructions are short."""
        of_x, of_recon = self._norms.tolist()
        return of_recon / of_x if of_x else math.nan

    @property
    def relative_bias(self) -> float:
        """Gamma = argmin over g of E ||x_hat / g - x||^2 = E ||x_hat||^2 / E [x_hat . x]: below 1 there is shrinkage.

        The relative reconstruction bias of Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated SAEs".
        """
        product, square = self._squares.tolist()
        return square / product if product else math.nan


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
