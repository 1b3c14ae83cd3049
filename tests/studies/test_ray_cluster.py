"""What a worker of a cluster is told, does and says, without a cluster; and with Ray itself, where it is installed."""

import importlib.util
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from prolu import RunConfig, grid, run_sweep
from prolu.activations.source import Source, open_streams
from prolu.runtime.progress import Meter, listeners
from prolu.studies.groups import worker
from prolu.studies.groups.dealing import begin, gather
from prolu.studies.groups.worker import GroupTask, ProgressBoard, StoppedError, portable, work_on
from prolu.studies.request import StudyRequest
from prolu.studies.settings import SweepSettings
from ray_cluster import ENVIRONMENT
from support.sweeps import contents

RUNS = [*grid(RunConfig(d_sae=40, n_tokens=2560, lr=0.02), coeff=[0.02, 0.05]), RunConfig(d_sae=40, n_tokens=1280)]

SETTINGS = SweepSettings(eval_tokens=320, checkpoint_minutes=0.0)


class Called:
    """An actor's handle, in this process."""

    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._actor, name))


@pytest.fixture
def source(tiny_lm_folder, stories_file):
    hook = ("blocks.1.hook_resid_pre",)
    return Source(lm=str(tiny_lm_folder), data=(str(stories_file),), hook=hook, ctx=32, threads=2)


def task_of(source, out, index, runs):
    (stream,) = open_streams(source, 2560, 2560, 64)
    task = GroupTask(portable(source), 64, stream.describe(), out, SETTINGS, index, runs)
    return pickle.loads(pickle.dumps(task))


def test_workers_train_what_one_process_does_and_say_how_far_they_are(source, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_LOOKS", 0.0)
    (stream,) = open_streams(source, 2560, 2560, 64)
    run_sweep(RUNS, stream, tmp_path / "a", eval_tokens=320, progress=False)
    request, board, seen = StudyRequest(RUNS, stream, tmp_path / "b", SETTINGS), ProgressBoard(), []
    monkeypatch.setattr(board, "tell", lambda *words: seen.append(words))
    for index, runs in enumerate(begin(request, 2)):
        work_on(task_of(source, request.out, index, runs), Called(board))
    assert gather(request)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert seen == [(index, 0, 64 * (i + 1)) for index in (0, 1) for i in range(40)]
    assert not listeners


def test_tokens_of_a_group():
    task = GroupTask(Source(), 64, {}, Path("a"), SETTINGS, 3, RUNS)
    assert task.length == 2560
    assert [task.sae_tokens(n) for n in (0, 640, 1280, 2560)] == [0, 1920, 3840, 6400]
    assert str(task).startswith("group 3 (prolu_ste-l1-0.02-")


def test_what_a_worker_says_is_told_and_what_it_fails_of_is_raised(source, tmp_path):
    board = ProgressBoard()
    (stream,) = open_streams(source, 2560, 2560, 64)
    runs = [*RUNS, RunConfig(d_sae=40, n_tokens=2560, lr=1e30)]
    begin(StudyRequest(runs, stream, tmp_path / "a", SETTINGS), 1)
    task = task_of(source, tmp_path / "a", 0, runs)
    work_on(task, Called(board))
    _, said = board.read()
    assert len(said) == 1
    assert said[0].startswith(f"group 0: {runs[-1].run_id}: failed at step 2 (the loss is not finite")
    assert board.read()[1] == []
    other = task._replace(stream=task.stream | {"data_digest": "0" * 64})
    with pytest.raises(ValueError, match=r"data_digest is '0+' where the sweep began, '\w+' on this node"):
        work_on(other, Called(board))


def test_a_signal_at_a_worker_is_no_end(source, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "train_group", interrupted)
    with pytest.raises(StoppedError):
        work_on(task_of(source, tmp_path / "a", 0, RUNS), Called(ProgressBoard()))
    assert not listeners


def test_paths_are_absolute_and_written_blocks_are_taken_as_they_are(source, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(source.data[0]).parent)
    relative = replace(source, data=("stories.txt",), tokens=Path("tokens"))
    (stream,) = open_streams(relative, 2560, 2560, 64)
    (there,) = open_streams(portable(relative), 2560, 2560, 64)
    assert there.describe() == stream.describe()
    monkeypatch.chdir(tmp_path)
    (there,) = open_streams(portable(replace(source, data=(str(stream.blocks.source),))), 2560, 2560, 64)
    assert there.describe()["data_digest"] == stream.describe()["data_digest"]
    assert portable(Source()) == replace(Source(), threads=portable(Source()).threads)


def test_a_meter_forgets_what_was_done_before(capsys):
    with Meter("training", 100, shown=False) as meter:
        meter.forget(40)
        listeners.append(print)
        try:
            meter.advance(10)
        finally:
            listeners.pop()
    assert capsys.readouterr().out == "training 10 60\n"


@pytest.mark.slow  # starts Ray some times
def test_ray_itself():
    """A few of `make ray`'s kills."""
    if not (ENVIRONMENT / "installed").exists() and importlib.util.find_spec("ray") is None:
        pytest.skip(f"Ray is not installed: `make ray` makes {ENVIRONMENT.name}")
    script = Path(__file__).parents[2] / "checks" / "ray_cluster.py"
    command = [sys.executable, script, "--worker-kills", "1", "--driver-kills", "1"]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 workers and 1 drivers killed" in done.stdout.splitlines()[-1]
