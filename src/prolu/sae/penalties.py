"""Sparsity penalties: a sum over latents, a mean over tokens; value and slope of one entry."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.checks import one_of
from prolu.sae.nonlinearities import Nonlinearity, Parameters, Pullback


class Penalty(ABC):
    """A penalty P = sum_i p(f_i) over the latents of a token, or over what a nonlinearity has penalised instead."""

    at_zero: float = 0.0
    """p of a latent that is off: a constant, without gradient."""

    @abstractmethod
    def value(self, latents: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The p of entries on the support."""

    def slope(self, latents: Float[Tensor, "..."]) -> Float[Tensor, "..."] | float:
        """dp/df of entries on the support; it goes through the nonlinearity's pullback."""
        return 0.0

    def pullback(self, nonlinearity: Nonlinearity, m: Float[Tensor, "..."], parameters: Parameters) -> Pullback | None:
        """Gradient of p in m and the parameters that does not go through the latent, if there is one."""
        return None

    def check(self, nonlinearity: Nonlinearity) -> str | None:
        """Why it cannot be had with this nonlinearity; None if it can."""
        return None


@dataclass(frozen=True)
class NoPenalty(Penalty):
    """P = 0, where a nonlinearity itself sets the sparsity."""

    def value(self, latents):
        """0."""
        return torch.zeros_like(latents)


@dataclass(frozen=True)
class L1(Penalty):
    """P = sum_i f_i."""

    def value(self, latents):
        """F."""
        return latents

    def slope(self, latents):
        """1."""
        return 1.0


@dataclass(frozen=True)
class SqrtL1(Penalty):
    """P = sum_i sqrt(f_i + 1e-6). Not the square root of the sum; the metric `sqrt_l1` has no 1e-6."""

    epsilon: float = 1e-6
    at_zero: float = 1e-3

    def value(self, latents):
        """sqrt(f + 1e-6)."""
        return torch.sqrt(latents + self.epsilon)

    def slope(self, latents):
        """1 / (2 sqrt(f + 1e-6)): 500 at f = 0."""
        return 0.5 * torch.rsqrt(latents + self.epsilon)


@dataclass(frozen=True)
class L0(Penalty):
    """P = sum_i [f_i > 0], by the pseudo-gradient of a nonlinearity's gate."""

    def value(self, latents):
        """[f > 0]."""
        return (latents > 0).to(latents.dtype)

    def pullback(self, nonlinearity, m, parameters):
        """The gate's."""
        return nonlinearity.gate_pullback(m, parameters)

    def check(self, nonlinearity):
        """Most gates have none."""
        nothing = torch.zeros(1)
        if nonlinearity.gate_pullback(nothing, dict.fromkeys(nonlinearity.parameter_names, nothing)) is None:
            return "needs a gate with a pseudo-gradient, as jumprelu has"
        return None


PENALTIES: dict[str, Penalty] = {"l1": L1(), "sqrt_l1": SqrtL1(), "l0": L0(), "none": NoPenalty()}
"""By the name that configs and files use."""


def penalty_named(name: str) -> Penalty:
    """The penalty of that name.

    Raises:
        ValueError: there is none.
    """
    return PENALTIES[one_of("penalty", name, PENALTIES)]
