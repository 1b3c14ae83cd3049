"""Nothing that was done is lost: kills, signals, damage, full disks, failing runs; the end is the same to the bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prolu import RunConfig, Trainer, grid
from prolu.cli.entry_point import main
from prolu.runtime.files import locked
from prolu.studies import checkpoints, request
from prolu.studies.checkpoints import Clock, RunState, read_checkpoint, write_checkpoint
from prolu.studies.sweep import SweepFailedError, SweepStoppedError
from support.commands import text_flags
from support.interruptions import PowerCutError, before_disk_operations, dies_at_step, end_of, in_a_process, wait_for
from support.sweeps import contents, stream_over, sweep

BASE = RunConfig(
    d_sae=40, n_tokens=2560, coeff=0.03, lr=0.02,
    resample_fractions=(0.5,), resample_candidates=320, resample_dead_below=0.01,
)  # fmt: skip
RUNS = grid(BASE, nonlinearity=["relu", "prolu_ste"], step=["dense"]) + grid(BASE, penalty=["sqrt_l1"], step=["sparse"])


def train(stream, out, runs=RUNS, seconds=0.0, **settings):
    """A sweep that leaves a checkpoint after every step, unless told how often."""
    return sweep(runs, stream, out, checkpoint_seconds=seconds, **settings)


@pytest.fixture(scope="module")
def wanted(tiny_lm, tiny_blocks, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "a"
    train(stream_over(tiny_lm, tiny_blocks), out, seconds=1e9)
    return contents(out)


@pytest.mark.parametrize("step", [1, 7, 20, 21, 39])
def test_a_sweep_that_died_goes_on_to_the_same_bits(wanted, tiny_stream, tmp_path, step):
    dies_at_step(step, lambda: train(tiny_stream, tmp_path / "a"))
    found = read_checkpoint(tmp_path / "a")
    assert (found.step, len(found.runs), found.complaints) == (step, 3, [])
    assert len(list((tmp_path / "a" / "checkpoints").iterdir())) == min(2, step)
    train(tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == wanted
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["event"] == "resumed"] == [step]


DAMAGES = {
    "bit flipped in weights": lambda place: flip(next(place.glob("*.safetensors"))),
    "bit flipped in the manifest": lambda place: flip(place / "checkpoint.json"),
    "torn weights": lambda place: tear(next(place.glob("*.safetensors"))),
    "torn manifest": lambda place: tear(place / "checkpoint.json"),
    "weights gone": lambda place: next(place.glob("*.safetensors")).unlink(),
    "manifest gone": lambda place: (place / "checkpoint.json").unlink(),
    "manifest of something else": lambda place: (place / "checkpoint.json").write_text("[1, 2]"),
    "empty manifest": lambda place: (place / "checkpoint.json").write_text(""),
}


def test_a_study_keeps_the_choice_of_steps_that_it_was_begun_with(tiny_stream, tmp_path, monkeypatch):
    automatic = [replace(BASE, coeff=0.3)]
    train(tiny_stream, tmp_path / "whole", automatic)
    dies_at_step(23, lambda: train(tiny_stream, tmp_path / "resumed", automatic))
    # A later version has another table, by which every step is dense.
    monkeypatch.setattr(request, "crossover_density", lambda *_: 0.0)
    train(tiny_stream, tmp_path / "resumed", automatic)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    train(tiny_stream, tmp_path / "dense", automatic)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["crossovers"] == {"40": 0.0}
    assert contents(tmp_path / "dense") != contents(tmp_path / "whole")


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def tear(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_on_the_one_before(wanted, tiny_stream, tmp_path, caplog, damage):
    dies_at_step(9, lambda: train(tiny_stream, tmp_path / "a"))
    DAMAGES[damage](tmp_path / "a" / "checkpoints" / "step-000000000009")
    train(tiny_stream, tmp_path / "a", seconds=1e9)
    assert re.search("step-000000000009 is damaged .* the one before is used", caplog.text)
    assert contents(tmp_path / "a") == wanted


def test_if_all_are_damaged_it_starts_anew_and_says_so(wanted, tiny_stream, tmp_path, caplog):
    dies_at_step(9, lambda: train(tiny_stream, tmp_path / "a"))
    for place in (tmp_path / "a" / "checkpoints").iterdir():
        tear(place / "checkpoint.json")
    train(tiny_stream, tmp_path / "a")
    assert caplog.text.count("training starts anew") == 2
    assert contents(tmp_path / "a") == wanted


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(wanted, tiny_stream, tmp_path, caplog):
    def full(name, path):
        if name == "write" and "checkpoints" in path.parts:
            raise OSError(28, "No space left on device")

    with before_disk_operations(full):
        train(tiny_stream, tmp_path / "a")
    assert "no checkpoint at step 1 (No space left on device); training goes on" in caplog.text
    assert contents(tmp_path / "a") == wanted


@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
@pytest.mark.parametrize("file", ["results.jsonl", "sae.safetensors", "metrics.jsonl"])
def test_a_full_disk_ends_the_sweep_in_one_sentence_from_python_too(wanted, tiny_stream, tmp_path, operation, file):
    def full(name, path):
        if name == operation and file in path.name:
            raise OSError(28, "No space left on device")

    with before_disk_operations(full), pytest.raises(SweepStoppedError, match="No space left on device") as stopped:
        train(tiny_stream, tmp_path / "a")
    assert "finished runs are saved; run the same sweep again to resume" in str(stopped.value)
    assert (stopped.value.errno, stopped.value.__cause__, stopped.value.__suppress_context__) == (28, None, True)
    train(tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == wanted


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from prolu.cli.entry_point import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_disk_that_takes_no_more_fails_in_a_sentence_and_loses_nothing(tiny_lm_folder, stories_file, tmp_path):
    size = {"d_sae": 400, "n_tokens": 2560, "batch_size": 64, "eval_tokens": 320}
    request = ["train", *text_flags(tiny_lm_folder, stories_file, **size, out=tmp_path / "a")]
    command = [sys.executable, "-c", LIMITED, "30000", *request]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "a").rglob("*.partial"))
    assert main(request) == 0


def test_a_run_that_fails_is_stopped_and_the_others_do_not_notice(wanted, tiny_stream, tmp_path, caplog):
    broken = RunConfig(d_sae=40, n_tokens=2560, coeff=0.03, lr=1e30, nonlinearity="prolu_ste", step="sparse")
    results = train(tiny_stream, tmp_path / "a", [*RUNS, broken])
    assert list(results.failures) == [broken.run_id]
    assert "not finite" in results.failures[broken.run_id]
    assert "the other runs go on" in caplog.text
    found = contents(tmp_path / "a")
    for name in wanted:
        if name.endswith((".safetensors", "metrics.jsonl", "results.jsonl")):
            assert found[name] == wanted[name]
    good = read_checkpoint(tmp_path / "a" / broken.run_id)
    assert all(t.isfinite().all() for t in good.runs[broken.run_id].tensors.values())
    again = train(tiny_stream, tmp_path / "a", [*RUNS, broken])  # it is tried again, from its last good checkpoint
    assert list(again.failures) == [broken.run_id]


def test_out_of_memory_in_one_run(wanted, tiny_stream, tmp_path, monkeypatch):
    plain = Trainer.step

    def step(self, acts, target=None):
        if self.config.nonlinearity == "relu" and self.state.n_updates == 5:
            raise MemoryError("cannot allocate")
        return plain(self, acts)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        results = train(tiny_stream, tmp_path / "a")
    assert set(results.failures.values()) == {"cannot allocate"}
    assert len(results.records) == 2
    train(tiny_stream, tmp_path / "a")
    found = contents(tmp_path / "a")
    lines = [set(files.pop("results.jsonl").splitlines()) for files in (found, dict(wanted))]
    assert lines[0] == lines[1]
    assert found == {name: data for name, data in wanted.items() if name != "results.jsonl"}


def test_when_every_run_fails_it_says_why(tiny_stream, tmp_path):
    broken = [RunConfig(d_sae=40, n_tokens=2560, lr=1e30)]
    with pytest.raises(SweepFailedError, match=r"every run failed; the first: the .* not finite"):
        train(tiny_stream, tmp_path / "a", broken)


def test_activations_that_are_not_finite_stop_the_sweep_in_one_sentence(tiny_lm, tiny_blocks, tmp_path, monkeypatch):
    stream = stream_over(tiny_lm, tiny_blocks)
    plain = tiny_lm.activations_at

    def poisoned(hooks, tokens):
        (acts,) = plain(hooks, tokens)
        acts[0, 3, 2] = float("nan")
        return [acts]

    monkeypatch.setattr(tiny_lm, "activations_at", poisoned)
    words = r"activations at blocks\.1\.hook_resid_pre are not finite as fp32, among blocks"
    with pytest.raises(FloatingPointError, match=words):
        train(stream, tmp_path / "a")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_130(tiny_lm_folder, stories_file, tmp_path, number):
    size = {"d_sae": 64, "n_tokens": 64_000_000, "batch_size": 64, "eval_tokens": 320, "checkpoint_minutes": 0.01}
    size["max_epochs"] = 1e6  # it would train for hours, on little text
    flags = text_flags(tiny_lm_folder, stories_file, **size, out=tmp_path / "a")
    process = subprocess.Popen([sys.executable, "-m", "prolu", "train", *flags], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob("a/checkpoints/step-*")))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saving a checkpoint" in said
    assert "run the same command again to resume" in said
    assert "Traceback" not in said
    assert read_checkpoint(tmp_path / "a").step > 0


def test_a_folder_has_one_owner_and_the_dead_own_nothing(tiny_stream, tmp_path):
    train(tiny_stream, tmp_path / "a")

    def hold():
        with locked(tmp_path / "a"):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = in_a_process(hold)
    wait_for((tmp_path / "held").exists)
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match="another process is working there"):
        train(tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == before
    os.kill(child, signal.SIGKILL)
    assert end_of(child) == -signal.SIGKILL
    train(tiny_stream, tmp_path / "a")


def test_two_are_kept_and_they_hold_everything(tmp_path):
    saved = {"a": RunState({"x": torch.arange(3.0)}, {"n_updates": 7, "curve": ["{}\n"]})}
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step, saved)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000000000002", "step-000000000010"]
    found = read_checkpoint(tmp_path)
    assert found.step == 10
    assert torch.equal(found.runs["a"].tensors["x"], torch.arange(3.0))
    assert found.runs["a"].facts == saved["a"].facts
    assert read_checkpoint(tmp_path / "nowhere") is None


def test_a_state_that_does_not_fit_is_refused():
    trainer = Trainer(RunConfig(d_sae=10, n_tokens=640), 6, 64)
    tensors, counters = trainer.state.tensors(), trainer.state.counters()
    for change, words in (
        ({"weights.encoder": torch.zeros(10, 7)}, "weights.encoder is torch.float32"),
        ({"weights.encoder": torch.zeros(10, 6, dtype=torch.float64)}, "torch.float64"),
        ({"first.decoder": torch.full((10, 6), torch.nan)}, "not finite"),
        ({"else": torch.zeros(1)}, r"lacks the tensors \[\] and has \['else'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer.restore_(tensors | change, counters)
    for wrong in ({"n_updates": 11}, {"n_updates": -1}, {"n_updates": "3"}, {"step": "fast"}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
            trainer.restore_(tensors, counters | wrong)


def test_checkpoints_take_less_than_three_percent_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    clock = Clock(None)
    for _ in range(10_000):
        now[0] += 1.0
        if clock.is_due:
            started, now[0] = now[0], now[0] + 20.0
            clock.wrote(started)
    assert 0 < clock.writing < 0.03 * now[0]


@pytest.mark.slow  # some processes, a minute
def test_kills_at_disk_operations_and_at_random_moments(tmp_path):
    """A few of `make crash`'s kills."""
    script = Path(__file__).parents[2] / "checks" / "crash.py"
    command = [sys.executable, script, "--every", "5", "--random", "2"]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"kills (\d+), identical \1/\1$", done.stdout.strip())


@pytest.mark.parametrize("keep_state", [False, True])
def test_a_run_that_ended_but_was_not_recorded_is(wanted, tiny_stream, tmp_path, keep_state):
    """The sweep dies between the last step and the second line of results."""

    def die(name, path):
        if name == "rename" and path.name == "results.jsonl" and path.exists():
            raise PowerCutError

    with before_disk_operations(die), pytest.raises(PowerCutError):
        train(tiny_stream, tmp_path / "a", seconds=1e9, keep_state=keep_state)
    assert len((tmp_path / "a" / "results.jsonl").read_text().splitlines()) == 1
    train(tiny_stream, tmp_path / "a", seconds=1e9, keep_state=keep_state)
    found = contents(tmp_path / "a")
    assert {name: found[name] for name in wanted} == wanted


def test_a_signal_while_runs_are_scored_keeps_those_that_wait(wanted, tiny_stream, tmp_path):
    def interrupt(name, path):
        if name == "rename" and path.name == "results.jsonl":
            os.kill(os.getpid(), signal.SIGTERM)

    with before_disk_operations(interrupt):
        for n_waiting in (2, 1):
            with pytest.raises(KeyboardInterrupt):
                train(tiny_stream, tmp_path / "a", seconds=1e9)
            assert len(read_checkpoint(tmp_path / "a").runs) == n_waiting
    train(tiny_stream, tmp_path / "a", seconds=1e9)
    assert contents(tmp_path / "a") == wanted


LENGTHS = {"d_sae": 40, "coeff": 0.03, "lr": 0.02, "decay_start_fraction": 1.0, "decay_end_fraction": 2.0}


def test_a_run_whose_schedule_permits_is_extended_to_the_same_bits(tiny_stream, tmp_path):
    def runs(n_tokens, **changes):
        return grid(
            RunConfig(n_tokens=n_tokens, warmup_fraction=640 / n_tokens, **LENGTHS, **changes), coeff=[0.02, 0.05]
        )

    short = sweep(runs(2560), tiny_stream, tmp_path / "a", keep_state=True)
    longer = sweep(runs(5120), tiny_stream, tmp_path / "a", keep_state=True)
    whole = sweep(runs(5120), tiny_stream, tmp_path / "b", keep_state=True)
    assert {r["n_tokens"] for r in longer.records} == {5120}
    for one, other in zip(longer.runs, whole.runs, strict=True):
        assert (one.folder / "sae.safetensors").read_bytes() == (other.folder / "sae.safetensors").read_bytes()
        assert one.record == other.record
    assert short.records != longer.records
    for changed, words in (
        (runs(2560), "it would be shorter"),
        (grid(RunConfig(n_tokens=10240, **LENGTHS), coeff=[0.02, 0.05]), "learning rate at step 0 was"),
        (runs(5760), "extend it to 6400 tokens or more"),
        (runs(10240, resample_fractions=(0.6,), resample_count_fraction=0.3), "it would have been resampled"),
        (runs(10240)[:1], "holds another study: 2 runs there, 1 here; a study keeps the runs"),
    ):
        with pytest.raises(ValueError, match=words):
            sweep(changed, tiny_stream, tmp_path / "a", keep_state=True)


def test_a_run_that_did_not_keep_its_state_cannot_be_extended(tiny_stream, tmp_path):
    for n_tokens in (2560, 5120):
        runs = [RunConfig(n_tokens=n_tokens, warmup_fraction=0.0, **LENGTHS)]
        if n_tokens == 2560:
            sweep(runs, tiny_stream, tmp_path / "a")
            continue
        with pytest.raises(ValueError, match="cannot be extended: it was finished without keeping its state"):
            sweep(runs, tiny_stream, tmp_path / "a")


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("name", ["log.jsonl", ".lock", RUNS[0].run_id])
def test_a_study_is_not_continued_through_links_into_other_folders(tiny_stream, tmp_path, name, exists):
    dies_at_step(7, lambda: train(tiny_stream, tmp_path / "a"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    target = foreign if name == RUNS[0].run_id else foreign / "log.jsonl"
    if name != RUNS[0].run_id and exists:
        target.write_text("mine too\n")
    (tmp_path / "a" / name).unlink(missing_ok=True)
    (tmp_path / "a" / name).symlink_to(target if exists else foreign / "nothing")
    before = contents(foreign)
    with pytest.raises(ValueError, match="a link that leads out of"):
        train(tiny_stream, tmp_path / "a")
    assert contents(foreign) == before
    # A link to a file inside the study harms nobody, but is no folder of a run.
    if name == RUNS[0].run_id:
        (tmp_path / "a" / name).unlink()
        (tmp_path / "a" / name).symlink_to(tmp_path / "a/config.json")
        with pytest.raises(ValueError, match="a file, but the folder of a run needs this name; move the file away"):
            train(tiny_stream, tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    train(tiny_stream, tmp_path / "a")


def test_a_resampling_that_a_short_run_leaves_out_is_said(tiny_stream, tmp_path, caplog):
    plain = RunConfig(d_sae=24, n_tokens=640, coeff=1)
    short = replace(plain, coeff=2, resample_fractions=(0.5, 0.96))
    sweep([short, plain], tiny_stream, tmp_path / "a")
    assert "1 resamplings of 2 runs are left out, because they would come after the last step" in caplog.text
    assert f"(the first: {short.run_id} after 0.96 of its 10 steps)" in caplog.text
