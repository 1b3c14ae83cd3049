"""Activations scaled per token to norm sqrt(d_in)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def normalise(acts: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch d_in"], Tensor]:
    """X sqrt(d) / norm(x) per token, and the raw norms [*batch]; x = 0 stays 0.

    The factor is computed first and then multiplied, the association other libraries use.
    """
    factor, norms = _factor(acts)
    return acts * factor, norms


def normalise_(acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch"]:
    """`normalise` in place; gives back the raw norms."""
    factor, norms = _factor(acts)
    acts.mul_(factor)
    return norms


def _factor(acts: Tensor) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch"]]:
    norms = torch.linalg.vector_norm(acts, dim=-1)
    return torch.where(norms > 0, math.sqrt(acts.shape[-1]) / norms, 0)[..., None], norms
