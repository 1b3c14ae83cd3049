"""All results as one table, for other programs: results.csv and results.parquet."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from prolu.evaluation.comparison.frontiers import Record, family
from prolu.runtime.files import write_atomically

CSV_FILE, PARQUET_FILE = "results.csv", "results.parquet"


def write_tables(records: Sequence[Record], folder: Path) -> None:
    """One row a run, one column a field of any run, `family` first; lists are JSON text, what a run lacks is empty."""
    names = dict.fromkeys(name for record in records for name in record)
    columns: dict[str, list[Any]] = {"family": [family(record) for record in records]}
    columns |= {name: _alike([_plain(record.get(name)) for record in records]) for name in names}
    table = pa.table(columns)
    for file, write in ((CSV_FILE, csv.write_csv), (PARQUET_FILE, parquet.write_table)):
        content = io.BytesIO()
        write(table, content)
        write_atomically(folder / file, content.getvalue())


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def _alike(values: list[Any]) -> list[Any]:
    """Numbers and text in one column (a field that changed its kind between versions) become text."""
    kinds = {str if isinstance(v, str) else bool if isinstance(v, bool) else float for v in values if v is not None}
    return values if len(kinds) < 2 else [None if v is None else str(v) for v in values]
