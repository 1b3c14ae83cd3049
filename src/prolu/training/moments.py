"""The two moments of Adam, which steps, resampling and checkpoints handle together."""

from typing import NamedTuple

from torch import Tensor

from prolu.sae.weights import Weights


class Moments(NamedTuple):
    """Adam's running means, one of each per weight: they have the shapes of the weights."""

    first: Weights
    """The running mean of each gradient."""
    second: Weights
    """The running mean of each squared gradient."""

    @classmethod
    def zeros_like(cls, weights: Weights) -> "Moments":
        """Return the moments before the first update."""
        return cls(weights.zeros_like(), weights.zeros_like())

    def tensors(self) -> list[Tensor]:
        """Return all tensors in one fixed order."""
        return [*self.first.tensors(), *self.second.tensors()]
