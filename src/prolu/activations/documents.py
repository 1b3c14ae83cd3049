"""Documents: the texts, or rows of token ids, of a split, and on which side of the held-out split each one falls."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from prolu.activations.text_files import KEY
from prolu.activations.text_rows import Rows

HELD_OUT_FRACTION = 0.1
"""The fraction of documents that are held out for evaluation."""


class Document(NamedTuple):
    """One text, or one row of token ids."""

    key: str | bytes
    """What decides on which side of the split the document falls."""
    content: str | np.ndarray


def is_held_out(key: str | bytes, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Return whether a document is held out for evaluation.

    The hash of its key decides, so a document is on the same side in every corpus and in every order.
    """
    name = key.encode() if isinstance(key, str) else key
    # The first 8 bytes of the hash are a uniform random number below 2^64.
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") < fraction * 2**64


def read_documents(rows: Rows, column: str) -> Iterator[Document]:
    """Yield the documents in a column of rows; rows without text are left out.

    Raises:
        ValueError: a row has neither text nor token ids there.
    """
    for row in rows:
        content = row.get(column) if isinstance(row, dict) else None
        if isinstance(content, str):
            if content.strip():
                yield Document(row.get(KEY, content), content)
        elif (tokens := _token_ids(content)) is not None:
            yield Document(tokens.tobytes(), tokens)
        else:
            columns = ", ".join(row) if isinstance(row, dict) else "none"
            raise ValueError(f"data {rows.source!r}: no text or token ids in column {column!r}; columns: {columns}")


def _token_ids(content: Any) -> np.ndarray | None:
    if not isinstance(content, np.ndarray | list):
        return None
    ids = np.asarray(content)
    return ids if ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) else None
