"""All results as one table for other programs: results.csv and results.parquet."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from prolu.evaluation.comparison.frontiers import Record, family
from prolu.runtime.files import json_text, write_atomically

CSV_FILE = "results.csv"
PARQUET_FILE = "results.parquet"


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
