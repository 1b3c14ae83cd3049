"""Figures that are added to the finished runs of a study, because they cost too much to be measured in every sweep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prolu.runtime.files import locked, through_json
from prolu.sae.autoencoder import SAE
from prolu.studies.folder import read_results, write_results
from prolu.studies.records import RESULTS_FILE, check_records
from prolu.studies.results import Run

Figures = Mapping[str, float | None]
"""Figures by name; None where one does not apply."""


@dataclass(frozen=True)
class Measure:
    """What is measured of every SAE of a study."""

    field: str
    """The field of results.jsonl that says on what it was measured."""
    made: str
    """The value of that field. It is different whenever the figures could be."""
    figures_of: Callable[[SAE], Figures]
    """The function that returns the figures of an SAE."""

    def is_missing(self, run: Run) -> bool:
        """Return whether a run lacks these figures, or has them of something else."""
        return run.record.get(self.field) != self.made


def add_figures(folder: str | Path, figures: Mapping[str, Mapping[str, float | str | None]]) -> None:
    """Add fields to lines of a study's results.jsonl, so that runs can be compared by them.

    A field of the same name is replaced. A run that is trained further loses what was added to it.

    Args:
        folder: The folder of the study.
        figures: The fields of each run, by `run_id`.

    Raises:
        ValueError: The study has no finished run of that name, or a field has a value that results.jsonl cannot have.
        FolderBusyError: Another process works in the folder.
    """
    folder = Path(folder)
    with locked(folder):
        records = read_results(folder)
        if unknown := figures.keys() - {record["run_id"] for record in records}:
            raise ValueError(f"{folder}: has no finished run named {', '.join(sorted(unknown))}")
        added = [record | through_json(figures.get(record["run_id"], {})) for record in records]
        check_records(folder / RESULTS_FILE, added)
        write_results(folder, added)


def measure_runs(runs: Sequence[Run], measures: Sequence[Measure], advance: Callable[[int], None]) -> None:
    """Measure the figures that runs of one study lack, and add those of each run as soon as they are known.

    Args:
        runs: The runs.
        measures: What is measured.
        advance: What is called with the number of runs that are done.
    """
    for run in runs:
        missing = [measure for measure in measures if measure.is_missing(run)]
        if missing:
            sae = run.load()
            found: dict[str, float | str | None] = {}
            for measure in missing:
                found |= {measure.field: measure.made} | dict(measure.figures_of(sae))
            add_figures(run.folder.parent, {run.record["run_id"]: found})
        advance(1)
