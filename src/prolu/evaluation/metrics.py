"""Figures of an SAE on held-out activations: sparsity, reconstruction, cross-entropy.

Each class keeps sums over tokens, to which batches are added, and divides once at the end. A mean of batches' ratios
would depend on how the tokens are cut into batches; these figures do not, beyond the rounding of float64.

Below, f [n_tokens, d_sae] are latents, x [n_tokens, d_in] the activations and x_hat their reconstructions.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

DENSE = 0.1
"""The fraction of tokens above which a latent counts as dense."""

FREQUENT = 0.01
"""The fraction of tokens above which a latent counts as frequent."""


def active_as_numbers(latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """Return 1 where a latent is active and 0 where it is not, in the number format of the latents."""
    # Written as floats at once: on a CPU, a boolean mask is summed two to four times more slowly.
    return torch.gt(latents, 0, out=torch.empty_like(latents))


class CodeSums:
    """Sums over tokens of an SAE's code, its latents f."""

    def __init__(self, d_sae: int):
        self.n_tokens = 0
        # Python floats are float64: in float32, a sum over 10^5 tokens would drop the last digits of what is added.
        self._l0 = 0.0
        self._l1 = 0.0
        self._sqrt_l1 = 0.0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        """The number of tokens on which each latent was active, [d_sae]."""
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        """The sum of each latent over tokens, [d_sae]."""

    def update(self, latents: Float[Tensor, "n d_sae"]) -> None:
        """Add the latents of some tokens."""
        fired = active_as_numbers(latents).sum(0, dtype=torch.float64).long().cpu()
        self.n_tokens += len(latents)
        self._l0 += fired.sum().item()
        # First over the latents of each token, in their own format: these are few. Then over tokens, in float64.
        self._l1 += latents.sum(1).sum(dtype=torch.float64).item()
        self._sqrt_l1 += latents.sqrt().sum(1).sum(dtype=torch.float64).item()
        self.fired += fired
        self.total += latents.sum(0, dtype=torch.float64).cpu()

    def merge(self, other: "CodeSums") -> None:
        """Add the tokens of other sums."""
        self.n_tokens += other.n_tokens
        self._l0 += other._l0
        self._l1 += other._l1
        self._sqrt_l1 += other._sqrt_l1
        self.fired += other.fired
        self.total += other.total

    def figures(self) -> dict[str, float]:
        """Return the figures that are one number, by name."""
        return {
            "l0": self.l0,
            "l1": self.l1,
            "sqrt_l1": self.sqrt_l1,
            "dead_fraction": self.dead_fraction,
            "dense_fraction": self.dense_fraction,
            "frequent_fraction": self.frequent_fraction,
        }

    @property
    def l0(self) -> float:
        """L0 = mean over tokens of #{i: f_i > 0}, in latents per token, from 0 to d_sae."""
        return self._l0 / self.n_tokens

    @property
    def l1(self) -> float:
        """L1 = mean over tokens of sum_i f_i, in units of the SAE's input, at least 0."""
        return self._l1 / self.n_tokens

    @property
    def sqrt_l1(self) -> float:
        """sqrt-L1 = mean over tokens of sum_i sqrt(f_i), at least 0."""
        return self._sqrt_l1 / self.n_tokens

    @property
    def dead_fraction(self) -> float:
        """#{i: f_i > 0 on no token} / d_sae, from 0 to 1."""
        return (self.fired == 0).double().mean().item()

    @property
    def dense_fraction(self) -> float:
        """#{i: f_i > 0 on more than 10% of tokens} / d_sae, from 0 to 1."""
        return (self.density > DENSE).double().mean().item()

    @property
    def frequent_fraction(self) -> float:
        """#{i: f_i > 0 on more than 1% of tokens} / d_sae, from 0 to 1; dense latents are among them."""
        return (self.density > FREQUENT).double().mean().item()

    @property
    def density(self) -> Float[Tensor, "d_sae"]:
        """#{tokens: f_i > 0} / n_tokens of each latent i, from 0 to 1."""
        return self.fired.double() / self.n_tokens

    @property
    def mean_when_on(self) -> Float[Tensor, "d_sae"]:
        """The mean of each f_i over the tokens on which it is active, above 0; 0 for a latent that never is.

        The name is that of the tensor in the run's `latents.safetensors`.
        """
        return self.total / self.fired.clamp(min=1)


class ReconstructionSums:
    """Sums over tokens of the error of x_hat and the spread of x, in float64."""

    def __init__(self, d_in: int):
        self._n = 0
        self._mean = torch.zeros(d_in, dtype=torch.float64)
        # sum ||x - mean x||^2, where the mean is over all tokens so far
        self._spread = 0.0
        # sum ||x - x_hat||^2
        self._error = 0.0
        # sum ||x||, sum ||x_hat||
        self._norms = torch.zeros(2, dtype=torch.float64)
        # sum x_hat . x, sum x_hat . x_hat
        self._products = torch.zeros(2, dtype=torch.float64)

    def update(self, x: Float[Tensor, "n d_in"], recon: Float[Tensor, "n d_in"]) -> None:
        """Add some tokens' activations and their reconstructions."""
        # float64 before the subtraction: a good reconstruction differs from x in its last digits.
        x = x.double().cpu()
        recon = recon.double().cpu()
        part = ReconstructionSums(x.shape[1])
        part._n = len(x)
        part._mean = x.mean(0)
        part._spread = (x - part._mean).square().sum().item()
        part._error = (x - recon).square().sum().item()
        part._norms = torch.stack([x.norm(dim=1).sum(), recon.norm(dim=1).sum()])
        part._products = torch.stack([(recon * x).sum(), recon.square().sum()])
        self.merge(part)

    def merge(self, other: "ReconstructionSums") -> None:
        """Add the tokens of other sums."""
        n = self._n + other._n
        if not n:
            return
        shift = other._mean - self._mean
        # Chan's formula: both spreads are around their own mean, and the last term moves them to the common one. The
        # shorter sum ||x||^2 - n ||mean||^2 would cancel away all digits where the mean is large against the spread.
        self._spread += other._spread + shift.square().sum().item() * self._n * other._n / n
        self._mean = self._mean + shift * other._n / n
        self._error += other._error
        self._norms = self._norms + other._norms
        self._products = self._products + other._products
        self._n = n

    @property
    def mse(self) -> float:
        """MSE = sum ||x - x_hat||^2 / (n_tokens d_in), in squared units of x, at least 0."""
        return self._error / (self._n * len(self._mean))

    @property
    def fvu(self) -> float:
        """The fraction of variance unexplained, sum ||x - x_hat||^2 / sum ||x - mean x||^2, without a unit.

        At least 0; 1 is reached by x_hat = mean x, and a worse reconstruction is above it. If all x are equal, it is
        0 for a perfect reconstruction and infinite otherwise.
        """
        if self._spread == 0:
            return 0.0 if self._error == 0 else math.inf
        return self._error / self._spread

    @property
    def norm_ratio(self) -> float:
        """Sum ||x_hat|| / sum ||x||, without a unit, at least 0; below 1 where reconstructions are too short.

        It is nan if all x are 0.
        """
        of_x, of_recon = self._norms.tolist()
        return of_recon / of_x if of_x else math.nan

    @property
    def relative_bias(self) -> float:
        """Gamma = argmin over g of E ||x_hat / g - x||^2 = E ||x_hat||^2 / E (x_hat . x), without a unit.

        1 for a reconstruction whose length cannot be improved by a common factor; below 1 there is shrinkage. It is nan
        if E (x_hat . x) is 0. This is the relative reconstruction bias of Rajamanoharan et al. 2024, "Improving
        Dictionary Learning with Gated Sparse Autoencoders".
        """
        product, square = self._products.tolist()
        return square / product if product else math.nan


def cross_entropy_figures(clean: float, recon: float, zero: float) -> dict[str, float]:
    """Return the figures that follow from the language model's mean next-token cross-entropies, in nats per token.

    - `ce_clean`, `ce_recon`, `ce_zero`: the three arguments, each at least 0.
    - `degradation` = recon - clean, the CE increase, in nats per token; negative if the SAE helps by chance.
    - `degradation_bits` = degradation / log 2, in bits per token.
    - `recovered` = (zero - recon) / (zero - clean), without a unit: 1 for a perfect reconstruction, 0 for one that is
      no better than zeros, nan if zeros are no worse than the activations.

    Args:
        clean: with the activations untouched.
        recon: with the SAE's reconstructions in their place.
        zero: with zeros in their place.
    """
    increase = recon - clean
    return {
        "ce_clean": clean,
        "ce_recon": recon,
        "ce_zero": zero,
        "degradation": increase,
        "degradation_bits": increase / math.log(2),
        "recovered": (zero - recon) / (zero - clean) if zero != clean else math.nan,
    }
