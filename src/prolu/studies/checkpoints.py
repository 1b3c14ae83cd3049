"""A sweep's state on the disk: whole or not there, checked when it is read, the last two kept. No pickle.

    checkpoints/step-000000012000/
      checkpoint.json          the step; each run's counters, curve and file, with its SHA-256; and its own
      RUN_ID.safetensors       weights, both moments, firing counters

What decides bits is all here: draws are keyed, and the stream is a function of the step.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from prolu.runtime.files import remove, rename_folder, write_flushed

CHECKPOINTS_FOLDER, MANIFEST_FILE = "checkpoints", "checkpoint.json"

N_KEPT = 2
"""The one before the last is what a damaged last one falls back on."""

LARGEST_SHARE = 0.03
"""Of the time that may go into writing checkpoints."""

SHORTEST_SECONDS = 60.0
"""Between two checkpoints, unless the user says otherwise."""


class RunState(NamedTuple):
    """One run's state."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]
    """Counters and curves, as JSON has them."""


class Checkpoint(NamedTuple):
    """A checkpoint as it was read."""

    step: int
    runs: dict[str, RunState]
    complaints: list[str]
    """A sentence for each newer one that is damaged."""


class DamagedError(Exception):
    """A checkpoint that is not what was written."""


def write_checkpoint(folder: Path, step: int, runs: Mapping[str, RunState]) -> None:
    """Writes the state of all runs, gives it its name, and removes all but the last two.

    Raises:
        OSError: the disk is full, or the folder is gone. Earlier checkpoints are left as they were.
    """
    place = folder / CHECKPOINTS_FOLDER
    partial, final = place / ".partial", place / f"step-{step:012}"
    remove(partial)
    try:
        partial.mkdir(parents=True)
        entries = {}
        for run_id, saved in runs.items():
            data = save({name: t.detach().cpu().contiguous() for name, t in saved.tensors.items()})
            write_flushed(partial / f"{run_id}.safetensors", data)
            entries[run_id] = {"sha256": hashlib.sha256(data).hexdigest(), "facts": saved.facts}
        content = json.dumps({"step": step, "runs": entries})
        seal = hashlib.sha256(content.encode()).hexdigest()
        write_flushed(partial / MANIFEST_FILE, json.dumps({"sha256": seal, "content": content}))
        remove(final)
        rename_folder(partial, final)
    except OSError:
        remove(partial)
        raise
    for old in _found(folder)[N_KEPT:]:
        remove(old)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, with a complaint for each newer one that is not; None without any."""
    complaints = []
    for place in _found(folder):
        try:
            step, runs = _read(place)
        except DamagedError as problem:
            complaints.append(f"checkpoint {place.name} is damaged ({problem})")
            continue
        return Checkpoint(step, runs, complaints)
    return Checkpoint(0, {}, complaints) if complaints else None


def remove_checkpoints(folder: Path) -> None:
    """What a finished sweep does."""
    remove(folder / CHECKPOINTS_FOLDER)


def _found(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted((folder / CHECKPOINTS_FOLDER).glob("step-*"), reverse=True)


def _read(place: Path) -> tuple[int, dict[str, RunState]]:
    try:
        sealed = json.loads((place / MANIFEST_FILE).read_bytes())
        content = sealed["content"]
        if hashlib.sha256(content.encode()).hexdigest() != sealed["sha256"]:
            raise DamagedError(f"{MANIFEST_FILE} is not what was written")
        manifest = json.loads(content)
        runs = {}
        for run_id, entry in manifest["runs"].items():
            data = (place / f"{run_id}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise DamagedError(f"{run_id} is not what was written")
            runs[run_id] = RunState(load(data), entry["facts"])
        return manifest["step"], runs
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as problem:
        raise DamagedError(f"{type(problem).__name__}: {problem}") from None


class Clock:
    """Says when the next checkpoint is due: often, but never for more than a share of the time."""

    def __init__(self, seconds: float | None):
        """Args: `seconds` between two checkpoints; None: so that writing stays under 3% of the time."""
        self._chosen, self._interval = seconds, SHORTEST_SECONDS if seconds is None else seconds
        self._last = time.monotonic()
        self.writing = 0.0
        """Seconds spent so far."""

    @property
    def is_due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self._last >= self._interval

    def wrote(self, started: float) -> None:
        """Notes a checkpoint that began at `started` (monotonic) and has just ended."""
        self._last = time.monotonic()
        took = self._last - started
        self.writing += took
        if self._chosen is None:
            self._interval = max(SHORTEST_SECONDS, took / LARGEST_SHARE)
