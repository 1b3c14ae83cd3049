"""Rows that come in batches, from a DataLoader or an iterator: they are read once, into memory or into files."""

import os
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.rows import Array
from prolu.runtime.files import remove


def as_arrays(side: str, rows: Any, keep: Path | None = None) -> Array | Sequence[Array]:
    """Return rows as arrays: arrays as they are, batches gathered into one, in the order in which they come.

    A stream reads rows by their numbers, in another order in every epoch, and again when a study is resumed. A
    DataLoader cannot return a row by its number, and an iterator gives each batch only once; so their batches are read
    once, before the stream begins.

    Args:
        side: what the rows are for, train or held_out, for messages and for the name of the file.
        rows: an array or tensor, several in a list or tuple; or batches, each an array or tensor [n, d_in] of
            floating-point numbers, or a tuple or list whose first item is one, as a DataLoader of (x, y) gives them.
        keep: the folder in which to keep batches, as `side`.npy, which is then mapped into memory and not read as a
            whole. A file that is there is used, and no batch is asked for. By default the rows are held in memory.

    Raises:
        ValueError: there are no batches, one of them is none of the above, or they differ in width or number format.
    """
    if isinstance(rows, np.ndarray | Tensor | Sequence):
        return rows
    if keep is None:
        # Copied, because an iterator may fill one buffer again and again.
        return torch.cat([piece.clone() for piece in _pieces(side, rows)])
    file = keep.expanduser() / f"{side}.npy"
    if not file.is_file():
        _write(file, _pieces(side, rows))
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _pieces(side: str, batches: Iterable[Any]) -> Iterator[Float[Tensor, "n d_in"]]:
    """Yield the rows of each batch, or raise ValueError for the first that cannot be used, or if there is none."""
    first: Tensor | None = None
    for number, batch in enumerate(batches):
        rows = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(rows, np.ndarray | Tensor) or rows.ndim != 2 or not rows.shape[1]:
            shape = getattr(rows, "shape", None)
            found = f"it is a {type(rows).__name__}" if shape is None else f"its shape is {list(shape)}"
            raise ValueError(
                f"{side}: batch {number} must be an array [n, d_in], or a tuple whose first item is one, but {found}"
            )
        rows = torch.as_tensor(rows).detach().cpu()
        first = rows if first is None else first
        if (rows.shape[1], rows.dtype) != (first.shape[1], first.dtype):
            raise ValueError(
                f"{side}: batch {number} has rows of {rows.shape[1]} {rows.dtype} numbers, and batch 0 of "
                f"{first.shape[1]} {first.dtype}; make them alike"
            )
        yield rows
    if first is None:
        raise ValueError(f"{side}: has no batches; an iterator that was read once before is empty")


def _write(file: Path, pieces: Iterable[Float[Tensor, "n d_in"]]) -> None:
    """Write rows to a .npy file, which has its name only once it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    shape = (0, 0)
    dtype = np.dtype(np.float32)
    try:
        with partial.open("wb") as out:
            for piece in pieces:
                # NumPy has no bf16; fp32 holds every number of it.
                rows = (piece.float() if piece.dtype == torch.bfloat16 else piece).numpy()
                if not shape[1]:
                    dtype = rows.dtype
                    out.write(_header(dtype, (0, rows.shape[1])))
                shape = (shape[0] + len(rows), rows.shape[1])
                out.write(np.ascontiguousarray(rows).data)
            # The number of rows is known only now. NumPy leaves room for a longer one in every header.
            out.seek(0)
            out.write(_header(dtype, shape))
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except BaseException:
        remove(partial)
        raise


def _header(dtype: np.dtype, shape: tuple[int, int]) -> bytes:
    """Return the header of a .npy file. Its length does not depend on the number of rows."""
    header = BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()
