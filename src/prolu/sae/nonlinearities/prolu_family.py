"""ProLU: m passes unshifted where m + b > 0 and m > 0, and b learns by synthetic gradients (Taggart 2024)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.sae.nonlinearities.base import Nonlinearity, Pullback, activate


def heaviside(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return T(x) = [x > 0], which the paper puts in place of the derivative of T: its straight-through estimator."""
    return (x > 0).to(x.dtype)


@dataclass(frozen=True)
class GeneralisedProLU(Nonlinearity):
    """f = ProLU(m, b_enc): m where m + b_enc > 0 and m > 0, else 0 (Taggart 2024; section 2 of the method).

    It exists because the bias of a ReLU shifts every value above its threshold, so that a latent is right at one
    magnitude only. ProLU has the threshold, max(0, -b), without the shift: an active latent is proportional to m.

    The true derivatives are df/dm = g, with g the gate, 0 or 1, and df/db = 0 almost everywhere, from which b cannot be
    learned. In training these stand in their place, with s = ReLU(m) STE(m + b), which is g m for the paper's STE:

        df/db = lerp(g, s, b_ste)        df/dm = lerp(g, m_gg g + s, m_ste)

    The two members that the paper compares are

                       with respect to m    with respect to b    (b_ste, m_ste, m_gg)
        prolu_relu     g                    g                    (0, 0, any)
        prolu_ste      g (1 + m)            g m                  (1, 1, 1)

    The second follows from ProLU = ReLU(m) T(m + b) with T(x) = [x > 0], by the product rule, with STE = T in place of
    T' and T for ReLU'. The product m T(m) T(m + b) has the same values but would give g (1 + 2 m).

    Another STE makes the support wider than the gate: gradients flow wherever m > 0 and STE(m + b) is not 0.
    """

    b_ste: float = 0.0
    """The weight of the straight-through gradient with respect to b, against g."""
    m_ste: float = 0.0
    """The weight of the straight-through gradient with respect to m, against g."""
    m_gg: float = 1.0
    """The weight of g within the straight-through gradient with respect to m."""
    ste: Callable[[Tensor], Tensor] = heaviside
    """The straight-through estimator of the derivative of T, entry by entry."""

    def __post_init__(self):
        for name in ("b_ste", "m_ste", "m_gg"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)}: must be finite")

    def support(self, m, parameters):
        """Return the gate [m + b > 0] [m > 0]; with another STE than the paper's also [m > 0] [STE(m + b) != 0]."""
        above = m + parameters["b_enc"]
        if self.ste is heaviside:
            return (above > 0) & (m > 0)
        return ((above > 0) | (self.ste(above) != 0)) & (m > 0)

    def threshold(self, parameters):
        """Return max(0, -b), below which ProLU suppresses noise; None if the support is wider than the gate."""
        # Exact, as for ReLU: the sign of a floating-point sum is never wrong.
        return torch.relu(-parameters["b_enc"]) if self.ste is heaviside else None

    def value(self, m, parameters):
        """Return m on the support, or 0 where [m + b > 0] is 0; only an STE of your own reaches such entries."""
        # The support of the paper's STE is the gate itself, so there nothing is left to decide.
        return m if self.ste is heaviside else torch.where(m + parameters["b_enc"] > 0, m, 0)

    def pullback(self, upstream, m, parameters):
        """Return the synthetic gradients of the class."""
        # Both lerps, written as (weight of g) * g + (weight of s) * s.
        m_weight_of_g = 1 - self.m_ste + self.m_ste * self.m_gg
        b_weight_of_g = 1 - self.b_ste
        if self.ste is heaviside:
            to_m = _times_affine(upstream, m_weight_of_g, self.m_ste, m)
            to_b = _times_affine(upstream, b_weight_of_g, self.b_ste, m)
            return Pullback(to_m, {"b_enc": to_b})
        above = m + parameters["b_enc"]
        slope = self.ste(above)
        # [m > 0], the other half of the gate and of ReLU(m), is part of the support, which the caller applies.
        gated = torch.where(above > 0, upstream, 0)
        through = torch.where(slope != 0, upstream * m * slope, 0)
        to_m = _weighted_sum(m, (m_weight_of_g, gated), (self.m_ste, through))
        to_b = _weighted_sum(m, (b_weight_of_g, gated), (self.b_ste, through))
        return Pullback(to_m, {"b_enc": to_b})


def _times_affine(upstream: Tensor, constant: float, slope: float, m: Tensor) -> Tensor:
    """Return upstream * (constant + slope m), without terms of weight 0, because 0 * inf would be NaN."""
    if slope == 0:
        # The same tensor, if it can be: steps see that the gradients of m and b are one, and sum them once.
        return upstream if constant == 1 else upstream * constant
    linear = m if slope == 1 else slope * m
    return upstream * (linear if constant == 0 else constant + linear)


def _weighted_sum(like: Tensor, *terms: tuple[float, Tensor]) -> Tensor:
    """Return the sum of weight * part over the terms, without terms of weight 0, because 0 * inf would be NaN."""
    return sum((weight * part for weight, part in terms if weight), torch.zeros_like(like))


PROLU_RELU = GeneralisedProLU()
PROLU_STE = GeneralisedProLU(b_ste=1.0, m_ste=1.0, m_gg=1.0)
GRADIENTS = {"relu": PROLU_RELU, "ste": PROLU_STE}
"""The paper's two synthetic gradients, by the names that `prolu` takes."""


def prolu(
    m: Float[Tensor, "*batch"], b: Float[Tensor, "..."], gradient: str | GeneralisedProLU = "ste"
) -> Float[Tensor, "*batch"]:
    """Return ProLU(m, b) = m where m + b > 0 and m > 0, else 0, with a synthetic gradient for training.

    Args:
        m: pre-activations without bias, of any shape.
        b: the bias. It is broadcast against m, and its gradient has its own shape.
        gradient: `relu` (d/dm = g, d/db = g, where g is 1 if m passes and else 0), `ste` (d/dm = g (1 + m),
            d/db = g m), or a `GeneralisedProLU`.

    Raises:
        ValueError: There is no such gradient, or b cannot be broadcast to the shape of m.
    """
    try:
        # b may be broadcast, m may not: latents have the shape of m.
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
    """ProLU with a learned bias for each latent: `ProLU(d_sae)(m)` for m of shape [..., d_sae].

    The arguments `gradient` and `initial_bias` choose the synthetic gradient, as in `prolu`, and the value at which all
    biases start.
    """

    def __init__(self, d_sae: int, gradient: str | GeneralisedProLU = "ste", initial_bias: float = 0.0):
        super().__init__()
        # Checked here, where the mistake was made, and not only at the first batch.
        _with_gradient(gradient)
        self.gradient = gradient
        self.bias = torch.nn.Parameter(torch.full((d_sae,), initial_bias))

    def forward(self, m: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the latents of pre-activations m."""
        return prolu(m, self.bias, self.gradient)
