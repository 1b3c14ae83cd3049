"""One batch of activations, and its scale in the space in which an SAE works."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prolu.sae.choices import Normalisation


class Batch(NamedTuple):
    """One batch of activations from shuffled token positions."""

    acts: Float[Tensor, "batch d_in"]
    """The normalised activations: each row has norm sqrt(d_in)."""
    raw_norm: Float[Tensor, " batch"]
    """The norm of each row before it was normalised."""
    target: Float[Tensor, "batch d_out"] | None = None
    """The activations of the same tokens at the hook that transcoders write at, as they come from the language model;
    None in a stream without such a hook."""

    def of_rows(self, kept: Bool[Tensor, " batch"]) -> "Batch":
        """Return the batch without the rows that are not kept."""
        target = None if self.target is None else self.target[kept]
        return Batch(self.acts[kept], self.raw_norm[kept], target)

    def scaled(self, normalisation: Normalisation) -> tuple[Tensor, Tensor | None]:
        """Return inputs and targets in the space in which an SAE with this normalisation works.

        With `none`, both are as they come from the language model. With `per_token`, the factor that scales an input x
        to norm sqrt(d_in) scales its target too: sqrt(d_in) / norm(x). So an output can be scaled back without knowing
        its target. The target of an input of zeros is scaled to zeros.
        """
        root = math.sqrt(self.acts.shape[1])
        if normalisation == "none":
            return self.acts * (self.raw_norm / root)[:, None], self.target
        if self.target is None:
            return self.acts, None
        return self.acts, self.target * torch.where(self.raw_norm > 0, root / self.raw_norm, 0)[:, None]
