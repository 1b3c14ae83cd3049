"""One study while it trains: its unfinished runs, their checkpoints, results and failures."""

import hashlib
import json
import logging
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from prolu.runtime.files import first_line
from prolu.runtime.interrupts import Interrupt
from prolu.runtime.progress import Meter
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.studies.checkpoints import RunState, read_checkpoint, write_checkpoint
from prolu.studies.extension import LENGTH_FIELDS
from prolu.studies.folder import FINAL_FOLDER, PATH_FIELDS, log_event, read_results, write_failure, write_results
from prolu.studies.request import StudyRequest
from prolu.studies.run_in_training import RunInTraining
from prolu.studies.trackers import TrackedRun, Trackers
from prolu.training.config import RunConfig
from prolu.training.steps import Steps
from prolu.training.trainer import StepReport, Trainer
from prolu.training.trainer_stack import MOST_ENTRIES, TrainerStack, stack_key, stacks_pay

logger = logging.getLogger(__name__)

SharedBuffers = dict[Hashable, Steps]
"""Buffers of training steps by the shapes of all weights and the precision. Trainers of one shape share them, since
only one of them steps at a time."""


class StudyInTraining:
    """One study while it trains: it holds the runs that are not finished, saves their checkpoints, and scores them.

    A run that fails is stopped and recorded, and the others go on; so does training if a checkpoint cannot be written.
    """

    def __init__(self, todo: Sequence[RunConfig], request: StudyRequest, buffers: SharedBuffers, trackers: Trackers):
        self.stream = request.stream
        self.mesh = request.stream.mesh
        self._request = request
        self._out = request.out
        self._settings = request.settings
        self._progress = request.progress
        self._trackers = trackers
        # On a mesh only the first rank evaluates.
        self.held_out = request.held_out if self.mesh.is_first else None
        self.runs = self._prepared(todo, buffers)
        """The runs in training, each at the step where it was left."""
        self._stacks = [(runs, TrainerStack([run.trainer for run in runs])) for runs in self._runs_to_stack()]
        for runs, _ in self._stacks:
            for run in runs:
                run.note_stack([other.run_id for other in runs])

    def runs_at(self, step: int) -> list[RunInTraining]:
        """Return the runs whose next step this is; a run that was restored at a later step waits for the others."""
        return [run for run in self.runs if run.n_updates == step]

    def step_stacks(
        self, ready: Sequence[RunInTraining], rows: Mapping[str, tuple[Tensor, Tensor | None]]
    ) -> dict[str, StepReport | Exception]:
        """Make the next step of all stacks with a run that is ready.

        Args:
            ready: the runs whose next step this is.
            rows: the batch's activations and targets, by the normalisation of runs (`Batch.scaled`).

        Returns:
            What the step did in each run, by name; if the step of a stack failed, the failure for each of its runs.
        """
        found: dict[str, StepReport | Exception] = {}
        for runs, stack in self._stacks:
            # A run that has failed stays in its stack, so that the numbers of the others do not change.
            if any(run in ready for run in runs):
                try:
                    reports: Sequence[StepReport | Exception] = stack.step(*rows[runs[0].trainer.config.normalisation])
                except (MemoryError, RuntimeError) as problem:
                    reports = [problem] * len(runs)
                found |= dict(zip([run.run_id for run in runs], reports, strict=True))
        return found

    @contextmanager
    def isolating_failure(self, run: RunInTraining) -> Iterator[None]:
        """Stop a run that fails within the block, and keep its last good state; the other runs continue.

        On a mesh only a loss that is not finite is known to all ranks, so any other failure ends them all.
        """
        try:
            yield
        except (FloatingPointError, MemoryError, RuntimeError) as problem:
            if self.mesh.n_ranks > 1 and not isinstance(problem, FloatingPointError):
                raise
            self.runs.remove(run)
            if self.mesh.is_first:
                self._keep_last_good_state(run)
                self._record_failure(run.run_id, run.n_updates, problem)

    def checkpoint(self) -> None:
        """Save the state of all runs. A disk that takes nothing costs this checkpoint, and no more."""
        # On a GPU a loss that is not finite may not have been seen yet, and such weights must not be saved.
        for run in list(self.runs):
            with self.isolating_failure(run):
                run.check_losses()
        if not self.runs:
            return
        started = time.monotonic()
        step = min(run.n_updates for run in self.runs)
        states = {run.run_id: run.state() for run in self.runs}
        if not self.mesh.is_first:
            return
        try:
            write_checkpoint(self._out, step, states)
        except OSError as problem:
            self._warn(f"no checkpoint at step {step} ({problem.strerror or problem}); training goes on")
        self.log("checkpoint", step=step, seconds=time.monotonic() - started)

    def conclude(self, interrupt: Interrupt) -> None:
        """Score and save the runs that have made all their steps; each is on the disk before the next is scored."""
        finished = [run for run in self.runs if run.finished]
        if not finished:
            return
        self._refit([run for run in finished if run.trainer.config.refit_tokens])
        n_tokens = self.held_out.n_tokens if self.held_out is not None else 0
        progress = self._progress and self.mesh.is_first
        with Meter("evaluating", n_tokens * len(finished), shown=progress) as meter:
            for run in finished:
                if self.mesh.any(interrupt.requested):
                    return
                with self.isolating_failure(run):
                    self._write_result(run)
                    self.runs.remove(run)
                meter.advance(n_tokens)

    def _refit(self, finished: Sequence[RunInTraining]) -> None:
        """Show training activations, the same for all, to the runs whose decoders are refitted after the last step."""
        for n_tokens in {run.trainer.config.refit_tokens for run in finished}:
            asking = [run for run in finished if run.trainer.config.refit_tokens == n_tokens]
            for batch in self.stream.fresh(n_tokens, "refit"):
                for run in asking:
                    run.refit(*batch.scaled(run.trainer.config.normalisation))

    def log(self, event: str, **facts: Any) -> None:
        """Append what happened, and when, to the study's log."""
        if self.mesh.is_first:
            log_event(self._out, event, **facts)

    def _prepared(self, todo: Sequence[RunConfig], buffers: SharedBuffers) -> list[RunInTraining]:
        """Return the runs with their trainers, each restored from its newest state."""
        together = self._read_states(self._out)
        prepared: list[RunInTraining] = []
        for config in todo:
            try:
                trainer = self._trainer(config, buffers)
            except (MemoryError, RuntimeError) as problem:
                if self.mesh.n_ranks > 1:
                    raise
                self._record_failure(config.run_id, 0, problem)
                continue
            run = RunInTraining(trainer, self._out / config.run_id, self.stream.describe())
            state = self._newest_state(run, together)
            if state is not None:
                try:
                    run.restore_(state)
                except (ValueError, KeyError, TypeError) as problem:
                    self._warn(f"{run.run_id}: its checkpoint does not fit ({problem}); it starts anew")
            if self.mesh.is_first:
                run.follow(self._trackers.follow(self._followed(run)))
            prepared.append(run)
        return prepared

    def _trainer(self, config: RunConfig, buffers: SharedBuffers) -> Trainer:
        stream = self.stream
        own = nonlinearity_named(config.resolved_nonlinearity).parameter_names
        shape = (stream.d_in, stream.d_out, config.skip, config.d_sae, own, config.precision)
        trainer = Trainer(
            config,
            stream.d_in,
            stream.batch_size,
            d_out=stream.d_out,
            steps=buffers.get(shape),
            device=stream.device,
            mesh=self.mesh,
            crossover=self._request.crossover(config),
        )
        buffers.setdefault(shape, trainer.steps)
        return trainer

    def _runs_to_stack(self) -> list[list[RunInTraining]]:
        """Return the runs of each stack: those that are alike, in their order, in stacks that are not too large."""
        if self.mesh.n_ranks > 1:
            return []
        alike: dict[Hashable, list[RunInTraining]] = {}
        for run in self.runs:
            config = run.trainer.config
            pays = config.step == "auto" and stacks_pay(self.stream.device.type, self.stream.d_in, config.d_sae)
            if config.step == "stacked" or pays:
                alike.setdefault((stack_key(run.trainer), run.n_updates), []).append(run)
        stacks: list[list[RunInTraining]] = []
        for runs in alike.values():
            entries = self.stream.batch_size * runs[0].trainer.config.d_sae
            size = max(1, MOST_ENTRIES // entries)
            stacks += [runs[i : i + size] for i in range(0, len(runs), size) if not runs[i].finished]
        return stacks

    def _newest_state(self, run: RunInTraining, together: Mapping[str, RunState]) -> RunState | None:
        """Return where a run was left: in the study's checkpoint, its own after a failure, or its kept final state."""
        if run.run_id in together:
            return together[run.run_id]
        for folder in (run.folder, run.folder / FINAL_FOLDER):
            if run.run_id in (states := self._read_states(folder)):
                return states[run.run_id]
        return None

    def _read_states(self, folder: Path) -> Mapping[str, RunState]:
        found = read_checkpoint(folder)
        if found is None:
            return {}
        for complaint in found.complaints:
            self._warn(f"{complaint}; the one before is used" if found.runs else f"{complaint}; training starts anew")
        if found.runs:
            self.log("resumed", step=found.step, runs=len(found.runs))
        return found.runs

    def _followed(self, run: RunInTraining) -> TrackedRun:
        """Describe a run to trackers, under a key made of all that stays when it is resumed, extended or moved."""
        config = run.trainer.config
        stream = self.stream.describe()
        out = self._out.resolve()
        hook = stream.get("hook", "")
        lasting = {k: v for k, v in config.describe().items() if k not in LENGTH_FIELDS and k != "init_from"}  # a path
        # A study at one of several hooks lies in OUT/HOOK and is named by both.
        group = f"{out.parent.name}/{hook}" if hook and out.name == hook else out.name
        facts = [group, {k: v for k, v in stream.items() if k not in PATH_FIELDS}, lasting]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return TrackedRun(out, group, config.run_id, key, run.trainer.describe() | {"stream": stream})

    def _keep_last_good_state(self, run: RunInTraining) -> None:
        """Copy the run's part of the last checkpoint into its own folder, where later checkpoints do not replace it."""
        found = read_checkpoint(self._out)
        if found and run.run_id in found.runs:
            write_checkpoint(run.folder, found.step, {run.run_id: found.runs[run.run_id]})

    def _record_failure(self, run_id: str, step: int, problem: Exception) -> None:
        reason = first_line(problem)
        self._warn(f"{run_id}: failed at step {step} ({reason}); the other runs go on")
        write_failure(self._out / run_id, step, reason)
        self.log("failed", run_id=run_id, step=step, reason=reason)

    def _write_result(self, run: RunInTraining) -> None:
        if self._settings.keep_state and (state := run.state()).tensors:
            write_checkpoint(run.folder / FINAL_FOLDER, run.n_updates, {run.run_id: state})
        record = run.finish(self.held_out)
        if record is None:
            return
        others = [other for other in read_results(self._out) if other["run_id"] != run.run_id]
        write_results(self._out, [*others, record])
        run.report_result(record)

    def _warn(self, sentence: str) -> None:
        if self.mesh.is_first:
            logger.warning(sentence)
