"""Pages of latents and reports: the work of `report`, and the last part of every command that trains."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prolu.activations.token_blocks import TokenBlocks
from prolu.cli.job import DONE, FAILED, Job
from prolu.cli.options import LatentPageOptions
from prolu.studies.folder import failures, finished_runs
from prolu.studies.request import StudyRequest
from prolu.studies.results import Results, records_of

if TYPE_CHECKING:
    from prolu.report.latents.pages import LatentPages

logger = logging.getLogger(__name__)


def prepare_report(
    folders: Sequence[Path],
    out: Path | None,
    latents: LatentPageOptions,
    *,
    all_verdicts: bool = False,
    agreement: bool = False,
    metrics: Sequence[str] = (),
) -> Job:
    """Write the missing pages of latents, and draw the report of one study, or of several together."""
    from prolu.evaluation.comparison.metric_catalog import check_compared
    from prolu.report.writer import check_studies

    latents.check()
    for name in metrics:
        check_compared(name)
    if not folders:
        raise ValueError("studies: name at least one folder")
    found = [Results.load(folder) for folder in folders]
    latents.check_named([run.run_id for results in found for run in results.runs])
    # Both raise ValueError before anything is written.
    records_of(found)
    check_studies(found, out)
    todo = [work for results in found if (work := _page_work(results, latents))]

    def job() -> None:
        for work in todo:
            work()
        draw_report(found, out, all_verdicts=all_verdicts, agreement=agreement, metrics=metrics)

    return [job]


def draw_studies(requests: Sequence[StudyRequest], latents: LatentPageOptions, out: Path) -> int:
    """Write missing pages of latents, then a report of each study that has a finished run, and one of all together.

    Returns:
        The exit code, which says whether a run failed.
    """
    from prolu.report.latents.row_examples import RowExamples

    studies: list[Results] = []
    for request in requests:
        if not finished_runs(request.runs, request.out):
            continue
        results = Results.load(request.out)
        studies.append(results)
        blocks = request.stream.blocks
        if missing := (pages := _pages_of(results, latents)).missing():
            # The model and the text are open already, so they need not be read again from the study's description.
            if isinstance(blocks, TokenBlocks):
                pages.write(missing, request.stream.lm, blocks)
            else:
                pages.write_of_rows(missing, RowExamples.open(latents.labels, latents.images, blocks), blocks)
    # A study at one hook lies in `out` itself; at several hooks, each study has a folder of its own in `out`.
    if requests[0].out == out:
        draw_report(studies)
    else:
        draw_reports(studies, out)
    n_failed = 0
    for request in requests:
        for run_id, reason in failures(request.out).items():
            logger.warning("%s/%s failed (%s); the same command tries it again", request.out, run_id, reason)
            n_failed += 1
    return FAILED if n_failed else DONE


def _pages_of(results: Results, latents: LatentPageOptions) -> "LatentPages":
    from prolu.report.latents.pages import LatentPages

    return LatentPages(
        results,
        latents.latent_pages,
        latents.latent_tokens,
        latents.examples,
        labels=latents.labels,
        images=latents.images,
    )


def _page_work(results: Results, latents: LatentPageOptions) -> Callable[[], None] | None:
    """Return a function that writes the missing pages of a study; None if none is missing.

    Raises:
        ValueError: what the pages are made from cannot be opened.
    """
    pages = _pages_of(results, latents)
    stream = results.config["stream"]
    is_of_rows = "rows" in stream
    if not is_of_rows and (latents.labels or latents.images):
        raise ValueError(f"labels and images: {results.folder} is a study of text, whose pages show its tokens")
    if not (missing := pages.missing()):
        return None
    if not is_of_rows:
        lm, blocks = pages.open_source()
        return lambda: pages.write(missing, lm, blocks)
    try:
        examples, rows = pages.open_rows()
    except ValueError as problem:
        # Rows from arrays of a Python program are in no file. That is an error only if pages of latents were asked for.
        if latents.latent_pages != "frontier" or latents.labels or latents.images:
            raise
        logger.info("no pages of latents: %s", problem)
        return None
    return lambda: pages.write_of_rows(missing, examples, rows)


def draw_reports(studies: Sequence[Results], out: Path) -> None:
    """Draw each study's own report, and one of all of them in `out`."""
    from prolu.report.writer import write_report

    for results in studies:
        draw_report([results])
    print(f"all hooks: {write_report(studies, out, hooks_apart=True).page}")


def draw_report(
    studies: Sequence[Path | Results],
    out: Path | None = None,
    *,
    all_verdicts: bool = False,
    agreement: bool = False,
    metrics: Sequence[str] = (),
) -> None:
    """Write the report of one study, or of several together, and print its summary."""
    from prolu.report.terminal import print_summary
    from prolu.report.writer import write_report

    drawn = write_report(studies, out, agreement=agreement, metrics=metrics)
    print_summary(drawn, all_verdicts=all_verdicts)
