"""Activation functions of an SAE: where each is on, its value, and its perhaps synthetic gradient.

Inside this file and `steps/`, m is the bias-free pre-activation (x - b_dec) W_enc and b the encoder bias.
All functions work entry by entry on tensors that broadcast: [batch, d_sae] against [d_sae] on the dense
path, [n_pairs] against [n_pairs] where only pairs on the support are kept.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Parameters = Mapping[str, Float[Tensor, "..."]]
"""A nonlinearity's own per-latent parameters, by name."""


class Pullback(NamedTuple):
    """A gradient brought back through a function of (m, parameters), entry by entry."""

    m: Float[Tensor, "..."]
    """With respect to m."""
    parameters: dict[str, Float[Tensor, "..."]]
    """With respect to each own parameter, before the sum over tokens."""

    def plus(self, other: "Pullback", factor: float) -> "Pullback":
        """The sum of this and factor * other; a parameter that one of them leaves alone counts 0 there."""
        nothing = torch.zeros_like(self.m)
        parameters = {
            name: self.parameters.get(name, nothing) + factor * other.parameters.get(name, nothing)
            for name in self.parameters.keys() | other.parameters.keys()
        }
        return Pullback(self.m + factor * other.m, parameters)


class Nonlinearity(ABC):
    """Latents as a function of m and own per-latent parameters; everything is zero off the support."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Own per-latent parameters; they start at zero unless `initial` says otherwise."""
        return ("b_enc",)

    def initial(self, name: str) -> float:
        """Value at which an own parameter starts."""
        return 0.0

    @abstractmethod
    def support(self, m: Float[Tensor, "..."], parameters: Parameters) -> Bool[Tensor, "..."]:
        """Entries at which the value or any gradient may be nonzero."""

    def threshold(self, parameters: Parameters) -> Float[Tensor, " d_sae"] | None:
        """Where the support is exactly m > threshold, latent by latent: that threshold; else None."""
        return None

    @abstractmethod
    def value(self, m: Float[Tensor, "..."], parameters: Parameters) -> Float[Tensor, "..."]:
        """The latent, on the support (elsewhere the caller puts 0)."""

    @abstractmethod
    def pullback(self, upstream: Float[Tensor, "..."], m: Float[Tensor, "..."], parameters: Parameters) -> Pullback:
        """The gradient `upstream` on the latent, brought back to m and the parameters, on the support."""


@dataclass(frozen=True)
class ReLU(Nonlinearity):
    """ReLU(m + b)."""

    def support(self, m, parameters):
        """[m + b > 0]."""
        return m + parameters["b_enc"] > 0

    def threshold(self, parameters):
        """-b: the sign of a floating-point sum is exact."""
        return -parameters["b_enc"]

    def value(self, m, parameters):
        """M + b."""
        return m + parameters["b_enc"]

    def pullback(self, upstream, m, parameters):
        """1 with respect to both."""
        return Pullback(upstream, {"b_enc": upstream})


def heaviside(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """T(x) = [x > 0], the paper's straight-through estimator: what stands for the derivative of T itself."""
    return (x > 0).to(x.dtype)


@dataclass(frozen=True)
class GeneralisedProLU(Nonlinearity):
    """ProLU(m, b) = m where m + b > 0 and m > 0, else 0 (Taggart 2024).

    Its true gradient in b is zero almost everywhere; the synthetic ones are, with g the gate and
    s = ReLU(m) STE(m + b), which is g m for the paper's STE,

        d/db = lerp(g, s, b_ste)        d/dm = lerp(g, m_gg g + s, m_ste)

    so that (0, 0) is ProLU_ReLU (g and g) and (1, 1, 1) is ProLU_STE (g m and g (1 + m)). Another STE makes
    the support wider than the gate: gradients flow wherever m > 0 and STE(m + b) is not 0.
    """

    b_ste: float = 0.0
    m_ste: float = 0.0
    m_gg: float = 1.0
    ste: Callable[[Tensor], Tensor] = heaviside
    """Straight-through estimator, entry by entry, in place of the derivative of T."""

    def __post_init__(self):
        for name in ("b_ste", "m_ste", "m_gg"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)}: must be finite")

    def support(self, m, parameters):
        """The gate [m + b > 0] [m > 0], both strict; with an STE of one's own also [m > 0] [STE(m + b) != 0]."""
        above = m + parameters["b_enc"]
        if self.ste is heaviside:
            return (above > 0) & (m > 0)
        return ((above > 0) | (self.ste(above) != 0)) & (m > 0)

    def threshold(self, parameters):
        """max(0, -b), the noise-suppression threshold, where the support is the gate."""
        return torch.relu(-parameters["b_enc"]) if self.ste is heaviside else None

    def value(self, m, parameters):
        """m: what passes the gate is not shifted."""
        return m if self.ste is heaviside else torch.where(m + parameters["b_enc"] > 0, m, 0)

    def pullback(self, upstream, m, parameters):
        """The synthetic gradients above."""
        gate_m, gate_b = 1 - self.m_ste + self.m_ste * self.m_gg, 1 - self.b_ste
        if self.ste is heaviside:
            to_m = _times_affine(upstream, gate_m, self.m_ste, m)
            return Pullback(to_m, {"b_enc": _times_affine(upstream, gate_b, self.b_ste, m)})
        above = m + parameters["b_enc"]
        gated, slope = torch.where(above > 0, upstream, 0), self.ste(above)
        through = torch.where(slope != 0, upstream * m * slope, 0)
        to_m, to_b = (
            sum((weight * part for weight, part in parts if weight), torch.zeros_like(m))
            for parts in ([(gate_m, gated), (self.m_ste, through)], [(gate_b, gated), (self.b_ste, through)])
        )
        return Pullback(to_m, {"b_enc": to_b})


def _times_affine(upstream: Tensor, constant: float, slope: float, m: Tensor) -> Tensor:
    """Upstream * (constant + slope m), terms of weight 0 left out: 0 * inf would be NaN."""
    if slope == 0:
        return upstream if constant == 1 else upstream * constant
    linear = m if slope == 1 else slope * m
    return upstream * (linear if constant == 0 else constant + linear)


NONLINEARITIES: dict[str, Nonlinearity] = {
    "relu": ReLU(),
    "prolu_relu": GeneralisedProLU(),
    "prolu_ste": GeneralisedProLU(b_ste=1.0, m_ste=1.0, m_gg=1.0),
}
"""By the name that configs and files use. One of your own, put here under a new name, trains like the others."""

GENERALISED = re.compile(r"prolu\(([^,()]+),([^,()]+),([^,()]+)\)")
"""`prolu(b_ste,m_ste,m_gg)` names a member of the generalised family."""


def nonlinearity_named(name: str) -> Nonlinearity:
    """The nonlinearity of that name: of `NONLINEARITIES`, or `prolu(b_ste,m_ste,m_gg)` as in `prolu(0.5,1,0)`.

    Raises:
        ValueError: there is none.
    """
    if name in NONLINEARITIES:
        return NONLINEARITIES[name]
    if written := GENERALISED.fullmatch(name):
        try:
            b_ste, m_ste, m_gg = map(float, written.groups())
            return GeneralisedProLU(b_ste, m_ste, m_gg)
        except ValueError as problem:
            raise ValueError(f"nonlinearity {name!r}: {problem}") from None
    raise ValueError(f"nonlinearity {name!r}: choose one of {', '.join(NONLINEARITIES)}, or prolu(b_ste,m_ste,m_gg)")


class _Activate(torch.autograd.Function):
    """A nonlinearity as a differentiable function: value forward, pullback backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(nonlinearity: Nonlinearity, names: tuple[str, ...], m: Tensor, *own: Tensor) -> Tensor:
        parameters = dict(zip(names, own, strict=True))
        value = nonlinearity.value(m, parameters)
        return torch.where(nonlinearity.support(m, parameters), value, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.nonlinearity, ctx.names, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        m, *own = ctx.saved_tensors
        parameters = dict(zip(ctx.names, own, strict=True))
        gate = ctx.nonlinearity.support(m, parameters)
        back = ctx.nonlinearity.pullback(upstream, m, parameters)
        to_m = torch.where(gate, back.m, 0)
        to_own = (torch.where(gate, back.parameters[name], 0) for name in ctx.names)
        summed = (d.sum_to_size(p.shape) for d, p in zip(to_own, own, strict=True))
        return None, None, to_m, *summed


def activate(
    nonlinearity: Nonlinearity, m: Float[Tensor, "*batch d_sae"], parameters: Parameters
) -> Float[Tensor, "*batch d_sae"]:
    """Latents, differentiable by the nonlinearity's own pullback."""
    names = tuple(parameters)
    return _Activate.apply(nonlinearity, names, m, *(parameters[name] for name in names))  # pyright: ignore[reportReturnType]


def prolu(
    m: Float[Tensor, "*batch"], b: Float[Tensor, "..."], gradient: str | GeneralisedProLU = "ste"
) -> Float[Tensor, "*batch"]:
    """ProLU(m, b) = m where m + b > 0 and m > 0, else 0, with a synthetic gradient for training.

    Args:
        m: pre-activations without bias, of any shape.
        b: bias; broadcasts against m, and its gradient is summed back to its own shape.
        gradient: `relu` (d/dm = g, d/db = g, g the gate), `ste` (d/dm = g (1 + m), d/db = g m), or a
            `GeneralisedProLU`.

    Raises:
        ValueError: another gradient, or shapes that do not broadcast to m's.
    """
    try:
        fits = torch.broadcast_shapes(m.shape, b.shape) == m.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"b of shape {tuple(b.shape)} does not broadcast to m's {tuple(m.shape)}")
    return _Activate.apply(_with_gradient(gradient), ("b_enc",), m, b)  # pyright: ignore[reportReturnType]


def _with_gradient(gradient: str | GeneralisedProLU) -> Nonlinearity:
    if isinstance(gradient, GeneralisedProLU):
        return gradient
    if gradient not in ("relu", "ste"):
        raise ValueError(f"gradient {gradient!r}: choose relu or ste, or pass a GeneralisedProLU")
    return NONLINEARITIES[f"prolu_{gradient}"]


class ProLU(torch.nn.Module):
    """ProLU with a learned bias per latent: `ProLU(d_sae)(m)` for m [..., d_sae]."""

    def __init__(self, d_sae: int, gradient: str | GeneralisedProLU = "ste", initial_bias: float = 0.0):
        super().__init__()
        _with_gradient(gradient)
        self.gradient = gradient
        self.bias = torch.nn.Parameter(torch.full((d_sae,), initial_bias))

    def forward(self, m: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of pre-activations m."""
        return prolu(m, self.bias, self.gradient)
