"""A study as people look at it: figures, one HTML page, pages of latents, a table in the terminal."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prolu.evaluation.comparison.figures import PLANES, draw_frontier, draw_training_curves, save_figure
from prolu.evaluation.comparison.frontiers import Record, studies
from prolu.evaluation.comparison.verdicts import Verdict, verdict_table
from prolu.report.latents.pages import page_of
from prolu.report.page import Report, render_page
from prolu.report.table_files import write_tables
from prolu.runtime.files import read_json_lines, write_atomically
from prolu.studies.folder import CURVES_FILE
from prolu.studies.results import Results, records_of

FIGURES_FOLDER, PAGE_FILE, POOLED_FOLDER = "figures", "report.html", "pooled"
ENDINGS = ("svg", "pdf", "png")


class DrawnReport(NamedTuple):
    """What a report shows, and where its page lies: the terminal prints its summary from the same numbers."""

    page: Path
    """The HTML page."""
    folders: list[Path]
    """The folders of the studies."""
    records: Sequence[Record]
    """The results of all runs; those of several studies are pooled."""
    verdicts: list[Verdict]
    """Families compared at equal L0."""


def write_report(studies: Sequence[str | Path | Results], out: str | Path | None = None) -> DrawnReport:
    """Write the report of one study, or of several together, and return what it shows.

    The report is a page (HTML), its figures (SVG, PDF and PNG) and a table of all results (CSV and Parquet).

    Args:
        studies: the studies, loaded already or as their folders.
        out: the folder of the report; by default the study's own, or `pooled` beside the first of several.

    Raises:
        ValueError: a folder holds no study, or none of its runs has finished.
    """
    found = [study if isinstance(study, Results) else Results.load(study) for study in studies]
    folders = [results.folder for results in found]
    records = records_of(found)
    place = Path(out) if out is not None else default_place(folders)
    report = _report(found, records, place)
    drawn = {f"{y}-against-{x}": draw_frontier(records, x, y) for x, y in PLANES}
    drawn["training-curves"] = draw_training_curves(report.curves, records)
    for name, figure in drawn.items():
        save_figure(figure, *(place / FIGURES_FOLDER / f"{name}.{ending}" for ending in ENDINGS))
    write_tables(records, place)
    page = place / PAGE_FILE
    write_atomically(page, render_page(report))
    return DrawnReport(page, folders, records, report.verdicts)


def _report(found: Sequence[Results], records: Sequence[Record], place: Path) -> Report:
    """What the page shows; runs of several studies are named with their study."""
    names = studies(records) if len(found) > 1 else [found[0].folder.resolve().name]
    prefixes = [f"{name}/" if len(found) > 1 else "" for name in names]
    runs = {
        r["run_id"]: run for r, run in zip(records, (run for results in found for run in results.runs), strict=True)
    }
    pages = {run_id: page for run_id, run in runs.items() if (page := page_of(run))}
    return Report(
        name=" + ".join(names),
        records=records,
        configs={name: results.config for name, results in zip(names, found, strict=True)},
        curves={run_id: read_json_lines(run.folder / CURVES_FILE) for run_id, run in runs.items()},
        verdicts=verdicts_of(found),
        failures={
            prefix + run_id: why
            for prefix, results in zip(prefixes, found, strict=True)
            for run_id, why in results.failures.items()
        },
        pages={run_id: Path(os.path.relpath(page, place)).as_posix() for run_id, page in pages.items()},
    )


def verdicts_of(found: Sequence[Results]) -> list[Verdict]:
    """Families compared at matched L0; those of studies at several hooks hook by hook, the challenger named with it."""
    by_hook: dict[str, list[Results]] = {}
    for results in found:
        by_hook.setdefault(results.config["stream"].get("hook", ""), []).append(results)
    return [
        v if len(by_hook) == 1 else v._replace(challenger=f"{hook}: {v.challenger}")
        for hook, some in by_hook.items()
        for v in verdict_table(some)
    ]


def default_place(folders: Sequence[Path]) -> Path:
    """Return the folder that a report is written to unless another is named."""
    return folders[0] if len(folders) == 1 else folders[0].resolve().parent / POOLED_FOLDER
