"""What a step minimises, and what it reports."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.sae.nonlinearities import Auxiliary, Nonlinearity, Parameters, Pullback
from prolu.sae.penalties import Penalty


@dataclass(frozen=True)
class Objective:
    """loss = mean over batch and d_in of (x - x_hat)^2 + coeff * mean over batch of P + auxiliary.

    The first is a mean over dimensions, P a sum over latents: both in normalised space.
    """

    nonlinearity: Nonlinearity
    penalty: Penalty
    coeff: float
    auxiliary: Auxiliary | None = None

    def pull_back(
        self,
        upstream: Float[Tensor, "..."],
        latents: Float[Tensor, "..."],
        m: Float[Tensor, "..."],
        own: Parameters,
        batch: int,
    ) -> tuple[Pullback, Float[Tensor, ""]]:
        """Reconstruction's gradient on latents, brought back to m and the parameters, the penalty's added.

        Entry by entry, on the support. Also the sum of the penalty over these entries.
        """
        per_token, code = self.coeff / batch, self.nonlinearity
        seen = code.penalised(latents, m, own)
        if seen is latents:
            back = code.pullback(upstream + per_token * self.penalty.slope(latents), m, own)
        else:
            slope = torch.zeros_like(seen) + self.penalty.slope(seen)
            back = code.pullback(upstream, m, own).plus(code.penalised_pullback(slope, m, own), per_token)
        if (direct := self.penalty.pullback(code, m, own)) is not None:
            back = back.plus(direct, per_token)
        return back, self.penalty.value(seen).sum(-1).sum(dtype=torch.float64)


class StepStats(NamedTuple):
    """What one step saw, before its update. Tensors, so that nothing waits for a device."""

    mse: Float[Tensor, ""]
    """Mean over batch and d_in of (x - x_hat)^2, normalised space."""
    penalty: Float[Tensor, ""]
    """Mean over batch of P, without the coefficient."""
    auxiliary: Float[Tensor, ""]
    """The auxiliary term, coefficient included; 0 without one."""
    fired: Float[Tensor, " d_sae"]
    """Tokens of the batch on which each latent was on (greater than 0)."""
    smallest: Float[Tensor, ""]
    """The smallest latent that was on, where the nonlinearity selects; else 0."""


def smallest_on(code: Nonlinearity, values: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """What `StepStats.smallest` says."""
    if code.selection is None:
        return values.new_zeros(())
    return values[values > 0].min() if (values > 0).any() else values.new_zeros(())
