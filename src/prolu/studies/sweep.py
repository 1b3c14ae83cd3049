"""Many SAEs on one stream of activations: the training loop, and the functions that begin it.

A sweep is, at heart,

    for batch in stream:
        for trainer in trainers:
            trainer.step(batch)

`train_together` below is this loop with what a long computation needs: studies at several hooks side by side, the
resampling of dead latents, scores of runs that end, checkpoints, and an orderly stop.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from prolu.activations.stream import ActivationStream
from prolu.runtime.files import locked, through_json
from prolu.runtime.interrupts import Interrupt
from prolu.runtime.progress import Meter
from prolu.runtime.stopping import StoppedError, one_sentence
from prolu.sae.choices import Normalisation
from prolu.studies.checkpoints import Clock
from prolu.studies.folder import failures, finished_runs, read_study, tidy, write_study
from prolu.studies.live_figures import LiveFigures
from prolu.studies.preflight import prepare_folders
from prolu.studies.request import StudyRequest, requests_at_hooks
from prolu.studies.results import Results
from prolu.studies.settings import MAX_EPOCHS, MIN_EVAL_FRACTION, SweepSettings
from prolu.studies.study_in_training import SharedBuffers, StudyInTraining
from prolu.studies.trackers import Trackers
from prolu.training.config import RunConfig


class SweepFailedError(RuntimeError):
    """No run of a sweep could be finished."""


class SweepStoppedError(StoppedError):
    """The disk, or a file that is read, failed while a sweep was running. All that was finished is kept."""

    resumes = "finished runs are saved; run the same sweep again to resume"


def train_together(studies: Sequence[StudyInTraining], clock: Clock, interrupt: Interrupt, *, progress: bool) -> None:
    """Train all runs of all studies to their ends, one batch of each study's stream at a time.

    All studies are at the same step, so that those which share a language model's pass ask for one window together.

    Raises:
        KeyboardInterrupt: the process was asked to stop; checkpoints are written.
    """
    runs = [run for study in studies for run in study.runs]
    first_step = min(run.n_updates for run in runs)
    last_step = max(run.trainer.n_steps for run in runs)
    batch_size = studies[0].stream.batch_size
    # Each rank of a mesh has a part of the weights only.
    figures = LiveFigures(studies) if studies[0].mesh.n_ranks == 1 else None
    n_tokens = (last_step - first_step) * batch_size
    with Meter("training", n_tokens, len(runs), shown=progress, figures=figures) as meter:
        for step in range(first_step, last_step):
            _resample_dead_latents(studies, step)
            for study in studies:
                if runs_now := study.runs_at(step):
                    batch = study.stream[step]
                    # In the space in which each run's SAE works: once for all runs that are scaled alike.
                    scalings: set[Normalisation] = {run.trainer.config.normalisation for run in runs_now}
                    rows = {normalisation: batch.scaled(normalisation) for normalisation in scalings}
                    in_stacks = study.step_stacks(runs_now, rows)
                    for run in runs_now:
                        with study.isolating_failure(run):
                            inputs = rows[run.trainer.config.normalisation]
                            report = in_stacks.get(run.run_id) or run.trainer.step(*inputs)
                            if isinstance(report, Exception):
                                raise report
                            run.record_step(report, study.held_out)
            meter.advance(batch_size)
            _conclude(studies, clock, interrupt)
            if studies[0].mesh.any(clock.is_due):
                _checkpoint(studies, clock)
        rate = {"tokens_per_second": meter.tokens_per_second, "seconds": meter.seconds, "n_saes": len(runs)}
    for study in studies:
        study.log("trained", **rate, seconds_checkpointing=clock.writing)


def train(requests: Sequence[StudyRequest]) -> None:
    """Train what the requests ask for and is not finished yet, all studies side by side, and record the results.

    The requests have been checked and their folders made (`prepare_folders`).

    Raises:
        FolderBusyError: another process is working in one of the folders.
        SweepFailedError: every run failed.
        KeyboardInterrupt: the process was asked to stop; checkpoints are written.
    """
    mesh = requests[0].stream.mesh
    settings = requests[0].settings
    clock = Clock(settings.checkpoint_seconds)
    trackers = Trackers(settings.tracker)
    with ExitStack() as held:
        if mesh.is_first:
            for request in requests:
                held.enter_context(locked(request.out))
                _record_extension(request)
        for request in requests:
            held.callback(request.stream.close)  # no thread reads on when training has ended, however it did
        held.enter_context(trackers)
        buffers: SharedBuffers = {}
        todo = [(request, unfinished) for request in requests if (unfinished := request.unfinished)]
        studies = [StudyInTraining(unfinished, request, buffers, trackers) for request, unfinished in todo]
        if studies:
            _train_until_interrupted(studies, clock, progress=requests[0].progress and mesh.is_first)
        if mesh.is_first:
            for request in requests:
                tidy(finished_runs(request.runs, request.out), request.out)
        mesh.wait()
    check_any_finished(requests)


def check_any_finished(requests: Sequence[StudyRequest]) -> None:
    """Raise SweepFailedError, with the first reason, if no run of any study has been finished."""
    if not any(finished_runs(request.runs, request.out) for request in requests):
        reasons = itertools.chain.from_iterable(failures(request.out).values() for request in requests)
        raise SweepFailedError(f"every run failed; the first: {next(reasons)}")


def run_sweep(
    runs: Iterable[RunConfig],
    stream: ActivationStream,
    out: str | Path,
    *,
    eval_tokens: int = 32_768,
    checkpoint_seconds: float | None = None,
    keep_state: bool = False,
    trackers: Sequence[str] = (),
    max_epochs: float = MAX_EPOCHS,
    min_eval_fraction: float = MIN_EVAL_FRACTION,
    progress: bool = True,
) -> Results:
    """Train all runs on one stream, score each when it ends, and write the study's folder.

    The result of a run does not depend on the runs beside it, to the bit, unless they are stacked, as small SAEs are on
    a GPU: then it does so within rounding (`RunConfig.step`). Call it again with the same arguments to
    resume: finished runs are kept, the others continue from the last checkpoint, and the result is bit-identical to
    that of an uninterrupted sweep. A run that fails (its loss is not finite, or memory is exhausted) is stopped and
    listed in `Results.failures`; the other runs go on. Ask for more tokens to extend finished runs; this needs
    `keep_state=True` and a schedule under which every step made so far stays what it was.

    Args:
        runs: what to train.
        stream: the activations on which all runs are trained.
        out: the study's folder; it will hold config.json, results.jsonl and a folder for each run.
        eval_tokens: held-out tokens on which every finished SAE is scored.
        checkpoint_seconds: seconds between two checkpoints. None: a minute or more, so that writing them takes less
            than 3% of the time.
        keep_state: keep the Adam moments of finished runs, so that they can be extended to more tokens.
        trackers: also send training curves to `wandb`, `tensorboard` or both. They do not change any result.
        max_epochs: how many times a run may see its text at most.
        min_eval_fraction: the least fraction of `eval_tokens` that the text must have.
        progress: show rates and the time left.

    Raises:
        ValueError: two runs are alike, a run is shorter than a batch, there is much less text than is asked for, or
            the folder holds something else or is in use by another process. Nothing is written then.
        SweepFailedError: every run failed.
        SweepStoppedError: the disk is full, or a file cannot be read any more. It is an OSError.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is written.
    """
    settings = _settings(eval_tokens, checkpoint_seconds, keep_state, trackers, max_epochs, min_eval_fraction)
    request = StudyRequest(list(runs), stream, Path(out), settings, progress)
    stream.mesh.first_rank_first(lambda: prepare_folders([request]))
    with one_sentence(SweepStoppedError):
        train([request])
    return Results.load(out)


def run_sweeps(
    runs: Iterable[RunConfig] | Callable[[int], Iterable[RunConfig]],
    streams: Iterable[ActivationStream],
    out: str | Path,
    *,
    eval_tokens: int = 32_768,
    checkpoint_seconds: float | None = None,
    keep_state: bool = False,
    trackers: Sequence[str] = (),
    max_epochs: float = MAX_EPOCHS,
    min_eval_fraction: float = MIN_EVAL_FRACTION,
    progress: bool = True,
) -> dict[str, Results]:
    """Train the same runs at several hooks, side by side; streams that share a source read each window once.

    Every hook has a study of its own in the folder `out`/HOOK, bit-identical to what `run_sweep` would write there.
    It is resumed and extended in the same way.

    Args:
        runs: what to train at each hook, or a function that returns it for a width d_in of the activations.
        streams: one per hook, alike in all else. Let them share a `Harvest` of all the hooks, or an `ActivationStore`.
        out: folder of the studies.
        eval_tokens: as in `run_sweep`, like the arguments after it.
        checkpoint_seconds: as in `run_sweep`.
        keep_state: as in `run_sweep`.
        trackers: as in `run_sweep`.
        max_epochs: as in `run_sweep`.
        min_eval_fraction: as in `run_sweep`.
        progress: as in `run_sweep`.

    Returns:
        The results by hook; a hook at which every run failed is left out.

    Raises:
        ValueError: as in `run_sweep`, or the streams differ in more than the hook. Nothing is written then.
        SweepFailedError: every run failed, at every hook.
        SweepStoppedError: as in `run_sweep`.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is written at every hook.
    """
    settings = _settings(eval_tokens, checkpoint_seconds, keep_state, trackers, max_epochs, min_eval_fraction)
    requests = requests_at_hooks(runs, streams, Path(out), settings, progress=progress)
    requests[0].stream.mesh.first_rank_first(lambda: prepare_folders(requests))
    with one_sentence(SweepStoppedError):
        train(requests)
    return {r.stream.hook: Results.load(r.out) for r in requests if finished_runs(r.runs, r.out)}


def _settings(
    eval_tokens: int,
    checkpoint_seconds: float | None,
    keep_state: bool,
    trackers: Sequence[str],
    max_epochs: float,
    min_eval_fraction: float,
) -> SweepSettings:
    minutes = None if checkpoint_seconds is None else checkpoint_seconds / 60
    return SweepSettings(
        eval_tokens=eval_tokens,
        max_epochs=max_epochs,
        min_eval_fraction=min_eval_fraction,
        checkpoint_minutes=minutes,
        keep_state=keep_state,
        tracker=tuple(trackers),  # pyright: ignore[reportArgumentType]  # `check` looks at the names
    )


def _record_extension(request: StudyRequest) -> None:
    """Write the config of a study whose runs were asked to be longer than they were; any other is there already."""
    runs = through_json(request.description["runs"])
    if runs != read_study(request.out)["runs"]:
        write_study(request.out, request.description)


def _train_until_interrupted(studies: Sequence[StudyInTraining], clock: Clock, *, progress: bool) -> None:
    mesh = studies[0].mesh
    if mesh.n_ranks > 1:
        for study in studies:
            study.log("mesh", data=mesh.n_data, latent=mesh.n_latent)
    with Interrupt(patient=mesh.n_ranks > 1) as interrupt:
        # A process that died between the last step of a run and its result left a run that only needs its score.
        _conclude(studies, clock, interrupt)
        if any(study.runs for study in studies):
            train_together(studies, clock, interrupt, progress=progress)


def _conclude(studies: Sequence[StudyInTraining], clock: Clock, interrupt: Interrupt) -> None:
    """Score the runs that have ended; if the process was asked to stop, save the others and stop."""
    for study in studies:
        study.conclude(interrupt)
    if studies[0].mesh.any(interrupt.requested):
        _checkpoint(studies, clock)
        raise KeyboardInterrupt


def _checkpoint(studies: Sequence[StudyInTraining], clock: Clock) -> None:
    """Save all studies. A process that dies between two of them leaves them at two steps; each resumes at its own."""
    started = time.monotonic()
    for study in studies:
        study.checkpoint()
    clock.wrote(started)


def _resample_dead_latents(studies: Sequence[StudyInTraining], step: int) -> None:
    """Replace the dead latents of all runs that are due at this step, at all hooks from one pass over fresh text."""
    due = [[run for run in study.runs_at(step) if run.trainer.resamples_now] for study in studies]
    resamplers = [[run.trainer.resampler() for run in runs] for runs in due]
    n_candidates = max((run.trainer.resampling.n_candidates for runs in due for run in runs), default=0)
    asking = [i for i, some in enumerate(resamplers) if any(resampler.n_dead for resampler in some)]
    fresh = [studies[i].stream.fresh(n_candidates, "resample", step) for i in asking]
    # Batches are taken in turns, one of each hook, so that one pass of the language model serves all hooks.
    for batches in zip(*fresh, strict=True):
        for i, batch in zip(asking, batches, strict=True):
            for run, resampler in zip(due[i], resamplers[i], strict=True):
                acts, target = batch.scaled(run.trainer.config.normalisation)
                resampler.offer(acts, batch.raw_norm, target)
    for runs, some in zip(due, resamplers, strict=True):
        for run, resampler in zip(runs, some, strict=True):
            run.record_resampling(step, run.trainer.resample_(resampler)._asdict())
