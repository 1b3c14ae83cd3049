"""Checks of everything that is read from a study's files: names are plain, numbers are numbers, and text is printable.
A study may have been downloaded. Its names become paths and links, and its text is shown in terminals and pages, so
they are checked where they are read, once for all code that uses them.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from prolu.evaluation.comparison.metric_catalog import METRICS
from prolu.runtime.files import read_json_lines
from prolu.runtime.names import check_inside, plain_name, shortened

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.jsonl"
CURVES_FILE = "metrics.jsonl"

CURVE_FIELDS = ("step", "tokens", "mse", "l0", "dead")
"""The fields of a training curve's lines that are read. All are numbers."""

SCORES = ("l0", "l1", "mse", "degradation")
"""The scores that every line of results has, by which runs are compared. Null stands for one that is not finite."""

OF_PREDICTIONS = ("degradation",)
"""Those among them that need a language model, and are null where the activations come from none."""

NUMBERS = METRICS.keys() | {"coeff", "target_l0", "d_sae", "n_tokens", "init_seed", "eval_tokens"}
"""The fields of results that are shown or compared as numbers: all metrics of the catalogue, and some settings. A
version may lack them, and what is not known of an SAE that another library trained is null."""

REPORTED = ("sqrt_l1", "dead_fraction", "eval_tokens")
"""Numbers that a report cannot do without."""

TEXTS = frozenset(["penalty", "unit", "freeze"])
"""Fields of results that are text, or null where they are not known."""

STREAM_TEXTS = ("lm", "lm_digest", "lm_dtype", "hook", "hook_out", "data", "data_digest")
"""Fields of a study's stream that are text."""

LARGEST_INTEGER = 2**63 - 1
"""The largest integer that the tables of results can hold."""


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a study's results, one per finished run; none if no run has finished.

    Raises:
        ValueError: a line is no JSON object, its `run_id` is not the plain name of a folder in the study, or a field
            has a value that cannot be shown or compared.
    """
    file = folder / RESULTS_FILE
    records = read_json_lines(file)
    check_records(file, records)
    return records


def check_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError for the first line of results that `read_records` would refuse."""
    for number, record in enumerate(records, 1):
        where = f"{file}: line {number}:"
        if "run_id" in record:
            check_inside(file.parent, plain_name(record["run_id"], f"{where} run_id"))
        for name, value in record.items():
            _check(where, plain_name(name, f"{where} the field"), value)


def _check(where: str, name: str, value: Any) -> None:
    """Raise ValueError unless a field of results has a value of its kind."""
    if name in NUMBERS or name in SCORES:
        kind, fits = "a number or null", value is None or is_number(value)
    elif name == "nonlinearity":
        kind, fits = "text", isinstance(value, str)
    elif name in TEXTS:
        kind, fits = "text or null", value is None or isinstance(value, str)
    elif name == "prefixes":
        kind, fits = "a list of scores, each with d_sae, l0 and degradation", _are_prefixes(value)
    elif name == "converged":
        kind, fits = "true, false or null", value is None or isinstance(value, bool)
    else:
        kind, fits = "a whole number of at most 64 bits", not isinstance(value, int) or is_number(int(value))
    if not fits:
        raise ValueError(f"{where} {name} is {shortened(value)}, but must be {kind}")
    check_printable(f"{where} {name}", value)


def _are_prefixes(value: Any) -> bool:
    """Return whether a value lists the scores of prefixes of a nested loss, all of them numbers."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        return False
    widths = [each.get("d_sae") for each in value]
    # Of rows that come from no language model, the CE increase is null.
    if not all("degradation" in each for each in value):
        return False
    needed = [each.get("l0") for each in value]
    numbers = [number for each in value for number in each.values() if number is not None]
    return all(type(n) is int and n > 0 for n in widths) and all(map(is_number, [*needed, *numbers]))


def scores_lacking(record: Mapping[str, Any]) -> str:
    """Return which scores of a run are not finite, as a reason for which it cannot be compared; empty if all are.

    A run on rows, which come from no language model, need not have scores of predictions.
    """
    names = [name for name in SCORES if has_predictions(record) or name not in OF_PREDICTIONS]
    lacking = [name for name in names if record.get(name) is None or not math.isfinite(record[name])]
    return f"not finite: {', '.join(lacking)}" if lacking else ""


def has_predictions(record: Mapping[str, Any]) -> bool:
    """Return whether a run was scored in a language model. Without one, even the clean cross-entropy is not known."""
    clean = record.get("ce_clean", 0.0)  # results of the first version may lack it
    return clean is not None and math.isfinite(clean)


def check_reported(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError unless every line of results has the numbers that a report shows of it."""
    for number, record in enumerate(records, 1):
        if lacking := [name for name in REPORTED if record.get(name) is None]:
            raise ValueError(f"{file}: line {number} lacks {', '.join(lacking)}, which a report shows")


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's training curve; none if it has none, as an SAE that was not trained here.

    Lines with a number that is not finite, which is null in the file, are left out with a warning.

    Raises:
        ValueError: a line is no JSON object, or lacks a number.
    """
    file = folder / CURVES_FILE
    return finite_rows(str(file), read_json_lines(file))


def finite_rows(where: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of a training curve, without those that have a number that is not finite.

    Args:
        where: what the lines are of, for messages.
        rows: the lines as they were read.

    Raises:
        ValueError: a line lacks a number.
    """
    for number, row in enumerate(rows, 1):
        for name in CURVE_FIELDS:
            value = row.get(name, "missing")
            if value is not None and not is_number(value):
                raise ValueError(f"{where}: line {number}: {name} is {shortened(row.get(name))}, but must be a number")
    finite = [dict(row) for row in rows if all(row[name] is not None for name in CURVE_FIELDS)]
    if n_left_out := len(rows) - len(finite):
        warn_once(f"{where}: {n_left_out} of {len(rows)} lines are left out; their numbers are not finite")
    return finite


@cache
def warn_once(sentence: str) -> None:
    """Warn of what is wrong in a file once per process, however often the file is read."""
    logger.warning(sentence)


def check_study(file: Path, study: Mapping[str, Any]) -> None:
    """Raise ValueError unless the config of a study has a stream and runs, of which all text can be shown."""
    if not {"stream", "runs"} <= study.keys():
        raise ValueError(f"{file}: not a study's config (needs 'stream' and 'runs')")
    stream = study["stream"]
    if not isinstance(stream, dict) or not isinstance(study["runs"], list):
        raise ValueError(f"{file}: not a study's config ('stream' must be an object, and 'runs' a list)")
    for name in STREAM_TEXTS:
        value = stream.get(name, "")
        # The text may lie in several files.
        parts = value if name == "data" and isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{file}: stream.{name} is {shortened(value)}, but must be text")
        for part in parts:
            check_printable(f"{file}: stream.{name}", part)
    if not is_number(stream.get("seed", 0)):
        raise ValueError(f"{file}: stream.seed is {shortened(stream['seed'])}, but must be a number")
    for name, value in stream.items():
        check_printable(f"{file}: stream.{name}", value)


def check_printable(where: str, value: Any) -> None:
    """Raise ValueError if a value is text with control characters, or others that are not printable."""
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{where} is {shortened(value)}, but must be printable text on one line")


def is_number(value: Any) -> bool:
    """Return whether a value that was read from JSON is a number, and not too large an integer."""
    # By type, because True is an int too.
    if type(value) is float:
        return math.isfinite(value)  # 1e999 is read as infinity
    return type(value) is int and abs(value) <= LARGEST_INTEGER
