"""The L0 controller: on a made-up plant, in a real run, through a checkpoint."""

import math
from dataclasses import replace

import pytest
import torch

from prolu import RunConfig, Trainer
from prolu.studies.recipes import RECIPES
from prolu.training.target_l0 import L0ControllerState
from support.synthetic import sparse_activations

CONFIG = RunConfig(
    nonlinearity="relu", penalty="l1", coeff=0.02, target_l0=6.0, d_sae=96, n_tokens=1500 * 64, lr=3e-3,
    decay_start_fraction=0.5, lr_floor=0.02,
)  # fmt: skip


def plant(elasticity, power, lag):
    """L0 of a made-up SAE: follows coeff^-elasticity * updates^-power with a lag, from half of 1,000 latents."""
    l0 = 500.0

    def respond(coeff, n_updates):
        nonlocal l0
        settled = 2 * coeff**-elasticity * (1 + n_updates / 500) ** -power
        l0 *= (settled / l0) ** (1 / lag)
        return l0

    return respond


@pytest.mark.parametrize(("elasticity", "power", "lag"), [(0.8, 0.0, 30), (0.8, 0.3, 100), (0.5, 0.6, 100)])
@pytest.mark.parametrize("start", [1e-4, 1e-2, 1.0])
def test_it_finds_the_target_whatever_the_plant_and_the_start(elasticity, power, lag, start):
    config = replace(CONFIG, n_tokens=4000 * 64, target_l0=20.0, coeff=start, d_sae=1000)
    controller = config.l0_controller(64)
    respond = plant(elasticity, power, lag)
    state = L0ControllerState(start)
    coeffs, l0s = [], []
    for n in range(4000):
        coeffs.append(controller.coeff(state, n))
        l0s.append(respond(coeffs[-1], n))
        state = controller.after(state, l0s[-1], n + 1)
    assert l0s[2799] == pytest.approx(20, rel=0.04)
    assert len(set(coeffs[2800:])) == 1
    assert power > 0 or l0s[-1] == pytest.approx(20, rel=0.04)


def test_a_run_ends_near_its_target_and_says_what_coefficient_it_took():
    trainer = Trainer(CONFIG, 16, 64)
    data = [sparse_activations(64, 16, n_features=48, seed=s, dtype=torch.float32) for s in range(50)]
    data = torch.cat(data)
    g = torch.Generator().manual_seed(0)
    for _ in range(trainer.n_steps):
        trainer.step(data[torch.randint(len(data), (64,), generator=g)])
    n_active = (trainer.sae().encode_normalised(data) > 0).sum(1).double().mean().item()
    assert n_active == pytest.approx(6, rel=0.1)
    assert trainer.coeff != CONFIG.coeff


@pytest.mark.parametrize("target", [3.0, 6.0])
def test_a_jumprelu_does_not_fall_through_its_target(target):
    """Its thresholds rise by the learning rate at most, in their logarithm, and hardly fall again."""
    config = replace(
        CONFIG, nonlinearity="jumprelu", penalty="l0", coeff=1.2e-3, lr=4e-3, warmup_fraction=0.05, target_l0=target
    )
    trainer = Trainer(config, 16, 64)
    data = torch.cat([sparse_activations(64, 16, n_features=48, seed=s, dtype=torch.float32) for s in range(50)])
    g = torch.Generator().manual_seed(0)
    for _ in range(trainer.n_steps):
        trainer.step(data[torch.randint(len(data), (64,), generator=g)])
    n_active = (trainer.sae().encode_normalised(data) > 0).sum(1).double().mean().item()
    assert n_active == pytest.approx(target, rel=0.1)


def falling(start, end, n):
    """L0s that fall from one to the other by the same factor at each of n steps."""
    return [start * (end / start) ** (i / (n - 1)) for i in range(n)]


def test_a_braking_controller_lowers_the_coefficient_while_l0_falls():
    config = replace(CONFIG, nonlinearity="jumprelu", penalty="l0", n_tokens=4000 * 64, target_l0=20.0)
    coeffs = {}
    for braking in (False, True):
        controller = replace(config, l0_braking=braking).l0_controller(64)
        state = L0ControllerState(1e-3)
        for n, l0 in enumerate(falling(1000, 20, 1000)):
            state = controller.after(state, l0, n + 1)
        coeffs[braking] = controller.coeff(state, 1000)
    assert coeffs[False] > 0.1
    assert coeffs[True] < 1e-3


@pytest.mark.parametrize("braking", [False, True])
def test_in_tensors_it_does_what_it_does_in_numbers(braking):
    config = replace(CONFIG, nonlinearity="jumprelu", penalty="l0", target_l0=20.0, l0_braking=braking)
    alone = config.l0_controller(64)
    targets = torch.tensor([20.0, 50.0], dtype=torch.float64)
    stack = replace(alone, target=targets)
    numbers = [L0ControllerState(1e-3), L0ControllerState(1e-3)]
    tensors = L0ControllerState(torch.full((2,), 1e-3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    for n, l0 in enumerate([*falling(500, 5, 900), 0.0, *falling(5, 40, 300)]):
        tensors = stack.after(tensors, torch.tensor([l0, 2 * l0], dtype=torch.float64), n + 1)
        numbers = [
            replace(alone, target=float(target)).after(state, factor * l0, n + 1)
            for target, state, factor in zip(targets, numbers, (1, 2), strict=True)
        ]
        coeffs = [replace(alone, target=float(t)).coeff(s, n + 1) for t, s in zip(targets, numbers, strict=True)]
        assert stack.coeff(tensors, n + 1).tolist() == pytest.approx(coeffs, rel=1e-9)


def test_a_checkpoint_holds_the_controller():
    def train(trainer, first, last):
        for seed in range(first, last):
            trainer.step(sparse_activations(64, 16, seed=seed, dtype=torch.float32))

    short = replace(CONFIG, n_tokens=200 * 64)
    whole, cut = Trainer(short, 16, 64), Trainer(short, 16, 64)
    train(whole, 0, 200)
    train(cut, 0, 97)
    tensors = {name: t.clone() for name, t in cut.state.tensors().items()}
    resumed = Trainer(short, 16, 64)
    resumed.restore_(tensors, cut.state.counters())
    train(resumed, 97, 200)
    assert resumed.state.l0_controller == whole.state.l0_controller
    for a, b in zip(resumed.state.weights.tensors(), whole.state.weights.tensors(), strict=True):
        assert torch.equal(a, b)
    for wrong in ([1.0], [math.nan, 0.0], [-1.0, 0.0]):
        with pytest.raises(ValueError, match="state of the L0 controller"):
            resumed.restore_(tensors, cut.state.counters() | {"steered": wrong})


def test_off_by_default_and_the_coefficient_warms_up_where_asked():
    plain = Trainer(RunConfig(d_sae=20, n_tokens=640, coeff=0.01, coeff_warmup_fraction=0.5), 8, 64)
    seen = []
    for seed in range(10):
        seen.append(plain.coeff)
        plain.step(sparse_activations(64, 8, seed=seed, dtype=torch.float32))
    assert seen == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01])
    assert RunConfig().l0_controller(4096) is None
    of_paper = [name for name in RECIPES if name.startswith("experiment")]
    assert len(of_paper) == 3
    assert all(run.target_l0 is None for name in (*of_paper, "demo") for run in RECIPES[name].runs_at(768))


def test_of_topk_the_target_is_the_k():
    run = RunConfig(nonlinearity="topk", penalty="none", target_l0=32.0)
    assert run.resolved_nonlinearity == "topk(32)"
    assert run.l0_controller(4096) is None
    assert run.family == "topk"
    assert RunConfig(nonlinearity="topk(7)", penalty="none").family == "topk"
    assert run.run_id == "topk-none-L32-lr0.001-d12288-s0"


def test_any_study_can_be_had_at_target_l0s():
    runs = RECIPES["demo"].at_targets((8, 32)).runs_at(128)
    assert len(runs) == 12
    assert {run.target_l0 for run in runs} == {8.0, 32.0}
    assert len({run.run_id for run in runs}) == 12


def test_the_comparison_has_its_families_targets_and_seeds():
    runs = RECIPES["comparison"].runs_at(128)
    assert {run.d_sae for run in runs} == {1024}
    assert len({run.family for run in runs}) == 10
    assert len({run.run_id for run in runs}) == len(runs) == 10 * 4 * 3
    assert min(run.n_tokens for run in runs) >= 2_000_000
    assert {run.target_l0 for run in runs} == {8, 16, 32, 64}
