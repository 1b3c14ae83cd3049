"""Readers of Arrow's formats: Parquet and Arrow files, and objects of the datasets library."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from prolu.activations.shards import NoRow, Row, Shard, clipped, lacking, unreadable

ROWS_AT_ONCE = 1000
"""The number of rows read at once from a dataset in memory."""


class DatasetObject(Shard):
    """An object of the `datasets` library, whose rows are in memory, memory-mapped or streamed."""

    def __init__(self, name: str, dataset: Any):
        super().__init__(name)
        self._dataset = dataset

    @property
    def place(self) -> str:
        """A text that two shards share only if they have the same rows, which a dataset's name does not ensure."""
        return f"object {id(self._dataset)}"

    def _count(self) -> int:
        return len(self._dataset) if hasattr(self._dataset, "__len__") else super()._count()

    def rows(self, columns: Sequence[str], low: int = 0, high: int | None = None) -> Iterator[Row | NoRow]:
        """Yield rows low .. high - 1; a streamed dataset is read only as far as they reach."""
        dataset = self._dataset
        known = dataset.column_names
        if known is not None:  # a streamed dataset may not know its columns before it is read
            # Rows that lack all columns asked for must still be counted.
            dataset = dataset.select_columns([name for name in columns if name in known] or known[:1])
        if low:
            dataset = dataset.skip(low)
        rows = _rows_by_table(dataset, columns) if _is_arrow(dataset) else iter(dataset.with_format(None))
        if known is not None and columns[0] not in known:
            rows = (lacking(known) for _ in rows)
        return rows if high is None else islice(rows, high - low)


def _is_arrow(dataset: Any) -> bool:
    """Return whether a dataset's rows lie in Arrow tables of one schema.

    Rows that a generator or a function makes are Python objects, and a column may change its type among them.
    """
    if hasattr(dataset, "__len__"):
        return True
    rows = getattr(dataset, "_ex_iterable", None)
    return dataset.features is not None and getattr(rows, "iter_arrow", None) is not None


def _rows_by_table(dataset: Any, columns: Sequence[str]) -> Iterator[Row | NoRow]:
    # Arrow tables give lists of token ids as arrays, without a Python object per token.
    for table in dataset.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        for batch in table.to_batches():
            yield from _batch_rows(batch, columns)


class ParquetFile(Shard):
    """A Parquet file, read one row group at a time; groups without a requested row are not read."""

    def _count(self) -> int:
        with self._open() as file:
            return self._parquet(file).metadata.num_rows  # from the footer: no row is read

    def rows(self, columns: Sequence[str], low: int = 0, high: int | None = None) -> Iterator[Row | NoRow]:
        """Yield rows low .. high - 1; other columns are not read from the disk."""
        import pyarrow

        with self._open() as file:
            parquet = self._parquet(file)
            names = parquet.schema_arrow.names
            wanted = [name for name in columns if name in names]
            first = 0
            for group in range(parquet.metadata.num_row_groups):
                n_rows = parquet.metadata.row_group(group).num_rows
                start, stop = clipped(low, high, first, n_rows)
                first += n_rows
                if start >= stop:
                    continue
                if columns[0] not in names:
                    yield from (lacking(names) for _ in range(start, stop))
                    continue
                try:
                    batches = parquet.iter_batches(row_groups=[group], columns=wanted)
                    yield from islice((row for batch in batches for row in _batch_rows(batch, columns)), start, stop)
                except (pyarrow.ArrowException, OSError) as problem:
                    raise unreadable(self.file, problem) from None

    def _parquet(self, file: Any) -> Any:
        import pyarrow
        from pyarrow import parquet

        try:
            return parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as problem:
            raise unreadable(self.file, problem) from None


class ArrowFile(Shard):
    """An Arrow file or an Arrow stream; `datasets` writes streams, other programs write files."""

    def _count(self) -> int:
        return sum(batch.num_rows for batch in self._batches())

    def rows(self, columns: Sequence[str], low: int = 0, high: int | None = None) -> Iterator[Row | NoRow]:
        """Yield rows low .. high - 1."""
        first = 0
        for batch in self._batches():
            start, stop = clipped(low, high, first, batch.num_rows)
            first += batch.num_rows
            if start < stop:
                yield from _batch_rows(batch.slice(start, stop - start), columns)

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
                raise unreadable(self.file, problem) from None


def _batch_rows(batch: Any, columns: Sequence[str]) -> Iterator[Row | NoRow]:
    """Yield the rows of a record batch, with the columns that are asked for."""
    names = batch.schema.names
    if columns[0] not in names:
        return (lacking(names) for _ in range(batch.num_rows))
    found = {name: _values(batch.column(names.index(name))) for name in columns if name in names}
    return (dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True))


def _values(column: Any) -> list[Any]:
    """Return the values of a column; lists of integers become arrays, without a Python object per token."""
    from pyarrow import types

    kind = column.type
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if is_list and (types.is_integer(kind.value_type) or types.is_boolean(kind.value_type)) and not column.null_count:
        values = column.flatten()
        if not values.null_count:  # a null among the ids would turn those of all rows into numbers with a fraction
            if types.is_fixed_size_list(kind):
                ends = np.arange(1, len(column) + 1) * kind.list_size
            else:
                ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
            return np.split(values.to_numpy(zero_copy_only=False), ends[:-1])
    return column.to_pylist()
