"""A shard: one file of rows, or what takes the place of a file; only the columns asked for are read."""

import io
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prolu.runtime.files import first_line

Row = dict[str, Any]
"""The columns of one row: texts as str, token ids as integer arrays."""

KEY = "__key__"
"""The column of the names of documents. Where there is one, a document's name and not its content decides whether it is
held out."""

COMPRESSIONS = {".gz", ".zst", ".xz", ".bz2"}
"""The endings that may follow the ending of a text or JSON file."""

BROKEN = (OSError, EOFError, zlib.error)
"""The errors that reading a damaged or vanished file raises."""


class NoRow(NamedTuple):
    """Stands for a row that cannot be read, or that lacks the column that was asked for."""

    reason: str
    """What is wrong, to be shown to the user."""


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

    @property
    def place(self) -> str:
        """A text that two shards share if they have the same rows, even if their names differ."""
        return os.path.realpath(self.file)

    @abstractmethod
    def rows(self, columns: Sequence[str], low: int = 0, high: int | None = None) -> Iterator[Row | NoRow]:
        """Yield rows low .. high - 1, or all from `low` on.

        Args:
            columns: The columns that are needed. The first must be there, the others may be missing. A row may hold
                more, if leaving them out would cost more than keeping them.
            low: The first row.
            high: The row behind the last one; None for the end.
        """

    def _count(self) -> int:
        return sum(1 for _ in self.rows([KEY]))

    def _open(self) -> Any:
        import fsspec

        if Path(self.file).suffix.lower() == ".zst":
            return self._open_zstandard()
        try:
            return fsspec.open(self.file, "rb", compression="infer").open()  # pyright: ignore[reportAttributeAccessIssue]
        except ValueError as problem:  # a Python that was built without one of its decoders
            raise ValueError(f"data {self.file!r}: cannot be decompressed here ({first_line(problem)})") from None

    def _open_zstandard(self) -> Any:
        """Return the decompressed content of a .zst file; of all its frames, since large files have many."""
        import fsspec
        import pyarrow

        # Arrow brings its own decoder, whereas fsspec needs a package that is not among the dependencies.
        compressed = fsspec.open(self.file, "rb").open()  # pyright: ignore[reportAttributeAccessIssue]
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(compressed, mode="r"), "zstd"))


def ending_of(file: str) -> str:
    """Return the ending that tells a file's format: `.jsonl` of `a.jsonl.gz`."""
    name = Path(file)
    suffix = name.suffix.lower()
    return Path(name.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def clipped(low: int, high: int | None, first: int, n_rows: int) -> tuple[int, int]:
    """Return which of the `n_rows` rows from row `first` on are among rows low .. high - 1, counted from `first`.

    The range is empty (its start is not below its stop) if none are.
    """
    start = max(low - first, 0)
    stop = n_rows if high is None else min(high - first, n_rows)
    return start, stop


def lacking(columns: Sequence[str]) -> NoRow:
    """Return what stands for a row that has these columns, but not the one that was asked for."""
    return NoRow(f"columns: {', '.join(map(str, columns)) or 'none'}")


def unreadable(file: str, problem: Exception) -> ValueError:
    """Return the error that a damaged file raises."""
    return ValueError(f"data {file!r}: not a readable {ending_of(file)} file ({first_line(problem)})")
