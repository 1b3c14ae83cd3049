"""The folder of a study: the names of its files, and what reads and writes them.

config.json            all that decides the study's numbers (`write_study`, `read_study`)
results.jsonl          one line per finished run (`write_results`, `read_results`)
log.jsonl              events with their time (`log_event`); no other file holds a time
checkpoints/           the state of unfinished runs (`checkpoints.py`)
RUN_ID/                one run: sae.safetensors, config.json, metrics.jsonl, documents.npz, latents.npz
RUN_ID/failure.json    why the run was stopped, if it failed
RUN_ID/final/          its last training state, if it was asked to keep that
groups/                while its runs are trained in groups (`groups/dealing.py`)
"""

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prolu.activations.token_blocks import LATER_FACTS
from prolu.runtime.files import (
    check_can_be_folder,
    json_text,
    read_json_object,
    remove,
    write_atomically,
    write_json_lines,
)
from prolu.runtime.names import check_inside, plain_name
from prolu.runtime.version import package_version
from prolu.studies.checkpoints import CHECKPOINTS_FOLDER, remove_checkpoints
from prolu.studies.records import RESULTS_FILE, check_study, read_records
from prolu.training.config import RunConfig

STUDY_FILE = "config.json"
LOG_FILE = "log.jsonl"
FAILURE_FILE = "failure.json"
FINAL_FOLDER = "final"
GROUPS_FOLDER = "groups"

PATH_FIELDS = ("lm", "data")
"""Fields of a stream's description that are paths. They may change when a folder is moved, but the content may not, so
the digests beside them are compared instead."""


def begin_folder(out: Path, study: Mapping[str, Any]) -> None:
    """Create a study's folder and write its config, unless they are there.

    Raises:
        ValueError: the folder cannot be written.
    """
    make_folder(out)
    try:
        if not (out / STUDY_FILE).exists():
            write_study(out, study)
    except OSError as problem:
        raise _unwritable(out, problem) from None


def make_folder(out: Path) -> None:
    """Create a folder unless it exists already.

    Raises:
        ValueError: it cannot be created.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise _unwritable(out, problem) from None


def _unwritable(out: Path, problem: OSError) -> ValueError:
    return ValueError(f"out {str(out)!r}: cannot be written ({problem.strerror})")


def holds_study(out: Path) -> bool:
    """Return whether a folder holds a study; an empty or missing one holds none.

    Raises:
        ValueError: something else is there.
    """
    check_can_be_folder(out)
    # Hidden files may be left by a process that was killed before its first file was complete.
    if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
        return False
    if not (out / STUDY_FILE).is_file():
        raise ValueError(f"out {str(out)!r}: not empty, and not a study; choose another folder")
    return True


def check_parent(out: Path, hooks: Sequence[str]) -> None:
    """Raise ValueError unless studies at these hooks can lie in `out`: it is new, or holds studies at hooks."""
    check_can_be_folder(out)
    there = [path for path in out.iterdir() if not path.name.startswith(".")] if out.exists() else []
    if (out / STUDY_FILE).exists():
        raise ValueError(f"out {str(out)!r}: holds a study at one hook; choose another folder for several")
    if any(path.name not in hooks for path in there) and not any((path / STUDY_FILE).is_file() for path in there):
        raise ValueError(f"out {str(out)!r}: not empty, and holds no studies; choose another folder")


def write_study(out: Path, study: Mapping[str, Any]) -> None:
    """Write a study's config into its folder."""
    write_atomically(out / STUDY_FILE, json_text(study, indent=1) + "\n")


def read_study(folder: Path) -> dict[str, Any]:
    """Return the resolved config of a study.

    Raises:
        ValueError: the folder holds no study, or the config is not one of a study.
    """
    file = folder / STUDY_FILE
    study = read_json_object(file, "study")
    if "sae" in study:
        around = folder.parent if folder.name else folder.absolute().parent
        inside = f"; its study is {around}" if (around / RESULTS_FILE).is_file() else ""
        raise ValueError(f"{folder}: this is the folder of one SAE, and not of a study{inside}")
    check_study(file, study)
    return study


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a study's numbers."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), "prolu": package_version()} | libraries


def text_to_read(folders: Sequence[Path], n_tokens: int, held_out_pool: int) -> tuple[int, int]:
    """Return how many training tokens, and how many held-out tokens at least, are read of the text.

    They are those of the studies that are there, else those asked for: a study that is resumed or extended keeps the
    text that it was begun with, and with it the order of its stream and the tokens that are scored.
    """
    for folder in folders:
        if holds_study(folder):
            stream = read_study(folder)["stream"]
            n_tokens = stream.get("max_train_tokens", n_tokens)
            held_out_pool = stream.get("held_out_pool", LATER_FACTS["held_out_pool"])
    return n_tokens, held_out_pool


def read_results(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a study's results, one per finished run; none if no run has finished."""
    return read_records(out)


def write_results(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a study's results, one line per finished run."""
    write_json_lines(out / RESULTS_FILE, records)


def finished_runs(runs: Sequence[RunConfig], out: Path) -> list[RunConfig]:
    """Return the runs that have a result at their full length."""
    lengths = {record["run_id"]: record["n_tokens"] for record in read_results(out)}
    return [run for run in runs if lengths.get(run.run_id) == run.n_tokens]


def write_failure(folder: Path, step: int, reason: str) -> None:
    """Note in a run's folder at which step it failed, and why."""
    folder.mkdir(exist_ok=True)
    write_atomically(folder / FAILURE_FILE, json_text({"step": step, "reason": reason}) + "\n")


def failures(folder: Path) -> dict[str, str]:
    """Return why runs of a study failed, by run_id.

    Raises:
        ValueError: a file does not say why, or the name of its folder is not plain.
    """
    reasons: dict[str, str] = {}
    for file in sorted(folder.glob(f"*/{FAILURE_FILE}")):
        run_id = plain_name(file.parent.name, f"{folder}: the failed run")
        check_inside(folder, run_id)
        reason = read_json_object(file, "failed run").get("reason")
        if not isinstance(reason, str):
            raise ValueError(f"{file}: its reason must be text")
        reasons[run_id] = reason
    return reasons


def log_event(out: Path, event: str, **facts: Any) -> None:
    """Append what happened, and when, to a study's log."""
    with (out / LOG_FILE).open("a") as log:
        log.write(json_text({"event": event, "time": time.time()} | facts) + "\n")


def tidy(finished: Sequence[RunConfig], out: Path) -> None:
    """Remove what only an unfinished study needs."""
    remove_checkpoints(out)
    for run in finished:
        folder = out / run.run_id
        if (folder / FAILURE_FILE).exists() or (folder / CHECKPOINTS_FOLDER).exists():
            remove(folder / FAILURE_FILE)
            remove_checkpoints(folder)
