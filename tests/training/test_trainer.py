"""Trainer, schedule, initial weights, and the golden run."""

import json
from pathlib import Path

import pytest
import torch

from prolu import RunConfig, Trainer
from prolu.runtime.mesh import ALONE
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.saved_sae import SAEConfig
from prolu.sae.scaling import normalise
from prolu.training.dead_latents import DeadLatents
from prolu.training.schedule import Schedule
from prolu.training.starting_weights import initial_weights
from support.synthetic import sparse_activations

GOLDEN = Path(__file__).parent / "golden" / "loss.json"
FAMILIES = [(n, p) for n in ("relu", "prolu_relu", "prolu_ste") for p in ("l1", "sqrt_l1")]


def golden_losses(nonlinearity, penalty):
    """Loss of 200 fp64 steps on synthetic sparse data, batch 32, 16 -> 64."""
    config = RunConfig(nonlinearity=nonlinearity, penalty=penalty, coeff=0.01, d_sae=64, n_tokens=200 * 32, init_seed=1)
    trainer = Trainer(config, 16, 32, dtype=torch.float64)
    losses = []
    for step in range(200):
        stats = trainer.step(sparse_activations(32, 16, seed=step)).stats
        losses.append(stats.mse.item() + config.coeff * stats.penalty.item())
    return losses


@pytest.mark.parametrize(("nonlinearity", "penalty"), FAMILIES)
def test_golden_run_repeats_its_stored_loss(nonlinearity, penalty):
    """To store a new curve after a change of numbers: python tests/training/test_trainer.py."""
    golden = json.loads(GOLDEN.read_text())
    stored, losses = golden[f"{nonlinearity} + {penalty}"], golden_losses(nonlinearity, penalty)
    # Another torch sums in another order; training makes of its last bits 5e-9 by step 164 (2.6, relu + sqrt_l1).
    n = len(stored) if torch.__version__ == golden["torch"] else 100
    assert losses[:n] == pytest.approx(stored[:n], rel=1e-9)
    assert losses[-1] < 0.6 * losses[0]


def test_decoder_rows_stay_of_unit_norm_and_every_parameter_moves():
    trainer = Trainer(RunConfig(d_sae=40, n_tokens=3200, coeff=0.01), 8, 32)
    before = trainer.state.weights.map(torch.clone)
    for seed in range(20):
        trainer.step(sparse_activations(32, 8, seed=seed, dtype=torch.float32))
    after = trainer.state.weights
    torch.testing.assert_close(after.decoder.norm(dim=1), torch.ones(40))
    for a, b in zip(before.tensors(), after.tensors(), strict=True):
        assert not torch.equal(a, b)


def test_a_step_leaves_its_batch_alone():
    trainer, x = (
        Trainer(RunConfig(d_sae=40, n_tokens=3200), 8, 32),
        sparse_activations(32, 8, dtype=torch.float32),
    )
    kept = x.clone()
    trainer.step(x)
    assert torch.equal(x, kept)


def test_silent_latents_are_counted():
    trainer = Trainer(RunConfig(d_sae=40, n_tokens=3200, coeff=0.01), 8, 32)
    trainer.state.weights.own["b_enc"][:7] = -1e3
    for seed in range(30):
        report = trainer.step(sparse_activations(32, 8, seed=seed, dtype=torch.float32))
    assert trainer.summary(report)["dead"] == 7


def test_initial_weights_are_those_of_the_method():
    weights = initial_weights(SAEConfig(d_in=768, d_sae=12_288), init_seed=0)
    assert weights.encoder.norm(dim=1).mean().item() == pytest.approx(0.354, abs=1e-3)
    assert weights.encoder.abs().max() <= (6 / 12_288) ** 0.5
    torch.testing.assert_close(weights.decoder, weights.encoder / weights.encoder.norm(dim=1, keepdim=True))
    assert not weights.b_dec.any()
    assert not weights.own["b_enc"].any()
    other = initial_weights(SAEConfig(d_in=768, d_sae=12_288), init_seed=1)
    assert not torch.equal(weights.encoder, other.encoder)


def test_schedule_gives_the_papers_values():
    factor = Schedule(warmup_steps=2000, decay_start_step=75_000, decay_end_step=95_000, floor=0.1).factor
    assert factor(0) == 1 / 2000
    assert factor(1999) == factor(2000) == factor(75_000) == 1
    assert factor(85_000) == pytest.approx(0.5)
    assert factor(93_000) == pytest.approx(0.1)
    assert factor(97_655) == 0.1


def test_schedule_scales_with_the_run():
    config = RunConfig(n_tokens=1000 * 64, warmup_fraction=0.1, decay_start_fraction=0.8, lr_floor=0.0)
    schedule = config.schedule(64)
    assert (schedule.warmup_steps, schedule.decay_start_step, schedule.decay_end_step) == (100, 800, 1000)
    assert config.probe_steps(64) == (640, 800)
    assert schedule.factor(999) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("coeff", -1.0, "must be 0 or more"), ("coeff", float("nan"), "must be a number"),
        ("nonlinearity", "gelu", "relu, prolu_relu, prolu_ste"), ("penalty", "l2", "l1, sqrt_l1"),
        ("lr", 0.0, "more than 0"), ("d_sae", 0, "at least 1"), ("n_tokens", -5, "at least 1"),
        ("warmup_fraction", 0.9, "schedule"), ("lr_floor", 2.0, "between 0 and 1"),
        ("normalisation", "z", "choose one of per_token, none"),
    ],
)  # fmt: skip
def test_wrong_configs_name_the_field_and_what_is_valid(field, value, words):
    config = RunConfig()
    object.__setattr__(config, field, value)  # the tests' own type checker would be quicker than the config's checks
    with pytest.raises(ValueError, match=words):
        config.__post_init__()


if __name__ == "__main__":
    curves = {f"{n} + {p}": golden_losses(n, p) for n, p in FAMILIES}
    GOLDEN.write_text(json.dumps({"torch": torch.__version__, **curves}, indent=1) + "\n")


def test_a_member_of_the_generalised_family_trains_and_has_a_folder_name_without_brackets():
    config = RunConfig(nonlinearity="prolu(0.5,1,0)", d_sae=24, n_tokens=320)
    assert config.run_id.startswith("prolu_0.5_1_0-l1-")
    trainer = Trainer(config, 6, 32)
    for seed in range(10):
        trainer.step(sparse_activations(32, 6, seed=seed, dtype=torch.float32))
    assert (trainer.sae().b_enc != 0).any()


@pytest.mark.parametrize("step", ["dense", "sparse", "sparse_torch"])
def test_activations_may_be_strided_and_carry_gradients(step):
    x = sparse_activations(32, 6, dtype=torch.float32)
    ends = []
    for acts in (x, x.T.contiguous().T, torch.cat([x, x], 1)[:, :6], x.clone().requires_grad_()):
        trainer = Trainer(RunConfig(d_sae=24, n_tokens=320, step=step), 6, 32)
        for _ in range(3):
            trainer.step(acts)
        ends.append(trainer.state.weights.tensors())
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_rows_that_are_not_scaled_are_trained_on_with_a_warning(caplog):
    scaled = normalise(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))[0]
    scaled[3] = 0
    Trainer(RunConfig(d_sae=16, n_tokens=640), 8, 64).step(scaled)
    assert not caplog.text
    trainer = Trainer(RunConfig(d_sae=16, n_tokens=640), 8, 64)
    for _ in range(2):
        trainer.step(3 * scaled)
    assert caplog.text.count("the trainer expects rows scaled to norm sqrt(d_in) = 2.828") == 1
    caplog.clear()
    Trainer(RunConfig(d_sae=16, n_tokens=640, normalisation="none"), 8, 64).step(3 * scaled)
    assert not caplog.text


def test_a_step_beyond_the_last_is_refused():
    trainer = Trainer(RunConfig(d_sae=16, n_tokens=128), 8, 64)
    acts = normalise(torch.randn(64, 8))[0]
    trainer.step(acts)
    trainer.step(acts)
    with pytest.raises(ValueError, match="the run has 2 steps"):
        trainer.step(acts)


def test_a_gpu_is_asked_for_dead_latents_at_every_step_at_which_some_can_be():
    g = torch.Generator().manual_seed(0)
    term = nonlinearity_named("topk(3)").in_training.auxiliary
    watch = DeadLatents(term, dead_tokens=95, batch_size=10, mesh=ALONE)
    last_fired = torch.zeros(6, dtype=torch.int64)
    looked, missed = 0, 0
    for n_updates in range(3000):
        dead = n_updates - last_fired >= 10
        before = watch._next_look
        some = watch._some_on_gpu(last_fired, n_updates)
        looked += watch._next_look != before
        missed += bool(dead.any()) and not some
        # Five latents fire often; one is silent for 500 steps at a time.
        fires = torch.rand(6, generator=g) < 0.6
        fires[5] = n_updates % 1000 < 500
        last_fired[fires] = n_updates + 1
    assert missed == 0
    assert looked < 800  # far fewer than 3000 readings, although 10 steps of silence are enough here
