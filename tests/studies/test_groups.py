"""Runs in groups: how they are dealt, and that what is gathered is what one process leaves, whatever happens."""

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prolu import RunConfig, Trainer, grid
from prolu.cli import drawing
from prolu.cli.entry_point import main
from prolu.runtime.files import FolderBusyError, locked, retry_while_busy
from prolu.studies.groups import dealing
from prolu.studies.groups.dealing import (
    begin,
    check_groups,
    deal,
    dealt_groups,
    gather,
    is_done,
    memory_of,
    n_groups,
    train_and_gather,
    train_group,
)
from prolu.studies.request import StudyRequest
from prolu.studies.settings import SweepSettings
from prolu.studies.sweep import SweepFailedError
from support.commands import text_flags
from support.interruptions import dies_at_disk_operation, dies_at_step, disk_operations
from support.sweeps import contents, stream_over, sweep

BASE = RunConfig(
    d_sae=40, n_tokens=2560, coeff=0.03, lr=0.02,
    resample_fractions=(0.5,), resample_candidates=320, resample_dead_below=0.01,
)  # fmt: skip
RUNS = [
    *grid(BASE, nonlinearity=["relu", "prolu_ste"], coeff=[0.02, 0.05]),
    replace(BASE, nonlinearity="prolu_relu", n_tokens=1280),
    replace(BASE, nonlinearity="topk", penalty="none", target_l0=6.0, d_sae=56, step="sparse"),
]
BROKEN = replace(BASE, lr=1e30, nonlinearity="prolu_ste", step="sparse")


def local(stream, out, runs=RUNS, **settings):
    return sweep(runs, stream, out, **({"checkpoint_seconds": 0.0} | settings))


def asked(stream, out, runs=RUNS, *, keep_state=False):
    settings = SweepSettings(eval_tokens=320, checkpoint_minutes=0.0, keep_state=keep_state)
    return StudyRequest(list(runs), stream, out, settings, progress=False)


def in_groups(stream, out, n, runs=RUNS, **changes):
    """What tasks do that come in the reverse order; whether the report was for one of them to draw."""
    request = asked(stream, out, runs, **changes)
    drawn = [train_and_gather(request, index, n) for index in reversed(range(n))]
    return any(drawn)


@pytest.fixture(scope="module")
def wanted(tiny_lm, tiny_blocks, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "a"
    local(stream_over(tiny_lm, tiny_blocks), out, checkpoint_seconds=1e9)
    return contents(out)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=20), st.integers(1, 8))
@settings(deadline=None)
def test_every_run_is_dealt_once_in_order_and_costs_are_even(sizes, n):
    runs = [RunConfig(d_sae=d, n_tokens=length, init_seed=i) for i, (d, length) in enumerate(sizes)]
    groups = deal(runs, n)
    assert groups == deal(list(runs), n)
    assert len(groups) == n
    assert sorted(run.init_seed for group in groups for run in group) == list(range(len(runs)))
    assert all(group == sorted(group, key=lambda run: run.init_seed) for group in groups)
    costs = [sum(run.d_sae * run.n_tokens for run in group) for group in groups]
    assert max(costs) - min(costs) <= max((d * length for d, length in sizes), default=0)
    assert len(runs) < n or all(groups)


def test_there_are_more_groups_where_memory_asks_for_it(tiny_stream, tmp_path):
    runs = grid(RunConfig(d_sae=100_000), init_seed=range(8))
    request = asked(tiny_stream, tmp_path, runs)

    def memory(some):
        return memory_of(request, some)

    state = memory(runs[:2]) - memory(runs[:1])
    assert state == (6 * 16 + 5) * 100_000 * 4 + 3 * 16 * 4
    assert n_groups(runs, 2, memory, 1e12) == 2
    assert n_groups(runs, 2, memory, memory(runs[:2])) == 4
    assert n_groups(runs, 2, memory, memory(runs[:1])) == 8
    assert n_groups(runs, 2, memory, 0) == 8
    assert n_groups(runs[:1], 2, memory, 0) == 1


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_gathered_groups_are_what_one_process_leaves(wanted, tiny_stream, tmp_path, n):
    assert in_groups(tiny_stream, tmp_path / "a", n)
    assert contents(tmp_path / "a") == wanted
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "trained" for line in log) == min(n, len(RUNS))
    assert in_groups(tiny_stream, tmp_path / "a", n)  # again: nothing to do
    local(tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == wanted


@pytest.mark.parametrize("step", [0, 3, 20, 39])
def test_a_group_that_died_goes_on_whoever_asks_for_how_many(wanted, tiny_stream, tmp_path, step):
    request = asked(tiny_stream, tmp_path / "a")
    dies_at_step(step, lambda: in_groups(tiny_stream, tmp_path / "a", 2))
    assert not gather(request)
    assert begin(request, 5) == dealt_groups(request) == deal(RUNS, 2)
    with pytest.raises(
        ValueError, match=r"its runs are trained in groups; resume it as it was begun, with --engine ray or"
    ):
        local(tiny_stream, tmp_path / "a")
    assert in_groups(tiny_stream, tmp_path / "a", 2)
    assert contents(tmp_path / "a") == wanted


def test_of_tasks_that_end_at_once_one_draws_the_report(tiny_stream, tmp_path, monkeypatch):
    request = asked(tiny_stream, tmp_path / "a")
    assert not train_and_gather(request, 0, 2)
    gathered = []

    def train_and_be_overtaken(*args):
        train_group(*args)
        gathered.append(gather(request))  # by the other task, which had not ended yet

    with monkeypatch.context() as patch:
        patch.setattr(dealing, "train_group", train_and_be_overtaken)
        assert not train_and_gather(request, 1, 2)
    assert gathered == [True]
    assert train_and_gather(request, 1, 2)  # the other may have died before it drew


def test_a_process_that_dies_at_any_disk_operation_of_dealing_and_gathering(wanted, tiny_stream, tmp_path):
    request = asked(tiny_stream, tmp_path / "begun")
    groups = begin(request, 2)
    for index, runs in enumerate(groups):
        train_group(replace(request, runs=runs), index)
    shutil.copytree(tmp_path / "begun", tmp_path / "counted")
    operations = disk_operations(lambda: gather(asked(tiny_stream, tmp_path / "counted")))
    assert contents(tmp_path / "counted") == wanted
    assert len(operations) == 2 * len(RUNS) + 6
    for i in range(len(operations)):
        shutil.copytree(tmp_path / "begun", tmp_path / "a")
        dies_at_disk_operation(i, lambda: gather(asked(tiny_stream, tmp_path / "a")))
        assert in_groups(tiny_stream, tmp_path / "a", 2)
        assert contents(tmp_path / "a") == wanted, f"died at {i}, {operations[i]}"
        shutil.rmtree(tmp_path / "a")
    for i in range(6):
        request = asked(tiny_stream, tmp_path / f"dealt{i}")
        dies_at_disk_operation(i, lambda request=request: begin(request, 2))
        assert begin(request, 2) == deal(RUNS, 2)


def test_a_run_that_fails_leaves_what_it_leaves_locally(tiny_stream, tmp_path):
    runs = [RUNS[0], BROKEN, RUNS[1]]
    for _ in range(2):  # the second time it is tried again, from its last good state
        failed = local(tiny_stream, tmp_path / "a", runs).failures
        assert in_groups(tiny_stream, tmp_path / "b", 2, runs)
        assert contents(tmp_path / "b") == contents(tmp_path / "a")
        assert list(failed) == [BROKEN.run_id]
    assert asked(tiny_stream, tmp_path / "b", runs).unfinished == [BROKEN]


def test_a_late_task_without_runs_does_not_deal_a_failed_run_anew(tiny_stream, tmp_path):
    runs = [RUNS[0], BROKEN]
    assert in_groups(tiny_stream, tmp_path / "a", 4, runs)
    request, before = asked(tiny_stream, tmp_path / "a", runs), contents(tmp_path / "a")
    assert not train_and_gather(request, 3, 4)
    assert contents(tmp_path / "a") == before
    assert dealt_groups(request) is None
    assert train_and_gather(request, 0, 4)  # it is group 0's to try again
    assert dealt_groups(request) is None


def test_when_every_run_fails_there_is_a_reason(tiny_lm_folder, stories_file, tmp_path, monkeypatch, capsys):
    def step(self, acts, target=None):
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(Trainer, "step", step)
    flags = flags_of(tiny_lm_folder, stories_file, tmp_path / "a")
    assert main([*flags, "--group", "0/1"]) == 1
    assert "every run failed; the first: cannot allocate" in capsys.readouterr().err
    with pytest.raises(SweepFailedError):
        raise SweepFailedError


def test_finished_runs_are_kept_with_their_state(wanted, tiny_stream, tmp_path):
    out = tmp_path / "a"
    local(tiny_stream, out)
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[2:5]))
    kept = [json.loads(line)["run_id"] for line in lines[2:5]]
    times = [(out / run_id / "sae.safetensors").stat().st_mtime_ns for run_id in kept]
    assert in_groups(tiny_stream, out, 2)
    assert contents(out) == wanted
    assert times == [(out / run_id / "sae.safetensors").stat().st_mtime_ns for run_id in kept]


def test_kept_states_are_gathered_and_extended_locally_only(tiny_stream, tmp_path):
    lengths = {"d_sae": 40, "coeff": 0.03, "lr": 0.02, "decay_start_fraction": 1.0, "decay_end_fraction": 2.0}

    def runs(n_tokens):
        return grid(RunConfig(n_tokens=n_tokens, warmup_fraction=640 / n_tokens, **lengths), init_seed=[0, 1])

    assert in_groups(tiny_stream, tmp_path / "a", 2, runs(2560), keep_state=True)
    local(tiny_stream, tmp_path / "b", runs(2560), keep_state=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(ValueError, match=r"n_tokens 5120: run .* has been finished at 2560; it can be extended with"):
        begin(asked(tiny_stream, tmp_path / "a", runs(5120)), 2)
    for name in "ab":
        local(tiny_stream, tmp_path / name, runs(5120), keep_state=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_one_process_began_it_must_finish(wanted, tiny_stream, tmp_path):
    dies_at_step(9, lambda: local(tiny_stream, tmp_path / "a"))
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match="one process began it and left a checkpoint; resume it with --engine local"):
        check_groups(asked(tiny_stream, tmp_path / "a"))
    with pytest.raises(ValueError, match="resume it with --engine local"):
        begin(asked(tiny_stream, tmp_path / "a"), 2)
    assert contents(tmp_path / "a") == before
    local(tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == wanted


def test_torn_groups_are_named(tiny_stream, tmp_path):
    request = asked(tiny_stream, tmp_path / "a")
    begin(request, 2)
    for content in ("[[", "[3]", '[["another"]]'):
        (tmp_path / "a" / "groups" / "groups.json").write_text(content)
        with pytest.raises(ValueError, match=r"groups\.json: not groups of this study's runs"):
            dealt_groups(request)


def test_patience_ends(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another process is working there"):
        retry_while_busy(lambda: locked(tmp_path).__enter__(), 0.5)


def flags_of(lm, text, out):
    size = {"target_l0": 6, "scale": 0.005, "batch_size": 64, "eval_tokens": 320, "threads": 2}
    return ["sweep", "demo", *text_flags(lm, text, **size, latent_pages="none", out=out)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group", "3"], "group '3': write I/N with I from 0 to N - 1"),
        (["--group", "3/3"], "group '3/3': write I/N"),
        (["--group", "-1/3"], "group '-1/3': write I/N"),
        (["--group", "0/2", "--engine", "ray"], "group '0/2': not with --engine ray"),
        (["--group", "0/2", "--hook", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"], "at one hook"),
        (["--group", "0/2", "--mesh", "latent=2"], "mesh 'latent=2': the processes of one SAE"),
        (["--address", "auto"], "address auto: only with --engine ray"),
        (["--workers", "3"], "workers 3: only with --engine ray"),
        (["--gpus-per-group", "0.5"], "gpus_per_group 0.5: only with --engine ray"),
        (["--engine", "ray", "--workers", "0"], "workers 0: must be at least 1"),
        (["--engine", "ray", "--gpus-per-group", "1.5"], "gpus_per_group 1.5: must be between 0 and 1, or a whole"),
        (["--engine", "ray", "--gpus-per-group", "-1"], "gpus_per_group -1.0: must be"),
        (["--engine", "ray", "--gpus-per-group", "nan"], "gpus_per_group nan: must be"),
        (["--engine", "ray", "--device", "cuda"], "with --device cuda a group needs a GPU"),
        (["--engine", "ray", "--lm-device", "cuda:1"], "with --lm-device cuda:1 a group needs a GPU"),
        (["--engine", "ray"], "engine 'ray': is not installed; pip install 'prolu[ray]'"),
    ],
)
def test_bad_requests(tiny_lm_folder, stories_file, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*flags_of(tiny_lm_folder, stories_file, tmp_path / "a"), *flags]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_another_number_of_groups_is_refused(tiny_lm_folder, stories_file, tmp_path, capsys):
    flags = flags_of(tiny_lm_folder, stories_file, tmp_path / "a")
    assert main([*flags, "--group", "1/3"]) == 0
    assert "group 1/3 is finished; the last task to end gathers all" in capsys.readouterr().out
    before = contents(tmp_path / "a")
    assert main([*flags, "--group", "1/2"]) == 2
    assert "group '1/2': this study was dealt into 3 groups" in capsys.readouterr().err
    assert main(flags) == 2
    assert "its runs are trained in groups" in capsys.readouterr().err
    assert contents(tmp_path / "a") == before
    assert main([*flags, "--group", "2/3"]) == 0
    assert not is_done(tmp_path / "a", 0)
    assert main([*flags, "--group", "0/3"]) == 0
    assert "report: " in capsys.readouterr().out
    assert not (tmp_path / "a" / "groups").exists()


def test_while_one_draws_others_may_gather_but_not_draw(tiny_lm_folder, stories_file, tmp_path, monkeypatch):
    out, drawn = tmp_path / "a", []

    def draw(studies):
        with locked(out):
            pass
        with pytest.raises(FolderBusyError), locked(out, ".report"):
            pass
        drawn.extend(results.folder for results in studies)

    monkeypatch.setattr(drawing, "draw_report", draw)
    assert main([*flags_of(tiny_lm_folder, stories_file, out), "--group", "0/1"]) == 0
    assert drawn == [out]


FAKE_SLURM = {
    # What a scheduler does: the tasks of the array, here one after the other, the last first, each again if it asks so.
    "sbatch": """#!/bin/bash
    script=$1; shift
    for task in 3 2 1 0; do
        export SLURM_ARRAY_TASK_ID=$task SLURM_CPUS_PER_TASK=1 SLURM_JOB_ID=$task
        bash "$script" "$@" || exit
        while [ -e "requeued-$task" ]; do rm "requeued-$task"; bash "$script" "$@" || exit; done
    done""",
    "srun": """#!/bin/bash
    [ "$1" = --cpus-per-task=1 ] && shift || exit 9
    if [ "$SLURM_JOB_ID" = 2 ] && [ ! -e preempted ]; then
        touch preempted
        "$@" & task=$!
        while ! ls OUT/groups/002/checkpoints/step-* >/dev/null 2>&1; do sleep 0.02; done
        kill -TERM $task; wait $task; exit
    fi
    exec "$@" """,
    "scontrol": """#!/bin/bash
    [ "$1" = requeue ] && touch "requeued-$2" """,
}


@pytest.mark.slow  # a dozen processes
def test_the_slurm_recipe(tiny_lm_folder, stories_file, tmp_path):
    """With a scheduler that takes one task away: it leaves a checkpoint, is queued again, and the end is the same."""
    script = Path(__file__).parents[2] / "examples" / "slurm_sweep.sh"
    for name, text in FAKE_SLURM.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text.replace("OUT", "array"))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    flags = flags_of(tiny_lm_folder, stories_file, "array")
    flags[flags.index("--scale") + 1] = "0.05"
    del flags[flags.index("--threads") :][:2]  # the script says it
    flags += ["--checkpoint-minutes", "0.001", "--tokens", "tokens", "--max-epochs", "8"]
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "N_GROUPS": "4"}

    def run(command):
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )

    done = run(["sbatch", script, *flags[1:]])
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "preempted").exists()
    assert "saving a checkpoint" in done.stderr
    assert "report: " in done.stdout
    flags[flags.index("array")] = "local"
    done = run([sys.executable, "-m", "prolu", *flags, "--threads", "1"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert trained(tmp_path / "array") == trained(tmp_path / "local")
    log = [json.loads(line) for line in (tmp_path / "array" / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in log].count("resumed") == 1


@pytest.mark.slow  # four processes
def test_three_tasks_at_once_wait_for_each_other(tiny_lm_folder, stories_file, tmp_path):
    flags = flags_of(tiny_lm_folder, stories_file, tmp_path / "a")
    flags[flags.index("--threads") + 1] = "1"
    command = [sys.executable, "-m", "prolu", *flags]
    task = [*command, "--tokens", str(tmp_path / "tokens")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    tasks = [subprocess.Popen([*task, "--group", f"{i}/3"], **pipes) for i in range(3)]
    said = [task.communicate(timeout=600)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    assert sum("report: " in words for words in said) == 1
    command[-1] = str(tmp_path / "b")
    subprocess.run(command, check=True, capture_output=True)
    assert trained(tmp_path / "a") == trained(tmp_path / "b")


def trained(out):
    """All of a study but its report."""
    drawn = ("report.html", "figures", ".report")
    return {name: data for name, data in contents(out).items() if not name.startswith(drawn)}
