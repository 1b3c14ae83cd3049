"""Every kind of step of a transcoder against its loss written out plainly and left to autograd."""

import math
from dataclasses import replace

import pytest
import torch

import prolu
from prolu.sae.nonlinearities import NONLINEARITIES
from prolu.sae.penalties import PENALTIES
from prolu.sae.saved_sae import SAEConfig
from prolu.training.moments import Moments
from prolu.training.starting_weights import initial_weights
from prolu.training.steps import AdamConfig, DenseStep, Objective, Update, dense, pair_finder, sparse_torch
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.sparse_numba import SparseNumbaStep
from prolu.training.steps.sparse_torch import SparseTorchStep
from prolu.training.steps.stacked import member
from prolu.training.trainer_stack import _stacked
from support.baselines import BASELINES, COEFF, REVIVED, objective_for
from support.jumps import jumped, pre_activation_loss
from support.steps import COMBINATIONS, PENALTY, relative
from support.synthetic import sparse_activations
from support.transcoders import targets_of, transcoder_weights
from training.test_baselines import largest

STEPS = [DenseStep, SparseNumbaStep, SparseTorchStep, CudaStep]
SIZES = [(1, 5, 9, 7), (60, 12, 40, 17), (130, 16, 333, 9)]


def output(w, f, x):
    """The transcoder's equation."""
    y_hat = f @ w.decoder + w.b_out
    return y_hat if w.skip is None else y_hat + x @ w.skip


def plain_loss(name, w, x, y, coeff, dead=None):
    """Each paper's loss, with the transcoder's output in place of the reconstruction and y in place of x."""
    own, m = w.own, (x - w.b_dec) @ w.encoder.T

    def miss(f):
        return (y - output(w, f, x)).square().mean()

    if name.startswith("gated"):
        pi_gate = m + own["b_gate"]
        f = (pi_gate > 0) * torch.relu(m * own["r_mag"].exp() + own["b_mag"])
        via_gate = torch.relu(pi_gate)
        frozen = output(w.map(torch.Tensor.detach), via_gate, x)
        penalty = torch.sqrt(via_gate + 1e-6) if name.endswith("sqrt") else via_gate
        return miss(f) + coeff * penalty.sum(-1).mean() + (y - frozen).square().mean()
    z = m + own["b_enc"]
    if name.startswith("jumprelu"):
        f, penalty = jumped(name, z, own)
        loss = miss(f) + coeff * penalty.sum(-1).mean()
        return loss if dead is None else loss + pre_activation_loss(z, own, dead, y.shape[1])
    f = largest(z, 5) if name.startswith("topk") else largest(z.flatten(), 3 * len(x)).view_as(z)
    loss = miss(f) + (coeff * f.sum(-1).mean() if name.endswith("l1") else 0)
    if dead is not None:
        residual = (y - output(w, f, x)).detach()
        f_aux = largest(z.masked_fill(~dead, -math.inf)[:, dead], min(512, int(dead.sum())))
        loss = loss + (f_aux @ w.decoder[dead] - residual).square().mean() / 32
    return loss


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    for module in (dense, pair_finder, sparse_torch):
        monkeypatch.setattr(module, "ROWS_PER_CHUNK", 50)


def check_gradients(step, weights, x, y, objective, loss_of):
    """Compare all gradients and the loss with autograd's."""
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    loss = loss_of(leaves)
    loss.backward()
    gradients, stats = step(weights, len(x)).gradients(weights, x, objective, y)
    assert gradients.named().keys() == weights.named().keys()
    for which, ours in gradients.named().items():
        theirs = leaves.named()[which].grad
        if which == "own.threshold" and objective.nonlinearity.selection is not None:  # not trained, but observed
            assert theirs is None
            assert not ours.any()
            continue
        assert theirs is not None
        assert relative(ours, theirs) < 1e-12, which
        if len(x) > 1:
            assert ours.abs().max() > 0, f"{which} does not move"
    ours = stats.mse + objective.coeff * stats.penalty + stats.auxiliary
    assert float(ours) == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("name", "with_dead"), [*((n, False) for n in BASELINES), *((n, True) for n in REVIVED)])
@pytest.mark.parametrize(("batch", "d_in", "d_sae", "d_out"), SIZES)
def test_gradients_are_autograds_for_gated_jumprelu_and_topk(step, name, batch, d_in, d_sae, d_out, with_dead, skip):
    dead = torch.arange(d_sae) % 3 == 0 if with_dead else None
    weights = transcoder_weights(BASELINES[name][0], d_in, d_sae, d_out, skip=skip)
    x, y = sparse_activations(batch, d_in), targets_of(batch, d_out)
    objective = objective_for(name, dead=dead)
    check_gradients(step, weights, x, y, objective, lambda w: plain_loss(name, w, x, y, COEFF, dead))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("nonlinearity", "penalty"), COMBINATIONS)
@pytest.mark.parametrize(("batch", "d_in", "d_sae", "d_out"), SIZES)
def test_gradients_are_autograds_for_relu_and_prolu(step, nonlinearity, penalty, batch, d_in, d_sae, d_out, skip):
    weights = transcoder_weights(nonlinearity, d_in, d_sae, d_out, skip=skip)
    weights.own["b_enc"].sub_(0.3)
    x, y = sparse_activations(batch, d_in), targets_of(batch, d_out)

    def loss_of(w):
        m = (x - w.b_dec) @ w.encoder.T
        own = w.own["b_enc"]
        gradient = nonlinearity.removeprefix("prolu_")
        f = torch.relu(m + own) if nonlinearity == "relu" else prolu.prolu(m, own, gradient)
        return (y - output(w, f, x)).square().mean() + 0.03 * PENALTY[penalty](f).sum(-1).mean()

    check_gradients(step, weights, x, y, Objective(NONLINEARITIES[nonlinearity], PENALTIES[penalty], 0.03), loss_of)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("nonlinearity", ["relu", "prolu_ste"])
def test_gradients_of_a_nested_loss_are_autograds(step, nonlinearity, skip):
    """The mean of the losses of three prefixes and of all latents, each with the whole bias and skip connection."""
    batch, d_in, d_sae, d_out = 70, 12, 40, 17
    weights = transcoder_weights(nonlinearity, d_in, d_sae, d_out, skip=skip)
    x, y = sparse_activations(batch, d_in), targets_of(batch, d_out)

    def loss_of(w):
        m = (x - w.b_dec) @ w.encoder.T
        own = w.own["b_enc"]
        f = torch.relu(m + own) if nonlinearity == "relu" else prolu.prolu(m, own, "ste")
        kept = [f * (torch.arange(d_sae) < n) for n in (3, 11, 30, d_sae)]
        return sum((y - output(w, part, x)).square().mean() for part in kept) / 4 + 0.03 * f.sum(-1).mean()

    objective = Objective(NONLINEARITIES[nonlinearity], PENALTIES["l1"], 0.03, prefixes=(3, 11, 30))
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    loss_of(leaves).backward()
    gradients, _ = step(weights, batch).gradients(weights, x, objective, y)
    for which, ours in gradients.named().items():
        assert relative(ours, leaves.named()[which].grad) < 1e-12, which


@pytest.mark.parametrize("limit", [None, 1e-3])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", BASELINES)
def test_twenty_updates_are_those_of_autograd_and_torchs_adam(name, skip, limit):
    """Each kind of step; the reference projects decoder gradients, clips, applies Adam and renormalises rows."""
    code = BASELINES[name][0]
    start = transcoder_weights(code, 12, 40, 17, skip=skip)
    leaves = start.map(lambda t: t.clone().requires_grad_())
    trained = [t for which, t in leaves.named().items() if which != "own.threshold" or name != "batchtopk"]
    adam = torch.optim.Adam(trained, lr=2e-3, betas=(0.9, 0.999), eps=1e-8)
    batches = [(sparse_activations(60, 12, seed=n), targets_of(60, 17, seed=n)) for n in range(20)]
    for x, y in batches:
        adam.zero_grad()
        plain_loss(name, leaves, x, y, COEFF).backward()
        w, g = leaves.decoder.data, leaves.decoder.grad
        g.sub_((g * w).sum(1, keepdim=True) * w)
        if limit is not None:
            norm = torch.stack([t.grad.norm() for t in trained]).norm()
            for t in trained:
                t.grad.div_((norm / limit).clamp(min=1))
        adam.step()
        w.div_(w.norm(dim=1, keepdim=True))
    for step_type in STEPS:
        weights = start.map(torch.clone)
        moments, step = Moments.zeros_like(weights), step_type(weights, 60)
        for n, (x, y) in enumerate(batches):
            update = Update(n, lr=2e-3, adam=AdamConfig(max_grad_norm=limit))
            step.update_(weights, moments, x, objective_for(name), update, y)
        for which, ours in weights.named().items():
            assert relative(ours, leaves.named()[which].detach()) < 1e-9, (step_type.__name__, which)


@pytest.mark.parametrize("skip", [False, True])
def test_a_stack_of_transcoders_is_trained_as_each_alone(skip):
    name, n, batch = "gated", 3, 30
    alone = [transcoder_weights("gated", 12, 40, 17, skip=skip) for _ in range(n)]
    for i, weights in enumerate(alone):
        weights.encoder.mul_(1 + 0.1 * i)
    stack = _stacked(alone)
    moments_alone = [Moments.zeros_like(w) for w in alone]
    moments = Moments.zeros_like(stack)
    dense_step, stacked = DenseStep(alone[0], batch), CudaStep(alone[0], batch, n_saes=n)
    together = replace(objective_for(name), coeff=torch.full((n,), COEFF, dtype=torch.float64))
    for t in range(20):
        x, y = sparse_activations(batch, 12, seed=t), targets_of(batch, 17, seed=t)
        updates = [Update(t, rate) for rate in (1e-3, 3e-4, 2e-3)]
        stacked.update_stack_(stack, moments, x, together, updates, y)
        for i in range(n):
            dense_step.update_(alone[i], moments_alone[i], x, objective_for(name), updates[i], y)
    for i in range(n):
        for ours, theirs in zip(member(stack, i).tensors(), alone[i].tensors(), strict=True):
            assert relative(ours, theirs) < 1e-9


def test_starting_weights_of_a_transcoder():
    config = SAEConfig(d_in=6, d_sae=50, d_out=4, skip=True, nonlinearity="topk(3)")
    weights = initial_weights(config, 0)
    sae = initial_weights(SAEConfig(d_in=6, d_sae=50, nonlinearity="topk(3)"), 0)
    assert torch.equal(weights.encoder, sae.encoder)
    assert weights.decoder.shape == (50, 4)
    torch.testing.assert_close(weights.decoder.norm(dim=1), torch.ones(50))
    assert not weights.b_out.any()
    assert weights.skip.shape == (6, 4)
    assert not weights.skip.any()
    assert sae.b_out is None
    assert sae.skip is None
    # Of one width, it does not start as an SAE does, whose decoder is the encoder transposed.
    square = initial_weights(SAEConfig(d_in=6, d_sae=50, d_out=6, nonlinearity="topk(3)"), 0)
    cosine = torch.nn.functional.cosine_similarity(square.encoder, square.decoder, dim=1)
    assert cosine.mean().abs() < 0.3


def test_an_sae_has_neither_a_skip_nor_an_output_bias():
    with pytest.raises(ValueError, match="only a transcoder"):
        SAEConfig(d_in=6, d_sae=50, skip=True)
    with pytest.raises(ValueError, match="d_out"):
        SAEConfig(d_in=6, d_sae=50, d_out=0)
