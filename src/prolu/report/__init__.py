"""A study as people look at it: figures, one HTML page, a table in the terminal, sentences with numbers."""

from pathlib import Path

from prolu.figures import PLANES, draw_frontier, draw_training_curves, save_figure
from prolu.files import read_json_lines, write_atomically
from prolu.report.page import render_page
from prolu.report.terminal import print_estimate, print_summary
from prolu.results import CURVES_FILE, Results, read_study

__all__ = ["print_estimate", "print_summary", "write_report"]

FIGURES_FOLDER, PAGE_FILE = "figures", "report.html"


def write_report(folder: str | Path) -> Path:
    """Draws a study's figures (SVG and PNG) and writes its page; returns the page's path.

    Raises:
        ValueError: no study there, or none of its runs has finished.
    """
    results = Results.load(folder)
    curves = {run.record["run_id"]: read_json_lines(run.folder / CURVES_FILE) for run in results.runs}
    for x, y in PLANES:
        for ending in ("svg", "png"):
            save_figure(
                draw_frontier(results.records, x, y),
                results.folder / FIGURES_FOLDER / f"{y}-against-{x}.{ending}",
            )
    for ending in ("svg", "png"):
        save_figure(
            draw_training_curves(curves, results.records),
            results.folder / FIGURES_FOLDER / f"training-curves.{ending}",
        )
    page = results.folder / PAGE_FILE
    write_atomically(page, render_page(results, read_study(results.folder), curves))
    return page
