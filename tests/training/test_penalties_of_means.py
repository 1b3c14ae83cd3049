"""Penalties whose slope depends on the whole batch, in every kind of step, against their equations and autograd."""

from dataclasses import replace

import pytest
import torch

from prolu import RunConfig, Trainer, prolu
from prolu.evaluation.comparison.frontiers import family
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.sae.saved_sae import SAEConfig
from prolu.training.moments import Moments
from prolu.training.starting_weights import initial_weights
from prolu.training.steps import DenseStep, Objective, Update, dense, pair_finder, sparse_torch
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.sparse_numba import SparseNumbaStep
from prolu.training.steps.sparse_torch import SparseTorchStep
from prolu.training.steps.stacked import member
from prolu.training.trainer_stack import _stacked, stack_key
from support.jumps import Jump, Step, theta_of
from support.steps import relative
from support.synthetic import sparse_activations

STEPS = [DenseStep, SparseNumbaStep, SparseTorchStep, CudaStep]
COEFF = 0.3
FAMILIES = [
    ("jumprelu(0.4)", "quadratic_l0(5)"),
    ("jumprelu_plain(0.4)", "frequency_l0(0.2)"),
    ("jumprelu_ste(0.4)", "quadratic_l0(5)"),
    ("relu", "quadratic_tanh(5)"),
    ("prolu_ste", "frequency_tanh(0.2)"),
    ("prolu_relu", "quadratic_tanh(5)"),
    ("gated", "quadratic_tanh(5)"),
    ("topk(5)", "frequency_tanh"),
]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Two thirds of the batches are cut, of which each part knows nothing of the others."""
    for module in (dense, pair_finder, sparse_torch):
        monkeypatch.setattr(module, "ROWS_PER_CHUNK", 50)
    monkeypatch.setattr(dense, "ENTRIES_PER_SLAB", 300)


def weights_of(nonlinearity, d_in=12, d_sae=40, dtype=torch.float64):
    weights = initial_weights(SAEConfig(d_in=d_in, d_sae=d_sae, nonlinearity=nonlinearity), 5, dtype)
    g = torch.Generator().manual_seed(6)
    for parameter in (weights.b_dec, *weights.own.values()):
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=g, dtype=dtype))
    if "threshold" in weights.own:
        weights.own["threshold"].abs_()
    return weights


def objective_of(nonlinearity, penalty, coeff=COEFF):
    trained = nonlinearity_named(nonlinearity).in_training
    term = trained.auxiliary if nonlinearity == "gated" else None
    return Objective(trained, penalty_named(penalty), coeff, term)


def plain_loss(nonlinearity, penalty, w, x, coeff=COEFF):
    """The loss as it is written in the papers: first L0, or each latent's frequency, of the batch, then a function of
    it."""
    own, m = w.own, (x - w.b_dec) @ w.encoder.T
    more = 0.0
    if nonlinearity.startswith("jumprelu"):
        z = m + own["b_enc"]
        f = Jump.apply(z, theta_of(own), "ste" in nonlinearity)
        counts = Step.apply(z, theta_of(own), "ste" in nonlinearity)
    elif nonlinearity == "gated":
        pi_gate = torch.relu(m + own["b_gate"])
        f = (pi_gate > 0) * torch.relu(m * own["r_mag"].exp() + own["b_mag"])
        counts = torch.tanh(4 * pi_gate)
        more = (x - pi_gate @ w.decoder.detach() - w.b_dec.detach()).square().mean()
    else:
        if nonlinearity.startswith("prolu"):
            f = prolu(m, own["b_enc"], nonlinearity.removeprefix("prolu_"))
        else:
            f = torch.relu(m + own["b_enc"])
        if nonlinearity.startswith("topk"):
            best = f.topk(5)
            f = torch.zeros_like(f).scatter(-1, best.indices, best.values)
        counts = torch.tanh(4 * f)
    if penalty.startswith("quadratic"):
        p = (counts.sum(-1).mean() / 5 - 1) ** 2
    else:
        frequency = counts.mean(0)
        scale = 0.1 if penalty == "frequency_tanh" else 0.2
        p = (frequency + frequency**2 / scale).sum()
    return (x - f @ w.decoder - w.b_dec).square().mean() + coeff * p + more, p


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("nonlinearity", "penalty"), FAMILIES)
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 5, 9), (60, 12, 40), (130, 16, 333)])
def test_one_step_gives_autograds_gradients(step, nonlinearity, penalty, batch, d_in, d_sae):
    weights, x = weights_of(nonlinearity, d_in, d_sae), sparse_activations(batch, d_in)
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    loss, p = plain_loss(nonlinearity, penalty, leaves, x)
    loss.backward()
    gradients, stats = step(weights, batch).gradients(weights, x, objective_of(nonlinearity, penalty))
    for name, ours in gradients.named().items():
        theirs = leaves.named()[name].grad
        assert theirs is not None
        assert relative(ours, theirs) < 1e-12, name
    assert float(stats.penalty) == pytest.approx(p.item(), rel=1e-12)
    # The penalty matters to what is compared: without it the gradients are others.
    without, _ = DenseStep(weights, batch).gradients(weights, x, objective_of(nonlinearity, penalty, 0.0))
    moved = [relative(gradient, without.own[name]) for name, gradient in gradients.own.items()]
    assert batch == 1 or max(moved) > 1e-3


@pytest.mark.parametrize(("nonlinearity", "penalty"), FAMILIES)
def test_twenty_updates_are_the_same_in_every_kind_of_step(nonlinearity, penalty):
    ends = []
    for step_type in STEPS:
        weights = weights_of(nonlinearity)
        moments, step = Moments.zeros_like(weights), step_type(weights, 64)
        for n in range(20):
            x = sparse_activations(64, 12, seed=n)
            step.update_(weights, moments, x, objective_of(nonlinearity, penalty), Update(n, lr=1e-3))
        ends.append((*weights.tensors(), *moments.tensors()))
    for end in ends[1:]:
        for ours, theirs in zip(end, ends[0], strict=True):
            assert relative(ours, theirs) < 1e-9


@pytest.mark.parametrize(("nonlinearity", "penalty"), FAMILIES[:5])
def test_each_sae_of_a_stack_has_a_batch_statistic_of_its_own(nonlinearity, penalty):
    n = 3
    alone = [weights_of(nonlinearity) for _ in range(n)]
    for i, weights in enumerate(alone):
        weights.encoder.mul_(1 + 0.2 * i)
    coeffs = torch.tensor([0.3, 0.1, 0.0], dtype=torch.float64)
    stack = _stacked(alone)
    x = sparse_activations(30, 12)
    together = replace(objective_of(nonlinearity, penalty), coeff=coeffs)
    gradients, stats = CudaStep(alone[0], 30, n_saes=n).gradients_of_stack(stack, x, together)
    for i, weights in enumerate(alone):
        objective = objective_of(nonlinearity, penalty, float(coeffs[i]))
        expected, theirs = DenseStep(weights, 30).gradients(weights, x, objective)
        for ours, one in zip(member(gradients, i).tensors(), expected.tensors(), strict=True):
            assert relative(ours, one) < 1e-12
        assert float(stats.penalty[i]) == pytest.approx(float(theirs.penalty), rel=1e-12)
    assert len(set(stats.penalty.tolist())) == n


def test_a_quadratic_penalty_draws_to_its_target_from_both_sides():
    found = []
    for bias in (-1.5, 0.5):
        config = RunConfig(
            nonlinearity="relu", penalty="quadratic_tanh", target_l0=6.0, coeff=20.0, d_sae=96, n_tokens=600 * 64,
            lr=3e-3, initial_bias=bias,
        )  # fmt: skip
        trainer = Trainer(config, 16, 64)
        counts = []
        for n in range(600):
            trainer.step(sparse_activations(64, 16, n_features=48, seed=n % 50, dtype=torch.float32))
            assert float(trainer.coeff) == 20.0
        for n in range(50):
            f = trainer.sae().encode_normalised(sparse_activations(64, 16, n_features=48, seed=n, dtype=torch.float32))
            counts.append(torch.tanh(4 * f).sum(-1).mean())
        found.append(float(torch.stack(counts).mean()))
    assert found == pytest.approx([6.0, 6.0], rel=0.1)


def test_the_target_is_the_l0_that_was_asked_for():
    run = RunConfig(nonlinearity="jumprelu_plain", penalty="quadratic_l0", target_l0=16.0, d_sae=64)
    assert (run.resolved_penalty, run.trained_penalty) == ("quadratic_l0", "quadratic_l0(16.0)")
    assert not run.has_target_l0
    assert run.l0_controller(4096) is None
    assert run.family == "jumprelu_plain + quadratic_l0"
    assert run.run_id == "jumprelu_plain-quadratic_l0-L16-lr0.001-d64-s0"
    assert penalty_named(run.trained_penalty).target == 16.0
    written = replace(run, penalty="quadratic_l0(16)", target_l0=None)
    assert written.family == family(written.describe()) == "jumprelu_plain + quadratic_l0"
    assert written.run_id == "jumprelu_plain-quadratic_l0_16-0.0012-lr0.001-d64-s0"
    scaled = replace(run, penalty="frequency_l0(0.5)")
    assert scaled.has_target_l0
    assert scaled.family == "jumprelu_plain + frequency_l0(0.5)"
    kinds = {stack_key(Trainer(replace(run, target_l0=t, n_tokens=640), 8, 64)) for t in (16.0, 32.0)}
    assert len(kinds) == 2


def test_what_does_not_go_together_is_refused():
    for config, words in (
        ({"penalty": "quadratic_l0"}, r"penalty 'quadratic_l0': give the L0, as in quadratic_l0\(32\), or a target_l0"),
        ({"nonlinearity": "relu", "penalty": "quadratic_l0(4)"}, "needs a gate with a pseudo-gradient"),
        ({"nonlinearity": "prolu_ste", "penalty": "frequency_l0"}, "needs a gate with a pseudo-gradient"),
        ({"penalty": "quadratic_l0(0)", "nonlinearity": "jumprelu"}, "target 0.0: must be more than 0"),
        ({"penalty": "frequency_tanh(-1)"}, "scale -1.0: must be more than 0, and finite"),
        ({"penalty": "tanh(nan)"}, "scale nan: must be more than 0, and finite"),
        ({"penalty": "tanh(1,2)"}, r"penalty 'tanh\(1,2\)': wrong number of arguments, write tanh\(scale\)"),
        ({"penalty": "l2"}, r"penalty 'l2': choose one of l1, sqrt_l1, l0, tanh, .*quadratic_l0\(target\)"),
    ):
        with pytest.raises(ValueError, match=words):
            RunConfig(**config)
