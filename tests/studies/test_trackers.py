"""Trackers hear every line as it comes, decide no bit, and hurt nothing when they fail."""

import importlib.util
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from prolu import ActivationStream, Harvest, Results, RunConfig, grid, run_sweeps
from prolu.cli.entry_point import main
from prolu.studies import checkpoints, study_in_training, trackers
from prolu.studies.runs import Run
from prolu.studies.settings import SweepSettings
from prolu.studies.trackers import check_trackers
from support.interruptions import dies_at_step
from support.markdown import blocks
from support.sweeps import contents, stream_over, sweep

BASE = RunConfig(d_sae=32, n_tokens=64 * 30, coeff=0.02, lr=3e-3)
RUNS = grid(BASE, nonlinearity=["relu", "prolu_ste"])


class Recorder:
    """A tracker that keeps what it hears, and fails where it is asked to."""

    def __init__(self, of):
        self.of, self.lines, self.figures, self.ended = of, [], None, ""
        heard.append(self)
        self.fail("open")

    def fail(self, where):
        if where == broken.get("where"):
            raise broken["with"]
        if where == broken.get("hang"):
            time.sleep(60)

    def log(self, line):
        self.fail("log")
        self.lines.append(line)

    def finish(self, figures):
        self.fail("finish")
        self.figures, self.ended = figures, "finished"

    def stop(self):
        self.fail("stop")
        self.ended = "stopped"


heard = []
broken = {}


@dataclass(frozen=True, kw_only=True)
class UncheckedSettings(SweepSettings):
    """Settings whose constructor is not type-checked by pytest, so that names of other trackers come through."""

    tracker: tuple[str, ...] = ()


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """A tracker with the name of a package that is installed."""
    heard.clear()
    broken.clear()
    monkeypatch.setattr(trackers, "TRACKERS", {"json": Recorder})
    monkeypatch.setattr("prolu.studies.sweep.SweepSettings", UncheckedSettings)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_lm, tiny_blocks):
    """What a sweep without trackers writes."""
    out = tmp_path_factory.mktemp("plain") / "a"
    train(stream_over(tiny_lm, tiny_blocks), out, names=())
    return contents(out)


def train(stream, out, runs=RUNS, names=("json",), **settings):
    return sweep(runs, stream, out, trackers=names, **settings)


def lines_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_they_hear_what_metrics_and_results_say_and_change_no_bit(plain, tiny_stream, tmp_path):
    results = train(tiny_stream, tmp_path / "a", names=("json", "json"))
    assert contents(tmp_path / "a") == plain
    assert [r.of.run_id for r in heard] == [run.folder.name for run in results.runs]  # each once
    for theirs, run in zip(heard, results.runs, strict=True):
        assert theirs.lines == lines_of(run)
        assert len(theirs.lines) == 30
        assert theirs.ended == "finished"
        assert theirs.of.study == tmp_path / "a"
        assert theirs.of.config["nonlinearity"] == run.record["nonlinearity"]
        assert theirs.of.config["stream"]["hook"] == "blocks.1.hook_resid_pre"
        for name in ("l0", "degradation", "fvu", "converged"):
            assert theirs.figures[name] == run.record[name]
        assert "coeff" not in theirs.figures
        json.dumps([theirs.of.config, theirs.figures])
    assert len({theirs.of.key for theirs in heard}) == 2


def test_a_resumed_run_is_the_same_run_and_is_told_its_curve_again(plain, tiny_stream, tmp_path):
    dies_at_step(17, lambda: train(tiny_stream, tmp_path / "a", checkpoint_seconds=0.0))
    first = heard[:]
    heard.clear()
    assert [theirs.ended for theirs in first] == ["stopped", "stopped"]
    results = train(tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == plain
    for before, theirs, run in zip(first, heard, results.runs, strict=True):
        assert theirs.of.key == before.of.key
        assert theirs.lines == lines_of(run)
        assert theirs.lines[:17] == before.lines


def test_steps_made_twice_are_told_twice_with_the_same_figures(tiny_stream, tmp_path, monkeypatch):
    """Those between the last checkpoint and a kill; so a tracker may drop either."""
    with monkeypatch.context() as patch:
        for module in (checkpoints, study_in_training):
            patch.setattr(module, "write_checkpoint", lambda *_: None)
        dies_at_step(20, lambda: train(tiny_stream, tmp_path / "a", checkpoint_seconds=0.0))
    first = heard[:]
    heard.clear()
    train(tiny_stream, tmp_path / "a")
    for before, theirs in zip(first, heard, strict=True):
        assert len(before.lines) == 20
        assert theirs.lines[:20] == before.lines


def test_another_study_is_another_run_and_a_longer_one_is_not(tiny_stream, tmp_path):
    runs = [RunConfig(d_sae=32, n_tokens=64 * n, coeff=0.02, warmup_fraction=0.0, decay_start_fraction=1.0,
                      decay_end_fraction=1.1) for n in (20, 40)]  # fmt: skip
    train(tiny_stream, tmp_path / "a", runs[:1], keep_state=True)
    train(tiny_stream, tmp_path / "a", runs[1:])
    train(tiny_stream, tmp_path / "b", runs[:1])
    short, longer, other = heard
    assert short.of.key == longer.of.key != other.of.key
    assert longer.lines[:20] == short.lines


@pytest.mark.parametrize(
    ("where", "problem"),
    [("open", SystemExit(1)), ("log", OSError(28, "No space left on device")), ("finish", Exception("two\nlines"))],
)
def test_one_that_fails_is_told_once_and_dropped(plain, tiny_stream, tmp_path, caplog, where, problem):
    broken.update({"where": where, "with": problem})
    train(tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == plain
    told = [message for message in caplog.messages if "tracker" in message]
    assert len(told) == 1
    assert told[0].startswith("tracker json: dropped (")
    assert "\n" not in told[0]


def test_one_that_hangs_is_not_waited_for(plain, tiny_stream, tmp_path, caplog, monkeypatch):
    broken["hang"] = "log"
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    train(tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == plain
    assert "tracker json: not done after" in caplog.text


def test_a_study_at_one_of_several_hooks_is_a_group_of_its_own(tiny_lm, tiny_blocks, tmp_path):
    hooks = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    shared = Harvest(tiny_lm, tiny_blocks, hooks)
    streams = [ActivationStream(tiny_lm.at(h), tiny_blocks, batch_size=64, seed=3, source=shared) for h in hooks]
    run_sweeps(RUNS[:1], streams, tmp_path / "both", eval_tokens=320, trackers=["json"], progress=False)
    assert [theirs.of.group for theirs in heard] == [f"both/{hook}" for hook in hooks]
    assert len({theirs.of.key for theirs in heard}) == 2
    assert [theirs.lines for theirs in heard] == [
        lines_of(Run(tmp_path / "both" / h / RUNS[0].run_id, {})) for h in hooks
    ]


def test_a_run_that_fails_is_stopped(tiny_stream, tmp_path):
    bad = RunConfig(d_sae=32, n_tokens=64 * 30, coeff=0.02, lr=1e30)
    train(tiny_stream, tmp_path / "a", [RUNS[0], bad])
    assert {theirs.of.run_id: theirs.ended for theirs in heard} == {RUNS[0].run_id: "finished", bad.run_id: "stopped"}


def test_a_study_is_resumed_with_other_trackers(plain, tiny_stream, tmp_path):
    dies_at_step(9, lambda: train(tiny_stream, tmp_path / "a", checkpoint_seconds=0.0))
    train(tiny_stream, tmp_path / "a", names=())
    assert contents(tmp_path / "a") == plain
    assert Results.load(tmp_path / "a").failures == {}


@pytest.fixture
def none_installed(recorder, monkeypatch):
    """Where the two are, they are hidden."""
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_the_command_line_offers_the_trackers_of_the_table(monkeypatch):
    monkeypatch.undo()
    assert set(get_args(trackers.TrackerName)) == trackers.TRACKERS.keys()


def test_an_unknown_one_is_refused_before_anything_is_written(tiny_stream, tmp_path):
    with pytest.raises(ValueError, match="tracker 'mlflow': choose among"):
        train(tiny_stream, tmp_path / "a", names=("mlflow",))
    assert list(tmp_path.iterdir()) == []


def test_missing_ones_are_refused_before_anything_is_written(tiny_stream, tmp_path, capsys, none_installed):
    for name in ("wandb", "tensorboard"):
        with pytest.raises(ValueError, match=rf"pip install 'prolu\[{name}\]'"):
            train(tiny_stream, tmp_path / "a", names=(name,))
        assert main(["train", "--tracker", name, "--out", str(tmp_path / "a")]) == 2
        shown = capsys.readouterr().err
        assert f"pip install 'prolu[{name}]'" in shown
        assert len(shown.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_commands_of_the_docs_are_understood(monkeypatch, tmp_path, capsys, none_installed):
    """As far as they go without the packages."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "howto" / "trackers.md").read_text()
    for line in "".join(blocks("sh", text)).splitlines():
        assert main(shlex.split(line)[1:]) == 2
        assert "not installed; pip install 'prolu[" in capsys.readouterr().err


def test_a_folder_of_their_name_is_not_them(tmp_path, monkeypatch):
    """W&B writes one into the working directory, and Python takes it for a package."""
    monkeypatch.setattr(trackers, "TRACKERS", {"not_a_package": Recorder})
    (tmp_path / "not_a_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="not installed"):
        check_trackers(["not_a_package"])


@pytest.mark.slow  # starts a Python of its own, and trains
def test_none_is_imported_unasked(tiny_lm_folder, stories_file, tmp_path):
    script = """
import sys
import prolu
unasked = {"wandb", "tensorboard", "torch.utils.tensorboard"}
assert not (unasked | {"huggingface_hub"}) & sys.modules.keys()
lm = prolu.LanguageModel(sys.argv[1], "blocks.1.hook_resid_pre")
blocks = prolu.load_blocks(sys.argv[2], lm.tokenizer, ctx=32)
stream = prolu.ActivationStream(lm, blocks, batch_size=64, window_tokens=2048)
prolu.run_sweep([prolu.RunConfig(d_sae=32, n_tokens=1280)], stream, "a", eval_tokens=320)
assert not unasked & sys.modules.keys()
"""
    command = [sys.executable, "-c", script, str(tiny_lm_folder), str(stories_file)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
