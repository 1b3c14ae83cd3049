"""Gated, JumpReLU, TopK and BatchTopK against their papers' equations, written out and left to autograd."""

import math
from dataclasses import replace

import pytest
import torch

from prolu import SAE, RunConfig, SAEConfig, Trainer
from prolu.sae.nonlinearities import activate, nonlinearity_named
from prolu.sae.nonlinearities.jumprelu import JumpReLU
from prolu.sae.nonlinearities.topk import HORIZON, TopK
from prolu.training.steps import DenseStep, dense, pair_finder, sparse_torch
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.sparse_numba import SparseNumbaStep
from prolu.training.steps.sparse_torch import SparseTorchStep
from support.baselines import BASELINES, COEFF, REVIVED, objective_for, weights_for
from support.jumps import jumped, pre_activation_loss, theta_of
from support.steps import relative
from support.synthetic import sparse_activations

STEPS = [DenseStep, SparseNumbaStep, SparseTorchStep, CudaStep]


def largest(z, n):
    """ReLU(z) where it is among the n largest of the last dimension, else 0."""
    best = z.topk(n)
    return torch.zeros_like(z).scatter(-1, best.indices, torch.relu(best.values))


def plain_loss(name, w, x, coeff, dead=None, prefixes=()):
    """Each paper's loss, in the library's scale: MSE a mean over dimensions, and over prefixes of a nested loss."""
    own, m = w.own, (x - w.b_dec) @ w.encoder.T

    def miss(f):
        ends = (*prefixes, w.d_sae)
        return sum((x - f[:, :end] @ w.decoder[:end] - w.b_dec).square().mean() for end in ends) / len(ends)

    if name.startswith("gated"):
        pi_gate = m + own["b_gate"]
        f = (pi_gate > 0) * torch.relu(m * own["r_mag"].exp() + own["b_mag"])
        via_gate = torch.relu(pi_gate)
        frozen = via_gate @ w.decoder.detach() + w.b_dec.detach()
        penalty = torch.sqrt(via_gate + 1e-6) if name.endswith("sqrt") else via_gate
        return miss(f) + coeff * penalty.sum(-1).mean() + (x - frozen).square().mean()
    z = m + own["b_enc"]
    if name.startswith("jumprelu"):
        f, penalty = jumped(name, z, own)
        loss = miss(f) + coeff * penalty.sum(-1).mean()
        return loss if dead is None else loss + pre_activation_loss(z, own, dead, x.shape[1])
    f = largest(z, 5) if name.startswith("topk") else largest(z.flatten(), 3 * len(x)).view_as(z)
    loss = miss(f) + (coeff * f.sum(-1).mean() if name.endswith("l1") else 0)
    if dead is not None:
        residual = (x - f @ w.decoder - w.b_dec).detach()
        f_aux = largest(z.masked_fill(~dead, -math.inf)[:, dead], min(512, int(dead.sum())))
        loss = loss + (f_aux @ w.decoder[dead] - residual).square().mean() / 32
    return loss


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("name", "with_dead"), [*((n, False) for n in BASELINES), *((n, True) for n in REVIVED)])
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 5, 9), (60, 12, 40), (130, 16, 333)])
@pytest.mark.parametrize("nested", [False, True])
def test_one_step_gives_autograds_gradients_of_the_papers_loss(
    monkeypatch, step, name, batch, d_in, d_sae, with_dead, nested
):
    for module in (dense, pair_finder, sparse_torch):
        monkeypatch.setattr(module, "ROWS_PER_CHUNK", 50)
    dead = torch.arange(d_sae) % 3 == 0 if with_dead else None
    weights, x = weights_for(name, d_in, d_sae), sparse_activations(batch, d_in)
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    prefixes = (1, d_sae // 3, d_sae - 2) if nested else ()
    loss = plain_loss(name, leaves, x, COEFF, dead, prefixes)
    loss.backward()
    objective = replace(objective_for(name, dead=dead), prefixes=prefixes)
    gradients, stats = step(weights, batch).gradients(weights, x, objective)
    assert list(gradients.own) == list(weights.own)
    for which, ours in gradients.named().items():
        theirs = leaves.named()[which].grad
        if which == "own.threshold" and name == "batchtopk":  # not trained, but observed
            assert theirs is None
            assert not ours.any()
            continue
        assert theirs is not None
        assert relative(ours, theirs) < 1e-12, which
        if batch > 1:
            assert ours.abs().max() > 0, f"{which} does not move"
    # The MSE that is reported is that of all latents, with a nested loss too.
    plain = plain_loss(name, weights, x, COEFF, dead).item()
    assert float(stats.mse + COEFF * stats.penalty + stats.auxiliary) == pytest.approx(plain, rel=1e-12)
    if "topk" in name:
        n = batch * (3 if name == "batchtopk" else 5)
        assert stats.fired.sum() <= n
        assert stats.smallest > 0


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("step", [SparseNumbaStep, SparseTorchStep])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sparse_steps_give_the_dense_steps_numbers_at_every_density(name, step, dtype):
    limit = 1e-12 if dtype == torch.float64 else 1e-4  # sums of 1,100 terms of both signs, in another order
    for shift in (-1.0, 0.0, 5.0):
        weights = weights_for(name, 17, 70, dtype)
        weights.own["b_gate" if name.startswith("gated") else "b_enc"].add_(shift)
        x = sparse_activations(1100, 17, dtype=dtype)
        dead = torch.arange(70) % 5 == 0
        objective = objective_for(name, dead=dead)
        reference, theirs = DenseStep(weights, 1100).gradients(weights, x, objective)
        gradients, ours = step(weights, 1100).gradients(weights, x, objective)
        for a, b in zip(gradients.tensors(), reference.tensors(), strict=True):
            assert relative(a, b) < limit
        for a, b in zip(ours, theirs, strict=True):
            assert relative(a, b) < limit
        assert torch.equal(ours.fired, theirs.fired)


def test_an_auxiliary_term_that_moves_nothing_else_moves_dead_latents():
    """Every parameter of a dead latent has a gradient: that AuxK leaves the encoder alone is another library's bug."""
    dead = torch.arange(40) % 4 == 0
    weights, x = weights_for("topk"), sparse_activations(60, 12)
    z = (x - weights.b_dec) @ weights.encoder.T + weights.own["b_enc"]
    weights.own["b_enc"][dead] += 0.01 - z.amax(0)[dead]  # above 0 on one token, never among the five largest
    silent, _ = DenseStep(weights, 60).gradients(weights, x, objective_for("topk"))
    assert not silent.encoder[dead].any()
    for step in STEPS:
        moved, _ = step(weights, 60).gradients(weights, x, objective_for("topk", dead=dead))
        for gradient in (moved.encoder, moved.decoder, moved.own["b_enc"]):
            assert (gradient[dead] != 0).flatten(1).any(1).all() if gradient.ndim > 1 else gradient[dead].all()


@pytest.mark.parametrize("name", BASELINES)
def test_a_saved_sae_computes_what_its_paper_says(name, tmp_path):
    nonlinearity = BASELINES[name][0]
    weights = weights_for(name, dtype=torch.float32)
    if "threshold" in weights.own:
        weights.own["threshold"].fill_(0.7)
    sae = SAE(SAEConfig(d_in=12, d_sae=40, nonlinearity=nonlinearity, normalisation="none"), weights)
    sae.save(tmp_path)
    x = sparse_activations(50, 12, dtype=torch.float32)
    own, m = weights.own, (x - weights.b_dec) @ weights.encoder.T
    if name.startswith("gated"):
        expected = (m + own["b_gate"] > 0) * torch.relu(own["r_mag"].exp() * m + own["b_mag"])
    elif name.startswith("jumprelu"):
        z = m + own["b_enc"]
        expected = z * (z > theta_of(own))
    elif name.startswith("topk"):
        expected = largest(m + own["b_enc"], 5)
    else:
        z = m + own["b_enc"]
        expected = torch.relu(z) * (z >= 0.7)
    assert torch.equal(SAE.load(tmp_path).encode(x).detach(), expected)


def test_topk_is_differentiable_where_it_is_on():
    m = torch.randn(3, 4, 20, dtype=torch.float64, requires_grad=True)
    b = torch.randn(20, dtype=torch.float64, requires_grad=True)
    f = activate(nonlinearity_named("topk(4)"), m, {"b_enc": b})
    assert ((f > 0).sum(-1) <= 4).all()
    f.square().sum().backward()
    assert torch.equal(m.grad, 2 * f)
    torch.testing.assert_close(b.grad, 2 * f.sum((0, 1)))


def test_prolu_is_a_gated_sae_with_no_magnitude_of_its_own():
    m, b = torch.randn(1000, 8), torch.randn(8)
    nothing = torch.zeros(8)
    gated = activate(nonlinearity_named("gated"), m, {"b_gate": b, "r_mag": nothing, "b_mag": nothing})
    assert torch.equal(gated, activate(nonlinearity_named("prolu_ste"), m, {"b_enc": b}))


def test_batchtopk_learns_its_threshold_from_what_was_on():
    trainer = Trainer(
        RunConfig(nonlinearity="batchtopk", penalty="none", target_l0=3, d_sae=40, n_tokens=64_000), 8, 64
    )
    seen = []
    for seed in range(HORIZON + 20):
        seen.append(float(trainer.step(sparse_activations(64, 8, seed=seed, dtype=torch.float32)).stats.smallest))
    running = 0.0
    for n, smallest in enumerate(seen, 1):
        running += (smallest - running) * max(1 / n, 1 / HORIZON)
    threshold = trainer.state.weights.own["threshold"]
    torch.testing.assert_close(threshold, torch.full((40,), running))
    x = sparse_activations(4096, 8, seed=7, dtype=torch.float32)
    n_active = (trainer.sae().encode_normalised(x) > 0).sum(1).double().mean().item()
    assert n_active == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize(
    ("nonlinearity", "penalty"),
    [
        ("gated", "l1"),
        ("jumprelu", "l0"),
        ("jumprelu_plain(1)", "l0"),
        ("jumprelu_ste", "tanh"),
        ("topk(4)", "none"),
        ("batchtopk(4)", "none"),
    ],
)
@pytest.mark.parametrize("step", ["dense", "sparse", "sparse_torch"])
def test_baselines_train_with_every_kind_of_step_to_one_result(nonlinearity, penalty, step):
    ends = []
    for step_kind in ("dense", step):
        config = RunConfig(
            nonlinearity=nonlinearity, penalty=penalty, coeff=0.01, d_sae=64, n_tokens=6400, step=step_kind,
            aux_dead_tokens=320, lr=3e-3,
        )  # fmt: skip
        trainer = Trainer(config, 16, 64, dtype=torch.float64)
        losses = [trainer.step(sparse_activations(64, 16, seed=s)).stats.mse.item() for s in range(60)]
        ends.append((losses, trainer.state.weights.tensors()))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-9)
    assert losses[-1] < 0.9 * losses[0]
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert relative(a, b) < 1e-8 if b.any() else not a.any()


def test_every_parameter_of_every_baseline_moves():
    for name, (nonlinearity, penalty) in BASELINES.items():
        config = RunConfig(nonlinearity=nonlinearity, penalty=penalty, coeff=0.01, d_sae=40, n_tokens=3200)
        trainer = Trainer(config, 8, 32)
        before = trainer.state.weights.map(torch.clone).named()
        for seed in range(30):
            trainer.step(sparse_activations(32, 8, seed=seed, dtype=torch.float32))
        for which, tensor in trainer.state.weights.named().items():
            assert not torch.equal(tensor, before[which]), f"{name}: {which}"


def test_what_does_not_go_together_is_refused():
    for config, words in (
        ({"nonlinearity": "relu", "penalty": "l0"}, "needs a gate with a pseudo-gradient"),
        ({"nonlinearity": "topk", "penalty": "none"}, "or a target_l0"),
        ({"nonlinearity": "topk(0)"}, "at least 1"),
        ({"nonlinearity": "topk(2,3)"}, "number of arguments"),
        ({"nonlinearity": "jumprelu(-1)"}, "bandwidth -1.0: must be more than 0"),
        ({"nonlinearity": "relu", "penalty": "none", "target_l0": 8.0}, "a penalty whose coefficient can be adjusted"),
        ({"target_l0": -1.0}, "more than 0 and less than d_sae"),
        ({"beta1": 1.0}, "less than 1"),
    ):
        with pytest.raises(ValueError, match=words):
            RunConfig(**config)


def test_the_paper_values_of_a_threshold():
    code = JumpReLU(0.001)
    assert code.initial("log_threshold") == math.log(0.001)
    assert JumpReLU(0.001, is_log=False).initial("threshold") == 0.001
    assert isinstance(nonlinearity_named("batchtopk(7)").in_training, TopK)


def test_a_plain_threshold_never_stays_below_zero():
    config = RunConfig(nonlinearity="jumprelu_plain(0.5)", d_sae=20, n_tokens=640, lr=0.2, coeff=0.0)
    trainer = Trainer(config, 8, 64)
    threshold = trainer.state.weights.own["threshold"]
    assert (threshold == 0.5).all()
    threshold[:10] = -0.3
    seen = []
    for seed in range(10):
        trainer.step(sparse_activations(64, 8, seed=seed, dtype=torch.float32))
        seen.append(threshold.clone())
    assert (torch.stack(seen) >= 0).all()
    assert (seen[0][:10] == 0).any()
    assert not torch.equal(seen[0], seen[-1])


def test_a_jumprelu_does_not_start_from_one_with_another_parameter(tmp_path):
    SAE(SAEConfig(d_in=12, d_sae=40, nonlinearity="jumprelu"), weights_for("jumprelu", dtype=torch.float32)).save(
        tmp_path
    )
    config = RunConfig(nonlinearity="jumprelu_plain", d_sae=40, n_tokens=640, init_from=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"nonlinearity 'jumprelu_plain': the SAE in .* has 'jumprelu'; only its argum"
    ):
        Trainer(config, 12, 64)
