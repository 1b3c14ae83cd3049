"""Readers of rows, one for each file format: any range of rows, read as it is asked for."""

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from prolu.activations.builtin import stdlib_documents
from prolu.runtime.files import first_line

Row = dict[str, Any]
"""The columns of one row: texts as str, token ids as integer arrays."""

KEY = "__key__"
"""The column that names a document for the split, where its source knows a better name than its content."""

ROWS_AT_ONCE = 1000
"""The number of rows read at once from a dataset in memory."""

SEPARATOR = "<|endoftext|>"
"""The line between two documents of a .txt file."""

PASSAGE_CHARACTERS = 4000
"""The length of the passages into which a .txt file without separators is cut."""

COMPRESSIONS = {".gz", ".zst", ".xz", ".bz2"}
"""The endings that may follow the ending of a text or JSON file."""

BROKEN = (OSError, EOFError, zlib.error)
"""The errors that reading a damaged or vanished file raises."""


class Shard(ABC):
    """One file of rows, local or on the hub, or what takes the place of a file."""

    def __init__(self, file: str):
        self.file = file
        self._n_rows: int | None = None

    @property
    def n_rows(self) -> int:
        """The number of rows; counted when it is first asked for, because some formats must be read for it."""
        if self._n_rows is None:
            self._n_rows = self._count()
        return self._n_rows

    @abstractmethod
    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        """Yield rows low .. high - 1, or all from `low` on."""

    def _count(self) -> int:
        return sum(1 for _ in self.rows())

    def _open(self) -> Any:
        import fsspec

        return fsspec.open(self.file, "rb", compression="infer").open()  # pyright: ignore[reportAttributeAccessIssue]


class StandardLibrary(Shard):
    """The source code of the interpreter's own standard library, one row per file."""

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        """Yield files low .. high - 1 in the order of their paths."""
        documents = ({KEY: key, "text": text} for key, text in stdlib_documents())
        return islice(documents, low, high)


class DatasetObject(Shard):
    """An object of the `datasets` library: memory-mapped rows are read where they lie, streamed ones as they come."""

    def __init__(self, name: str, dataset: Any):
        super().__init__(name)
        # Arrow batches give lists of token ids as arrays, without a Python object per token.
        self._dataset = dataset.with_format("arrow")

    def _count(self) -> int:
        return len(self._dataset) if hasattr(self._dataset, "__len__") else super()._count()

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        """Yield rows low .. high - 1; a streamed dataset is read only as far as they reach."""
        tables = (self._dataset.skip(low) if low else self._dataset).iter(batch_size=ROWS_AT_ONCE)
        rows = (row for table in tables for batch in table.to_batches() for row in _arrow_rows(batch))
        return rows if high is None else islice(rows, high - low)


class _TextFile(Shard):
    """A text file: documents between lines that hold `SEPARATOR` only, or passages if there is no such line."""

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        try:
            with self._open() as file:
                text = file.read().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise ValueError(f"data {self.file!r}: not UTF-8 text") from None
        except BROKEN as problem:
            raise _unreadable(self.file, ending_of(self.file), problem) from None
        texts = text.split(f"\n{SEPARATOR}\n") if SEPARATOR in text else _passages(text)
        return islice(({"text": t} for t in texts if t.strip()), low, high)


def _passages(text: str) -> Iterator[str]:
    """Yield a text in passages of about `PASSAGE_CHARACTERS`, cut at the ends of lines."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + PASSAGE_CHARACTERS)
        end = len(text) if newline < 0 else newline + 1
        yield text[start:end]
        start = end


class _JsonLinesFile(Shard):
    """A file with one JSON object per line."""

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        return islice(self._all(), low, high)

    def _all(self) -> Iterator[Row]:
        number = 0
        try:
            with self._open() as lines:
                for number, line in enumerate(lines, 1):  # noqa: B007  # the error message names it
                    if line.strip():
                        yield json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"data {self.file!r}: line {number} is not JSON") from None
        except BROKEN as problem:
            raise _unreadable(self.file, ending_of(self.file), problem) from None


class _ParquetFile(Shard):
    """A Parquet file, read one row group at a time; groups without a requested row are not read."""

    def _count(self) -> int:
        with self._open() as file:
            return self._parquet(file).metadata.num_rows  # from the footer: no row is read

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        with self._open() as file:
            parquet = self._parquet(file)
            first = 0
            for group in range(parquet.metadata.num_row_groups):
                n_rows = parquet.metadata.row_group(group).num_rows
                start, stop = clipped(low, high, first, n_rows)
                first += n_rows
                if start < stop:
                    batches = parquet.iter_batches(row_groups=[group])
                    yield from islice((row for batch in batches for row in _arrow_rows(batch)), start, stop)

    def _parquet(self, file: Any) -> Any:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as problem:
            raise _unreadable(self.file, ".parquet", problem) from None


class _ArrowFile(Shard):
    """An Arrow file or an Arrow stream; `datasets` writes streams, other programs write files."""

    def _count(self) -> int:
        return sum(batch.num_rows for batch in self._batches())

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        first = 0
        for batch in self._batches():
            start, stop = clipped(low, high, first, batch.num_rows)
            first += batch.num_rows
            if start < stop:
                yield from _arrow_rows(batch.slice(start, stop - start))

    def _batches(self) -> Iterator[Any]:
        import pyarrow

        with self._open() as file:
            try:
                try:
                    reader = pyarrow.ipc.open_file(file)
                    batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                except pyarrow.ArrowInvalid:  # no footer, so it can only be a stream
                    file.seek(0)
                    batches = iter(pyarrow.ipc.open_stream(file))
                yield from batches
            except (pyarrow.ArrowException, OSError) as problem:
                raise _unreadable(self.file, ".arrow", problem) from None


FILE_FORMATS: dict[str, type[Shard]] = {
    ".txt": _TextFile,
    ".jsonl": _JsonLinesFile,
    ".json": _JsonLinesFile,
    ".parquet": _ParquetFile,
    ".arrow": _ArrowFile,
}
"""The readers by the ending of a file's name; text and JSON may be compressed (.gz, .zst ...)."""


def open_file(file: str) -> Shard:
    """Return the reader of a file, local or on the hub.

    Raises:
        ValueError: its format is not known.
    """
    kind = FILE_FORMATS.get(ending_of(file))
    if kind is None:
        raise ValueError(f"data {file!r}: no file of a known kind; known: {', '.join(FILE_FORMATS)}")
    return kind(file)


def ending_of(file: str) -> str:
    """Return the ending that tells a file's format: `.jsonl` of `a.jsonl.gz`."""
    name = Path(file)
    return Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix


def clipped(low: int, high: int | None, first: int, n_rows: int) -> tuple[int, int]:
    """Return which of the `n_rows` rows from row `first` on are among rows low .. high - 1, counted from `first`.

    The range is empty (its start is not below its stop) if none are.
    """
    start = max(low - first, 0)
    stop = n_rows if high is None else min(high - first, n_rows)
    return start, stop


def _arrow_rows(batch: Any) -> Iterator[Row]:
    """Return the rows of a record batch; lists of integers become arrays, without a Python object per token."""
    from pyarrow import types

    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        is_list = types.is_list(column.type) or types.is_large_list(column.type)
        if is_list and types.is_integer(column.type.value_type) and not column.null_count:
            values = column.flatten().to_numpy(zero_copy_only=False)
            ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
            columns[name] = np.split(values, ends[:-1])
        else:
            columns[name] = column.to_pylist()
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _unreadable(file: str, ending: str, problem: Exception) -> ValueError:
    reason = first_line(problem)
    return ValueError(f"data {file!r}: not a readable {ending} file ({reason})")
