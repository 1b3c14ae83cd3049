"""The paper's 108 configurations, written out a second time from the method's tables."""

from dataclasses import replace

import pytest

from prolu import ActivationStream, run_sweep
from prolu.studies.recipes import RECIPES, recipe_named

# coefficient of i, how many, learning rate, resampled encoder norm, multipliers
TABLE = {
    "experiment1": (lambda i: 0.0003 * 2**i, 5, 0.001, 0.02, {}),
    "experiment2": (lambda i: 0.0003 * 1.58**i, 8, 0.0003, 0.02, {}),
    "experiment3": (
        lambda i: 0.0004 * 1.5**i, 5, 0.001, 0.2,
        {
            "prolu_ste + l1": 0.3, "prolu_relu + l1": 3, "relu + l1": 3,
            "relu + sqrt_l1": 2, "prolu_relu + sqrt_l1": 2, "prolu_ste + sqrt_l1": 2,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "n_runs"), [("experiment1", 30), ("experiment2", 48), ("experiment3", 30)])
def test_the_papers_configurations(name, n_runs):
    coefficient, n, lr, encoder_norm, multipliers = TABLE[name]
    recipe = RECIPES[name]
    runs, source = recipe.runs_at(768), recipe.source
    assert len(runs) == n_runs
    assert recipe.batch_size == 4096
    assert {run.n_tokens for run in runs} == {recipe.n_tokens}
    assert (source["lm"], source["hook"]) == ("gpt2", "blocks.6.hook_resid_pre")
    assert (source["split"], source["eval_split"], source["eval_tokens"]) == ("train[0:40%]", "train[90:95%]", 819_200)
    found = {(run.nonlinearity, run.penalty, f"{run.coeff:.10e}") for run in runs}
    expected = {
        (nonlinearity, penalty, f"{coefficient(i) * multipliers.get(f'{nonlinearity} + {penalty}', 1):.10e}")
        for nonlinearity in ("relu", "prolu_relu", "prolu_ste")
        for penalty in ("l1", "sqrt_l1")
        for i in range(n)
    }
    assert found == expected
    assert len({run.run_id for run in runs}) == n_runs
    for run in runs:
        assert run.lr == lr
        assert run.n_steps(4096) == 97_656
        assert run.d_sae == 12_288
        assert run.normalisation == "per_token"
        assert run.initial_bias == 0
        schedule, resampling = run.schedule(4096), run.resampling(4096)
        assert (schedule.warmup_steps, schedule.restart_steps) == (2000, (25_000, 50_000))
        assert (schedule.decay_start_step, schedule.decay_end_step, schedule.floor) == (75_000, 95_000, 0.1)
        assert (resampling.steps, resampling.count_steps) == ((25_000, 50_000), 12_500)
        assert (resampling.dead_below, resampling.n_candidates, resampling.max_raw_norm) == (3e-6, 819_200, 2500)
        assert (resampling.exponent, resampling.second_moment) == (1, "mean")
        assert resampling.encoder_norm == encoder_norm


def test_another_width_scales_coefficients_and_cuts_no_norms():
    wide, narrow = (RECIPES["experiment1"].runs_at(d_in)[0] for d_in in (768, 128))
    assert narrow.coeff == pytest.approx(6 * wide.coeff)
    assert narrow.d_sae == 16 * 128
    assert narrow.resample_max_raw_norm is None


def test_a_scale_shrinks_everything_together():
    full = recipe_named("experiment1")
    small = full.scaled(0.01)
    assert full.scaled(1) == full
    assert small.n_tokens == 4_000_000
    run = small.runs_at(768)[7]
    assert (run.n_tokens, run.resample_candidates, run.n_steps(4096)) == (4_000_000, 8192, 976)
    schedule, resampling = run.schedule(4096), run.resampling(4096)
    assert (schedule.warmup_steps, schedule.decay_start_step, schedule.decay_end_step) == (20, 750, 949)
    assert (resampling.steps, resampling.count_steps) == ((250, 500), 125)
    with pytest.raises(ValueError, match="scale 0"):
        full.scaled(0)


@pytest.mark.slow  # trains 30 SAEs
def test_the_first_sweep_runs_end_to_end_at_a_tiny_scale(tiny_lm, tiny_blocks, tmp_path):
    recipe = RECIPES["experiment1"].scaled(0.0004)._replace(batch_size=256)
    # At the paper's rate so few steps kill no latent.
    runs = [replace(run, lr=0.02) for run in recipe.runs_at(tiny_lm.d_in)]
    stream = ActivationStream(tiny_lm, tiny_blocks, batch_size=recipe.batch_size)
    results = run_sweep(runs, stream, tmp_path / "experiment1", eval_tokens=320, max_epochs=10, progress=False)
    assert len(results.runs) == 30
    for run in results.runs:
        assert [entry["step"] for entry in run.record["resampled"]] == [160, 320]
        assert run.record["degradation"] == pytest.approx(run.record["ce_recon"] - run.record["ce_clean"])
    assert any(entry["n_reborn"] for run in results.runs for entry in run.record["resampled"])
