"""The paper's 108 configurations, written out a second time from the method's tables."""

import json
from dataclasses import replace

import pytest

from prolu import ActivationStream, run_sweep
from prolu.activations.synthetic import HARD
from prolu.cli.entry_point import main
from prolu.studies.recipes import RECIPES, recipe_named
from support.sweeps import HOOK, contents

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


@pytest.mark.parametrize(("name", "n_tokens"), [("demo", 100_003), ("experiment1", 4_000_000), ("comparison", 1)])
def test_a_number_of_tokens_is_a_scale(name, n_tokens):
    recipe = recipe_named(name).of_length(n_tokens)
    runs = recipe.runs_at(128)
    assert recipe.n_tokens == n_tokens
    assert {run.n_tokens for run in runs} == {n_tokens}
    if name == "experiment1":
        assert runs == recipe_named(name).scaled(0.01).runs_at(128)


def dry_runs(capsys, *words):
    """The runs that `prolu sweep` would train."""
    assert main(["sweep", *words, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["runs"]


@pytest.mark.parametrize("name", RECIPES)
def test_overrides_replace_what_a_recipe_has_in_all_its_runs(name, capsys):
    where = ["--lm", "builtin", "--hook", "blocks.2.hook_resid_pre"]
    before = dry_runs(capsys, name, *where)
    after = dry_runs(capsys, name, *where, "--d-sae", "192", "--lr", "0.003", "--n-tokens", "1e6")
    (unscaled, *_) = dry_runs(capsys, name, *where, "--normalisation", "none")
    assert len(after) == len(before) > 0
    assert unscaled == before[0] | {"normalisation": "none"}
    changed = {"d_sae": 192, "lr": 0.003, "n_tokens": 1_000_000}
    for old, new in zip(before, after, strict=True):
        # The prefixes of nested losses stay the same fractions.
        prefixes = [n * 192 // old["d_sae"] for n in old.get("matryoshka", [])]
        follows = {"resample_candidates": new["resample_candidates"]} | ({"matryoshka": prefixes} if prefixes else {})
        assert new == old | changed | follows


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--n-tokens", "1000", "--scale", "0.5"], "n_tokens 1000 and scale 0.5: give one of the two"),
    (["--n-tokens", "0"], "n_tokens 0: must be at least 1"),
    (["--d-sae", "0"], "d_sae 0: must be at least 1"),
    (["--lr", "0"], "lr 0.0: must be more than 0, and finite"),
    (["--d-sae", "16", "--target-l0", "16"], "target_l0 16.0: must be more than 0 and less than d_sae, or None"),
])  # fmt: skip
def test_wrong_overrides_are_refused(flags, sentence, capsys):
    assert main(["sweep", "demo", "--dry-run", *flags]) == 2
    assert capsys.readouterr().err == f"prolu: {sentence}\n"


def test_a_demo_with_another_number_of_latents_is_refused_or_resumed(tiny_lm_folder, stories_file, tmp_path, capsys):
    """Until version 0.1.0 was complete, the demo had 512 latents at every width."""
    out = tmp_path / "demo"
    where = ["--lm", tiny_lm_folder, "--hook", HOOK, "--data", stories_file, "--ctx", "32", "--eval-tokens", "320"]
    size = ["--n-tokens", "640", "--batch-size", "64", "--latent-pages", "none", "--out", out]
    command = ["sweep", "demo", *map(str, [*where, *size])]
    assert main([*command, "--d-sae", "24"]) == 0
    before = contents(out)
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err.endswith(
        f"prolu: out {str(out)!r} holds another study: runs.0.d_sae is 24 there, 64 here; choose another folder\n"
    )
    assert contents(out) == before
    assert main([*command, "--d-sae", "24"]) == 0
    assert contents(out) == before


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


def test_what_is_compared_in_2026():
    runs = recipe_named("comparison2026").runs_at(128)
    assert len(runs) == 12 * 4 * 3
    assert {run.family for run in runs} == {
        "relu + l1", "prolu_relu + sqrt_l1", "jumprelu(1) + l0", "jumprelu_plain(1) + quadratic_l0",
        "jumprelu_ste + tanh", "batchtopk", "batchtopk, matryoshka", "jumprelu(1) + l0, matryoshka",
        "prolu_relu + sqrt_l1, matryoshka", "batchtopk, frozen decoder", "batchtopk, soft-frozen decoder",
        "batchtopk, frozen encoder",
    }  # fmt: skip
    assert {run.matryoshka for run in runs} == {(), (64, 128, 256, 512)}
    assert len({run.run_id for run in runs}) == len(runs)
    wider = recipe_named("comparison2026").of_width(2048).runs_at(128)
    assert {run.matryoshka for run in wider} == {(), (128, 256, 512, 1024)}
    # All else is equal, but where the L0 controller starts.
    varied = {"nonlinearity": "relu", "penalty": "l1", "coeff": 1.0, "target_l0": 8.0, "init_seed": 0}
    assert len({replace(run, **varied, matryoshka=(), freeze="none") for run in runs}) == 1


def test_the_study_of_known_features_has_random_baselines_and_rows_as_they_are():
    recipe = RECIPES["synthetic"]
    assert recipe.source["activations"] == "synthetic:hard"
    runs = recipe.runs_at(HARD.d_in)
    assert len(runs) == 7 * 3 * 3
    assert {run.target_l0 for run in runs} == {HARD.l0 / 2, HARD.l0, 2 * HARD.l0}
    assert {run.d_sae for run in runs} == {2 * HARD.n_features}
    assert {run.normalisation for run in runs} == {"none"}
    assert {run.freeze for run in runs} == {"none", "decoder", "encoder"}
    assert len({run.run_id for run in runs}) == len(runs)


def test_a_study_can_be_cut_to_some_penalties():
    recipe = recipe_named("experiment1")
    chosen = recipe.with_penalties(["sqrt_l1"]).runs_at(64)
    assert chosen == [run for run in recipe.runs_at(64) if run.penalty == "sqrt_l1"]
    assert len(chosen) == 15
    # A penalty that follows from the nonlinearity counts as that penalty.
    assert {run.nonlinearity for run in recipe_named("comparison").with_penalties(["none"]).runs_at(64)} == {
        "topk",
        "batchtopk",
    }


def test_a_penalty_that_a_study_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"penalty 'l0': choose one of l1, sqrt_l1"):
        recipe_named("experiment1").with_penalties(["l0"]).runs_at(64)
