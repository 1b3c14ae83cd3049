"""What a family of steps is."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.weights import Weights
from prolu.training.steps.adam import AdamConfig, adam_update_
from prolu.training.steps.objective import Objective, StepStats


class Step(ABC):
    """A training step for SAEs of one shape: owns its buffers, keeps no state between calls.

    On a mesh, `weights` are a rank's latents and `acts` its rows of the batch. Statistics are then of these too, but
    for `mse` and `auxiliary`, which look at all latents.
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
        self._sum_over_data_(gradients)
        adam_update_(weights, gradients, first, second, n_updates=n_updates, lr=lr, config=adam, mesh=self.mesh)
        return stats

    def _sum_over_data_(self, gradients: Weights) -> None:
        for gradient in gradients.tensors():
            self.mesh.sum_over_data_(gradient, "gradients")
