"""A study as people look at it: figures, one HTML page, a table in the terminal, sentences with numbers."""

from collections.abc import Sequence
from pathlib import Path

from prolu.figures import PLANES, draw_frontier, draw_training_curves, save_figure
from prolu.files import read_json_lines, write_atomically
from prolu.frontiers import Record, studies
from prolu.report.page import render_page
from prolu.report.tables import write_tables
from prolu.report.terminal import print_estimate, print_summary
from prolu.results import CURVES_FILE, Results, pool, read_study

__all__ = ["print_estimate", "print_summary", "records_of", "write_report"]

FIGURES_FOLDER, PAGE_FILE, POOLED_FOLDER = "figures", "report.html", "pooled"


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Draws figures (SVG and PNG) of one study, or of several together, and writes their page and a table of all
    results (CSV and parquet); returns the page's path.

    Args:
        folders: studies.
        out: folder of the report; by default the study's own, or `pooled` beside the first of several.

    Raises:
        ValueError: no study there, or none of its runs has finished.
    """
    found = [Results.load(folder) for folder in folders]
    records = records_of(found)
    place = Path(out) if out is not None else default_place(folders)
    names = studies(records) if len(found) > 1 else [found[0].folder.resolve().name]
    configs = {name: read_study(results.folder) for name, results in zip(names, found, strict=True)}
    files = [run.folder / CURVES_FILE for results in found for run in results.runs]
    curves = {r["run_id"]: read_json_lines(file) for r, file in zip(records, files, strict=True)}
    for ending in ("svg", "png"):
        for x, y in PLANES:
            save_figure(draw_frontier(records, x, y), place / FIGURES_FOLDER / f"{y}-against-{x}.{ending}")
        save_figure(draw_training_curves(curves, records), place / FIGURES_FOLDER / f"training-curves.{ending}")
    write_tables(records, place)
    page = place / PAGE_FILE
    write_atomically(page, render_page(" + ".join(names), records, configs, curves))
    return page


def records_of(found: Sequence[Results]) -> Sequence[Record]:
    """The runs of one study, or of several, pooled."""
    return pool(found) if len(found) > 1 else found[0].records


def default_place(folders: Sequence[str | Path]) -> Path:
    """Where a report goes."""
    return Path(folders[0]) if len(folders) == 1 else Path(folders[0]).resolve().parent / POOLED_FOLDER
