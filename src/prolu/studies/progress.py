"""How far the runs of a study are, read from its files while another process trains it.

Nothing is locked or written. A file that is being replaced is read in its old or its new form; if it cannot be read
now, it can be a moment later.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prolu.runtime.files import rows_of_json
from prolu.studies.checkpoints import CHECKPOINTS_FOLDER, read_facts
from prolu.studies.folder import FAILURE_FILE, GROUPS_FOLDER, LOG_FILE, STUDY_FILE, failures, read_study
from prolu.studies.records import RESULTS_FILE, finite_rows, is_number, read_curve, read_records
from prolu.training.config import RunConfig


class RunProgress(NamedTuple):
    """A run of a study that has no result yet."""

    settings: dict[str, Any]
    """Its settings as its line of results will have them, with its `run_id`."""
    n_steps: int
    """The number of its steps."""
    n_steps_saved: int
    """How many of them the last checkpoint has; all, if it is finished in a group that is not gathered yet."""
    curve: list[dict[str, Any]]
    """The lines of its training curve so far."""

    @property
    def fraction(self) -> float:
        """The fraction of its steps that is saved, from 0 to 1."""
        return min(1.0, self.n_steps_saved / self.n_steps)


def watched_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return when the files that say how far a study is were last written, in nanoseconds, and their sizes."""
    found = {}
    for part in _parts(folder):
        for pattern in (STUDY_FILE, RESULTS_FILE, LOG_FILE, f"{CHECKPOINTS_FOLDER}/step-*", f"*/{FAILURE_FILE}"):
            for file in part.glob(pattern):
                try:
                    state = file.stat()
                except FileNotFoundError:
                    continue  # an old checkpoint, removed just now
                found[str(file.relative_to(folder))] = (state.st_mtime_ns, state.st_size)
    return found


def unfinished_runs(folder: Path) -> list[RunProgress]:
    """Return the runs of a study that have neither a result nor failed, in the study's order.

    Raises:
        ValueError: the folder holds no study, or a file in it is damaged.
    """
    study = read_study(folder)
    ended = {record["run_id"] for record in read_records(folder)} | failures(folder).keys()
    facts: dict[str, dict[str, Any]] = {}
    curves_in_groups = {}
    for part in _parts(folder):
        facts |= read_facts(part)
        if part != folder:
            ended |= failures(part).keys()
            curves_in_groups |= {record["run_id"]: read_curve(part / record["run_id"]) for record in read_records(part)}
    batch_size = study["stream"].get("batch_size", 1)
    if type(batch_size) is not int:
        raise ValueError(f"{folder / STUDY_FILE}: stream.batch_size must be a whole number")
    found = []
    for config in _configs(folder, study["runs"]):
        run_id, n_steps = config.run_id, config.n_steps(batch_size)
        n_saved, curve = _saved(run_id, facts.get(run_id, {}))
        if run_id in curves_in_groups:
            n_saved, curve = n_steps, curves_in_groups[run_id]
        if run_id not in ended:
            found.append(RunProgress(config.describe() | {"run_id": run_id}, n_steps, n_saved, curve))
    return found


def _configs(folder: Path, recorded: Sequence[Any]) -> list[RunConfig]:
    try:
        return [RunConfig.recorded(settings) for settings in recorded]
    except (AttributeError, TypeError):
        raise ValueError(f"{folder / STUDY_FILE}: its runs are not the settings of runs") from None


def _parts(folder: Path) -> list[Path]:
    """Return the folder of a study, and those of the groups in which it is trained."""
    return [folder, *sorted(file.parent for file in (folder / GROUPS_FOLDER).glob(f"*/{STUDY_FILE}"))]


def _saved(run_id: str, facts: Mapping[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """Return the number of steps and the curve that a checkpoint has of a run."""
    n_steps, lines = facts.get("n_updates", 0), facts.get("curve", [])
    if not is_number(n_steps) or not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{run_id}: its checkpoint is not one of this version")
    where = f"{run_id}: its curve"
    return int(n_steps), finite_rows(where, rows_of_json("".join(lines), where))
