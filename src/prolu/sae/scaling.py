"""Activations centred, and scaled per token to norm sqrt(d_in), so that one learning rate and penalty suit all."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def centre(acts: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Return activations minus their mean over d, token by token."""
    return acts - acts.mean(-1, keepdim=True)


def normalise(acts: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch d_in"], Tensor]:
    """Return x sqrt(d_in) / norm(x) for each token x, and the norms before the scaling, [*batch]. x = 0 stays 0."""
    factor, norms = _factor(acts)
    return acts * factor, norms


def normalise_(acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch"]:
    """Scale activations as `normalise` does, in place; return the norms before the scaling."""
    factor, norms = _factor(acts)
    # In place, so that a window of activations is not held twice.
    acts.mul_(factor)
    return norms


def _factor(acts: Tensor) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch"]]:
    """Return sqrt(d_in) / norm(x) of each token, or 0 where x = 0, and the norms."""
    norms = torch.linalg.vector_norm(acts, dim=-1)
    # The quotient comes first and is then multiplied by x, as in other libraries: (x sqrt(d_in)) / norm(x) would round
    # differently, and an exported SAE would not see the same inputs to the bit.
    factor = torch.where(norms > 0, math.sqrt(acts.shape[-1]) / norms, 0)
    return factor[..., None], norms
