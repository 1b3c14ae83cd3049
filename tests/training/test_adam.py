"""The update against torch's own Adam and clip, whole and slab by slab, for every kind of step."""

import pytest
import torch

from prolu.sae.nonlinearities import NONLINEARITIES
from prolu.sae.penalties import L1
from prolu.training.moments import Moments
from prolu.training.steps import AdamConfig, DenseStep, Objective, Update, adam, adam_update_
from prolu.training.steps.sparse_numba import SparseNumbaStep
from prolu.training.steps.sparse_torch import SparseTorchStep
from support.steps import random_weights, relative
from support.synthetic import sparse_activations


def torchs_own(weights, gradients, max_grad_norm, n_steps, lr):
    """Projection, torch.nn.utils.clip_grad_norm_, torch.optim.Adam, unit rows: written out."""
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    optimiser = torch.optim.Adam(leaves.tensors(), lr=lr)
    for _ in range(n_steps):
        for p, g in zip(leaves.tensors(), gradients.tensors(), strict=True):
            p.grad = g.clone()
        rows = leaves.decoder.detach()
        leaves.decoder.grad.sub_((leaves.decoder.grad * rows).sum(1, keepdim=True) * rows)
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(leaves.tensors(), max_grad_norm)
        optimiser.step()
        with torch.no_grad():
            leaves.decoder.div_(leaves.decoder.norm(dim=1, keepdim=True))
    return leaves


@pytest.mark.parametrize("entries", [1, 7 * 63, 2**18])
@pytest.mark.parametrize("share", [None, 0.1, 0.999, 10.0])
def test_an_update_is_torchs_adam_with_its_clip(monkeypatch, entries, share):
    monkeypatch.setattr(adam, "ENTRIES_PER_SLAB", entries)
    weights, gradients = random_weights(63, 100), random_weights(63, 100).map(lambda t: torch.sin(9 * t))
    rows = weights.decoder
    projected = gradients.map(torch.clone)
    projected.decoder.sub_((projected.decoder * rows).sum(1, keepdim=True) * rows)
    norm = torch.cat([g.flatten() for g in projected.tensors()]).norm().item()
    limit = share and share * norm
    theirs = torchs_own(weights, gradients, limit, 3, 1e-2)
    moments, config = Moments.zeros_like(weights), AdamConfig(max_grad_norm=limit)
    for n in range(3):
        adam_update_(weights, gradients.map(torch.clone), moments, Update(n, lr=1e-2, adam=config))
    tolerance = 1e-7 if share else 1e-14  # torch's clip adds 1e-6 to the norm
    for a, b in zip(weights.tensors(), theirs.tensors(), strict=True):
        assert relative(a, b.detach()) < tolerance


@pytest.mark.parametrize("step_type", [SparseNumbaStep, SparseTorchStep])
def test_every_kind_of_step_clips_alike(step_type):
    objective, config = Objective(NONLINEARITIES["prolu_ste"], L1(), 0.03), AdamConfig(max_grad_norm=1e-3)
    ends = []
    for step_class in (DenseStep, step_type):
        weights = random_weights(20, 90)
        moments, step = Moments.zeros_like(weights), step_class(weights, 64)
        for n in range(5):
            x = sparse_activations(64, 20, seed=n)
            step.update_(weights, moments, x, objective, Update(n, lr=1e-3, adam=config))
        ends.append((*weights.tensors(), *moments.tensors()))
    for ours, theirs in zip(*ends, strict=True):
        assert relative(ours, theirs) < 1e-12
    norm = torch.cat([m.flatten() for m in ends[0][-len(weights.tensors()) * 2 : -len(weights.tensors())]]).norm()
    assert norm < 1e-3  # a mean of gradients, none of them longer than the limit
