"""The runs of a study dealt into groups, each a small study of its own, and gathered into one folder again.

    STUDY/groups/groups.json   the run_ids of each group; written once, when the study is begun in groups
    STUDY/groups/000/          the study of group 0, with its own checkpoints
    STUDY/groups/000/done      written when all runs of the group have ended

Every step here can be killed at any moment and repeated; in the end the folder is byte for byte what one process would
have left.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from prolu.activations.rows import ActivationRows
from prolu.runtime.files import locked, remove, rename_folder, write_atomically
from prolu.studies.checkpoints import CHECKPOINTS_FOLDER
from prolu.studies.cost import BYTES, buffer_bytes, state_bytes
from prolu.studies.folder import GROUPS_FOLDER, LOG_FILE, make_folder, read_results, write_results
from prolu.studies.groups.engine import Engine
from prolu.studies.preflight import prepare_folders
from prolu.studies.request import StudyRequest, check_requests
from prolu.studies.sweep import SweepFailedError, check_any_finished, train
from prolu.training.config import RunConfig

GROUPS_FILE = "groups.json"
DONE_FILE = "done"

PATIENCE = 120.0
"""Seconds to wait for a folder while another process deals or gathers there, or has not ended yet."""

PROCESS_BYTES = 600_000_000
"""Memory of a process before it trains anything: Python, torch and transformers."""

Groups = list[list[RunConfig]]


def deal(runs: Sequence[RunConfig], n: int) -> Groups:
    """Return the runs in `n` groups of about equal cost; some groups are empty if there are few runs.

    The cost of a run is d_sae * n_tokens. The costliest run that is left always goes to the group with the least cost,
    the first of equals. Within a group, runs keep their order. Every group reads the stream once, so `n` groups read
    it n - 1 times more often than one process.
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
    """Return the number of groups: `workers`, or the smallest larger number at which each fits into `room` bytes."""
    n = max(1, min(workers, len(runs)))
    while n < len(runs) and max(memory(group) for group in deal(runs, n)) > room:
        n += 1
    return n


def memory_of(request: StudyRequest, runs: Sequence[RunConfig]) -> int:
    """Return the bytes that a process needs to train these runs of a study."""
    stream = request.stream
    blocks = stream.blocks
    model = None if isinstance(blocks, ActivationRows) else stream.lm.model
    buffers = buffer_bytes(
        max(run.d_sae for run in runs),
        stream.d_in,
        batch_size=stream.batch_size,
        window_tokens=stream.window_tokens,
        eval_tokens=request.settings.eval_tokens,
        n_parameters=sum(p.numel() for p in model.parameters()) if model else 0,
        n_vocabulary=model.config.get_text_config().vocab_size if model else 0,
        n_windows=stream.n_windows,
    )
    state = state_bytes([run.d_sae for run in runs], stream.d_in)
    # Rows may all lie in memory, or none of them.
    data = BYTES * blocks.n_train_tokens * blocks.d_in if isinstance(blocks, ActivationRows) else blocks.train.nbytes
    return PROCESS_BYTES + state + buffers + data


def check_groups(request: StudyRequest) -> None:
    """Raise ValueError unless a study can be begun in groups, or resumed in those that it has."""
    check_requests([request], in_groups=True)
    if (request.out / CHECKPOINTS_FOLDER).exists():
        raise ValueError(
            f"out {str(request.out)!r}: one process began it and left a checkpoint; resume it with --engine local"
        )
    lengths = {record["run_id"]: record["n_tokens"] for record in read_results(request.out)}
    for run in request.runs:
        if lengths.get(run.run_id, run.n_tokens) != run.n_tokens:
            raise ValueError(
                f"n_tokens {run.n_tokens}: run {run.run_id} has been finished at {lengths[run.run_id]}; it can be "
                "extended with --engine local only"
            )


def dealt_groups(request: StudyRequest) -> Groups | None:
    """Return the groups that a study is being trained in, or None if it is not.

    Raises:
        ValueError: they are groups of another study.
    """
    file = request.out / GROUPS_FOLDER / GROUPS_FILE
    by_id = {run.run_id: run for run in request.runs}
    if not file.is_file():
        return None
    try:
        return [[by_id[run_id] for run_id in ids] for ids in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{file}: not groups of this study's runs") from None


def begin(request: StudyRequest, n: int, index: int | None = None) -> Groups:
    """Return the groups of a study: those that it was begun in, else its unfinished runs dealt into `n` groups.

    New groups are written down, so that every process has the same ones.

    Args:
        request: the study.
        n: number of groups, if the study is not in groups yet.
        index: the only group that the caller trains. If that group is empty, another process writes the groups down.

    Raises:
        ValueError: the study cannot be trained in groups.
        FolderBusyError: another process is working there.
    """
    make_folder(request.out)
    with locked(request.out, patience=PATIENCE):
        # The study may have changed since it was checked: another task may have dealt, trained and gathered it.
        check_groups(request)
        prepare_folders([request], in_groups=True)
        groups = dealt_groups(request)
        if groups is not None:
            return groups
        groups = deal(request.unfinished, n)
        if any(groups) and (index is None or groups[index]):
            (request.out / GROUPS_FOLDER).mkdir(exist_ok=True)
            ids = [[run.run_id for run in group] for group in groups]
            write_atomically(request.out / GROUPS_FOLDER / GROUPS_FILE, json.dumps(ids) + "\n")
        return groups


def folder_of(out: Path, index: int) -> Path:
    """Return the folder in which a group is trained."""
    return out / GROUPS_FOLDER / f"{index:03}"


def is_done(out: Path, index: int) -> bool:
    """Return whether all runs of a group have ended."""
    return (folder_of(out, index) / DONE_FILE).exists()


def train_group(request: StudyRequest, index: int) -> None:
    """Train one group, from its checkpoint if there is one, unless the group is done.

    Args:
        request: the study, on this process's stream, with the runs of this group only.
        index: number of the group.

    Raises:
        FolderBusyError: another process trains it.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint is written.
    """
    group = replace(request, out=folder_of(request.out, index))
    if not _opened(request, group, index):
        return
    with suppress(SweepFailedError):  # the folder of each run says why it failed
        train([group])
    write_atomically(group.out / DONE_FILE, "")


def _opened(request: StudyRequest, group: StudyRequest, index: int) -> bool:
    """Prepare the folder of a group; return whether there is anything to train."""
    with locked(request.out, patience=PATIENCE):
        all_gathered = not (request.out / GROUPS_FOLDER / GROUPS_FILE).is_file()
        if not group.runs or all_gathered or is_done(request.out, index):
            return False
        prepare_folders([group], is_group=True)
        for run in group.runs:  # one that failed before is resumed from its last good state
            if (request.out / run.run_id).exists() and not (group.out / run.run_id).exists():
                rename_folder(request.out / run.run_id, group.out / run.run_id)
        return True


def gather(request: StudyRequest) -> bool:
    """Move what finished groups have made into the study's folder; return whether this call moved the last of it.

    Raises:
        FolderBusyError: another process is working there.
    """
    with locked(request.out, patience=PATIENCE):
        return _gather(request, dealt_groups(request))


def _gather(request: StudyRequest, groups: Groups | None) -> bool:
    out = request.out
    gone = out / f".{GROUPS_FOLDER}"
    remove(gone)  # left by a gathering that was killed before its last line
    if groups is None:
        return False
    finished = [i for i, runs in enumerate(groups) if runs and is_done(out, i)]
    _gather_results(request, [(groups[i], folder_of(out, i)) for i in finished])
    if len(finished) < sum(map(bool, groups)):
        return False
    with (out / LOG_FILE).open("a") as log:
        for i in finished:
            log.write((folder_of(out, i) / LOG_FILE).read_text())
    rename_folder(out / GROUPS_FOLDER, gone)
    remove(gone)
    return True


def _gather_results(request: StudyRequest, finished: Sequence[tuple[list[RunConfig], Path]]) -> None:
    """Move the folders of these groups' runs into the study's folder, and their lines into its results."""
    out = request.out
    records = {record["run_id"]: record for record in read_results(out)}
    before = list(records.items())
    for runs, folder in finished:
        for run in runs:
            if (folder / run.run_id).exists():
                remove(out / run.run_id)
                rename_folder(folder / run.run_id, out / run.run_id)
        records |= {record["run_id"]: record for record in read_results(folder)}
    # One process writes a record when a run ends: the shorter run first, and of equals in the study's order.
    batch_size = request.stream.batch_size
    ordered = sorted(request.runs, key=lambda run: run.n_steps(batch_size))
    records = {run.run_id: records[run.run_id] for run in ordered if run.run_id in records}
    if list(records.items()) != before:
        write_results(out, list(records.values()))


def train_and_gather(request: StudyRequest, index: int, n: int) -> bool:
    """Train one group of `n`, gather what is finished, and return whether this task is the one to draw the report.

    It is if this task gathered the last group, or if all groups had been gathered before it began, because the task
    that gathered them may have been killed before it drew the report. Of tasks that end at the same time, only one
    draws it.

    Args:
        request: the study.
        index: number of the group that this task trains.
        n: number of groups, if the study is not in groups yet.
    """
    groups = begin(request, n, index)
    train_group(replace(request, runs=groups[index]), index)
    return gather(request) or not any(groups)


def prepare_group(request: StudyRequest, engine: Engine) -> Callable[[], bool]:
    """Check that one group of a study can be trained; return the work, which returns whether to draw the report.

    Raises:
        ValueError: the study cannot be trained so.
    """
    index, n = engine.group_and_count()
    check_groups(request)
    groups = dealt_groups(request)
    if groups is not None and len(groups) != n:
        raise ValueError(f"group {engine.group!r}: this study was dealt into {len(groups)} groups")
    make_folder(request.out)

    def work() -> bool:
        if not train_and_gather(request, index, n):
            return False
        check_any_finished([request])
        return True

    return work
