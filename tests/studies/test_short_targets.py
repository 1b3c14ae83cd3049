"""Target L0s in short runs: a new one reaches it, and one that an earlier version began is resumed as it was."""

import json
from dataclasses import replace

import pytest

from prolu import RunConfig, grid
from prolu.studies.extension import runs_as_begun
from prolu.studies.folder import STUDY_FILE
from support.interruptions import dies_at_step
from support.sweeps import contents, stream_over, sweep

BASE = RunConfig(
    d_sae=96, n_tokens=200 * 64, lr=4e-3, coeff=0.02, warmup_fraction=0.05, coeff_warmup_fraction=0.05,
    decay_start_fraction=0.5, lr_floor=0.02, target_l0=6.0,
)  # fmt: skip
RUNS = grid(BASE, nonlinearity=["relu", "prolu_relu"])
AS_BEFORE = [replace(run, l0_integration_steps=1.0) for run in RUNS]


def test_the_field_is_recorded_where_it_decides_something():
    assert RUNS[0].describe()["l0_integration_steps"] == 10.0
    assert "l0_integration_steps" not in AS_BEFORE[0].describe()
    assert "l0_integration_steps" not in replace(BASE, target_l0=None).describe()
    assert "l0_integration_steps" not in replace(BASE, nonlinearity="topk").describe()


@pytest.mark.parametrize(("n_steps", "now", "before"), [(15, 10, 1), (200, 10, 5), (400, 10, 10), (4000, 100, 100)])
def test_it_decides_in_runs_of_fewer_than_400_steps(n_steps, now, before):
    run = replace(BASE, n_tokens=n_steps * 64)
    assert run.l0_controller(64).steps == now
    assert replace(run, l0_integration_steps=1.0).l0_controller(64).steps == before


@pytest.mark.parametrize("value", [0.0, 0.9, -1.0, float("inf")])
def test_what_is_no_time_is_refused(value):
    with pytest.raises(ValueError, match=r"^l0_integration_steps .*: must be"):
        replace(BASE, l0_integration_steps=value)


def check_resumed_as_begun(as_before, runs, field, stream, folder):
    """A study of an earlier version, whose config lacks a field, is resumed by runs with today's default of it."""
    sweep(as_before, stream, folder / "whole")
    assert field not in (folder / "whole" / STUDY_FILE).read_text()
    dies_at_step(120, lambda: sweep(as_before, stream, folder / "cut", checkpoint_seconds=0.0))
    # What does not name the field, as every command, is resumed with its value in the study.
    results = sweep(runs, stream, folder / "cut")
    assert contents(folder / "cut") == contents(folder / "whole")
    assert sweep(runs, stream, folder / "new").records[0]["coeff"] != results.records[0]["coeff"]


def test_a_study_of_an_earlier_version_is_resumed_by_its_rule(tiny_stream, tmp_path):
    """Such a study is one with the old integration time: its config lacks the field."""
    check_resumed_as_begun(AS_BEFORE, RUNS, "l0_integration_steps", tiny_stream, tmp_path)


def test_only_runs_under_l0_record_that_they_brake():
    jumprelu = replace(BASE, nonlinearity="jumprelu")
    assert jumprelu.describe()["l0_braking"] is True
    assert "l0_braking" not in replace(jumprelu, l0_braking=False).describe()
    for other in (
        RUNS[0],
        replace(jumprelu, nonlinearity="jumprelu_ste", penalty="l0"),
        replace(jumprelu, target_l0=None),
        replace(jumprelu, penalty="l1"),
    ):
        assert "l0_braking" not in other.describe()
        assert other.target_l0 is None or not other.l0_controller(64).brakes
        assert RunConfig.recorded(other.describe()).l0_braking is True
    before = {name: value for name, value in jumprelu.describe().items() if name != "l0_braking"}
    assert RunConfig.recorded(before).l0_braking is False


def test_a_study_that_was_begun_without_braking_is_resumed_without(tiny_stream, tmp_path):
    runs = grid(BASE, nonlinearity=["jumprelu"])
    as_before = [replace(run, l0_braking=False) for run in runs]
    check_resumed_as_begun(as_before, runs, "l0_braking", tiny_stream, tmp_path)


def test_another_integration_time_is_another_study(tiny_stream, tmp_path):
    sweep(AS_BEFORE[:1], tiny_stream, tmp_path / "old")
    sweep(RUNS[:1], tiny_stream, tmp_path / "new")
    asked = [replace(RUNS[0], l0_integration_steps=25.0)]
    assert runs_as_begun(asked, tmp_path / "old") == asked
    for folder, there in (("old", "None"), ("new", "10.0")):
        with pytest.raises(ValueError, match=rf"l0_integration_steps is {there} there, 25.0 here"):
            sweep(asked, tiny_stream, tmp_path / folder)
    with pytest.raises(ValueError, match=r"l0_integration_steps is 10.0 there, None here"):
        sweep(AS_BEFORE[:1], tiny_stream, tmp_path / "new")
    assert json.loads((tmp_path / "new" / STUDY_FILE).read_text())["runs"][0]["l0_integration_steps"] == 10.0


def test_a_run_of_200_steps_comes_within_a_tenth_of_its_target(tiny_lm, tiny_blocks, tmp_path):
    stream = stream_over(tiny_lm, tiny_blocks)
    ratios = [record["l0"] / record["target_l0"] for record in sweep(RUNS, stream, tmp_path / "study").records]
    assert all(abs(ratio - 1) < 0.1 for ratio in ratios), ratios
