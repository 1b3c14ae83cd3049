"""Both sparse steps against the dense reference: gradients, updates, statistics, at odd sizes and all densities."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prolu
from prolu import RunConfig, Trainer
from prolu.sae.nonlinearities import NONLINEARITIES, GeneralisedProLU, nonlinearity_named
from prolu.sae.penalties import L1, PENALTIES
from prolu.training.moments import Moments
from prolu.training.steps import DenseStep, Objective, Update, pair_finder, sparse_torch
from prolu.training.steps.choice import Steps, crossover_density, next_step_kind
from prolu.training.steps.sparse_numba import SparseNumbaStep
from prolu.training.steps.sparse_torch import SparseTorchStep
from support.steps import COMBINATIONS, random_weights, relative
from support.synthetic import sparse_activations

STEPS = [SparseNumbaStep, SparseTorchStep]
BIASES = {"nearly none on": -1.6, "sparse": -0.9, "half": 0.0, "all on": 1e3}


def at_density(d_in, d_sae, density, dtype, seed=0):
    """Weights whose encoder bias sets the density; the last tenth of latents never fires."""
    weights = random_weights(d_in, d_sae, dtype)
    g = torch.Generator().manual_seed(seed)
    weights.own["b_enc"].copy_(BIASES[density] + 0.05 * torch.randn(d_sae, generator=g, dtype=dtype))
    if density != "all on":
        weights.own["b_enc"][-d_sae // 10 :] = -1e4
    return weights


def compare(ours, theirs, gradients, reference, limit):
    for a, b in zip(gradients.tensors(), reference.tensors(), strict=True):
        assert relative(a, b) < limit
    assert relative(ours.mse, theirs.mse) < limit
    assert relative(ours.penalty, theirs.penalty) < limit
    assert torch.equal(ours.fired, theirs.fired)


@pytest.mark.parametrize("step_type", STEPS)
@pytest.mark.parametrize(("nonlinearity", "penalty"), COMBINATIONS)
@pytest.mark.parametrize("density", BIASES)
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 63, 1000), (7, 63, 1000), (130, 16, 33), (1100, 17, 70)])
def test_one_step_gives_the_dense_steps_gradients(step_type, nonlinearity, penalty, density, batch, d_in, d_sae):
    objective = Objective(NONLINEARITIES[nonlinearity], PENALTIES[penalty], 0.03)
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        weights = at_density(d_in, d_sae, density, dtype)
        x = sparse_activations(batch, d_in, dtype=dtype)
        reference, theirs = DenseStep(weights, batch).gradients(weights, x, objective)
        gradients, ours = step_type(weights, batch).gradients(weights, x, objective)
        compare(ours, theirs, gradients, reference, limit)


@pytest.mark.parametrize("first_rows", [1.0, 30.0, 0.01], ids=["like others", "larger", "smaller"])
def test_a_selection_over_the_batch_whose_bound_is_guessed_too_high(first_rows, monkeypatch):
    passes = []
    append = pair_finder.PairFinder._append
    monkeypatch.setattr(
        pair_finder.PairFinder, "_append", lambda *args, **kinds: (passes.append(1), append(*args, **kinds))[1]
    )
    weights = random_weights(63, 1000)
    x = sparse_activations(2300, 63)
    x[: pair_finder.SAMPLED_ROWS] *= first_rows
    objective = Objective(nonlinearity_named("batchtopk(9)").in_training, L1(), 0.03)
    objective = replace(objective, auxiliary=None)
    reference, theirs = DenseStep(weights, 2300).gradients(weights, x, objective)
    gradients, ours = SparseNumbaStep(weights, 2300).gradients(weights, x, objective)
    compare(ours, theirs, gradients, reference, 1e-12)
    assert ours.fired.sum() == 9 * 2300
    assert len(passes) == (2 if first_rows > 1 else 1)


@pytest.mark.slow  # the largest size: a quarter of a million pairs and more
@pytest.mark.parametrize("step_type", STEPS)
@pytest.mark.parametrize("density", BIASES)
def test_a_batch_of_4096(step_type, density):
    objective = Objective(NONLINEARITIES["prolu_ste"], PENALTIES["sqrt_l1"], 0.03)
    weights, x = at_density(63, 1000, density, torch.float64), sparse_activations(4096, 63)
    reference, theirs = DenseStep(weights, 4096).gradients(weights, x, objective)
    gradients, ours = step_type(weights, 4096).gradients(weights, x, objective)
    compare(ours, theirs, gradients, reference, 1e-13)


def test_one_pair_in_the_whole_batch():
    objective = Objective(NONLINEARITIES["prolu_ste"], L1(), 0.03)
    weights, x = random_weights(8, 50), sparse_activations(40, 8)
    m = (x - weights.b_dec) @ weights.encoder.T
    best = m.flatten().sort(descending=True).values
    weights.own["b_enc"].fill_(-(best[0] + best[1]).item() / 2)
    reference, theirs = DenseStep(weights, 40).gradients(weights, x, objective)
    assert theirs.fired.sum() == 1
    for step_type in STEPS:
        gradients, ours = step_type(weights, 40).gradients(weights, x, objective)
        compare(ours, theirs, gradients, reference, 1e-13)


@pytest.mark.parametrize("step_type", STEPS)
def test_nothing_on_at_all(step_type):
    weights, x = random_weights(8, 50), sparse_activations(40, 8)
    weights.own["b_enc"].fill_(-1e6)
    gradients, stats = step_type(weights, 40).gradients(weights, x, Objective(NONLINEARITIES["relu"], L1(), 0.1))
    assert not gradients.encoder.any()
    assert not gradients.decoder.any()
    assert gradients.b_dec.abs().sum() > 0
    assert stats.fired.sum() == 0


@pytest.mark.parametrize("step_type", STEPS)
@pytest.mark.parametrize("ste", [torch.exp, lambda x: x.clamp(-1, 1), lambda x: ((x > 0) & (x < 1)).to(x.dtype)])
def test_another_straight_through_estimator_reaches_latents_that_are_off(step_type, ste):
    nonlinearity = GeneralisedProLU(0.5, 1.0, 0.5, ste)
    weights, x = random_weights(9, 30), sparse_activations(40, 9, dtype=torch.float64)
    objective = Objective(nonlinearity, PENALTIES["sqrt_l1"], 0.03)
    reference, theirs = DenseStep(weights, 40).gradients(weights, x, objective)
    gradients, ours = step_type(weights, 40).gradients(weights, x, objective)
    compare(ours, theirs, gradients, reference, 1e-12)
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    f = prolu.prolu((x - leaves.b_dec) @ leaves.encoder.T, leaves.own["b_enc"], nonlinearity)
    penalty = torch.sqrt(f + 1e-6).sum(-1).mean()
    ((x - f @ leaves.decoder - leaves.b_dec).square().mean() + 0.03 * penalty).backward()
    for ours, autograds in zip(reference.tensors(), leaves.tensors(), strict=True):
        assert relative(ours, autograds.grad) < 1e-12


@pytest.mark.parametrize("step_type", STEPS)
@pytest.mark.parametrize(("nonlinearity", "penalty"), COMBINATIONS)
def test_twenty_updates_follow_the_dense_step(step_type, nonlinearity, penalty):
    objective = Objective(NONLINEARITIES[nonlinearity], PENALTIES[penalty], 0.02)
    exact = twenty_updates(DenseStep, objective, torch.float64)
    for ours, theirs in zip(twenty_updates(step_type, objective, torch.float64), exact, strict=True):
        assert relative(ours, theirs) < 1e-10
    dense = twenty_updates(DenseStep, objective, torch.float32)
    steep = (nonlinearity, penalty) == ("relu", "sqrt_l1")  # slope 500 at zero: both amplify rounding, by chance
    for ours, theirs, true in zip(twenty_updates(step_type, objective, torch.float32), dense, exact, strict=True):
        if steep:
            assert relative(ours, true) < max(1e-5, 3 * relative(theirs, true))
        else:
            assert relative(ours, theirs) < 1e-5


def twenty_updates(step_class, objective, dtype):
    """Weights and both moments after them."""
    weights = at_density(20, 90, "sparse", dtype)
    moments, step = Moments.zeros_like(weights), step_class(weights, 64)
    for n in range(20):
        x = sparse_activations(64, 20, seed=n, dtype=dtype)
        step.update_(weights, moments, x, objective, Update(n, lr=1e-3))
    return (*weights.tensors(), *moments.tensors())


@pytest.mark.parametrize("step_type", STEPS)
def test_buffers_keep_nothing_between_calls(step_type):
    objective = Objective(NONLINEARITIES["prolu_ste"], PENALTIES["sqrt_l1"], 0.1)
    weights = random_weights(8, 20)
    shared = step_type(weights, 64)
    shared.gradients(weights, sparse_activations(64, 8, seed=1), objective)
    x = sparse_activations(40, 8, seed=2)
    again = shared.gradients(weights, x, objective)[0].map(torch.clone)
    fresh = step_type(weights, 40).gradients(weights, x, objective)[0]
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), fresh.tensors(), strict=True))


def test_the_choice_follows_density_with_hysteresis():
    assert next_step_kind("dense", 0.19, 0.2) == "dense"
    assert next_step_kind("dense", 0.17, 0.2) == "sparse"
    assert next_step_kind("sparse", 0.21, 0.2) == "sparse"
    assert next_step_kind("sparse", 0.23, 0.2) == "dense"
    assert 0 < crossover_density("cpu", 768, 12_288) < 1
    assert crossover_density("abacus", 768, 12_288) == 0
    assert crossover_density("cpu", 768, 12_288, "tf32") == 0


def test_in_bf16_the_dense_step_is_chosen_at_lower_densities():
    for d_in, d_sae in [(64, 1024), (576, 4608), (768, 12_288)]:
        assert 0 < crossover_density("cpu", d_in, d_sae, "bf16") < crossover_density("cpu", d_in, d_sae, "fp32")


def test_a_run_starts_dense_and_becomes_sparse():
    trainer = Trainer(RunConfig(d_sae=256, n_tokens=64_000, coeff=0.3, lr=1e-2), 16, 64)
    kinds = []
    for seed in range(300):
        kinds.append(trainer.state.step)
        trainer.step(sparse_activations(64, 16, seed=seed % 50, dtype=torch.float32))
    assert kinds[0] == "dense"
    assert kinds[-1] == "sparse"


@pytest.mark.parametrize("step", ["dense", "sparse", "sparse_torch"])
def test_a_kind_of_step_can_be_forced(step):
    trainer = Trainer(RunConfig(d_sae=64, n_tokens=6400, step=step), 16, 64)
    for seed in range(3):
        trainer.step(sparse_activations(64, 16, seed=seed, dtype=torch.float32))
    assert trainer.state.step == step


class LargestOutput(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave back."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize(("step_type", "module"), [(SparseNumbaStep, pair_finder), (SparseTorchStep, sparse_torch)])
def test_nothing_of_size_batch_by_d_sae_is_made(monkeypatch, step_type, module):
    """Peak of a step: weights, Adam's moments, gradients, one chunk of m, error and centred input, the pairs."""
    monkeypatch.setattr(module, "ROWS_PER_CHUNK", 16)
    batch, d_in, d_sae = 512, 8, 700
    weights, x = at_density(d_in, d_sae, "sparse", torch.float32), sparse_activations(batch, d_in, dtype=torch.float32)
    weights.own["b_enc"].fill_(-0.25)
    objective = Objective(NONLINEARITIES["prolu_ste"], PENALTIES["sqrt_l1"], 0.03)
    step = step_type(weights, batch)
    moments = Moments.zeros_like(weights)
    with LargestOutput() as largest:
        stats = step.update_(weights, moments, x, objective, Update(0, lr=1e-3))
    n_pairs = int(stats.fired.sum())
    assert 0 < n_pairs < batch * d_sae / 8
    assert largest.entries <= max(16 * d_sae, 2 * n_pairs, d_in * d_sae)


@pytest.mark.parametrize(("n_torch", "n_numba"), [(1, 2), (2, 1)])
def test_numba_leaves_the_number_of_pytorchs_threads_alone(n_torch, n_numba):
    """Both share OpenMP. A process of its own, because numba starts its threads once."""
    steps = f"""
import torch
torch.set_num_threads({n_torch})
from prolu import RunConfig, Trainer
trainer = Trainer(RunConfig(d_sae=16, n_tokens=128, coeff=0.1, step="sparse"), 8, 64)
trainer.step(torch.randn(64, 8))
print(type(trainer.steps["sparse"]).__name__, torch.get_num_threads())
"""
    environment = os.environ | {"NUMBA_NUM_THREADS": str(n_numba)}
    done = subprocess.run([sys.executable, "-c", steps], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SparseNumbaStep", str(n_torch)]


def test_an_unknown_kind_of_step_is_refused():
    weights = random_weights(8, 16)
    with pytest.raises(ValueError, match=r"^step 'unknown kind': must be one of dense, sparse, sparse_torch$"):
        Steps(weights, 4)["unknown kind"]
