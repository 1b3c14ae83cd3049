"""Results and comparisons as tables for other programs: CSV and Parquet."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from prolu.evaluation.comparison.claims import FamilyComparison
from prolu.evaluation.comparison.frontiers import Record, family
from prolu.runtime.files import json_text, write_atomically

CSV_FILE = "results.csv"
PARQUET_FILE = "results.parquet"
VERDICTS_FILE = "verdicts.csv"
STANDINGS_FILE = "standings.csv"


def write_tables(records: Sequence[Record], folder: Path) -> None:
    """Write one row per run and one column per field that any run has, after a first column `family`.

    Lists become JSON text, and a field that a run lacks is left empty.
    """
    names = dict.fromkeys(name for record in records for name in record)  # a set with an order
    columns: dict[str, list[Any]] = {"family": [family(record) for record in records]}
    for name in names:
        columns[name] = _of_one_kind([_cell(record.get(name)) for record in records])
    table = pa.table(columns)
    for file, write in ((CSV_FILE, csv.write_csv), (PARQUET_FILE, parquet.write_table)):
        content = io.BytesIO()
        write(table, content)
        write_atomically(folder / file, content.getvalue())


def write_comparison(found: FamilyComparison, folder: Path) -> None:
    """Write verdicts.csv, a row per verdict in any metric, and standings.csv, a row per family, metric and L0.

    The columns are the fields of `Verdict` and `Standing`, with those that name what is compared first. What is not a
    finite number is left empty.
    """
    verdicts = [*found.verdicts, *found.others]
    first = ("metric", "challenger", "baseline", "l0")
    rows = [{name: getattr(v, name) for name in first} | v._asdict() | {"is_better": v.is_better} for v in verdicts]
    _write_rows(rows, folder / VERDICTS_FILE)
    first = ("metric", "family", "l0")
    _write_rows(
        [{name: getattr(s, name) for name in first} | s._asdict() for s in found.standings], folder / STANDINGS_FILE
    )


def _write_rows(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write rows of equal fields as CSV, or remove the file of an earlier report if there are none."""
    if not rows:
        file.unlink(missing_ok=True)
        return
    columns = {name: [_finite(_cell(row[name])) for row in rows] for name in rows[0]}
    content = io.BytesIO()
    csv.write_csv(pa.table(columns), content)
    write_atomically(file, content.getvalue())


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> Any:
    return json_text(value) if isinstance(value, list | tuple | dict) else value


def _of_one_kind(values: list[Any]) -> list[Any]:
    """Return the values as they are, or all as text if text, numbers and truth values are mixed.

    Columns of a table have one type, but a field may have changed its type between versions.
    """
    kinds = {_kind(value) for value in values if value is not None}
    return values if len(kinds) < 2 else [None if value is None else str(value) for value in values]


def _kind(value: Any) -> type:
    if isinstance(value, str):
        return str
    # bool before float: True is an int too, but Arrow does not put both into one column.
    return bool if isinstance(value, bool) else float
