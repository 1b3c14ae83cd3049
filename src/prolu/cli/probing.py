"""The command `probe`: figures of the latents of finished studies that take a text of their own to measure."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prolu.activations.language_model import LanguageModel
from prolu.activations.resolving import check_is_there
from prolu.activations.source import open_language_model
from prolu.cli.job import Job
from prolu.evaluation.comparison.points import points
from prolu.runtime.checks import at_least_1
from prolu.runtime.files import locked
from prolu.runtime.names import shown
from prolu.runtime.progress import Meter
from prolu.studies.added_figures import Measure, measure_runs
from prolu.studies.probing import letter_absorption, python_probes
from prolu.studies.results import Results

logger = logging.getLogger(__name__)

SHOWN = ("probe_mean_1", "probe_mean_5", "probe_mean_all", "probe_mean_acts", "absorption_fraction")
"""The figures that are printed; results.jsonl has more."""


def prepare_probing(folders: Sequence[Path], *, lm: str, data: str, text_column: str, n_characters: int) -> Job:
    """Check the request, and return the work.

    Args:
        folders: the folders of the studies.
        lm: where the language model is, if it has moved; else empty.
        data: another text than that of the studies; else empty.
        text_column: the column of that text.
        n_characters: the number of characters of Python source to probe on.

    Raises:
        ValueError: a folder holds no study of a language model, or its text cannot be probed.
    """
    if not folders:
        raise ValueError("studies: name at least one folder")
    if text_column and not data:
        raise ValueError("text_column: only with --data")
    if data:
        check_is_there(data)
    at_least_1("n_characters", n_characters)
    prepared = []
    for results in map(Results.load, folders):
        with locked(results.folder):  # nothing is in training there, which would keep what is found from being written
            stream = _stream(results, lm, data, text_column)
        opened = open_language_model(stream, described_by=f"the study {results.folder}")
        prepared.append((results, _measures(stream, opened, n_characters)))

    def job() -> None:
        for results, measures in prepared:
            with Meter("probing", len(results.runs)) as meter:
                measure_runs(results.runs, measures, meter.advance)
            print("\n".join(_table(Results.load(results.folder))))

    return [job]


def _measures(stream: Mapping[str, Any], lm: LanguageModel, n_characters: int) -> list[Measure]:
    """Return what can be measured of the SAEs of a study, and say why the rest cannot be.

    Raises:
        ValueError: nothing can be.
    """
    makers: list[Callable[[], Measure]] = [
        lambda: python_probes(stream, lm, n_characters),
        lambda: letter_absorption(lm),
    ]
    found = []
    reasons = []
    for make in makers:
        try:
            found.append(make())
        except ValueError as problem:
            reasons.append(str(problem))
    if not found:
        raise ValueError("; ".join(reasons))
    for reason in reasons:
        logger.info("left out: %s", reason)
    return found


def _stream(results: Results, lm: str, data: str, text_column: str) -> Mapping[str, Any]:
    """Return the description of a study's stream, with what the options replace in it."""
    stream: dict[str, Any] = dict(results.config["stream"])
    if "rows" in stream:
        raise ValueError(f"{results.folder}: was trained on rows that come from no language model, and has no text")
    if lm:
        stream["lm"] = lm
    if data:
        of_one_text = {"text_column": text_column or "text", "data_config": "", "split": "train", "eval_split": ""}
        stream |= {"data": data} | of_one_text
    return stream


def _table(results: Results) -> list[str]:
    """Return the lines of a table of the settings of a study: means over seeds, with 95% intervals where there are."""
    records = results.records
    names = [name for name in SHOWN if all(record.get(name) is not None for record in records)]
    by_name = {name: points(records, y=name) for name in names}
    rows = [["", "L0", *names]]
    for place, point in enumerate(by_name[names[0]] if names else ()):
        cells = [_cell(by_name[name][place].y, by_name[name][place].y_half_width) for name in names]
        rows.append([shown(point.family), f"{point.x:.1f}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for head, *cells in rows:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{head:{widths[0]}}", *aligned]).rstrip())
    return lines


def _cell(mean: float, half_width: float) -> str:
    return f"{mean:.3f}" if math.isnan(half_width) else f"{mean:.3f} +- {half_width:.3f}"
