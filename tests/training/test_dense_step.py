"""The step by hand against autograd and torch.optim.Adam."""

import pytest
import torch

from prolu.sae.nonlinearities import NONLINEARITIES, prolu
from prolu.sae.penalties import L1, PENALTIES
from prolu.training.moments import Moments
from prolu.training.steps import DenseStep, Objective, Update, adam_update_, dense
from support.steps import COMBINATIONS, PENALTY, random_weights, relative
from support.synthetic import sparse_activations


def plain_loss(weights, x, nonlinearity, penalty, coeff):
    """Section 1 of the method, written out."""
    m = (x - weights.b_dec) @ weights.encoder.T
    b = weights.own["b_enc"]
    f = torch.relu(m + b) if nonlinearity == "relu" else prolu(m, b, nonlinearity.removeprefix("prolu_"))
    x_hat = f @ weights.decoder + weights.b_dec
    p = PENALTY[penalty](f).sum(-1)
    return ((x - x_hat) ** 2).mean(), p.mean(), ((x - x_hat) ** 2).mean() + coeff * p.mean()


@pytest.mark.parametrize(("nonlinearity", "penalty"), COMBINATIONS)
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 5, 9), (7, 63, 100), (130, 16, 33)])
def test_one_step_gives_autograds_gradients(monkeypatch, nonlinearity, penalty, batch, d_in, d_sae):
    monkeypatch.setattr(dense, "ROWS_PER_CHUNK", 50)
    monkeypatch.setattr(dense, "ENTRIES_PER_SLAB", 7 * d_sae)
    weights = random_weights(d_in, d_sae)
    x = sparse_activations(batch, d_in)
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    mse, p, loss = plain_loss(leaves, x, nonlinearity, penalty, 0.03)
    loss.backward()
    objective = Objective(NONLINEARITIES[nonlinearity], PENALTIES[penalty], 0.03)
    gradients, stats = DenseStep(weights, batch).gradients(weights, x, objective)
    for ours, theirs in zip(gradients.tensors(), leaves.tensors(), strict=True):
        assert theirs.grad is not None
        assert relative(ours, theirs.grad) < 1e-13
    assert stats.mse.item() == pytest.approx(mse.item(), rel=1e-13)
    assert stats.penalty.item() == pytest.approx(p.item(), rel=1e-13)
    assert stats.fired.sum() > 0


@pytest.mark.parametrize(("nonlinearity", "penalty"), COMBINATIONS)
def test_twenty_updates_follow_torchs_adam_with_projection(nonlinearity, penalty):
    weights, batches = random_weights(16, 48), [sparse_activations(64, 16, seed=s) for s in range(20)]
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    adam = torch.optim.Adam(leaves.tensors(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    moments = Moments.zeros_like(weights)
    step, objective = (
        DenseStep(weights, 64),
        Objective(NONLINEARITIES[nonlinearity], PENALTIES[penalty], 0.02),
    )
    for n, x in enumerate(batches):
        adam.zero_grad()
        plain_loss(leaves, x, nonlinearity, penalty, 0.02)[2].backward()
        rows, g = leaves.decoder, leaves.decoder.grad
        assert g is not None
        with torch.no_grad():
            g -= (g * rows).sum(1, keepdim=True) * rows
            adam.step()
            rows /= rows.norm(dim=1, keepdim=True)
        gradients, _ = step.gradients(weights, x, objective)
        adam_update_(weights, gradients, moments, Update(n, lr=1e-3))
    for ours, theirs in zip(weights.tensors(), leaves.tensors(), strict=True):
        assert relative(ours, theirs.detach()) < 1e-10


def test_buffers_keep_nothing_between_calls():
    weights, objective = (
        random_weights(8, 20),
        Objective(NONLINEARITIES["prolu_ste"], PENALTIES["sqrt_l1"], 0.1),
    )
    shared = DenseStep(weights, 64)
    shared.gradients(weights, sparse_activations(64, 8, seed=1), objective)
    x = sparse_activations(40, 8, seed=2)
    again = shared.gradients(weights, x, objective)[0].map(torch.clone)
    for a, b in zip(again.tensors(), DenseStep(weights, 40).gradients(weights, x, objective)[0].tensors(), strict=True):
        assert torch.equal(a, b)


def test_infinite_activations_off_the_gate_do_not_poison_other_latents():
    weights = random_weights(4, 6)
    weights.own["b_enc"].fill_(-1e9)
    gradients, _ = DenseStep(weights, 3).gradients(
        weights, sparse_activations(3, 4), Objective(NONLINEARITIES["prolu_ste"], L1(), 0.1)
    )
    assert all(t.isfinite().all() for t in gradients.tensors())
    assert gradients.encoder.count_nonzero() == 0
