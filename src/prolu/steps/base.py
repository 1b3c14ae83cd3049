"""What a family of steps is."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.mesh import ALONE, Mesh
from prolu.steps.adam import AdamConfig, adam_update_
from prolu.steps.objective import Objective, StepStats
from prolu.weights import Weights


class Step(ABC):
    """A training step for SAEs of one shape: owns its buffers, keeps no state between calls.

    On a mesh `weights` are this rank's latents and `acts` its rows of the batch. Three sums make the numbers those
    of one process: reconstructions over the latent axis, gradients over the data axis, b_dec's and figures over both.
    """

    mesh: Mesh = ALONE

    @abstractmethod
    def gradients(
        self, weights: Weights, acts: Float[Tensor, "batch d_in"], objective: Objective
    ) -> tuple[Weights, StepStats]:
        """Gradients with respect to every weight, and what was seen. They may be the buffers' own."""

    def update_(
        self,
        weights: Weights,
        first: Weights,
        second: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        *,
        n_updates: int,
        lr: float,
        adam: AdamConfig,
    ) -> StepStats:
        """One projected Adam update of weights and moments, in place; `n_updates` were made before."""
        gradients, stats = self.gradients(weights, acts, objective)
        adam_update_(weights, gradients, first, second, n_updates=n_updates, lr=lr, config=adam, mesh=self.mesh)
        return stats

    def _n_tokens(self, acts: Tensor) -> int:
        """Tokens of the whole batch."""
        return len(acts) * self.mesh.data

    def _summed(self, gradients: Weights, stats: StepStats, objective: Objective) -> tuple[Weights, StepStats]:
        """Over all ranks: of what each found on its own rows for its own latents."""
        self.mesh.sum_(gradients.b_dec, "all")
        for tensor in (gradients.encoder, gradients.decoder, *gradients.own.values()):
            self.mesh.sum_(tensor, "data")
        return gradients, self._summed_stats(stats, objective)

    def _summed_stats(self, stats: StepStats, objective: Objective) -> StepStats:
        mesh = self.mesh
        if mesh.size == 1:
            return stats
        mse, penalty, auxiliary, n_on = mesh.sum_(
            torch.stack([mesh.once(stats.mse), stats.penalty, mesh.once(stats.auxiliary), stats.n_on]), "all"
        )
        smallest = stats.smallest
        if objective.nonlinearity.selection is not None:
            smallest = mesh.min_(smallest.where(smallest > 0, torch.inf), "all")
            smallest = smallest.where(smallest.isfinite(), 0)
        return StepStats(mse, penalty, auxiliary, mesh.sum_(stats.fired, "data"), smallest, n_on)
