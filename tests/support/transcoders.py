"""Random weights and targets for tests of transcoders."""

import torch

from prolu import SAEConfig
from prolu.training.starting_weights import initial_weights


def transcoder_weights(nonlinearity, d_in=12, d_sae=40, d_out=17, *, skip=False, dtype=torch.float64):
    config = SAEConfig(d_in=d_in, d_sae=d_sae, nonlinearity=nonlinearity, d_out=d_out, skip=skip)
    weights = initial_weights(config, 5, dtype)
    g = torch.Generator().manual_seed(6)
    for parameter in (*weights.shared().values(), *weights.own.values()):
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=g, dtype=dtype))
    if "threshold" in weights.own:
        weights.own["threshold"].abs_()  # as trainers keep it
    return weights


def targets_of(batch, d_out, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(batch, d_out, generator=g, dtype=dtype) + torch.linspace(-1, 1, d_out, dtype=dtype)
