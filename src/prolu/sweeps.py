"""Many SAEs on one stream of activations: one language-model pass, results as they finish, kept when killed."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prolu.active import ActiveRun
from prolu.checkpoints import (
    CHECKPOINTS_FOLDER,
    Clock,
    Saved,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)
from prolu.config import RunConfig
from prolu.evaluation import HeldOut
from prolu.files import owned, read_json_lines, remove, write_atomically
from prolu.interrupts import Interrupt
from prolu.progress import Meter
from prolu.results import FAILURE_FILE, RESULTS_FILE, Results, failures, read_study
from prolu.steps import Steps
from prolu.stream import ActivationStream
from prolu.study import FINAL_FOLDER, describe_study, prepare_folder, write_study
from prolu.training import Trainer


class SweepFailedError(RuntimeError):
    """No run of a sweep could be finished."""


def grid(base: RunConfig, **values: Sequence[Any]) -> list[RunConfig]:
    """All combinations of some fields' values: `grid(RunConfig(), penalty=["l1", "sqrt_l1"], coeff=[1e-3, 2e-3])`.

    Raises:
        ValueError: not a field of RunConfig, or not a valid value.
    """
    known = asdict(base)
    for name in values:
        if name not in known:
            raise ValueError(f"{name!r}: not a field of RunConfig; fields: {', '.join(known)}")
    return [replace(base, **dict(zip(values, point, strict=True))) for point in itertools.product(*values.values())]


def with_seeds(runs: Iterable[RunConfig], seeds: Sequence[int]) -> list[RunConfig]:
    """Every run at each of some init seeds.

    Raises:
        ValueError: no seed, or one twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"init_seeds {' '.join(map(str, seeds)) or 'none'}: name one or more, each once")
    return [replace(run, init_seed=seed) for run in runs for seed in seeds]


def run_sweep(
    runs: Iterable[RunConfig],
    stream: ActivationStream,
    out: str | Path,
    *,
    eval_tokens: int = 32_768,
    checkpoint_seconds: float | None = None,
    keep_state: bool = False,
    progress: bool = True,
) -> Results:
    """Trains all runs on one stream, evaluates each when it ends, and writes the study's folder.

    A run's bits do not depend on the runs beside it. Called again with the same arguments, it keeps the
    runs that have finished, and goes on with the others where the last checkpoint left them: to the bit what
    an uninterrupted sweep gives. A run that fails (its loss not finite, memory gone) is stopped and listed
    under `Results.failures`; the others go on. With more tokens, and a schedule by which every step so far
    stays what it was, finished runs whose state was kept are extended.

    Args:
        runs: what to train; `train` is a sweep of one.
        stream: activations, shared by all.
        out: the study's folder: config.json, results.jsonl, and a folder for each run.
        eval_tokens: held-out tokens to score on.
        checkpoint_seconds: between two checkpoints; None: a minute or more, and under 3% of the time.
        keep_state: keep the moments of finished runs, so that they can be extended to more tokens.
        progress: show rates and time left.

    Raises:
        ValueError: two runs alike, a run shorter than a batch, a folder that holds something else, or one in
            which another process is working. Nothing is written then.
        SweepFailedError: every run failed.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is written.
    """
    runs, out = list(runs), Path(out)
    prepare_folder(out, runs, stream, eval_tokens)
    with owned(out):
        study = describe_study(runs, stream, eval_tokens)
        if json.loads(json.dumps(study["runs"])) != read_study(out)["runs"]:
            write_study(out, study)  # a longer one
        done = _done(runs, out)
        if todo := [run for run in runs if run not in done]:
            clock = Clock(checkpoint_seconds)
            _Sweep(todo, stream, out, eval_tokens, clock, keep_state=keep_state, progress=progress).train()
        done = _done(runs, out)
        _tidy(done, out)
        if not done:
            raise SweepFailedError(f"every run failed; the first: {next(iter(failures(out).values()))}")
    return Results.load(out)


def _done(runs: Sequence[RunConfig], out: Path) -> list[RunConfig]:
    """Those that have a result at their full length."""
    lengths = {record["run_id"]: record["n_tokens"] for record in read_json_lines(out / RESULTS_FILE)}
    return [run for run in runs if lengths.get(run.run_id) == run.n_tokens]


class _Sweep:
    """The loop: trainers on one stream, checkpoints, results, and what to do when a run or the disk fails."""

    def __init__(
        self,
        todo: list[RunConfig],
        stream: ActivationStream,
        out: Path,
        eval_tokens: int,
        clock: Clock,
        *,
        keep_state: bool,
        progress: bool,
    ):
        self._stream, self._out, self._clock = stream, out, clock
        self._keep_state, self._progress = keep_state, progress
        self._interrupt = Interrupt()
        self._held_out = HeldOut(stream.lm, stream.blocks, eval_tokens)
        self._active = self._prepared(todo)

    def train(self) -> None:
        """Trains all that is left to train.

        Raises:
            KeyboardInterrupt: asked to stop; a checkpoint is written.
        """
        with Interrupt() as self._interrupt:
            self._conclude()  # what had ended, but was not yet recorded
            self._stop_if_asked()
            if self._active:
                self._loop()

    def _loop(self) -> None:
        first = min(run.trainer.state.n_updates for run in self._active)
        n_steps, batch_size = max(run.trainer.n_steps for run in self._active), self._stream.batch_size
        n_saes = len(self._active)
        with Meter("training", (n_steps - first) * batch_size, n_saes, shown=self._progress) as meter:
            for step in range(first, n_steps):
                due = [run for run in self._active if run.trainer.state.n_updates == step]
                _resample([run for run in due if run.trainer.resamples_now], self._stream, step)
                batch = self._stream[step]
                for run in due:
                    self._attempt(run, lambda run=run, batch=batch: run.step(batch, self._held_out))
                meter.advance(batch_size)
                self._conclude()
                self._stop_if_asked()
                if self._active and self._clock.is_due:
                    self._checkpoint()
            rate = {"tokens_per_second": meter.tokens_per_second, "seconds": meter.seconds, "n_saes": n_saes}
        self._log("trained", **rate, seconds_checkpointing=self._clock.writing)

    def _prepared(self, todo: list[RunConfig]) -> list[ActiveRun]:
        """Trainers, each where it was left."""
        shared: dict[tuple[int, str], Steps] = {}
        together = self._read(self._out)
        active: list[ActiveRun] = []
        for config in todo:
            folder, shape = self._out / config.run_id, (config.d_sae, config.precision)
            try:
                trainer = Trainer(config, self._stream.d_in, self._stream.batch_size, steps=shared.get(shape))
            except (MemoryError, RuntimeError) as problem:
                self._record_failure(config.run_id, 0, problem)
                continue
            shared.setdefault(shape, trainer.steps)
            run = ActiveRun(trainer, folder, self._stream.describe())
            places = (lambda: together, lambda f=folder: self._read(f), lambda f=folder: self._read(f / FINAL_FOLDER))
            saved = next((found[config.run_id] for place in places if config.run_id in (found := place())), None)
            if saved is not None:
                try:
                    run.restore_(saved)
                except (ValueError, KeyError, TypeError) as problem:
                    self._say(f"{config.run_id}: its checkpoint does not fit ({problem}); it starts anew")
            active.append(run)
        return active

    def _read(self, folder: Path) -> Mapping[str, Saved]:
        found = read_checkpoint(folder)
        if found is None:
            return {}
        for complaint in found.complaints:
            self._say(f"{complaint}; the one before is used" if found.runs else f"{complaint}; training starts anew")
        if found.runs:
            self._log("resumed", step=found.step, runs=len(found.runs))
        return found.runs

    def _stop_if_asked(self) -> None:
        if self._interrupt.requested:
            if self._active:
                self._checkpoint()
            raise KeyboardInterrupt

    def _checkpoint(self) -> None:
        started, step = time.monotonic(), min(run.trainer.state.n_updates for run in self._active)
        try:
            write_checkpoint(self._out, step, {run.run_id: run.saved() for run in self._active})
        except OSError as problem:
            self._say(f"no checkpoint at step {step} ({problem.strerror or problem}); training goes on")
        self._clock.wrote(started)
        self._log("checkpoint", step=step, seconds=time.monotonic() - started)

    def _attempt(self, run: ActiveRun, work: Callable[[], None]) -> None:
        """Does some work of one run; if it fails, the run is stopped and the others go on."""
        try:
            work()
        except (FloatingPointError, MemoryError, RuntimeError) as problem:
            self._active.remove(run)
            self._keep_last_good(run)
            self._record_failure(run.run_id, run.trainer.state.n_updates, problem)

    def _keep_last_good(self, run: ActiveRun) -> None:
        """The run's part of the last checkpoint moves into its own folder, where later ones do not replace it."""
        found = read_checkpoint(self._out)
        if found and run.run_id in found.runs:
            write_checkpoint(run.folder, found.step, {run.run_id: found.runs[run.run_id]})

    def _record_failure(self, run_id: str, step: int, problem: Exception) -> None:
        reason = str(problem).split("\n")[0] or type(problem).__name__
        self._say(f"{run_id}: failed at step {step} ({reason}); the other runs go on")
        (self._out / run_id).mkdir(exist_ok=True)
        write_atomically(self._out / run_id / FAILURE_FILE, json.dumps({"step": step, "reason": reason}) + "\n")
        self._log("failed", run_id=run_id, step=step, reason=reason)

    def _conclude(self) -> None:
        """Evaluates runs that have ended; each is on the disk before the next is looked at."""
        finished = [run for run in self._active if run.finished]
        if not finished:
            return
        n_tokens = self._held_out.n_tokens
        with Meter("evaluating", n_tokens * len(finished), shown=self._progress) as meter:
            for run in finished:
                if self._interrupt.requested:
                    return
                self._attempt(run, lambda run=run: self._write_result(run))
                self._active = [other for other in self._active if other is not run]
                meter.advance(n_tokens)

    def _write_result(self, run: ActiveRun) -> None:
        if self._keep_state:
            write_checkpoint(run.folder / FINAL_FOLDER, run.trainer.state.n_updates, {run.run_id: run.saved()})
        record = run.finish(self._held_out)
        records = [r for r in read_json_lines(self._out / RESULTS_FILE) if r["run_id"] != run.run_id] + [record]
        write_atomically(self._out / RESULTS_FILE, "".join(json.dumps(r) + "\n" for r in records))

    def _say(self, sentence: str) -> None:
        print(f"prolu: {sentence}", file=sys.stderr, flush=True)

    def _log(self, event: str, **facts: Any) -> None:
        with (self._out / "log.jsonl").open("a") as log:
            log.write(json.dumps({"event": event, "time": time.time()} | facts) + "\n")


def _resample(due: list[ActiveRun], stream: ActivationStream, step: int) -> None:
    """Resamples the dead latents of all runs whose turn it is, on one harvest of fresh activations."""
    rebirths = [run.trainer.rebirth() for run in due]
    if any(rebirth.n_dead for rebirth in rebirths):
        most = max(run.trainer.resampling.n_candidates for run in due)
        for batch in stream.fresh(most, "resample", step):
            for rebirth in rebirths:
                rebirth.offer(batch.acts, batch.raw_norm)
    for run, rebirth in zip(due, rebirths, strict=True):
        run.resampled.append({"step": step} | run.trainer.resample_(rebirth)._asdict())


def _tidy(runs: Sequence[RunConfig], out: Path) -> None:
    """Removes what only an unfinished study needs."""
    remove_checkpoints(out)
    for run in runs:
        if (out / run.run_id / FAILURE_FILE).exists() or (out / run.run_id / CHECKPOINTS_FOLDER).exists():
            remove(out / run.run_id / FAILURE_FILE)
            remove_checkpoints(out / run.run_id)
