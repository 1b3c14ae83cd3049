"""What a step minimises, and what it reports."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.nonlinearities import Nonlinearity, Parameters, Pullback
from prolu.penalties import Penalty


@dataclass(frozen=True)
class Auxiliary:
    """A second reconstruction, from other latents of the same m: coeff * mean (f_aux W_dec - target)^2.

    AuxK (dead latents explain the residual) and Gated's frozen-decoder term are of this form.
    """

    code: Nonlinearity
    """Gives the auxiliary latents; its own parameters are among the SAE's."""
    target: Literal["residual", "centred_input"]
    """x - x_hat, or x - b_dec; a constant either way."""
    coeff: float
    trains_decoder: bool
    """Whether the term moves W_dec."""


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
        per_token = self.coeff / batch
        upstream = upstream + per_token * self.penalty.slope(latents)
        back = self.nonlinearity.pullback(upstream, m, own)
        if (direct := self.penalty.pullback(m, own)) is not None:
            back = back.plus(direct, per_token)
        return back, self.penalty.value(latents, m, own).sum(-1).sum(dtype=torch.float64)


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
