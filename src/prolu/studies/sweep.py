"""Many SAEs on one stream of activations: one language-model pass, results as they finish, kept when killed."""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prolu.activations.stream import ActivationStream
from prolu.runtime.files import owned
from prolu.runtime.interrupts import Interrupt
from prolu.runtime.progress import Meter
from prolu.studies.checkpoints import Clock
from prolu.studies.folder import check_parent, done_of, failures, read_study, tidy, write_study
from prolu.studies.request import StudyRequest, describe_study, prepare_folders
from prolu.studies.results import Results
from prolu.studies.study_in_training import ActiveStudy, Shared
from prolu.studies.trackers import Trackers
from prolu.training.config import RunConfig


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
    """Every run at each of some init seeds, whatever its own was.

    Raises:
        ValueError: no seed, or one twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"init_seeds {' '.join(map(str, seeds)) or 'none'}: name one or more, each once")
    return list(dict.fromkeys(replace(run, init_seed=seed) for run in runs for seed in seeds))


def run_sweep(
    runs: Iterable[RunConfig],
    stream: ActivationStream,
    out: str | Path,
    *,
    eval_tokens: int = 32_768,
    checkpoint_seconds: float | None = None,
    keep_state: bool = False,
    trackers: Sequence[str] = (),
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
        trackers: also write training curves to `wandb`, `tensorboard` or both (docs/howto/trackers.md).
        progress: show rates and time left.

    Raises:
        ValueError: two runs alike, a run shorter than a batch, a folder that holds something else, or one in
            which another process is working. Nothing is written then.
        SweepFailedError: every run failed.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is written.
    """
    request = StudyRequest(list(runs), stream, Path(out), eval_tokens)
    _finish([request], Clock(checkpoint_seconds), keep_state=keep_state, trackers=trackers, progress=progress)
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
    progress: bool = True,
) -> dict[str, Results]:
    """The same sweep at several hooks, side by side: where the streams share a source, each window is read once.

    Every hook has a study of its own in `out`/HOOK, to the bit what `run_sweep` writes there, resumed and
    extended like it.

    Args:
        runs: what to train at each hook, or a function of the width of its activations.
        streams: one per hook, alike in all else; share a `Harvest` of all the hooks, or an `ActivationStore`.
        out: folder of the studies.
        eval_tokens, checkpoint_seconds, keep_state, trackers, progress: as `run_sweep` has them.

    Returns:
        Finished runs by hook; a hook at which every run failed is left out.

    Raises:
        ValueError: as `run_sweep`; or streams that differ in more than the hook. Nothing is written then.
        SweepFailedError: every run failed, at every hook.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is written at every hook.
    """
    requests = requests_at_hooks(runs, streams, Path(out), eval_tokens)
    _finish(requests, Clock(checkpoint_seconds), keep_state=keep_state, trackers=trackers, progress=progress)
    return {r.stream.lm.hook: Results.load(r.out) for r in requests if done_of(r.runs, r.out)}


def requests_at_hooks(
    runs: Iterable[RunConfig] | Callable[[int], Iterable[RunConfig]],
    streams: Iterable[ActivationStream],
    out: Path,
    eval_tokens: int,
) -> list[StudyRequest]:
    """One study per hook, each in a folder of its own.

    Raises:
        ValueError: no stream, two at one hook, streams that differ in more than the hook, or a folder that holds
            something else.
    """
    streams, fixed = list(streams), None if callable(runs) else list(runs)
    if not streams:
        raise ValueError("no streams: pass at least one ActivationStream")
    hooks = [stream.lm.hook for stream in streams]
    if len(set(hooks)) < len(hooks):
        raise ValueError(f"hooks {', '.join(hooks)}: one is listed twice")
    first = streams[0].describe()
    for stream in streams[1:]:
        for name, value in stream.describe().items():
            if name != "hook" and value != first[name]:
                raise ValueError(f"streams at several hooks: {name} is {first[name]!r} and {value!r}; make them alike")
    check_parent(out, hooks)
    at_width = runs if callable(runs) else lambda _: fixed or []
    return [StudyRequest(list(at_width(s.d_in)), s, out / s.lm.hook, eval_tokens) for s in streams]


def _finish(
    requests: Sequence[StudyRequest], clock: Clock, *, keep_state: bool, trackers: Sequence[str], progress: bool
) -> None:
    """Trains what is not done yet, of one study or of several side by side."""
    told, shared, mesh = Trackers(trackers), Shared(), requests[0].stream.mesh
    mesh.in_turn(lambda: prepare_folders(requests))
    progress = progress and mesh.is_first
    with ExitStack() as folders:
        for request in requests if mesh.is_first else []:
            folders.enter_context(owned(request.out))
        folders.enter_context(told)
        left: list[ActiveStudy] = []
        for request in requests:
            study = describe_study(request)
            if mesh.is_first and json.loads(json.dumps(study["runs"])) != read_study(request.out)["runs"]:
                write_study(request.out, study)  # a longer one
            done = done_of(request.runs, request.out)
            if todo := [run for run in request.runs if run not in done]:
                left.append(
                    ActiveStudy(todo, request, shared=shared, keep_state=keep_state, progress=progress, trackers=told)
                )
        if left:
            _train(left, clock, progress=progress)
        for request in requests if mesh.is_first else []:
            tidy(done_of(request.runs, request.out), request.out)
        mesh.wait()
    if not any(done_of(request.runs, request.out) for request in requests):
        reasons = itertools.chain.from_iterable(failures(request.out).values() for request in requests)
        raise SweepFailedError(f"every run failed; the first: {next(reasons)}")


def _train(studies: Sequence[ActiveStudy], clock: Clock, *, progress: bool) -> None:
    """Trains all that is left to train.

    Raises:
        KeyboardInterrupt: asked to stop; checkpoints are written.
    """
    mesh = studies[0].mesh
    if mesh.n_ranks > 1:
        for study in studies:
            study.log("mesh", data=mesh.n_data, latent=mesh.n_latent)
    with Interrupt(patient=mesh.n_ranks > 1) as interrupt:
        _conclude(studies, clock, interrupt)  # what had ended, but was not yet recorded
        if any(study.runs for study in studies):
            _loop(studies, clock, interrupt, progress=progress)


def _loop(studies: Sequence[ActiveStudy], clock: Clock, interrupt: Interrupt, *, progress: bool) -> None:
    """Step by step, all studies at the same one: so they ask for the same window one after the other."""
    runs = [run for study in studies for run in study.runs]
    first, n_steps = min(run.trainer.state.n_updates for run in runs), max(run.trainer.n_steps for run in runs)
    batch_size = studies[0].stream.batch_size
    with Meter("training", (n_steps - first) * batch_size, len(runs), shown=progress) as meter:
        for step in range(first, n_steps):
            _resample(studies, step)
            for study in studies:
                study.step(step)
            meter.advance(batch_size)
            _conclude(studies, clock, interrupt)
            if studies[0].mesh.any(clock.is_due):
                _checkpoint(studies, clock)
        rate = {"tokens_per_second": meter.tokens_per_second, "seconds": meter.seconds, "n_saes": len(runs)}
    for study in studies:
        study.log("trained", **rate, seconds_checkpointing=clock.writing)


def _conclude(studies: Sequence[ActiveStudy], clock: Clock, interrupt: Interrupt) -> None:
    """Scores what has ended; if asked to stop, saves the rest and stops."""
    for study in studies:
        study.conclude(interrupt)
    if studies[0].mesh.any(interrupt.requested):
        _checkpoint(studies, clock)
        raise KeyboardInterrupt


def _checkpoint(studies: Sequence[ActiveStudy], clock: Clock) -> None:
    """One per study; a process that dies between two of them leaves studies at two steps, and both go on."""
    started = time.monotonic()
    for study in studies:
        study.checkpoint()
    clock.wrote(started)


def _resample(studies: Sequence[ActiveStudy], step: int) -> None:
    """Resamples the dead latents of all runs whose turn it is, at all hooks on one harvest of fresh activations."""
    due = [[run for run in study.due(step) if run.trainer.resamples_now] for study in studies]
    rebirths = [[run.trainer.rebirth() for run in runs] for runs in due]
    most = max((run.trainer.resampling.n_candidates for runs in due for run in runs), default=0)
    asking = [i for i, some in enumerate(rebirths) if any(rebirth.n_dead for rebirth in some)]
    fresh = (studies[i].stream.fresh(most, "resample", step) for i in asking)
    for batches in zip(*fresh, strict=True):  # in turns, so that a pass serves all hooks
        for i, batch in zip(asking, batches, strict=True):
            for rebirth in rebirths[i]:
                rebirth.offer(batch.acts, batch.raw_norm)
    for runs, some in zip(due, rebirths, strict=True):
        for run, rebirth in zip(runs, some, strict=True):
            run.resampled.append({"step": step} | run.trainer.resample_(rebirth)._asdict())
