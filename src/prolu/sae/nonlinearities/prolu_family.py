"""ProLU: passes m where m + b > 0 and m > 0, unshifted; with synthetic gradients for b (Taggart 2024)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.sae.nonlinearities.base import Nonlinearity, Pullback, activate


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


PROLU_RELU = GeneralisedProLU()
PROLU_STE = GeneralisedProLU(b_ste=1.0, m_ste=1.0, m_gg=1.0)
GRADIENTS = {"relu": PROLU_RELU, "ste": PROLU_STE}
"""The paper's two synthetic gradients."""


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
    return activate(_with_gradient(gradient), m, {"b_enc": b})


def _with_gradient(gradient: str | GeneralisedProLU) -> Nonlinearity:
    if isinstance(gradient, GeneralisedProLU):
        return gradient
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient {gradient!r}: choose relu or ste, or pass a GeneralisedProLU")
    return GRADIENTS[gradient]


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
