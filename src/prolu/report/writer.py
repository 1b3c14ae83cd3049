"""Writes the report of one study, or of several together, into a folder: figures, the HTML page, tables."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from prolu.evaluation.comparison.claims import FamilyComparison, compare_families
from prolu.evaluation.comparison.figures import (
    draw_frontier,
    draw_magnitude_response,
    draw_training_curves,
    save_figure,
)
from prolu.evaluation.comparison.frontiers import Record, study_names
from prolu.evaluation.comparison.metric_catalog import check_compared, main_metric
from prolu.evaluation.comparison.prefixes import prefix_title, prefix_widths, with_prefix
from prolu.evaluation.comparison.styles import planes
from prolu.evaluation.document_sums import read_documents_of
from prolu.evaluation.latents import density_quartiles
from prolu.evaluation.truth import read_truth
from prolu.report.agreement import NO_PAIRS, DrawnAgreement, compare_seeds, write_agreement
from prolu.report.headline import CONVERGED, PageHeadline, headline
from prolu.report.latents.pages import page_of
from prolu.report.page import render_page
from prolu.report.page_data import PageContent
from prolu.report.table_files import write_comparison, write_tables
from prolu.report.truth_section import truth_section
from prolu.runtime.files import write_atomically
from prolu.runtime.names import check_inside, folder_name
from prolu.sae.autoencoder import WEIGHTS_FILE
from prolu.studies.records import RESULTS_FILE, check_reported, read_curve
from prolu.studies.results import Results, records_of
from prolu.studies.runs import Run

FIGURES_FOLDER = "figures"
PAGE_FILE = "report.html"
POOLED_FOLDER = "pooled"
ENDINGS = ("svg", "pdf", "png")


class DrawnReport(NamedTuple):
    """What a report shows, and where its page lies: the terminal prints its summary from the same numbers."""

    page: Path
    """The HTML page."""
    studies: list[Results]
    """The studies."""
    records: Sequence[Record]
    """The results of all runs; those of several studies are pooled."""
    comparison: FamilyComparison
    """Families compared at equal L0, and what that says about claims."""
    agreement: DrawnAgreement = NO_PAIRS
    """How far SAEs that differ in their init seed only agree."""

    @property
    def folders(self) -> list[Path]:
        """The folders of the studies, as they were given."""
        return [results.folder for results in self.studies]

    @property
    def runs(self) -> list[Run]:
        """The runs of all studies, in the order of the records."""
        return [run for results in self.studies for run in results.runs]

    @property
    def latent_pages(self) -> list[Path]:
        """The pages of latents that there are."""
        return [page for run in self.runs if (page := page_of(run))]


def write_report(
    studies: Sequence[str | Path | Results],
    out: str | Path | None = None,
    *,
    hooks_apart: bool = False,
    agreement: bool = False,
    metrics: Sequence[str] = (),
) -> DrawnReport:
    """Write the report of one study, or of several together, and return what it shows.

    The report is a page (HTML), its figures (SVG, PDF and PNG) and a table of all results (CSV and Parquet).

    Args:
        studies: the studies, loaded already or as their folders.
        out: the folder of the report; by default the study's own, or `pooled` beside the first of several.
        hooks_apart: whether studies at several hooks are taken too, with the families of each hook by themselves.
        agreement: whether the agreement between seeds is computed also where that takes more than a minute.
        metrics: the metrics beside the CE increase by which families are compared, by their names in results.jsonl.

    Raises:
        ValueError: one of the metrics is none; a folder holds no study, none of its runs has finished, or two studies
            were scored with different models, at different hooks or on different tokens.
    """
    for name in metrics:
        check_compared(name)
    found = [study if isinstance(study, Results) else Results.load(study) for study in studies]
    folders = [results.folder for results in found]
    records = records_of(found, hooks_apart=hooks_apart)
    place = Path(out) if out is not None else default_place(folders)
    check_studies(found, out)
    agreements = compare_seeds(found, whatever_it_takes=agreement)
    content = page_content(found, records, place, compare_families(found, metrics), agreements)
    figures = {f"{y}-against-{x}": draw_frontier(records, x, y) for x, y in planes(records)}
    for n in prefix_widths(records):
        metric = main_metric(records)
        name = f"{metric}-against-l0-first-{n}"
        figures[name] = draw_frontier(with_prefix(records, n), "l0", metric, prefix_title(n, metric))
    if content.truth is not None:
        figures["magnitude-response"] = draw_magnitude_response(content.truth.lines)
    figures["training-curves"] = draw_training_curves(content.curves, records)
    for name, figure in figures.items():
        save_figure(figure, *(place / FIGURES_FOLDER / f"{name}.{ending}" for ending in ENDINGS))
    write_tables(records, place)
    write_agreement(content.agreement, place)
    write_comparison(content.comparison, place)
    # The page is written last, so that all files that it links to exist.
    page = place / PAGE_FILE
    write_atomically(page, render_page(content))
    return DrawnReport(page, found, records, content.comparison, content.agreement)


def check_studies(found: Sequence[Results], out: str | Path | None) -> None:
    """Raise ValueError if a file that the report of some studies needs is damaged, or a link leads elsewhere."""
    place = Path(out) if out is not None else default_place([results.folder for results in found])
    check_inside(place, FIGURES_FOLDER)
    for results in found:
        check_reported(results.folder / RESULTS_FILE, results.records)
        _ = results.failures
        for run in results.runs:
            read_curve(run.folder)
            read_documents_of(run.folder)
            density_quartiles(run.folder)
            read_truth(run.folder)


def page_content(
    found: Sequence[Results],
    records: Sequence[Record],
    place: Path,
    comparison: FamilyComparison,
    agreement: DrawnAgreement = NO_PAIRS,
) -> PageContent:
    """Return what the page in the folder `place` shows; runs of several studies are named with their study."""
    is_pooled = len(found) > 1
    names = study_names(records) if is_pooled else [folder_name(found[0].folder)]
    runs_in_order = [run for results in found for run in results.runs]
    # Pooled records have other run_ids than those in their study's folder, but the same order.
    runs = {record["run_id"]: run for record, run in zip(records, runs_in_order, strict=True)}
    pages = {run_id: _address(page, place) for run_id, run in runs.items() if (page := page_of(run))}
    failures = {}
    for name, results in zip(names, found, strict=True):
        prefix = f"{name}/" if is_pooled else ""
        failures |= {prefix + run_id: reason for run_id, reason in results.failures.items()}
    return PageContent(
        name=" + ".join(names),
        records=records,
        configs={name: results.config for name, results in zip(names, found, strict=True)},
        curves={run_id: read_curve(run.folder) for run_id, run in runs.items()},
        comparison=comparison,
        agreement=agreement,
        truth=truth_section(records, {name: truth for name, run in runs.items() if (truth := read_truth(run.folder))}),
        failures=failures,
        pages=pages,
        folders={
            run_id: os.path.relpath(run.folder, place)
            for run_id, run in runs.items()
            if (run.folder / WEIGHTS_FILE).is_file()
        },
        headline=_headline(runs_in_order[0], place) if len(runs_in_order) == 1 else None,
    )


def _headline(run: Run, place: Path) -> PageHeadline:
    page = page_of(run)
    return PageHeadline(
        name=f"{run.record['run_id']}, {CONVERGED[run.record['converged']]}",
        figures=headline(run),
        weights=_address(run.folder / WEIGHTS_FILE, place),
        page=_address(page, place) if page else "",
        folder=json.dumps(Path(os.path.relpath(run.folder, place)).as_posix(), ensure_ascii=False),
    )


def _address(file: Path, place: Path) -> str:
    """Return the address of a file for a page in the folder `place`."""
    # Relative, so that the links hold when the folder is moved or served. Quoted, so that a name is never taken for
    # more than a path, such as a query or a fragment.
    return quote(Path(os.path.relpath(file, place)).as_posix())


def default_place(folders: Sequence[Path]) -> Path:
    """Return the folder that a report is written to unless another is named."""
    return folders[0] if len(folders) == 1 else Path(os.path.abspath(folders[0])).parent / POOLED_FOLDER
