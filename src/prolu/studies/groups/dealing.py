"""A study's runs dealt into groups, each a small study of its own, and gathered into what one process leaves."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prolu.runtime.files import owned, patiently, read_json_lines, remove, rename_folder, write_atomically
from prolu.studies.checkpoints import CHECKPOINTS_FOLDER
from prolu.studies.cost import buffer_bytes, state_bytes
from prolu.studies.folder import GROUPS_FOLDER, RESULTS_FILE, done_of, failures, make_folder
from prolu.studies.groups.engine import Engine
from prolu.studies.request import StudyRequest, check_requests, prepare_folders
from prolu.studies.sweep import SweepFailedError, run_sweep
from prolu.training.config import RunConfig

GROUPS_FILE, DONE_FILE, LOG_FILE = "groups.json", "done", "log.jsonl"

PATIENCE = 120.0
"""Seconds to wait for a folder whose owner is dealing, gathering, or dying."""

PROCESS_BYTES = 600_000_000
"""Of a process before it trains anything: Python, torch, transformers."""

Groups = list[list[RunConfig]]


def deal(runs: Sequence[RunConfig], n: int) -> Groups:
    """Runs in `n` groups of about equal cost, d_sae * n_tokens: the costliest run left goes to the group that has
    least, the first among equals. Within a group runs keep their order. Some groups are empty if runs are few.

    Every group reads the stream once, so `n` groups cost n - 1 harvests more than one.
    """
    groups: Groups = [[] for _ in range(n)]
    costs = [0] * n
    for run in sorted(runs, key=lambda run: -run.d_sae * run.n_tokens):
        least = costs.index(min(costs))
        groups[least].append(run)
        costs[least] += run.d_sae * run.n_tokens
    order = {run: i for i, run in enumerate(runs)}
    return [sorted(group, key=order.__getitem__) for group in groups]


def n_groups(runs: Sequence[RunConfig], workers: int, memory: Callable[[Sequence[RunConfig]], int], room: float) -> int:
    """As many as are trained at once, or as few more as it takes for each to fit into `room` bytes."""
    n = max(1, min(workers, len(runs)))
    while n < len(runs) and max(memory(group) for group in deal(runs, n)) > room:
        n += 1
    return n


def memory_of(request: StudyRequest, runs: Sequence[RunConfig]) -> int:
    """Bytes of the process that trains these runs of a study."""
    stream, model = request.stream, request.stream.lm.model
    buffers = buffer_bytes(
        max(run.d_sae for run in runs), stream.d_in, batch_size=stream.batch_size, window_tokens=stream.window_tokens,
        eval_tokens=request.eval_tokens, n_parameters=sum(p.numel() for p in model.parameters()),
        n_vocabulary=model.config.vocab_size,
    )  # fmt: skip
    state = state_bytes([run.d_sae for run in runs], stream.d_in)
    return PROCESS_BYTES + state + buffers + stream.blocks.train.nbytes


def left(request: StudyRequest) -> list[RunConfig]:
    """Runs of a study that have no result."""
    done = done_of(request.runs, request.out)
    return [run for run in request.runs if run not in done]


def check_groups(request: StudyRequest) -> None:
    """Raises ValueError unless a study can be begun in groups, or be gone on with in those that it has."""
    check_requests([request], in_groups=True)
    if (request.out / CHECKPOINTS_FOLDER).exists():
        raise ValueError(
            f"out {str(request.out)!r}: one process began it and left a checkpoint; go on with --engine local"
        )
    lengths = {record["run_id"]: record["n_tokens"] for record in read_json_lines(request.out / RESULTS_FILE)}
    for run in request.runs:
        if lengths.get(run.run_id, run.n_tokens) != run.n_tokens:
            raise ValueError(
                f"n_tokens {run.n_tokens}: run {run.run_id} has been finished at {lengths[run.run_id]}; it is extended "
                "with --engine local only"
            )


def begun(request: StudyRequest) -> Groups | None:
    """The groups of a study that is being trained in groups.

    Raises:
        ValueError: they are of another study.
    """
    file, by_id = request.out / GROUPS_FOLDER / GROUPS_FILE, {run.run_id: run for run in request.runs}
    if not file.is_file():
        return None
    try:
        return [[by_id[run_id] for run_id in ids] for ids in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: not groups of this study's runs") from None


def begin(request: StudyRequest, n: int, index: int | None = None) -> Groups:
    """The groups of a study: those that it was begun in, or what is left of it dealt into `n`, and so written down.

    Args:
        request: the study.
        n: number of groups, if the study is not in groups yet.
        index: of the only group that the caller trains; one without runs leaves it to others to write groups down.

    Raises:
        ValueError: it cannot be trained in groups.
        FolderBusyError: another process is working there.
    """

    def dealt() -> Groups:
        with owned(request.out):
            check_groups(request)
            prepare_folders([request], in_groups=True)
            if (groups := begun(request)) is None:
                groups = deal(left(request), n)
                if any(groups) and (index is None or groups[index]):
                    (request.out / GROUPS_FOLDER).mkdir(exist_ok=True)
                    ids = [[run.run_id for run in group] for group in groups]
                    write_atomically(request.out / GROUPS_FOLDER / GROUPS_FILE, json.dumps(ids) + "\n")
            return groups

    make_folder(request.out)
    return patiently(dealt, PATIENCE)


def folder_of(out: Path, index: int) -> Path:
    """Where a group is trained."""
    return out / GROUPS_FOLDER / f"{index:03}"


def is_done(out: Path, index: int) -> bool:
    """Whether a group's runs have all ended."""
    return (folder_of(out, index) / DONE_FILE).exists()


def train_group(request: StudyRequest, index: int, runs: list[RunConfig], *, progress: bool, **settings: Any) -> None:
    """Trains one group, from its checkpoint if there is one, unless that is done.

    Args:
        request: the study, on this process's stream; of its runs, these are enough.
        index: of the group.
        runs: of the group.
        progress, settings: as `run_sweep` has them.

    Raises:
        FolderBusyError: another process trains it.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is written.
    """
    group = request._replace(runs=runs, out=folder_of(request.out, index))

    def opened() -> bool:
        with owned(request.out):
            is_begun = (request.out / GROUPS_FOLDER / GROUPS_FILE).is_file()  # else all are gathered
            if not runs or not is_begun or is_done(request.out, index):
                return False
            prepare_folders([group])
            for run in runs:  # one that failed before goes on from its last good state
                if (request.out / run.run_id).exists() and not (group.out / run.run_id).exists():
                    rename_folder(request.out / run.run_id, group.out / run.run_id)
            return True

    if not patiently(opened, PATIENCE):
        return
    with suppress(SweepFailedError):  # each run's folder says so
        run_sweep(runs, request.stream, group.out, eval_tokens=request.eval_tokens, progress=progress, **settings)
    write_atomically(group.out / DONE_FILE, "")


def gather(request: StudyRequest) -> bool:
    """Moves what finished groups have made into the study's folder, as one process would have left it; returns
    whether this call moved the last of it.

    Killed at any moment and called again, it ends the same.

    Raises:
        FolderBusyError: another process is working there.
    """

    def gathered() -> bool:
        with owned(request.out):
            return _gather(request, begun(request))

    return patiently(gathered, PATIENCE)


def _gather(request: StudyRequest, groups: Groups | None) -> bool:
    out, gone = request.out, request.out / f".{GROUPS_FOLDER}"
    remove(gone)
    if groups is None:
        return False
    finished = [i for i, runs in enumerate(groups) if runs and is_done(out, i)]
    records = {record["run_id"]: record for record in read_json_lines(out / RESULTS_FILE)}
    before = list(records.items())
    for i in finished:
        folder = folder_of(out, i)
        for run in groups[i]:
            if (folder / run.run_id).exists():
                remove(out / run.run_id)
                rename_folder(folder / run.run_id, out / run.run_id)
        records |= {record["run_id"]: record for record in read_json_lines(folder / RESULTS_FILE)}
    # One process writes a record when a run ends: the shorter first, then in the study's order.
    batch_size = request.stream.batch_size
    ordered = sorted(request.runs, key=lambda run: run.n_steps(batch_size))
    records = {run.run_id: records[run.run_id] for run in ordered if run.run_id in records}
    if list(records.items()) != before:
        write_atomically(out / RESULTS_FILE, "".join(json.dumps(record) + "\n" for record in records.values()))
    if len(finished) < sum(map(bool, groups)):
        return False
    with (out / LOG_FILE).open("a") as log:
        for i in finished:
            log.write((folder_of(out, i) / LOG_FILE).read_text())
    rename_folder(out / GROUPS_FOLDER, gone)
    remove(gone)
    return True


def train_and_gather(request: StudyRequest, index: int, n: int, **settings: Any) -> bool:
    """Trains one group of `n`, then gathers what is finished; returns whether the report is this task's to draw.

    It is if this task gathered the last group, or found all gathered when it came: whoever did that may have died
    before the report. Of tasks that end at once, only one draws.

    Args:
        request, index: as `train_group` has them.
        n: number of groups, if the study is not in groups yet.
        settings: as `train_group` has them.
    """
    groups = begin(request, n, index)
    train_group(request, index, groups[index], **settings)
    return gather(request) or not any(groups)


def check_finished(request: StudyRequest) -> None:
    """Raises SweepFailedError if no run of a study has been finished."""
    if not done_of(request.runs, request.out):
        raise SweepFailedError(f"every run failed; the first: {next(iter(failures(request.out).values()))}")


def prepare_group(request: StudyRequest, engine: Engine, **settings: Any) -> Callable[[], bool]:
    """Trains one group of a study, then gathers what is finished; the work says whether the report is to be drawn.

    Raises:
        ValueError: the study cannot be trained so.
    """
    index, n = engine.place
    check_groups(request)
    if len(begun(request) or range(n)) != n:
        raise ValueError(f"group {engine.group!r}: this study was dealt into {len(begun(request) or [])} groups")
    make_folder(request.out)

    def work() -> bool:
        if not train_and_gather(request, index, n, progress=True, **settings):
            return False
        check_finished(request)
        return True

    return work
