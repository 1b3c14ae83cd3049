"""Rows of a dataset, wherever it lies: any split, any slice of it, read as they are asked for."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prolu.activations.arrow_files import DatasetObject
from prolu.activations.shards import NoRow, Row, Shard, clipped, ending_of
from prolu.activations.text_files import FILE_FORMATS, StandardLibrary, open_file
from prolu.runtime.files import first_line

NOT_DATA = {"dataset_info.json", "state.json", "dataset_dict.json"}
"""The names of files that `datasets` writes beside the rows."""


class Rows:
    """The rows of one split, or of a slice of it: of `builtin`, a file, a folder, a hub dataset or a dataset object."""

    def __init__(self, source: Any, split: str = "train"):
        """Find the files. None of them is read, unless a slice needs their numbers of rows.

        Args:
            source: where the rows are, as `load_blocks` takes it.
            split: a split's name, or a slice of it as the `datasets` library writes it: `train[0:40%]`,
                `train[90:95%]`, `train[1000:2000]`.

        Raises:
            ValueError: there is no such source, or it has no such split.
        """
        self.source = name_of(source)
        self.split = split
        written = re.fullmatch(r"(\w+)(\[[^\]]*\])?", split)
        if written is None:
            raise ValueError(f"split {split!r}: write a name, or a slice as in train[0:40%] or train[1000:2000]")
        self.name = written[1]
        self._shards = _shards(source, self.name)
        self.start = 0
        self.stop = None  # without a slice: the end is wherever reading ends, so that nothing need be counted
        if written[2]:
            self.start, self.stop = self._range()

    def overlaps(self, other: "Rows") -> bool:
        """Return whether some row belongs to both."""
        if (self.source, self.name) != (other.source, other.name):
            return False
        start = max(self.start, other.start)
        stops = [rows.stop for rows in (self, other) if rows.stop is not None]
        return not stops or start < min(stops)

    def fingerprint(self) -> str:
        """Return SHA-256 of the names and local sizes of the files, so that changed text has another fingerprint.

        A dataset object has its own fingerprint in its name; a streamed one has none.
        """
        files = [
            (shard.file, Path(shard.file).stat().st_size if Path(shard.file).is_file() else -1)
            for shard in self._shards
        ]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def read(self, columns: Sequence[str]) -> Iterator[Row | NoRow]:
        """Yield the rows with the columns that are asked for; what stands for a row that cannot be read says why.

        Args:
            columns: The columns that are needed, of which the first must be there.
        """
        if self.stop is None:
            for shard in self._shards:
                yield from shard.rows(columns)
            return
        first = 0
        for shard in self._shards:
            # Shards outside the slice are not opened: skipping to 90% of the Pile by reading would read 90% of it.
            start, stop = clipped(self.start, self.stop, first, shard.n_rows)
            first += shard.n_rows
            if start < stop:
                yield from shard.rows(columns, start, stop)

    def _range(self) -> tuple[int, int]:
        from datasets import ReadInstruction

        n_rows = sum(shard.n_rows for shard in self._shards)
        try:
            (part,) = ReadInstruction.from_spec(self.split).to_absolute({self.name: n_rows})
        except ValueError as problem:
            raise ValueError(f"split {self.split!r}: {problem}") from None
        if part.from_ >= part.to:
            raise ValueError(f"split {self.split!r}: contains none of the {n_rows} rows")
        return part.from_, part.to


def name_of(source: Any) -> str:
    """Return what names a source of rows: a name or path itself, or the kind and fingerprint of a dataset object."""
    if isinstance(source, str):
        return source
    kind = f"datasets.{type(source).__name__}"
    return f"{kind} {source._fingerprint}" if hasattr(source, "_fingerprint") else kind


def _shards(source: Any, split: str) -> list[Shard]:
    """Return the shards of a split of a source; the `datasets` library resolves names, patterns and splits."""
    if not isinstance(source, str):
        dataset = _split_of_object(source, split)
        return [DatasetObject(name_of(dataset), dataset)]
    if not source:
        # `Path("")` is the working directory, whose files nobody has asked for.
        raise ValueError("data '': must be a file, a folder, a dataset on the hub, or 'builtin'")
    path = Path(source)
    if source == "builtin":
        splits = {"train": [source]}
    elif path.is_file():
        splits = {"train": [str(path)]}
    elif path.is_dir():
        splits = _splits_of_folder(path)
    else:
        splits = _splits_on_hub(source)
    if not any(splits.values()):
        raise ValueError(f"data {source!r}: no file of a known kind; known: {', '.join(FILE_FORMATS)}")
    if split not in splits:
        raise ValueError(f"split {split!r}: {source} has {', '.join(splits)}")
    return [StandardLibrary(source)] if source == "builtin" else [open_file(file) for file in splits[split]]


def _split_of_object(source: Any, split: str) -> Any:
    """Return a split of an object of the `datasets` library; an object without splits is `train`."""
    from datasets import Dataset, IterableDataset

    splits = source if isinstance(source, dict) else {"train": source}
    if not splits or not all(isinstance(dataset, Dataset | IterableDataset) for dataset in splits.values()):
        raise ValueError(f"data: a {type(source).__name__}; pass a name, a path, or a dataset of the datasets library")
    if split not in splits:
        raise ValueError(f"split {split!r}: the {type(source).__name__} has {', '.join(map(str, splits))}")
    return splits[split]


def _splits_of_folder(folder: Path) -> dict[str, list[str]]:
    """Return the files of a folder by split.

    Names such as train-00000.parquet or test/a.jsonl tell the split, as they do on the hub; other files are `train`.
    """
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except (EmptyDatasetError, FileNotFoundError):
        return {}
    return _known_files(found)


def _splits_on_hub(name: str) -> dict[str, list[str]]:
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(name).config.data_files
    except Exception as problem:  # the hub client raises many kinds; each means that the dataset cannot be had
        reason = first_line(problem)
        raise ValueError(
            f"data {name!r}: neither a file, a folder, 'builtin', nor a dataset that the hub provides ({reason})"
        ) from None
    return _known_files(dict(files or {}))  # pyright: ignore[reportArgumentType, reportCallIssue]


def _known_files(found: Mapping[Any, Any]) -> dict[str, list[str]]:
    """Return the files of known formats by split, in the order of their names; splits without any are left out."""
    splits = {}
    for split, files in found.items():
        names = sorted(str(file) for file in files)
        known = [name for name in names if ending_of(name) in FILE_FORMATS and Path(name).name not in NOT_DATA]
        if known:
            splits[str(split)] = known
    return splits
