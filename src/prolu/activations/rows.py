"""Rows of activations that come from no language model: arrays, tensors, and whatever else gives rows by number.

A stream reads blocks of several positions from a source of activations. Rows are also given to it as blocks: those of
an array have one row each, and those of rows that are computed in groups have several. So a stream of rows has the same
windows, batches and seeds as a stream of text.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.harvesting import ActivationSource, Piece
from prolu.activations.language_model import DTYPES
from prolu.runtime.rng import keyed_generator

ROW_DTYPES = DTYPES | {"fp64": torch.float64}
"""The number formats that rows may have. Windows hold them in fp32."""

ROWS_PER_PASS = 8192
"""The number of rows that are read at once. The candidates for resampling come in whole passes."""

Array = np.ndarray | Tensor


@runtime_checkable
class RowBlocks(Protocol):
    """Rows in blocks of equal length, which are read by their numbers; the same numbers always give the same rows."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of blocks, the number of rows in each, and their width."""
        ...

    def __len__(self) -> int:
        """Return the number of blocks."""
        ...

    def __getitem__(self, chosen: np.ndarray, /) -> Float[Tensor, "n ctx d_in"]:
        """Return the rows of some blocks, in the order of their numbers."""
        ...


@runtime_checkable
class KnownFeatures(Protocol):
    """The features that held-out rows are made of, where they are known: x = sum_i c_i v_i + noise."""

    @property
    def directions(self) -> Float[Tensor, "n_features d_in"]:
        """The unit vector v_i of each feature."""
        ...

    def codes(self, chosen: np.ndarray, /) -> Float[Tensor, "n ctx n_features"]:
        """Return the codes c of the rows of some blocks, at least 0, in the order of the blocks' numbers."""
        ...


class RowArrays(RowBlocks):
    """The rows of one or several arrays, one after the other, as blocks of one row."""

    def __init__(self, parts: Sequence[Array], numbers: np.ndarray | None = None):
        """Take arrays, [n, d_in] each, without copying them.

        Args:
            parts: the arrays, all of one width and number format.
            numbers: the rows to take, counted through all parts; all of them by default.
        """
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self._numbers = numbers

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of rows, 1, and their width."""
        n = self._starts[-1] if self._numbers is None else len(self._numbers)
        return int(n), 1, self._parts[0].shape[1]

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    @property
    def n_in_files(self) -> int:
        """The number of rows in all arrays, of which these are some."""
        return int(self._starts[-1])

    def numbers_in_files(self, chosen: np.ndarray) -> np.ndarray:
        """Return the numbers that some of the rows have in the arrays, counted through all of them."""
        return chosen if self._numbers is None else self._numbers[chosen]

    def __getitem__(self, chosen: np.ndarray, /) -> Float[Tensor, "n 1 d_in"]:
        """Return some of the rows, in the order of their numbers."""
        numbers = self.numbers_in_files(chosen)
        if len(self._parts) == 1:
            return _rows_of(self._parts[0], numbers)[:, None]
        of_part = np.searchsorted(self._starts, numbers, side="right") - 1
        found = torch.empty(len(numbers), self.shape[2], dtype=_rows_of(self._parts[0], numbers[:0]).dtype)
        for i in np.unique(of_part):
            here = of_part == i
            found[torch.from_numpy(here)] = _rows_of(self._parts[i], numbers[here] - self._starts[i])
        return found[:, None]


def _rows_of(part: Array, numbers: np.ndarray) -> Float[Tensor, "n d_in"]:
    if isinstance(part, Tensor):
        return part[torch.from_numpy(numbers).to(part.device)].cpu()
    return torch.from_numpy(part[numbers])


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationRows:
    """Rows to train on and rows to score on: what a stream reads where there is no language model."""

    train: RowBlocks
    """The rows that SAEs train on."""
    held_out: RowBlocks
    """The rows that SAEs are scored on, and never trained on."""
    source: str
    """What the rows are called, or the path that they came from."""
    dtype: str
    """The number format of the rows, one of `ROW_DTYPES`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For rows that are computed and not read from files, all settings that decide them. The digest of such rows is
    taken of these settings, without computing the rows."""
    truth: KnownFeatures | None = None
    """The features that the held-out rows are made of, where they are known."""

    kind = "data"
    """The word for the data in messages; for token blocks it is "text"."""
    unit = "row"
    """The word for one position in messages; for token blocks it is "token"."""
    held_out_pool = 0
    """As in token blocks; the rows that are scored are chosen among all that are held out."""
    n_documents = None
    """As in token blocks; of rows it is not known which belong together."""
    n_rows_left_out = 0
    """As in token blocks; rows that cannot be used are refused instead."""
    n_tokens_dropped = 0
    """As in token blocks; a block of rows is whole."""

    @property
    def ctx(self) -> int:
        """The number of rows per block."""
        return self.train.shape[1]

    @property
    def d_in(self) -> int:
        """The width of the rows."""
        return self.train.shape[2]

    @property
    def n_train_tokens(self) -> int:
        """The number of rows to train on."""
        return self.train.shape[0] * self.ctx

    @property
    def n_held_out_tokens(self) -> int:
        """The number of rows that are held out."""
        return self.held_out.shape[0] * self.ctx

    def digest(self) -> str:
        """Return SHA-256 of all rows, or of what they are made by; it names the data of a study."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        if self.facts:
            made_by = (sorted(self.facts.items()), self.train.shape, self.held_out.shape)
            return hashlib.sha256(repr(made_by).encode()).hexdigest()
        total = hashlib.sha256(self.dtype.encode())
        for rows in (self.train, self.held_out):
            _add_rows(total, rows, np.arange(len(rows)))
        return total.hexdigest()

    def digest_of_held_out(self, chosen: np.ndarray) -> str:
        """Return SHA-256 of some blocks of held-out rows."""
        total = hashlib.sha256(self.dtype.encode())
        _add_rows(total, self.held_out, chosen)
        return total.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return everything that decides the rows, for a study's config.json."""
        return {
            "data": self.source,
            **self.facts,
            "data_digest": self.digest(),
            "rows": self.n_train_tokens,
            "held_out_rows": self.n_held_out_tokens,
            "ctx": self.ctx,
        }


def _add_rows(total: Any, rows: RowBlocks, chosen: np.ndarray) -> None:
    """Add the shape and the values of some blocks to a digest."""
    total.update(repr((len(chosen), *rows.shape[1:])).encode())
    for piece in in_passes(chosen, rows.shape[1]):
        total.update(rows[piece].contiguous().view(torch.uint8).numpy().data)


def in_passes(chosen: np.ndarray, ctx: int) -> Iterator[np.ndarray]:
    """Yield the numbers of blocks in groups of about `ROWS_PER_PASS` rows."""
    n = max(1, ROWS_PER_PASS // ctx)
    for start in range(0, len(chosen), n):
        yield chosen[start : start + n]


class RowSource(ActivationSource):
    """Rows as the source of a stream's activations."""

    def __init__(self, rows: ActivationRows):
        self._rows = rows
        self.dtype = rows.dtype

    def at(self, hook: str, chosen: np.ndarray) -> Iterator[Piece]:
        """Yield the rows of these blocks, in this order. There is no hook at which they are read."""
        for piece in in_passes(chosen, self._rows.ctx):
            yield self._rows.train[piece]

    def check(self, facts: dict[str, Any]) -> None:
        """Raise ValueError unless these are the rows that `facts` describe."""
        if facts["data_digest"] != self._rows.digest():
            raise ValueError("source: has other rows than the stream")


def rows_of_arrays(
    train: Array | Sequence[Array],
    held_out: Array | Sequence[Array] | None = None,
    *,
    held_out_fraction: float = 0.1,
    name: str = "rows",
) -> ActivationRows:
    """Return the rows of arrays, once it is known that all of their numbers are finite. Nothing is copied.

    Args:
        train: the rows to train on, an array or tensor [n, d_in] of floating-point numbers, or several such.
        held_out: the rows to score on, likewise; by default some of `train`, chosen at random by their number alone.
        held_out_fraction: the fraction of `train` that is held out where `held_out` is not given.
        name: what the rows are called in config.json and reports.

    Raises:
        ValueError: an array is empty, has another shape or number format than the first, or holds a number that is not
            finite; or the fraction leaves no row on one of the two sides.
    """
    parts = _checked("train", train)
    dtype, d_in = _dtype_name(parts[0]), parts[0].shape[1]
    if held_out is not None:
        others = _checked("held_out", held_out)
        if (found := (_dtype_name(others[0]), others[0].shape[1])) != (dtype, d_in):
            raise ValueError(f"held_out: has {found[0]} rows of width {found[1]}, and train {dtype} ones of {d_in}")
        return ActivationRows(train=RowArrays(parts), held_out=RowArrays(others), source=name, dtype=dtype)
    n = sum(map(len, parts))
    n_held_out = round(held_out_fraction * n)
    if not 0 < n_held_out < n:
        raise ValueError(f"held_out_fraction {held_out_fraction}: leaves {n_held_out} of {n} rows to score on")
    # At random, because rows that lie together are often alike: those of one class, or of one recording.
    order = torch.randperm(n, generator=keyed_generator("held-out rows", n)).numpy()
    chosen = [np.sort(some) for some in (order[n_held_out:], order[:n_held_out])]
    return ActivationRows(
        train=RowArrays(parts, chosen[0]), held_out=RowArrays(parts, chosen[1]), source=name, dtype=dtype
    )


def _checked(side: str, arrays: Array | Sequence[Array]) -> list[Array]:
    """Return arrays of rows as a list, or raise ValueError for the first that cannot be used."""
    parts = [arrays] if isinstance(arrays, np.ndarray | Tensor) else list(arrays)
    if not parts:
        raise ValueError(f"{side}: has no arrays")
    parts = [part.detach() if isinstance(part, Tensor) else np.asarray(part) for part in parts]
    for part in parts:
        if part.ndim != 2 or not part.shape[0] or not part.shape[1]:
            shape = list(part.shape)
            raise ValueError(f"{side}: must be an array [n_rows, d_in] with at least one row, but its shape is {shape}")
        if _dtype_name(part) not in ROW_DTYPES:
            formats = ", ".join(ROW_DTYPES)
            raise ValueError(f"{side}: its numbers are {part.dtype}; convert them to one of {formats}")
        if (part.shape[1], _dtype_name(part)) != (parts[0].shape[1], _dtype_name(parts[0])):
            raise ValueError(f"{side}: its arrays differ in width or number format; make them alike")
        _check_finite(side, part)
    return parts


def _check_finite(side: str, part: Array) -> None:
    for start in range(0, len(part), ROWS_PER_PASS):
        piece = part[start : start + ROWS_PER_PASS]
        finite = piece.isfinite().all(1).cpu().numpy() if isinstance(piece, Tensor) else np.isfinite(piece).all(1)
        if not finite.all():
            raise ValueError(f"{side}: row {start + int(finite.argmin())} holds a number that is not finite")


def _dtype_name(part: Array) -> str:
    if isinstance(part, Tensor):
        dtype = part.dtype
    else:
        # PyTorch reads arrays of this machine's byte order only.
        dtype = getattr(torch, part.dtype.name, None) if part.dtype.isnative else None
    return next((name for name, known in ROW_DTYPES.items() if known == dtype), str(part.dtype))
