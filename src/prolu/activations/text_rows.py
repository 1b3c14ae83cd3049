"""Rows of a dataset, wherever it lies: any split, any slice of it, read as they are asked for."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prolu.activations.resolving import name_of, plain_source, shards_of
from prolu.activations.shards import NoRow, Row, clipped


class SplitRows:
    """The rows of one split, or of a slice of it: of `builtin`, a file, a folder, a hub dataset or a dataset object."""

    def __init__(self, source: Any, split: str = "train", config: str = ""):
        """Find the files. None of them is read, unless a slice needs their numbers of rows.

        Args:
            source: where the rows are, as `load_blocks` takes it.
            split: a split's name, or a slice of it as the `datasets` library writes it: `train[0:40%]`,
                `train[90:95%]`, `train[1000:2000]`.
            config: the name of a configuration, where the source has several.

        Raises:
            ValueError: there is no such source, or it has no such configuration or split.
        """
        source = plain_source(source)
        self.source = name_of(source)
        self.config = config
        self.split = split
        # A split may have any name, such as `train-clean` or `validation.other`.
        written = re.fullmatch(r"([^\[\]]+)(\[[^\]]*\])?", split)
        if written is None:
            raise ValueError(f"split {split!r}: write a name, or a slice as in train[0:40%] or train[1000:2000]")
        self.name = written[1]
        self._shards = shards_of(source, config, self.name)
        self.start = 0
        self.stop = None  # without a slice: the end is wherever reading ends, so that nothing need be counted
        if written[2]:
            self.start, self.stop = self._range(written[2])

    def overlaps(self, other: "SplitRows") -> bool:
        """Return whether some row belongs to both."""
        if (self.source, self.name) != (other.source, other.name):
            # Two splits may be declared over the same file, or over two names of it.
            return not self._files().isdisjoint(other._files())
        start = max(self.start, other.start)
        stops = [rows.stop for rows in (self, other) if rows.stop is not None]
        return not stops or start < min(stops)

    def _files(self) -> set[str]:
        return {shard.place for shard in self._shards}

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
        """Yield the rows with the columns that are asked for; for a row that cannot be read, a `NoRow` with the reason.

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

    def _range(self, written: str) -> tuple[int, int]:
        from datasets import ReadInstruction

        n_rows = sum(shard.n_rows for shard in self._shards)
        try:
            (part,) = ReadInstruction.from_spec(f"train{written}").to_absolute({"train": n_rows})
        except ValueError as problem:
            raise ValueError(f"split {self.split!r}: {problem}") from None
        if part.from_ >= part.to:
            raise ValueError(f"split {self.split!r}: contains none of the {n_rows} rows")
        return part.from_, part.to
