"""Sparsity penalties: what one entry adds, its slope, and how the batch's means over tokens make one number."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.sae.calls import form_of, made_by_call
from prolu.sae.choices import TAKES_TARGET
from prolu.sae.nonlinearities import Nonlinearity, Parameters, Pullback


class Penalty(ABC):
    """A sparsity penalty P = sum_i p(f_i) over the latents of a token.

    Where the nonlinearity has another quantity penalised (`Nonlinearity.penalised`), that stands for f.
    """

    at_zero: float = 0.0
    """p(0), which an inactive latent contributes to the value. It is a constant and has no gradient."""
    is_of_means: bool = False
    """Whether the loss has another function of the batch's means of p(f_i), `total`, than their sum.

    Its slope depends on the whole batch. So every kind of step finds the means before it brings any gradient back, and
    multiplies the coefficient, latent by latent, by `weights` of them. p(0) must be 0.
    """

    def total(self, means: Float[Tensor, "*stack d_sae"]) -> Float[Tensor, "*stack"]:
        """Return the penalty of a batch, from the mean of p(f_i) over its tokens for each latent i."""
        return means.sum(-1)

    def weights(self, means: Float[Tensor, "*stack d_sae"]) -> Float[Tensor, "*stack d_sae"]:
        """Return the derivative of `total` with respect to each mean."""
        return torch.ones_like(means)

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

    It exists because its slope falls as f grows, so that it shrinks large latents less than L1 does. It is a sum of
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
        # Whether a nonlinearity defines a pseudo-gradient does not depend on the numbers, so it is called once with a
        # zero.
        if nonlinearity.gate_pullback(nothing, dict.fromkeys(nonlinearity.parameter_names, nothing)) is None:
            return "needs a gate with a pseudo-gradient, as jumprelu has"
        return None


@dataclass(frozen=True)
class Tanh(Penalty):
    """P = sum_i tanh(c f_i), with dP/df_i = c (1 - tanh(c f_i)^2); decoder rows have unit norm.

    It counts latents as L0 does, but softly, so that no pseudo-gradient is needed: it has a slope at small latents, as
    L1 has, and hardly any at large ones. It is the penalty of Anthropic's Circuits Updates of January 2025, for
    jumprelu_ste, and can be used with any nonlinearity.
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


class OfMeans(Penalty):
    """A penalty that counts active latents by another penalty, `count`, and is a function of the batch's means of it.

    By L0, the means are how often each latent is active; by tanh they are so approximately, for nonlinearities whose
    gate has no pseudo-gradient, ReLU and ProLU among them.
    """

    is_of_means = True
    count: Penalty
    """The penalty p whose means are taken: L0 or tanh."""

    def value(self, latents):
        """Return the count of each latent."""
        return self.count.value(latents)

    def slope(self, latents):
        """Return the slope of the count."""
        return self.count.slope(latents)

    def pullback(self, nonlinearity, m, parameters):
        """Return the gradient of the count that does not pass through f, if there is one."""
        return self.count.pullback(nonlinearity, m, parameters)

    def check(self, nonlinearity):
        """Return why latents cannot be counted so with a nonlinearity; None if they can."""
        return self.count.check(nonlinearity)


@dataclass(frozen=True)
class Quadratic(OfMeans):
    """P = (L0 / target - 1)^2, where L0 is the mean over the batch.

    It draws L0 to a target from above and from below. The reconstruction pulls L0 up against it, so at a small
    coefficient L0 stays above the target. dictionary_learning trains JumpReLU so, with a coefficient of 1 for a squared
    error that is a sum over d_in, which is 1 / d_in here. (SAELens takes (L0 - target)^2 token by token, as a mean.)
    """

    target: float
    """The L0 to which it draws."""
    count: Penalty = L0()

    def __post_init__(self):
        if not 0 < self.target < math.inf:
            raise ValueError(f"target {self.target}: must be more than 0, and finite")

    def total(self, means):
        """Return (L0 / target - 1)^2."""
        return (means.sum(-1) / self.target - 1).square()

    def weights(self, means):
        """Return 2 (L0 / target - 1) / target for every latent."""
        miss = means.sum(-1, keepdim=True) / self.target - 1
        return (2 / self.target * miss).expand_as(means)


@dataclass(frozen=True)
class Frequency(OfMeans):
    """P = sum_i q_i (1 + q_i / scale), with q_i how often latent i is active in the batch.

    For latents that are rarely active it is nearly L0; the more often a latent is active beyond `scale`, the more
    another activation costs. It prevents latents that are active on nearly all tokens, which L0 permits (Smith et al.
    2025, the second progress update of Google DeepMind's team; Gemma Scope 2 has such a penalty besides a quadratic
    one).
    """

    scale: float = 0.1
    """The frequency from which the quadratic part is larger than the linear one."""
    count: Penalty = L0()

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale {self.scale}: must be more than 0, and finite")

    def total(self, means):
        """Return sum_i q_i (1 + q_i / scale)."""
        return (means * (1 + means / self.scale)).sum(-1)

    def weights(self, means):
        """Return 1 + 2 q_i / scale for each latent."""
        return 1 + 2 * means / self.scale


PENALTIES: dict[str, Penalty] = {
    "l1": L1(),
    "sqrt_l1": SqrtL1(),
    "l0": L0(),
    "tanh": Tanh(),
    "frequency_l0": Frequency(),
    "frequency_tanh": Frequency(count=Tanh()),
    "none": NoPenalty(),
}
"""The penalties without arguments, by the names that configs and files use."""

WITH_ARGUMENTS: dict[str, Callable[..., Penalty]] = {
    "tanh": lambda scale: Tanh(float(scale)),
    "quadratic_l0": lambda target: Quadratic(float(target)),
    "quadratic_tanh": lambda target: Quadratic(float(target), count=Tanh()),
    "frequency_l0": lambda scale: Frequency(float(scale)),
    "frequency_tanh": lambda scale: Frequency(float(scale), count=Tanh()),
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
    if name in TAKES_TARGET:
        raise ValueError(f"penalty {name!r}: give the L0, as in {name}(32), or a target_l0")
    forms = [*PENALTIES, *(form_of(each, WITH_ARGUMENTS) for each in WITH_ARGUMENTS)]
    raise ValueError(f"penalty {name!r}: choose one of {', '.join(forms)}")
