"""The tables of runs of the page: which rows they have and what their cells say. `tables.html` makes HTML of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prolu.evaluation.comparison.frontiers import Record, family
from prolu.studies.progress import RunProgress

COLUMNS = {
    "family": "family",
    "setting": "coeff / target L0",
    "init_seed": "seed",
    "l0": "L0",
    "degradation": "CE increase",
    "recovered": "recovered",
    "mse": "MSE",
    "fvu": "FVU",
    "l1": "L1",
    "sqrt_l1": "sqrt-L1",
    "dead_fraction": "dead",
    "converged": "converged",
}
"""The columns of the table of runs, after the run's name, with their titles."""

PROGRESS_COLUMNS = {
    "tokens": "tokens",
    "l0": "L0",
    "mse": "MSE",
    "dead": "dead latents",
    "coeff": "coefficient",
}
"""The columns of the table of runs in training, after name, family and progress, with their titles."""

N_TEXT_COLUMNS = 2
"""The first columns of the table of runs, name and family, are text; the others are aligned as numbers."""


class RunRow(NamedTuple):
    """One run in the table of all runs."""

    run_id: str
    page: str | None
    """The address of the pages of its latents; None if it has none."""
    converged: bool
    cells: list[str]
    """The cells of `COLUMNS`."""


def rows_of_runs(records: Sequence[Record], pages: Mapping[str, str]) -> list[RunRow]:
    """Return a row per run, by family and L0."""
    in_order = sorted(records, key=lambda r: (family(r), r["l0"]))
    return [_run_row(r, pages.get(r["run_id"])) for r in in_order]


def _run_row(r: Record, page: str | None) -> RunRow:
    target = r.get("target_l0")
    # With a target L0 the coefficient was adjusted in training, so the target is what tells settings apart.
    shown = dict(r) | {
        "family": family(r),
        "setting": r["coeff"] if target is None else target,
        "converged": "not known" if r["converged"] is None else r["converged"],
    }
    cells = [_cell(shown.get(column)) for column in COLUMNS]
    return RunRow(r["run_id"], page, bool(r["converged"]), cells)


class ProgressRow(NamedTuple):
    """One run in the table of those in training."""

    run_id: str
    family: str
    percent: int
    """How much of its training is saved, from 0 to 100."""
    cells: list[str]
    """The cells of `PROGRESS_COLUMNS`: the last line of its curve."""


def rows_of_progress(runs: Sequence[RunProgress]) -> list[ProgressRow]:
    """Return a row per run in training."""
    return [
        ProgressRow(
            run.settings["run_id"],
            family(run.settings),
            math.floor(100 * run.fraction),
            [_cell(run.curve[-1].get(column)) if run.curve else "" for column in PROGRESS_COLUMNS],
        )
        for run in runs
    ]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):  # before numbers: True is an int
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
