"""Text to token blocks: documents go in, rows of `ctx` token ids come out, split by document."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prolu.progress import Meter
from prolu.rows import KEY, Rows

HELD_OUT_FRACTION = 0.1
"""Share of documents kept for evaluation."""

MAX_EVAL_SPLIT_TOKENS = 2**20
"""Tokens read of a split for evaluation: a little more than the paper's 819,200."""

DOCUMENTS_PER_CALL = 64
"""Texts that the tokenizer gets at once."""


class Document(NamedTuple):
    """One text, or one row of token ids. `key` decides on which side of the split it falls."""

    key: str | bytes
    content: str | np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBlocks:
    """A corpus as two arrays of token ids, [n_blocks, ctx] each; every block begins with BOS."""

    train: np.ndarray
    """Blocks that SAEs train on."""
    held_out: np.ndarray
    """Blocks of other documents, for evaluation only."""
    source: str
    """The name or path that the text came from."""
    text_column: str = "text"
    """The column of the text or of the token ids."""
    split: str = "train"
    """Rows trained on."""
    eval_split: str = ""
    """Rows scored on; empty: a part of the documents of `split`."""
    max_train_tokens: int
    """Reading stopped when there were so many to train on."""
    n_documents: int
    """Documents read, both sides together."""

    @property
    def ctx(self) -> int:
        """Tokens per block."""
        return self.train.shape[1]

    def digest(self) -> str:
        """SHA-256 of all token ids: names the data of a study."""
        return hashlib.sha256(self.train.tobytes() + self.held_out.tobytes()).hexdigest()


def is_held_out(key: str | bytes, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether a document is kept for evaluation: by the hash of its key, so for ever the same side."""
    name = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") < fraction * 2**64


def load_blocks(
    source: str,
    tokenizer: Any,
    ctx: int = 128,
    *,
    max_train_tokens: int = 100_000_000,
    text_column: str = "text",
    split: str = "train",
    eval_split: str = "",
    held_out_fraction: float = HELD_OUT_FRACTION,
    progress: bool = False,
) -> TokenBlocks:
    """Reads text, or token ids, and cuts it into blocks of `ctx` tokens.

    Texts are tokenised, joined with BOS between them and cut into blocks; a tail shorter than a block is
    dropped. Rows that are token ids already are cut each by itself: one of 256 gives two blocks of 128.
    The first token of every block is overwritten with BOS.

    Args:
        source: `builtin` (the interpreter's own standard library), a .txt, .jsonl, .parquet or .arrow
            file, a folder of such files, or the name of a dataset on the Hugging Face hub.
        tokenizer: a fast transformers tokenizer.
        ctx: tokens per block.
        max_train_tokens: stop reading when there are so many to train on.
        text_column: the column that holds the text, or the token ids, where there are columns.
        split: rows to train on: a split, or a slice of one, as in `train[0:40%]`.
        eval_split: rows to evaluate on, as in `train[90:95%]`; empty: a tenth of the documents of `split`.
        held_out_fraction: that tenth, where `eval_split` is empty.
        progress: show the rate and the time left.

    Raises:
        ValueError: nothing there, no such column or split, splits that overlap, token ids that the tokenizer
            does not have, or too little text for one block on either side.
    """
    if ctx < 2:
        raise ValueError(f"ctx {ctx}: a block holds at least 2 tokens")
    rows, others = Rows(source, split), Rows(source, eval_split) if eval_split else None
    if others and rows.overlaps(others):
        raise ValueError(f"eval_split {eval_split!r}: overlaps split {split!r}, so what is trained on would be scored")
    packer = _Packer(tokenizer, ctx)
    with Meter("reading text", max_train_tokens, shown=progress) as meter:
        for some in batched(read_documents(rows, text_column), DOCUMENTS_PER_CALL):
            sides = [not others and is_held_out(document.key, held_out_fraction) for document in some]
            before = packer.n_tokens[False]
            packer.add(some, sides)
            meter.advance(packer.n_tokens[False] - before)
            if packer.n_tokens[False] >= max_train_tokens:
                break
    if others:
        for some in batched(read_documents(others, text_column), DOCUMENTS_PER_CALL):
            packer.add(some, [True] * len(some))
            if packer.n_tokens[True] >= MAX_EVAL_SPLIT_TOKENS:
                break
    train, held_out = (packer.blocks(side) for side in (False, True))
    for name, side, blocks in (("training", False, train), ("held-out", True, held_out)):
        if not len(blocks):
            raise ValueError(
                f"data {source!r}: {packer.n_documents} documents give {packer.n_tokens[side]} {name} tokens, "
                f"fewer than one block of {ctx}; pass more text or a smaller --ctx"
            )
    return TokenBlocks(
        train=train, held_out=held_out, source=str(Path(source).resolve()) if Path(source).exists() else source,
        text_column=text_column, split=split, eval_split=eval_split, max_train_tokens=max_train_tokens,
        n_documents=packer.n_documents,
    )  # fmt: skip


class _Packer:
    """Documents become rows of `ctx` token ids, on either side of the split."""

    def __init__(self, tokenizer: Any, ctx: int):
        self._tokenizer, self._ctx, self._bos = tokenizer, ctx, bos_token_id(tokenizer)
        self._n_ids = len(tokenizer)
        self._dtype = np.uint16 if self._n_ids <= 2**16 else np.uint32
        self._pieces: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self.n_tokens, self.n_documents = {False: 0, True: 0}, 0

    def add(self, documents: Sequence[Document], held_out: Sequence[bool]) -> None:
        texts = [d.content for d in documents if isinstance(d.content, str)]
        ids: list[list[int]] = []
        if texts:
            ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        encoded = iter(ids)
        for document, side in zip(documents, held_out, strict=True):
            if isinstance(document.content, str):
                piece = np.array([self._bos, *next(encoded)], dtype=self._dtype)
            else:
                piece = self._checked(document.content[: len(document.content) // self._ctx * self._ctx])
            self._pieces[side].append(piece)
            self.n_tokens[side] += len(piece)
        self.n_documents += len(documents)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._n_ids:
            raise ValueError(
                f"token ids from {ids.min()} to {ids.max()}: the tokenizer has {self._n_ids}, so another one wrote them"
            )
        return ids.astype(self._dtype)

    def blocks(self, held_out: bool) -> np.ndarray:
        pieces = self._pieces[held_out]
        tokens = np.concatenate(pieces) if pieces else np.empty(0, self._dtype)
        blocks = tokens[: len(tokens) // self._ctx * self._ctx].reshape(-1, self._ctx)
        blocks[:, 0] = self._bos
        return blocks


def batched(items: Iterable[Document], n: int) -> Iterator[list[Document]]:
    """Lists of `n` items, the last perhaps shorter."""
    rest = iter(items)
    while some := list(islice(rest, n)):
        yield some


def bos_token_id(tokenizer: Any) -> int:
    """The token that begins every block: BOS, or EOS where a tokenizer has no BOS."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a BOS nor an EOS token to begin a block with")


def read_documents(rows: Rows, column: str) -> Iterator[Document]:
    """Documents in a column of rows; rows without text are left out.

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
