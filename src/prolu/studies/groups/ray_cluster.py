"""A sweep on a Ray cluster: each group of runs is a task, placed where it fits, and retried when its worker dies."""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError, RayTaskError, TaskCancelledError  # pyright: ignore[reportMissingImports]

from prolu.activations.options import Source
from prolu.runtime.files import first_line, locked
from prolu.runtime.interrupts import Interrupt
from prolu.runtime.progress import Meter
from prolu.studies.folder import GROUPS_FOLDER, make_folder
from prolu.studies.groups.dealing import begin, check_groups, deal, dealt_groups, gather, is_done, memory_of, n_groups
from prolu.studies.groups.engine import Engine
from prolu.studies.groups.worker import SECONDS_BETWEEN_LOOKS, GroupTask, ProgressBoard, StoppedError, portable, work_on
from prolu.studies.request import StudyRequest
from prolu.studies.sweep import SweepFailedError, check_any_finished
from prolu.training.config import RunConfig

logger = logging.getLogger(__name__)

RETRIES = 20
"""How often a group is tried again after its worker died; each time it resumes from the last checkpoint."""

SECONDS_TO_ANSWER = 10.0
"""How long a cluster at an address may take to accept a connection."""


def prepare_cluster(request: StudyRequest, source: Source, engine: Engine) -> Callable[[], bool]:
    """Check that a study can be trained in groups on a cluster; return the work, which trains and gathers them.

    Raises:
        ValueError: the study cannot be trained so, no cluster answers, or none of its nodes can hold a group.
    """
    check_groups(request)
    todo = request.unfinished
    there = dealt_groups(request)
    if not todo and not there:
        return lambda: gather(request) or True  # a gathering that was killed may have left something to remove
    connect(engine, source.threads)
    wanted = {"CPU": float(source.threads), "GPU": engine.gpus_per_group}
    n = n_groups(todo, engine.workers, lambda runs: memory_of(request, runs), room(engine.workers))
    for runs in filter(None, there or deal(todo, n)):
        check_fits(wanted | {"memory": memory_of(request, runs)})
    make_folder(request.out)

    def work() -> bool:
        groups = begin(request, n)
        unfinished = [(i, runs) for i, runs in enumerate(groups) if runs and not is_done(request.out, i)]
        tasks = [_task(request, source, i, runs) for i, runs in unfinished]
        if tasks:
            with locked(request.out / GROUPS_FOLDER, ".driver"):
                _train(request, tasks, wanted)
        ray.shutdown()  # the report needs no cluster
        gather(request)
        check_any_finished([request])
        return True

    return work


def _task(request: StudyRequest, source: Source, number: int, runs: list[RunConfig]) -> GroupTask:
    return GroupTask(
        source=portable(source),
        batch_size=request.stream.batch_size,
        stream=request.stream.describe(),
        out=request.out.absolute(),
        settings=request.settings,
        number=number,
        runs=runs,
    )


def connect(engine: Engine, threads: int) -> None:
    """Join the cluster, or start one on this machine.

    Raises:
        ValueError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it Ray warns of a coming default
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not engine.address:
        sizes = {"num_cpus": engine.workers * threads, "object_store_memory": 10**8}
        ray.init(address="local", include_dashboard=False, **sizes, **quiet)
        return
    host, _, port = engine.address.rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()  # Ray itself tries for minutes
        ray.init(address=engine.address, **quiet)
    except (OSError, ValueError, RuntimeError) as problem:
        reason = first_line(problem)
        raise ValueError(f"address {engine.address!r}: no Ray cluster answers there ({reason})") from None


def nodes() -> list[dict[str, float]]:
    """Return the resources of each machine of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(workers: int) -> float:
    """Return the largest memory per group at which `workers` groups fit in the cluster and each fits on one machine."""
    found = [node.get("memory", 0.0) for node in nodes()]
    return min(max(found), sum(found) / workers)


def check_fits(wanted: dict[str, float]) -> None:
    """Raise ValueError if no machine of the cluster has all that a group needs."""
    found = nodes()
    if not any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in found):
        most = {name: max(node.get(name, 0.0) for node in found) for name in wanted}
        raise ValueError(
            f"a group needs {_in_words(wanted)} on one machine; the most that machines of the cluster have is "
            f"{_in_words(most)}"
        )


def _in_words(resources: dict[str, float]) -> str:
    gpus = f", {resources['GPU']:g} GPU" if resources["GPU"] else ""
    return f"{resources['CPU']:g} CPUs{gpus} and {resources['memory'] / 1e9:,.1f} GB of memory"


def _train(request: StudyRequest, tasks: Sequence[GroupTask], wanted: dict[str, float]) -> None:
    """Have all groups trained; each is gathered when it is finished.

    Raises:
        SweepFailedError: a group could not be trained; the others were.
        KeyboardInterrupt: asked to stop; the groups have checkpoints.
    """
    board = ray.remote(ProgressBoard).options(num_cpus=0).remote()
    remote = ray.remote(max_calls=1)(
        work_on
    )  # a new process for every group, so that nothing of one stays for the next
    settings = {"num_cpus": wanted["CPU"], "num_gpus": wanted["GPU"], "max_retries": RETRIES}
    settings |= {"retry_exceptions": [StoppedError]}
    waiting = {}
    for task in tasks:
        own = {"memory": memory_of(request, task.runs), "name": f"group {task.number}"}
        waiting[remote.options(**own, **settings).remote(task, board)] = task
    problems = []
    asked_to_stop = False
    total = sum(task.sae_tokens(task.length) for task in tasks)
    with Interrupt() as interrupt, Meter("training", total, unit="SAE-tokens") as meter:
        shown = Shown(meter, tasks)
        while waiting:
            ended, _ = ray.wait(list(waiting), timeout=SECONDS_BETWEEN_LOOKS)
            shown.look(board)
            for ref in ended:
                if problem := _problem_of(ref):
                    problems.append(f"{waiting[ref]}: {problem}")
                del waiting[ref]
                gather(request)
            if interrupt.requested and not asked_to_stop:
                asked_to_stop = True
                for ref in waiting:
                    ray.cancel(ref)
        shown.look(board)
    if interrupt.requested:
        raise KeyboardInterrupt
    if problems:
        raise SweepFailedError("; ".join(problems))


def _problem_of(ref: Any) -> str | None:
    """Return why a task failed, in a sentence, or None if it did not fail."""
    try:
        ray.get(ref)
    except (TaskCancelledError, StoppedError):
        return "stopped"
    except RayTaskError as problem:
        cause = problem.cause
        if not isinstance(cause, OSError | ValueError | FloatingPointError):
            logger.error(str(problem))  # an error in this package; Ray's text has the traceback
        return str(cause) or type(cause).__name__
    except RayError as problem:
        return f"its worker died more than {RETRIES} times ({first_line(problem)})"
    return None


class Shown:
    """Shows the content of the progress board: one meter for all groups, and the messages of all workers."""

    def __init__(self, meter: Meter, tasks: Sequence[GroupTask]):
        self._meter = meter
        self._tasks = {task.number: task for task in tasks}
        self._done: dict[int, int] = {}

    def look(self, board: Any) -> None:
        """Read the board and bring the meter up to date."""
        try:
            positions, sentences = ray.get(board.read.remote(), timeout=10 * SECONDS_BETWEEN_LOOKS)
        except RayError:
            return  # the board has died: only the display of progress is lost with it
        for sentence in sentences:
            logger.warning(sentence)
        for index, (start, position) in positions.items():
            before = self._tasks[index].sae_tokens(start)
            now = self._tasks[index].sae_tokens(position)
            if index not in self._done:
                self._meter.forget(before)
                self._done[index] = before
            if now > self._done[index]:  # a group that resumes from a checkpoint repeats some steps
                self._meter.advance(now - self._done[index])
                self._done[index] = now
