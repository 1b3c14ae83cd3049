"""The interface of a training step, and the update that all steps share."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.nonlinearities import Gather
from prolu.sae.weights import Weights
from prolu.training.moments import Moments
from prolu.training.steps.adam import Update, adam_update_
from prolu.training.steps.objective import Objective, StepStats


class Step(ABC):
    """A training step for SAEs of one shape. It owns its buffers and keeps no state between calls.

    On a mesh, `weights` are those of a rank's latents and `acts` its rows of the batch. Statistics are then of these
    too, except for `mse` and `auxiliary`, which take all latents into account.
    """

    mesh: Mesh = ALONE
    """The ranks that share one SAE and one batch."""

    @abstractmethod
    def gradients(
        self,
        weights: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[Weights, StepStats]:
        """Return the gradient of the loss with respect to every weight, and statistics of the batch.

        The gradients may be the step's own buffers, which the next call overwrites. `target` is as in `update_`.
        """

    def update_(
        self,
        weights: Weights,
        moments: Moments,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        update: Update,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> StepStats:
        """Make one training update, in place: gradients of this batch, then a projected Adam update (`adam`).

        Args:
            weights: the weights, which are changed.
            moments: Adam's moments of these weights, which are changed.
            acts: the batch of activations.
            objective: the loss.
            update: the learning rate and the constants of this Adam update.
            target: what a transcoder is to give for `acts`; None for an SAE, whose target is `acts`.

        Returns:
            The loss and the other statistics of the batch, computed with the weights as they were before the update.
        """
        gradients, stats = self.gradients(weights, acts, objective, target)
        self._sum_over_data_(gradients)
        objective.add_weight_terms_(weights, gradients)
        self._apply_(weights, gradients, moments, update)
        return stats

    def _apply_(self, weights: Weights, gradients: Weights, moments: Moments, update: Update) -> None:
        """Update weights and moments by these gradients, which are used up."""
        adam_update_(weights, gradients, moments, update, self.mesh)

    def _sum_over_data_(self, gradients: Weights) -> None:
        """Add the gradients of all ranks that hold the same latents and see other rows of the batch."""
        for gradient in gradients.tensors():
            self.mesh.sum_over_data_(gradient, "gradients")


def gather_of(mesh: Mesh) -> Gather | None:
    """Return how a selection sees the latents of the other ranks; None if this rank holds all latents."""
    if mesh.n_latent == 1:
        return None
    return lambda candidates: mesh.gathered_over_latents(candidates, -1, "selection")
