"""Checkpoints: the state of a study in training, on the disk.

    checkpoints/step-000000012000/
      checkpoint.json          the step, its own SHA-256, and the counters, curve and file digest of each run
      RUN_ID.safetensors       the run's weights, both Adam moments, and firing counters

A checkpoint is either complete or missing, every byte of it is checked when it is read, and the last two are kept.
Nothing in it is a pickle. The trainers' states and the step number are all that decides how training continues: random
draws are keyed by seed and step, and the stream of activations is a function of the step, so there is no generator and
no buffer to save.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from prolu.runtime.files import json_text, remove, rename_folder, write_flushed
from prolu.runtime.names import plain_name

CHECKPOINTS_FOLDER = "checkpoints"
MANIFEST_FILE = "checkpoint.json"

N_KEPT = 2
"""The number of checkpoints that are kept: should the last one be damaged, training resumes from the one before."""

LARGEST_FRACTION = 0.03
"""The largest fraction of the time that may go into writing checkpoints."""

SHORTEST_SECONDS = 60.0
"""The shortest time between two checkpoints, unless the user chooses one."""


class RunState(NamedTuple):
    """The state of one run in training."""

    tensors: dict[str, torch.Tensor]
    """The weights, the Adam moments and the firing counters."""
    facts: dict[str, Any]
    """The counters and the curve, as JSON values."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read, and the ones that could not be."""

    step: int
    """The number of steps that have been made."""
    runs: dict[str, RunState]
    """The state of each run, by its run_id."""
    complaints: list[str]
    """A sentence for each newer checkpoint that is damaged."""


class DamagedError(Exception):
    """A checkpoint does not hold what was written."""


def write_checkpoint(folder: Path, step: int, runs: Mapping[str, RunState]) -> None:
    """Write the state of all runs after `step` steps, and remove all checkpoints but the last two.

    Raises:
        OSError: The disk is full, or the folder is gone. Earlier checkpoints are left as they were.
    """
    place = folder / CHECKPOINTS_FOLDER
    partial = place / ".partial"
    final = place / f"step-{step:012}"
    remove(partial)  # of a process that was killed while it wrote
    try:
        partial.mkdir(parents=True)
        entries = {}
        for run_id, state in runs.items():
            data = save({name: t.detach().cpu().contiguous() for name, t in state.tensors.items()})
            write_flushed(partial / f"{run_id}.safetensors", data)
            entries[run_id] = {"sha256": hashlib.sha256(data).hexdigest(), "facts": state.facts}
        # The manifest holds its content as text, so that the digest is of exactly these bytes.
        content = json_text({"step": step, "runs": entries})
        seal = hashlib.sha256(content.encode()).hexdigest()
        write_flushed(partial / MANIFEST_FILE, json_text({"sha256": seal, "content": content}))
        # A damaged checkpoint of this step may be in the way: training has resumed from the one before it.
        remove(final)
        # Only the rename makes it a checkpoint. All files have been flushed before, so it never names a partial one.
        rename_folder(partial, final)
    except OSError:
        remove(partial)
        raise
    # Old checkpoints are removed only now, because they are needed until the new one is on the disk.
    for old in _newest_first(folder)[N_KEPT:]:
        remove(old)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest undamaged checkpoint, with a complaint for each newer one; None if there is none at all.

    If all are damaged, the result is step 0 without runs, so that training starts again and the complaints are shown.
    """
    complaints = []
    for place in _newest_first(folder):
        try:
            step, runs = _read(place)
        except DamagedError as problem:
            complaints.append(f"checkpoint {place.name} is damaged ({problem})")
            continue
        return Checkpoint(step, runs, complaints)
    return Checkpoint(0, {}, complaints) if complaints else None


def read_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the counters and curves of the runs in the newest checkpoint that can be read, without any tensor.

    It may be called while another process writes checkpoints there. The result is empty if there is none.
    """
    for place in _newest_first(folder):
        try:
            _, entries = _read_manifest(place)
            with _damage():
                return {run_id: dict(entry["facts"]) for run_id, entry in entries.items()}
        except DamagedError:  # or removed meanwhile: there is a newer one then
            continue
    return {}


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a study that has finished."""
    remove(folder / CHECKPOINTS_FOLDER)


def _newest_first(folder: Path) -> list[Path]:
    # Step numbers are padded with zeros, so names sort as numbers do.
    return sorted((folder / CHECKPOINTS_FOLDER).glob("step-*"), reverse=True)


def _read(place: Path) -> tuple[int, dict[str, RunState]]:
    """Return the step and the runs of one checkpoint.

    Raises:
        DamagedError: A file is missing, or does not hold what was written.
    """
    step, entries = _read_manifest(place)
    with _damage():
        runs = {}
        for run_id, entry in entries.items():
            data = (place / f"{plain_name(run_id, 'the run')}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise DamagedError(f"the file of {run_id} does not hold what was written")
            runs[run_id] = RunState(load(data), entry["facts"])
        return step, runs


def _read_manifest(place: Path) -> tuple[int, dict[str, Any]]:
    """Return the step of one checkpoint, and the digest and the facts of each of its runs.

    Raises:
        DamagedError: The file is missing, or does not hold what was written.
    """
    with _damage():
        sealed = json.loads((place / MANIFEST_FILE).read_bytes())
        content = sealed["content"]
        if hashlib.sha256(content.encode()).hexdigest() != sealed["sha256"]:
            raise DamagedError(f"{MANIFEST_FILE} does not hold what was written")
        manifest = json.loads(content)
        return manifest["step"], dict(manifest["runs"])


@contextmanager
def _damage() -> Iterator[None]:
    """Raise DamagedError for whatever damaged bytes can make of a manifest: no JSON, other types, missing keys."""
    try:
        yield
    # RecursionError: of deep nesting.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as problem:
        raise DamagedError(f"{type(problem).__name__}: {problem}") from None


class Clock:
    """A clock that says when the next checkpoint is due.

    It decides only when a checkpoint is written, never what a study contains: results and curves do not depend on it.
    """

    def __init__(self, seconds: float | None):
        """Start the clock.

        Args:
            seconds: The time between two checkpoints. None: as long as keeps writing below 3% of the time, and at least
                a minute.
        """
        self._chosen = seconds
        self._interval = SHORTEST_SECONDS if seconds is None else seconds
        self._last = time.monotonic()
        self.writing = 0.0
        """The number of seconds spent in writing so far."""

    @property
    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self._last >= self._interval

    def wrote(self, started: float) -> None:
        """Note that a checkpoint has just been written, which began at `started` on the monotonic clock."""
        self._last = time.monotonic()
        took = self._last - started
        self.writing += took
        if self._chosen is None:
            self._interval = max(SHORTEST_SECONDS, took / LARGEST_FRACTION)
