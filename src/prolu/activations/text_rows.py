"""Rows of a dataset, wherever it lies: any split, any slice of it, read as they are asked for."""

import hashlib
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from prolu.activations.builtin import stdlib_documents

Row = dict[str, Any]
"""Columns of one row: texts as str, token ids as integer arrays."""

ROWS_AT_ONCE = 1000
"""Of a dataset at hand."""

KEY = "__key__"
"""Column that names a document for the split, where its source knows a better name than its content."""

SEPARATOR = "<|endoftext|>"
"""A line of its own between two documents of a .txt file."""

COMPRESSIONS = {".gz", ".zst", ".xz", ".bz2"}
BROKEN = (OSError, EOFError, zlib.error)
"""What reading a damaged or vanished file raises."""

NOT_DATA = {"dataset_info.json", "state.json", "dataset_dict.json"}
"""What `datasets` writes beside the rows."""


class Rows:
    """The rows of one split, or of a slice of it, of `builtin`, a file, a folder, a dataset on the hub or at hand."""

    def __init__(self, source: Any, split: str = "train"):
        """Finds the files; reads none, unless a slice needs their numbers of rows.

        Args:
            source: see `load_blocks`.
            split: a split's name, or a slice of it as the `datasets` library writes it: `train[0:40%]`,
                `train[90:95%]`, `train[1000:2000]`.

        Raises:
            ValueError: nothing there, or no such split.
        """
        self.source, self.split = name_of(source), split
        written = re.fullmatch(r"(\w+)(\[[^\]]*\])?", split)
        if written is None:
            raise ValueError(f"split {split!r}: write a name, or a slice as in train[0:40%] or train[1000:2000]")
        self.name = written[1]
        self._shards = _shards(source, self.name)
        self.start, self.stop = 0, None
        if written[2]:
            self.start, self.stop = self._range()

    def overlaps(self, other: "Rows") -> bool:
        """Whether a row belongs to both."""
        if (self.source, self.name) != (other.source, other.name):
            return False
        ends = [rows.stop for rows in (self, other) if rows.stop is not None]
        return max(self.start, other.start) < min(ends, default=self.start + other.start + 1)

    def fingerprint(self) -> str:
        """SHA-256 of the names and, on this disk, the sizes of the files: text that was changed has another.

        Of a dataset at hand, its own fingerprint is in its name; one that is iterated only has none.
        """
        files = [
            (shard.file, Path(shard.file).stat().st_size if Path(shard.file).is_file() else -1)
            for shard in self._shards
        ]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def __iter__(self) -> Iterator[Row]:
        if self.stop is None:
            for shard in self._shards:
                yield from shard.rows()
            return
        first = 0
        for shard in self._shards:
            low, high = max(self.start - first, 0), min(self.stop - first, shard.n_rows)
            if low < high:
                yield from shard.rows(low, high)
            first += shard.n_rows

    def _range(self) -> tuple[int, int]:
        from datasets import ReadInstruction

        n_rows = sum(shard.n_rows for shard in self._shards)
        try:
            (part,) = ReadInstruction.from_spec(self.split).to_absolute({self.name: n_rows})
        except ValueError as problem:
            raise ValueError(f"split {self.split!r}: {problem}") from None
        if part.from_ >= part.to:
            raise ValueError(f"split {self.split!r}: none of its {n_rows} rows")
        return part.from_, part.to


class _Shard(ABC):
    """One file of rows, local or on the hub."""

    def __init__(self, file: str):
        self.file = file
        self._n_rows: int | None = None

    @property
    def n_rows(self) -> int:
        """Counted once."""
        if self._n_rows is None:
            self._n_rows = self._count()
        return self._n_rows

    @abstractmethod
    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        """Rows low .. high - 1."""

    def _count(self) -> int:
        return sum(1 for _ in self.rows())

    def _open(self) -> Any:
        import fsspec

        return fsspec.open(self.file, "rb", compression="infer").open()  # pyright: ignore[reportAttributeAccessIssue]


class _Builtin(_Shard):
    """The interpreter's own standard library, a row per file."""

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        documents = ({KEY: key, "text": text} for key, text in stdlib_documents())
        return islice(documents, low, high)


class _AtHand(_Shard):
    """A `datasets` object: memory-mapped rows are read where they lie, streamed ones as they come."""

    def __init__(self, dataset: Any):
        super().__init__(name_of(dataset))
        self._dataset = dataset.with_format("arrow")

    def _count(self) -> int:
        return len(self._dataset) if hasattr(self._dataset, "__len__") else super()._count()

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        tables = (self._dataset.skip(low) if low else self._dataset).iter(batch_size=ROWS_AT_ONCE)
        rows = (row for table in tables for batch in table.to_batches() for row in _arrow_rows(batch))
        return rows if high is None else islice(rows, high - low)


class _Text(_Shard):
    """Documents between lines that hold `SEPARATOR` only; without one, passages."""

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        try:
            with self._open() as file:
                text = file.read().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise ValueError(f"data {self.file!r}: not UTF-8 text") from None
        except BROKEN as problem:
            raise _unreadable(self.file, _ending(self.file), problem) from None
        texts = text.split(f"\n{SEPARATOR}\n") if SEPARATOR in text else _passages(text)
        return islice(({"text": t} for t in texts if t.strip()), low, high)


def _passages(text: str, n_characters: int = 4000) -> Iterator[str]:
    """A text without separators as passages of about `n_characters`, cut where a line ends."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + n_characters)
        end = len(text) if newline < 0 else newline + 1
        yield text[start:end]
        start = end


class _JsonLines(_Shard):
    """One JSON object a line."""

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        return islice(self._all(), low, high)

    def _all(self) -> Iterator[Row]:
        number = 0
        try:
            with self._open() as lines:
                for number, line in enumerate(lines, 1):  # noqa: B007  # the error names it
                    if line.strip():
                        yield json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"data {self.file!r}: line {number} is not JSON") from None
        except BROKEN as problem:
            raise _unreadable(self.file, _ending(self.file), problem) from None


class _Parquet(_Shard):
    """Row groups before the first row asked for are not read."""

    def _count(self) -> int:
        with self._open() as file:
            return self._parquet(file).metadata.num_rows

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        with self._open() as file:
            parquet, first = self._parquet(file), 0
            for group in range(parquet.metadata.num_row_groups):
                n_rows = parquet.metadata.row_group(group).num_rows
                start, stop = max(low - first, 0), n_rows if high is None else min(high - first, n_rows)
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


class _Arrow(_Shard):
    """An Arrow file or stream, as `datasets` and others write it."""

    def _count(self) -> int:
        return sum(batch.num_rows for batch in self._batches())

    def rows(self, low: int = 0, high: int | None = None) -> Iterator[Row]:
        first = 0
        for batch in self._batches():
            start, stop = max(low - first, 0), batch.num_rows if high is None else min(high - first, batch.num_rows)
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
                except pyarrow.ArrowInvalid:
                    file.seek(0)
                    batches = iter(pyarrow.ipc.open_stream(file))
                yield from batches
            except (pyarrow.ArrowException, OSError) as problem:
                raise _unreadable(self.file, ".arrow", problem) from None


FILE_FORMATS: dict[str, type[_Shard]] = {
    ".txt": _Text,
    ".jsonl": _JsonLines,
    ".json": _JsonLines,
    ".parquet": _Parquet,
    ".arrow": _Arrow,
}
"""By the ending of a file's name; text and JSON may be compressed (.gz, .zst ...)."""


def _arrow_rows(batch: Any) -> Iterator[Row]:
    """Rows of a record batch; lists of integers come out as arrays, without a Python object per token."""
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


def name_of(source: Any) -> str:
    """What names a source of rows: itself, if it is a name or path, else the kind and fingerprint of a dataset."""
    if isinstance(source, str):
        return source
    kind = f"datasets.{type(source).__name__}"
    return f"{kind} {source._fingerprint}" if hasattr(source, "_fingerprint") else kind


def _shards(source: Any, split: str) -> list[_Shard]:
    if not isinstance(source, str):
        return [_AtHand(_at_hand(source, split))]
    path = Path(source)
    if source == "builtin":
        splits = {"train": [source]}
    elif path.is_file():
        splits = {"train": [str(path)]}
    elif path.is_dir():
        splits = _folder(path)
    else:
        splits = _hub(source)
    if not any(splits.values()):
        raise ValueError(f"data {source!r}: no file of a known kind; known: {', '.join(FILE_FORMATS)}")
    if split not in splits:
        raise ValueError(f"split {split!r}: {source} has {', '.join(splits)}")
    return [_Builtin(source)] if source == "builtin" else [_format(file)(file) for file in splits[split]]


def _at_hand(source: Any, split: str) -> Any:
    """The split of an object of the `datasets` library; one that has no splits is `train`."""
    from datasets import Dataset, IterableDataset

    splits = source if isinstance(source, dict) else {"train": source}
    if not splits or not all(isinstance(dataset, Dataset | IterableDataset) for dataset in splits.values()):
        raise ValueError(f"data: a {type(source).__name__}; pass a name, a path, or a dataset of the datasets library")
    if split not in splits:
        raise ValueError(f"split {split!r}: the {type(source).__name__} has {', '.join(map(str, splits))}")
    return splits[split]


def _format(file: str) -> type[_Shard]:
    kind = FILE_FORMATS.get(_ending(file))
    if kind is None:
        raise ValueError(f"data {file!r}: no file of a known kind; known: {', '.join(FILE_FORMATS)}")
    return kind


def _ending(file: str) -> str:
    name = Path(file)
    return Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix


def _folder(folder: Path) -> dict[str, list[str]]:
    """Files by split: by names such as train-00000.parquet or test/a.jsonl, as on the hub; others are `train`."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except (EmptyDatasetError, FileNotFoundError):
        return {}
    return _known({str(split): [str(file) for file in files] for split, files in found.items()})


def _hub(name: str) -> dict[str, list[str]]:
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(name).config.data_files
    except Exception as problem:  # the hub client raises many kinds; each means: not to be had
        reason = str(problem).split("\n")[0]
        raise ValueError(
            f"data {name!r}: neither a file, a folder, 'builtin', nor a dataset the hub gives ({reason})"
        ) from None
    return _known({str(split): [str(file) for file in some] for split, some in dict(files or {}).items()})  # pyright: ignore[reportArgumentType, reportCallIssue]


def _known(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    kept = {
        split: sorted(file for file in files if _ending(file) in FILE_FORMATS and Path(file).name not in NOT_DATA)
        for split, files in splits.items()
    }
    return {split: files for split, files in kept.items() if files}


def _unreadable(file: str, ending: str, problem: Exception) -> ValueError:
    reason = str(problem).split("\n")[0]
    return ValueError(f"data {file!r}: not a readable {ending} file ({reason})")
