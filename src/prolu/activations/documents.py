"""Documents: the texts, or rows of token ids, of a split, and on which side of the held-out split each one falls."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prolu.activations.chats import Chat, ChatTemplate, NotAChatError, is_chat, key_of
from prolu.activations.shards import KEY, NoRow, Row
from prolu.activations.text_rows import SplitRows

HELD_OUT_FRACTION = 0.1
"""The fraction of documents that are held out for evaluation."""

ROWS_BEFORE_GIVING_UP = 10_000
"""The number of rows without any text after which no more are read."""

UNLABELLED = -100
"""The number that stands in columns of labels where a model is not trained to predict; PyTorch's losses ignore it."""

FIRST_PADDING_CHECK = 64
"""The number of rows of token ids after which padding is first looked for: the documents of the first batch, so that
nothing has been written yet. It is looked for again whenever the number has doubled."""

FEWEST_PADDED_ROWS = 4
"""The number of rows below which nothing can be said about padding."""


class Document(NamedTuple):
    """One text, one chat, or one row of token ids."""

    key: str | bytes
    """What decides on which side of the split the document falls."""
    content: str | Chat | np.ndarray


def is_held_out(key: str | bytes, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Return whether a document is held out for evaluation.

    The hash of its key decides, so a document is on the same side in every corpus and in every order.
    """
    name = key.encode() if isinstance(key, str) else key
    # The first 8 bytes of the hash are a uniform random number below 2^64.
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") < fraction * 2**64


class Documents:
    """The documents in a column of rows; rows without text are left out, and counted.

    A row of token ids may have a mask beside it, which is 0 at padding: what it masks is cut off.
    """

    def __init__(self, rows: SplitRows, column: str, template: ChatTemplate | None = None):
        """Prepare to read a column.

        Args:
            rows: The rows of a split.
            column: The column that holds texts or token ids. The mask of `input_ids` is `attention_mask`, that of
                `chosen_input_ids` is `chosen_attention_mask`, and that of any other column is `attention_mask`.
            template: What turns chats into texts; without it there may be none.
        """
        self._template = template
        self.rows = rows
        self.column = column
        self._mask = column.replace("input_ids", "attention_mask") if "input_ids" in column else "attention_mask"
        self.n_rows = 0
        """The number of rows read so far."""
        self.n_left_out = 0
        """The number of rows among them that had no text and no token ids."""
        self.first_reason = ""
        """Why the first of these was left out."""
        self._kind = ""  # of the rows so far: texts or token ids

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            ValueError: no row has text or token ids, or the rows of ids are padded and no mask says where.
        """
        self.n_rows = 0
        self.n_left_out = 0
        self._kind = ""
        padding = _PaddingCheck(self.rows.source, self._mask)
        found = False
        for row in self.rows.read([self.column, self._mask, KEY]):
            self.n_rows += 1
            document = row if isinstance(row, NoRow) else self._document(row, padding)
            if isinstance(document, Document):
                found = True
                yield document
            else:
                self._leave_out(document, found)
        padding.check()
        if self.n_left_out and not found:
            raise self._no_text()

    def _leave_out(self, row: NoRow, found: bool) -> None:
        if not self.n_left_out:
            self.first_reason = row.reason
        self.n_left_out += 1
        if self.n_left_out >= ROWS_BEFORE_GIVING_UP and not found:
            raise self._no_text()

    def _no_text(self) -> ValueError:
        return ValueError(
            f"data {self.rows.source!r}: no text or token ids in column {self.column!r}; {self.first_reason}"
        )

    def _document(self, row: Row, padding: "_PaddingCheck") -> Document | NoRow:
        """Return the document of a row, or why it has none."""
        if self.column not in row:
            return NoRow(f"columns: {', '.join(map(str, row))}")
        content = row[self.column]
        if isinstance(content, str):
            self._check_kind("texts")
            key = row.get(KEY)
            return _text(content, key if isinstance(key, str) else content)
        if self._template is not None and is_chat(content):
            self._check_kind("chats")
            return _chat(content, self._template)
        return self._of_ids(content, row.get(self._mask), padding)

    def _of_ids(self, content: Any, mask: Any, padding: "_PaddingCheck") -> Document | NoRow:
        """Return the document of what should be a row of token ids."""
        ids = _integers(content)
        if ids is None:
            return NoRow(f"a row holds {'nothing' if content is None else _kind_of(content)} there")
        if not len(ids):
            return NoRow("a row holds an empty list there")
        self._check_kind("token ids")
        if (ids == UNLABELLED).any():
            raise ValueError(
                f"data {self.rows.source!r}: column {self.column!r} holds {UNLABELLED}, so it holds labels, in which "
                f"{UNLABELLED} marks what a model is not trained to predict; choose the column of the token ids, "
                "usually input_ids"
            )
        if mask is not None:
            return self._masked(ids, mask)
        padding.add(ids)
        return _of_ids(ids)

    def _masked(self, ids: np.ndarray, mask: Any) -> Document | NoRow:
        kept = _mask_of(mask, len(ids))
        if kept is None:
            return NoRow(f"a row has {len(ids)} token ids, and an {self._mask} that does not fit them")
        if not kept.any():
            return NoRow(f"a row has an {self._mask} that is 0 at all of its {len(ids)} token ids")
        return _of_ids(ids[kept])

    def _check_kind(self, kind: str) -> None:
        """Raise ValueError if earlier rows were of another kind: two files of one folder may hold different things."""
        if kind != (self._kind or kind):
            raise ValueError(
                f"data {self.rows.source!r}: column {self.column!r} holds {self._kind} in some rows and {kind} in "
                "others; choose a column, or files, of one kind"
            )
        self._kind = kind


def _of_ids(ids: np.ndarray) -> Document:
    # The ids in one form: their integer type belongs to the file, and must not decide on a document's side.
    return Document(ids.astype("<i8").tobytes(), ids)


def _chat(messages: Sequence[Mapping[str, Any]], template: ChatTemplate) -> Document | NoRow:
    try:
        return Document(key_of(messages), template.render(messages))
    except NotAChatError as problem:
        return NoRow(str(problem))


def _text(content: str, key: str) -> Document | NoRow:
    if not content.strip():
        return NoRow("a row holds an empty text there")
    try:
        content.encode()
    except UnicodeEncodeError:
        return NoRow("the text there is not UTF-8, to which `iconv` converts files")
    return Document(key, content)


def _kind_of(content: Any) -> str:
    return f"a value of type {type(content).__name__}"


def _integers(content: Any) -> np.ndarray | None:
    """Return a list of integers as an array; None if it is something else."""
    if not isinstance(content, np.ndarray | list | tuple):
        return None
    try:
        ids = np.asarray(content)
    except ValueError:  # lists of several lengths
        return None
    if ids.size == 0 and ids.ndim == 1:
        return ids.astype(np.int64)
    return ids if ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) else None


def _mask_of(mask: Any, n_ids: int) -> np.ndarray | None:
    """Return where a mask keeps the ids of a row; None if it does not fit them.

    Whole numbers above 0 keep an id too: some programs number the documents of a row in its mask.
    """
    try:
        values = np.asarray(mask)
    except ValueError:
        return None
    if values.shape != (n_ids,) or not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
        return None
    # A mask that is added to scores of attention is 0 where it keeps an id and negative elsewhere: the other way round.
    if not np.array_equal(values, np.abs(np.trunc(values.astype(np.float64)))):
        return None
    return values != 0


class _PaddingCheck:
    """Looks whether most rows of token ids begin or end with one id several times, as padded rows do."""

    def __init__(self, source: Any, mask: str):
        self._source = source
        self._mask = mask
        self._n_rows = 0
        self._next_check = FIRST_PADDING_CHECK
        self._repeated: Counter[tuple[str, int]] = Counter()

    def add(self, ids: np.ndarray) -> None:
        """Count a row of token ids without an attention mask, and whether it ends or begins with a repeated id."""
        self._n_rows += 1
        if len(ids) > 1:
            # Twice is enough: of most rows that are not padded, the same id does not stand twice at the same end.
            if ids[-1] == ids[-2]:
                self._repeated["end", int(ids[-1])] += 1
            if ids[0] == ids[1]:
                self._repeated["begin", int(ids[0])] += 1
        if self._n_rows == self._next_check:
            self._next_check *= 2
            self.check()

    def check(self) -> None:
        """Raise ValueError if most rows so far look padded."""
        for (side, token), count in self._repeated.most_common(1):
            if self._n_rows >= FEWEST_PADDED_ROWS and 2 * count > self._n_rows:
                raise ValueError(
                    f"data {self._source!r}: {count} of {self._n_rows} rows {side} with token id {token} several "
                    f"times, which looks like padding, and no column {self._mask} says where it is; add that column "
                    "(1 for text, 0 for padding), or cut the padding off"
                )
