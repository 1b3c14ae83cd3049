"""One study while it trains: its runs, their checkpoints, results and failures."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prolu.evaluation.held_out import HeldOut
from prolu.runtime.files import read_json_lines, write_atomically
from prolu.runtime.interrupts import Interrupt
from prolu.runtime.progress import Meter
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.studies.checkpoints import RunState, read_checkpoint, write_checkpoint
from prolu.studies.folder import FAILURE_FILE, FINAL_FOLDER, MOVABLE, RESULTS_FILE
from prolu.studies.request import LENGTH_FIELDS, StudyRequest
from prolu.studies.run_in_training import ActiveRun
from prolu.studies.trackers import Followed, Trackers
from prolu.training.config import RunConfig
from prolu.training.steps import Steps
from prolu.training.trainer import Trainer

Shared = dict[tuple[int, int, tuple[str, ...], str], Steps]
"""Buffers of steps by d_in, d_sae, own parameters and precision; trainers of one shape share them."""


class ActiveStudy:
    """The runs of one study that are not finished, on their stream; what to do when one of them or the disk fails."""

    def __init__(
        self,
        todo: Sequence[RunConfig],
        request: StudyRequest,
        *,
        shared: Shared,
        keep_state: bool,
        progress: bool,
        trackers: Trackers,
    ):
        self.stream, self.mesh, self._out = request.stream, request.stream.mesh, request.out
        self._keep_state, self._progress, self._trackers = keep_state, progress, trackers
        self._held_out = None
        if self.mesh.is_first:
            self._held_out = HeldOut(self.stream.lm, self.stream.blocks, request.eval_tokens)
        self.runs = self._prepared(todo, shared)
        """Those that are training, each where it was left."""

    @property
    def first_step(self) -> int:
        """The earliest that a run waits for."""
        return min(run.trainer.state.n_updates for run in self.runs)

    def due(self, step: int) -> list[ActiveRun]:
        """Runs whose next step it is."""
        return [run for run in self.runs if run.trainer.state.n_updates == step]

    def step(self, step: int) -> None:
        """One step of each run whose turn it is."""
        if due := self.due(step):
            batch = self.stream[step]
            for run in due:
                self._attempt(run, lambda run=run: run.step(batch, self._held_out))

    def checkpoint(self) -> None:
        """Saves all runs; a disk that takes nothing costs the checkpoint, no more."""
        if not self.runs:
            return
        started, step = time.monotonic(), self.first_step
        saved = {run.run_id: run.saved() for run in self.runs}
        if not self.mesh.is_first:
            return
        try:
            write_checkpoint(self._out, step, saved)
        except OSError as problem:
            self._say(f"no checkpoint at step {step} ({problem.strerror or problem}); training goes on")
        self.log("checkpoint", step=step, seconds=time.monotonic() - started)

    def conclude(self, interrupt: Interrupt) -> None:
        """Evaluates runs that have ended; each is on the disk before the next is looked at."""
        finished = [run for run in self.runs if run.finished]
        if not finished:
            return
        n_tokens = self._held_out.n_tokens if self._held_out is not None else 0
        with Meter("evaluating", n_tokens * len(finished), shown=self._progress) as meter:
            for run in finished:
                if self.mesh.any(interrupt.requested):
                    return
                self._attempt(run, lambda run=run: self._write_result(run))
                self.runs = [other for other in self.runs if other is not run]
                meter.advance(n_tokens)

    def log(self, event: str, **facts: Any) -> None:
        """Notes what happened, and when."""
        if not self.mesh.is_first:
            return
        with (self._out / "log.jsonl").open("a") as log:
            log.write(json.dumps({"event": event, "time": time.time()} | facts) + "\n")

    def _prepared(self, todo: Sequence[RunConfig], shared: Shared) -> list[ActiveRun]:
        """Trainers, each where it was left."""
        together = self._read(self._out)
        active: list[ActiveRun] = []
        for config in todo:
            own = nonlinearity_named(config.code).parameter_names
            folder, shape = self._out / config.run_id, (self.stream.d_in, config.d_sae, own, config.precision)
            try:
                stream, steps = self.stream, shared.get(shape)
                trainer = Trainer(
                    config, stream.d_in, stream.batch_size, steps=steps, device=stream.device, mesh=self.mesh
                )
            except (MemoryError, RuntimeError) as problem:
                if self.mesh.n_ranks > 1:
                    raise
                self._record_failure(config.run_id, 0, problem)
                continue
            shared.setdefault(shape, trainer.steps)
            run = ActiveRun(trainer, folder, self.stream.describe())
            places = (lambda: together, lambda f=folder: self._read(f), lambda f=folder: self._read(f / FINAL_FOLDER))
            saved = next((found[config.run_id] for place in places if config.run_id in (found := place())), None)
            if saved is not None:
                try:
                    run.restore_(saved)
                except (ValueError, KeyError, TypeError) as problem:
                    self._say(f"{config.run_id}: its checkpoint does not fit ({problem}); it starts anew")
            if self.mesh.is_first:
                run.follow(self._trackers.follow(self._followed(run)))
            active.append(run)
        return active

    def _followed(self, run: ActiveRun) -> Followed:
        """A run as trackers know it: named by its study's name and all that stays when it is resumed or extended."""
        config, stream = run.trainer.config, self.stream.describe()
        lasting = {k: v for k, v in asdict(config).items() if k not in LENGTH_FIELDS and k != "init_from"}  # a path
        out, hook = self._out.resolve(), stream["hook"]
        group = f"{out.parent.name}/{hook}" if out.name == hook else out.name  # one of several hooks, or the only one
        facts = [group, {k: v for k, v in stream.items() if k not in MOVABLE}, lasting]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return Followed(out, group, config.run_id, key, run.trainer.describe() | {"stream": stream})

    def _read(self, folder: Path) -> Mapping[str, RunState]:
        found = read_checkpoint(folder)
        if found is None:
            return {}
        for complaint in found.complaints:
            self._say(f"{complaint}; the one before is used" if found.runs else f"{complaint}; training starts anew")
        if found.runs:
            self.log("resumed", step=found.step, runs=len(found.runs))
        return found.runs

    def _attempt(self, run: ActiveRun, work: Callable[[], None]) -> None:
        """Does some work of one run; if it fails, the run is stopped and the others go on.

        On a mesh only a loss that is not finite is known to all ranks; anything else ends them.
        """
        try:
            work()
        except (FloatingPointError, MemoryError, RuntimeError) as problem:
            if self.mesh.n_ranks > 1 and not isinstance(problem, FloatingPointError):
                raise
            self.runs.remove(run)
            if not self.mesh.is_first:
                return
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
        self.log("failed", run_id=run_id, step=step, reason=reason)

    def _write_result(self, run: ActiveRun) -> None:
        if self._keep_state and (saved := run.saved()).tensors:
            write_checkpoint(run.folder / FINAL_FOLDER, run.trainer.state.n_updates, {run.run_id: saved})
        record = run.finish(self._held_out)
        if record is None:
            return
        records = [r for r in read_json_lines(self._out / RESULTS_FILE) if r["run_id"] != run.run_id] + [record]
        write_atomically(self._out / RESULTS_FILE, "".join(json.dumps(r) + "\n" for r in records))
        run.tell_result(record)

    def _say(self, sentence: str) -> None:
        if self.mesh.is_first:
            print(f"prolu: {sentence}", file=sys.stderr, flush=True)
