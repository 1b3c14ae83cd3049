"""The folder of a study: the names of its files, and what reads and writes them."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prolu.runtime.files import check_can_be_folder, read_json_lines, remove, write_atomically
from prolu.studies.checkpoints import CHECKPOINTS_FOLDER, remove_checkpoints
from prolu.training.config import RunConfig

FINAL_FOLDER = "final"
"""In a run's folder: the state it ended with, if it was asked to keep that."""


GROUPS_FOLDER = "groups"
"""In a study's folder while its runs are trained in groups (`groups.py`)."""


MOVABLE = ("lm", "data")
"""Of a stream: paths, which may change; what lies there may not, so the digests are compared."""


def make_folder(out: Path) -> None:
    """Creates it, if it is not there; ValueError if it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise _unwritable(out, problem) from None


def _unwritable(out: Path, problem: OSError) -> ValueError:
    return ValueError(f"out {str(out)!r}: cannot be written ({problem.strerror})")


def write_study(out: Path, study: Mapping[str, Any]) -> None:
    """Writes a study's config into its folder."""
    write_atomically(out / STUDY_FILE, json.dumps(study, indent=1) + "\n")


def holds_study(out: Path) -> bool:
    """Whether there is a study already, whichever.

    Raises:
        ValueError: something else is there.
    """
    check_can_be_folder(out)
    if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
        return False  # nothing but what a process leaves that died before its first file was whole
    if not (out / STUDY_FILE).is_file():
        raise ValueError(f"out {str(out)!r}: not empty, and not a study; choose another folder")
    return True


def check_parent(out: Path, hooks: Sequence[str]) -> None:
    """Raises ValueError unless studies at these hooks can lie in `out`: it is new, or holds studies at hooks."""
    check_can_be_folder(out)
    there = [path for path in out.iterdir() if not path.name.startswith(".")] if out.exists() else []
    if (out / STUDY_FILE).exists():
        raise ValueError(f"out {str(out)!r}: holds a study at one hook; choose another folder for several")
    if any(path.name not in hooks for path in there) and not any((path / STUDY_FILE).is_file() for path in there):
        raise ValueError(f"out {str(out)!r}: not empty, and holds no studies; choose another folder")


RESULTS_FILE, STUDY_FILE, CURVES_FILE = "results.jsonl", "config.json", "metrics.jsonl"


FAILURE_FILE = "failure.json"
"""In the folder of a run that was stopped because it failed."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a study's numbers."""
    return {"python": platform.python_version()} | {p: version(p) for p in ("prolu", "torch", "transformers")}


def failures(folder: Path) -> dict[str, str]:
    """Why the runs of a study that failed did, by run_id."""
    files = sorted(folder.glob(f"*/{FAILURE_FILE}"))
    return {file.parent.name: json.loads(file.read_text(encoding="utf-8"))["reason"] for file in files}


def read_study(folder: Path) -> dict[str, Any]:
    """The resolved config of a study.

    Raises:
        ValueError: the folder holds no study.
    """
    file = folder / STUDY_FILE
    try:
        study = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{folder}: no study here (no {STUDY_FILE})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: not JSON") from None
    if not isinstance(study, dict) or not {"stream", "runs"} <= study.keys():
        raise ValueError(f"{file}: not a study's config (needs 'stream' and 'runs')")
    return study


def done_of(runs: Sequence[RunConfig], out: Path) -> list[RunConfig]:
    """Those that have a result at their full length."""
    lengths = {record["run_id"]: record["n_tokens"] for record in read_json_lines(out / RESULTS_FILE)}
    return [run for run in runs if lengths.get(run.run_id) == run.n_tokens]


def tidy(done: Sequence[RunConfig], out: Path) -> None:
    """Removes what only an unfinished study needs."""
    remove_checkpoints(out)
    for run in done:
        if (out / run.run_id / FAILURE_FILE).exists() or (out / run.run_id / CHECKPOINTS_FOLDER).exists():
            remove(out / run.run_id / FAILURE_FILE)
            remove_checkpoints(out / run.run_id)
