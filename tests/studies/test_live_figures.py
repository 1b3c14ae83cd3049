"""The line of progress in a notebook: what it says of SAEs in training, and that looking changes no bit."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prolu import ActivationStream, RunConfig, Trainer, grid, run_sweep
from prolu.evaluation.held_out import held_out_of
from prolu.evaluation.scoring import score_prefix
from prolu.runtime import progress
from prolu.studies import live_figures
from prolu.studies.live_figures import LiveFigures
from prolu.studies.run_in_training import RunInTraining
from prolu.studies.study_in_training import StudyInTraining
from support.sweeps import contents

BASE = RunConfig(d_sae=32, n_tokens=64 * 24, coeff=0.02, lr=3e-3)
RUNS = [*grid(BASE, nonlinearity=["relu", "gated"]), replace(BASE, nonlinearity="batchtopk", target_l0=5.0)]


@pytest.fixture
def always(monkeypatch):
    """A notebook whose line is written, with a new look, after every batch."""
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_REWRITES", 0.0)
    monkeypatch.setattr(live_figures, "LARGEST_FRACTION", 1e9)
    monkeypatch.setattr(live_figures, "LOOK_TOKENS", 128)


def stream_over(lm, blocks):
    return ActivationStream(lm, blocks, batch_size=64, seed=3, window_tokens=2048)


def lines_of(written):
    return [line.rstrip() for line in re.split(r"[\r\n]", written) if line.startswith("training")]


def test_looking_changes_no_bit(tiny_lm, tiny_blocks, tmp_path, always, capsys):
    def sweep(name, shown):
        return run_sweep(RUNS, stream_over(tiny_lm, tiny_blocks), tmp_path / name, eval_tokens=640, progress=shown)

    quiet = sweep("quiet", False)
    assert capsys.readouterr().out == ""
    watched = sweep("watched", True)
    assert contents(watched.folder) == contents(quiet.folder)
    lines = lines_of(capsys.readouterr().out)
    one, two = r"\d+\.\d", r"\d+\.\d\d\d"
    assert any(
        re.search(rf", L0 {one}, MSE {two}, CE increase -?{two} nats$", line) for line in lines
    )  # the first look
    several = rf", L0 {one} to {one}, MSE {two} to {two}, CE increase -?{two} to -?{two} nats$"
    assert sum(bool(re.search(several, line)) for line in lines) > 10


class Study(StudyInTraining):
    """A study with runs that have made one step."""

    def __init__(self, stream, configs):
        self.stream = stream
        self.runs = []
        for config in configs:
            trainer = Trainer(config, stream.d_in, stream.batch_size)
            trainer.step(stream[0].scaled(config.normalisation)[0])
            self.runs.append(RunInTraining(trainer, Path("nowhere"), {}))


def test_the_figures_are_those_of_an_evaluation(tiny_lm, tiny_blocks):
    stream = stream_over(tiny_lm, tiny_blocks)
    study = Study(stream, RUNS[:1])
    sae = study.runs[0].trainer.sae()
    expected = score_prefix(sae, held_out_of(stream, live_figures.LOOK_TOKENS), sae.d_sae)
    said = LiveFigures([study])()
    assert said == (
        f"L0 {expected['l0']:.1f}, MSE {expected['mse']:.3f}, CE increase {expected['degradation']:.3f} nats"
    )


@pytest.mark.usefixtures("always")
def test_every_run_has_its_turn(tiny_lm, tiny_blocks):
    stream = stream_over(tiny_lm, tiny_blocks)
    studies = [Study(stream, RUNS[:2]), Study(stream, RUNS[2:])]
    live = LiveFigures(studies)
    for n in range(1, 7):
        assert live()
        assert sum(live._n_looks.values()) == n
        assert len(live._n_looks) == min(n, 3)
    assert set(live._n_looks.values()) == {2}
    ended = studies[0].runs.pop(0)  # its last look is kept
    before = live._looks[0, ended.run_id]
    for _ in range(4):
        live()
    assert live._looks[0, ended.run_id] == before
    assert sorted(live._n_looks.values()) == [2, 4, 4]


def test_looks_take_a_small_part_of_the_time(tiny_lm, tiny_blocks, monkeypatch):
    live = LiveFigures([Study(stream_over(tiny_lm, tiny_blocks), RUNS[:1])])
    now = [live._start]
    monkeypatch.setattr(live_figures, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(*args):
        now[0] += 2.0
        return {"l0": 1.0, "mse": 1.0, "degradation": 1.0}

    monkeypatch.setattr(live_figures, "score_prefix", slow)
    while now[0] < live._start + 1000:
        live()
        now[0] += 0.5
    fraction = live._spent / (now[0] - live._start)
    assert 0.02 < fraction <= live_figures.LARGEST_FRACTION + 2.0 / 1000


def test_training_goes_on_if_nothing_can_be_shown(tiny_lm, tiny_blocks, tmp_path, always, monkeypatch, capsys, caplog):
    def fails(*args):
        raise torch.OutOfMemoryError("no memory for a look")

    monkeypatch.setattr(live_figures, "score_prefix", fails)
    with caplog.at_level(logging.WARNING):
        study = run_sweep(RUNS, stream_over(tiny_lm, tiny_blocks), tmp_path / "study", eval_tokens=640)
    assert len(study.runs) == 3
    assert caplog.text.count("no figures are shown during training (no memory for a look)") == 1
    bare = r"(scoring the language model|training) \d+%(, [\d:]+( left)?)?(, [a-z ]+)?"
    assert all(re.fullmatch(bare, line) for line in lines_of(capsys.readouterr().out))


def test_rows_have_no_ce_increase(tmp_path, always, capsys):
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(2000, 12)).astype(np.float32))
    stream = ActivationStream.from_rows(rows, batch_size=64, window_tokens=640)
    run_sweep(RUNS[:1], stream, tmp_path / "rows", eval_tokens=200)
    lines = lines_of(capsys.readouterr().out)
    assert any("MSE" in line for line in lines)
    assert not any("CE" in line for line in lines)
