"""Sparsity penalties: each is a sum over latents and a mean over tokens, given by the value and slope of one entry."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.sae.calls import form_of, made_by_call
from prolu.sae.nonlinearities import Nonlinearity, Parameters, Pullback


class Penalty(ABC):
    """A sparsity penalty P = sum_i p(f_i) over the latents of a token.

    Where the nonlinearity has another quantity penalised (`Nonlinearity.penalised`), that stands for f.
    """

    at_zero: float = 0.0
    """p(0), which an inactive latent contributes to the value. It is a constant and has no gradient."""

    @abstractmethod
    def value(self, latents: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return p(f), entry by entry, on the support."""

    def slope(self, latents: Float[Tensor, "..."]) -> Float[Tensor, "..."] | float:
        """Return dp/df, entry by entry, on the support. The nonlinearity's pullback takes it to m and the parameters.

        Off the support the pullback is 0, so an inactive latent gets no gradient from a penalty.
        """
        return 0.0

    def pullback(self, nonlinearity: Nonlinearity, m: Float[Tensor, "..."], parameters: Parameters) -> Pullback | None:
        """Return the gradient with respect to m and the parameters that does not pass through f, if there is one."""
        return None

    def check(self, nonlinearity: Nonlinearity) -> str | None:
        """Return why the penalty cannot be used with a nonlinearity; None if it can."""
        return None


@dataclass(frozen=True)
class NoPenalty(Penalty):
    """P = 0, for nonlinearities that set L0 themselves: TopK and BatchTopK."""

    def value(self, latents):
        """Return 0 for every latent: there is no penalty."""
        return torch.zeros_like(latents)


@dataclass(frozen=True)
class L1(Penalty):
    """P = sum_i f_i, with dP/df_i = 1.

    It is the penalty of the first SAEs. It makes latents sparse, but also smaller than the reconstruction needs.
    """

    def value(self, latents):
        """Return the penalty of each latent, which is its value f."""
        return latents

    def slope(self, latents):
        """Return the derivative of the penalty with respect to each latent, 1."""
        return 1.0


@dataclass(frozen=True)
class SqrtL1(Penalty):
    """P = sum_i sqrt(f_i + epsilon), with dP/df_i = 1 / (2 sqrt(f_i + epsilon)).

    It exists because its slope falls as f grows: it presses on small latents and lets large ones be. It is a sum of
    roots, not the root of the sum. The metric `sqrt_l1` has no epsilon.
    """

    epsilon: float = 1e-6
    """The paper's constant, which bounds the slope by 500, its value at f = 0."""
    at_zero: float = 1e-3
    """sqrt(epsilon)."""

    def value(self, latents):
        """Return the penalty of each latent, sqrt(f + epsilon)."""
        return torch.sqrt(latents + self.epsilon)

    def slope(self, latents):
        """Return 1 / (2 sqrt(f + epsilon))."""
        # Its own derivative reaches 2.5e8 near 0. So training amplifies rounding, and steps that are right but round
        # differently end at different weights.
        return 0.5 * torch.rsqrt(latents + self.epsilon)


@dataclass(frozen=True)
class L0(Penalty):
    """P = sum_i [f_i > 0], with the pseudo-gradient of the nonlinearity's gate.

    It is the sparsity that is measured, and does not shrink latents. Its true gradient is 0 almost everywhere, so it
    needs a nonlinearity that defines another, as JumpReLU does.
    """

    def value(self, latents):
        """Return the penalty of each latent: 1 where it is active (f > 0), else 0."""
        return (latents > 0).to(latents.dtype)

    def pullback(self, nonlinearity, m, parameters):
        """Return the pullback of the gate."""
        return nonlinearity.gate_pullback(m, parameters)

    def check(self, nonlinearity):
        """Return why L0 cannot be used, if the gate has no pseudo-gradient."""
        nothing = torch.zeros(1)
        # A nonlinearity says so by what it returns, for any numbers: so it is asked once, for a zero.
        if nonlinearity.gate_pullback(nothing, dict.fromkeys(nonlinearity.parameter_names, nothing)) is None:
            return "needs a gate with a pseudo-gradient, as jumprelu has"
        return None


@dataclass(frozen=True)
class Tanh(Penalty):
    """P = sum_i tanh(c f_i), with dP/df_i = c (1 - tanh(c f_i)^2); decoder rows have unit norm.

    It counts latents as L0 does, but softly, so that no pseudo-gradient is needed: it presses on small latents as L1
    does, and lets large ones be. It is that of Anthropic's Circuits Updates of January 2025, for jumprelu_ste, and goes
    with any nonlinearity.
    """

    scale: float = 4.0
    """c; the update has 4, at inputs of norm sqrt(d_in), as here."""

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale {self.scale}: must be more than 0, and finite")

    def value(self, latents):
        """Return the penalty of each latent, tanh(c f)."""
        return torch.tanh(self.scale * latents)

    def slope(self, latents):
        """Return c (1 - tanh(c f)^2)."""
        return self.scale * (1 - torch.tanh(self.scale * latents).square())


PENALTIES: dict[str, Penalty] = {
    "l1": L1(),
    "sqrt_l1": SqrtL1(),
    "l0": L0(),
    "tanh": Tanh(),
    "none": NoPenalty(),
}
"""The penalties without arguments, by the names that configs and files use."""

WITH_ARGUMENTS: dict[str, Callable[..., Penalty]] = {
    "tanh": lambda scale: Tanh(float(scale)),
}
"""The penalties with arguments, which are written in brackets after the name, as in `tanh(4)`."""


def penalty_named(name: str) -> Penalty:
    """Return the penalty that a config calls by this name, such as sqrt_l1 or tanh(4).

    Raises:
        ValueError: There is none of this name, or its arguments are wrong.
    """
    if (called := made_by_call("penalty", name, WITH_ARGUMENTS)) is not None:
        return called
    if name in PENALTIES:
        return PENALTIES[name]
    forms = [*PENALTIES, *(form_of(each, WITH_ARGUMENTS) for each in WITH_ARGUMENTS)]
    raise ValueError(f"penalty {name!r}: choose one of {', '.join(forms)}")
