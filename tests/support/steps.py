"""Random weights for tests of training steps, and how far two results are apart."""

import itertools

import torch

from prolu.sae.saved_sae import SAEConfig
from prolu.sae.weights import Weights
from prolu.training.starting_weights import initial_weights

PENALTY = {
    "l1": lambda f: f,
    "sqrt_l1": lambda f: torch.sqrt(f + 1e-6),
    "tanh": lambda f: torch.tanh(4 * f),
}
"""The penalties of a latent's value, written out for autograd."""

COMBINATIONS = list(itertools.product(["relu", "prolu_relu", "prolu_ste"], PENALTY))


def random_weights(d_in, d_sae, dtype=torch.float64, own=("b_enc",)):
    weights = initial_weights(SAEConfig(d_in=d_in, d_sae=d_sae), 5, dtype)
    g = torch.Generator().manual_seed(6)
    weights.b_dec.copy_(0.1 * torch.randn(d_in, generator=g, dtype=dtype))
    return Weights(
        weights.encoder, weights.decoder, weights.b_dec,
        {name: 0.2 * torch.randn(d_sae, generator=g, dtype=dtype) - 0.1 for name in own},
    )  # fmt: skip


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


def same(a, b):
    """Whether two SAEs' weights, or Adam's moments, are equal to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
