"""Text to token blocks: documents go in, rows of `ctx` token ids come out, split by document."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prolu.activations.text_rows import KEY, Rows
from prolu.activations.token_blocks import (
    DOCUMENT_DTYPE,
    BlocksFolder,
    TokenBlocks,
    bos_token_id,
    holds_blocks,
    read_blocks,
)
from prolu.runtime.progress import Meter

HELD_OUT_FRACTION = 0.1
"""Share of documents kept for evaluation."""

MAX_EVAL_SPLIT_TOKENS = 2**20
"""Tokens read of a split for evaluation: a little more than the paper's 819,200."""

DOCUMENTS_PER_CALL = 64
"""Texts that the tokenizer gets at once."""

TOKENS_BETWEEN_SAVES = 2**20
"""What a kill may cost, where blocks are written to the disk."""


class Document(NamedTuple):
    """One text, or one row of token ids. `key` decides on which side of the split it falls."""

    key: str | bytes
    content: str | np.ndarray


def is_held_out(key: str | bytes, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether a document is kept for evaluation: by the hash of its key, so for ever the same side."""
    name = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") < fraction * 2**64


def load_blocks(
    source: Any,
    tokenizer: Any,
    ctx: int = 128,
    *,
    max_train_tokens: int = 100_000_000,
    text_column: str = "text",
    split: str = "train",
    eval_split: str = "",
    held_out_fraction: float = HELD_OUT_FRACTION,
    folder: str | Path | None = None,
    progress: bool = False,
) -> TokenBlocks:
    """Reads text, or token ids, and cuts it into blocks of `ctx` tokens.

    Texts are tokenised, joined with BOS between them and cut into blocks; a tail shorter than a block is
    dropped. Rows that are token ids already are cut each by itself: one of 256 gives two blocks of 128.
    The first token of every block is overwritten with BOS.

    Args:
        source: `builtin` (the interpreter's own standard library), a .txt, .jsonl, .parquet or .arrow
            file, a folder of such files, the name of a dataset on the Hugging Face hub, a `Dataset` or
            `IterableDataset` of the datasets library (or its dict of them, by split), or a folder of token
            blocks, which are then taken as they are.
        tokenizer: a fast transformers tokenizer.
        ctx: tokens per block.
        max_train_tokens: stop reading when there are so many to train on, and a block to evaluate on.
        text_column: the column that holds the text, or the token ids, where there are columns.
        split: rows to train on: a split, or a slice of one, as in `train[0:40%]`.
        eval_split: rows to evaluate on, as in `train[90:95%]`; empty: a tenth of the documents of `split`.
        held_out_fraction: that tenth, where `eval_split` is empty.
        folder: where to write the blocks, which are then memory-mapped; a folder that was begun is gone on with.
        progress: show the rate and the time left.

    Raises:
        ValueError: nothing there, no such column or split, splits that overlap, token ids that the tokenizer
            does not have, too little text for one block on either side, or a folder that holds something else.
    """
    if ctx < 2:
        raise ValueError(f"ctx {ctx}: a block holds at least 2 tokens")
    if isinstance(source, str) and holds_blocks(source):
        return _as_they_are(source, tokenizer, ctx)
    rows, others = Rows(source, split), Rows(source, eval_split) if eval_split else None
    if others and rows.overlaps(others):
        raise ValueError(f"eval_split {eval_split!r}: overlaps split {split!r}, so what is trained on would be scored")
    made = {
        "source": str(Path(rows.source).resolve()) if Path(rows.source).exists() else rows.source,
        "text_column": text_column, "split": split, "eval_split": eval_split, "max_train_tokens": max_train_tokens,
    }  # fmt: skip
    if folder is None:
        packer = _Packer(tokenizer, ctx, _dtype(tokenizer), None)
        _pack(packer, rows, others, text_column, max_train_tokens, held_out_fraction, progress)
        packer.check(rows.source)
        return TokenBlocks(
            train=packer.blocks(False), held_out=packer.blocks(True), held_out_documents=packer.documents(),
            n_documents=packer.n_documents, **made,
        )  # fmt: skip
    decides = {"ctx": ctx, "held_out_fraction": held_out_fraction, "tokenizer": tokenizer_digest(tokenizer)}
    decides["files"] = [part.fingerprint() for part in (rows, others) if part is not None]
    with BlocksFolder(Path(folder), made | decides, _dtype(tokenizer)) as on_disk:
        if not on_disk.finished:
            packer = _Packer(tokenizer, ctx, _dtype(tokenizer), on_disk)
            _pack(packer, rows, others, text_column, max_train_tokens, held_out_fraction, progress)
            packer.check(rows.source)
            packer.save()
            on_disk.finish()
    return read_blocks(folder)


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of all that a fast tokenizer does."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _dtype(tokenizer: Any) -> np.dtype:
    return np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)


def _as_they_are(folder: str, tokenizer: Any, ctx: int) -> TokenBlocks:
    blocks = read_blocks(folder)
    if blocks.ctx != ctx:
        raise ValueError(f"ctx {ctx}: the blocks in {folder} have {blocks.ctx} tokens")
    bos = bos_token_id(tokenizer)
    if (blocks.train[:, 0] != bos).any() or (blocks.held_out[:, 0] != bos).any():
        raise ValueError(
            f"data {folder!r}: its blocks do not begin with this tokenizer's BOS, so another one made them"
        )
    return blocks


def _pack(
    packer: "_Packer", rows: Rows, others: Rows | None, column: str, max_train_tokens: int, fraction: float, shown: bool
) -> None:
    """Reads until there is enough; what the packer has already is passed over."""
    with Meter("reading text", max_train_tokens, shown=shown) as meter:
        meter.advance(packer.n_tokens[False])
        for some in packer.missing(rows, column, others=False):
            if packer.n_tokens[False] >= max_train_tokens and (packer.has_block(True) or others or not fraction):
                break
            before = packer.n_tokens[False]
            packer.add(some, [not others and is_held_out(document.key, fraction) for document in some])
            meter.advance(packer.n_tokens[False] - before)
    if others:
        for some in packer.missing(others, column, others=True):
            if packer.n_tokens[True] >= MAX_EVAL_SPLIT_TOKENS:
                break
            packer.add(some, [True] * len(some), others=True)


class _Packer:
    """Documents become rows of `ctx` token ids, on either side of the split; in memory, or in a folder."""

    def __init__(self, tokenizer: Any, ctx: int, dtype: np.dtype, folder: BlocksFolder | None):
        self._tokenizer, self._ctx, self._bos = tokenizer, ctx, bos_token_id(tokenizer)
        self._n_ids, self._dtype, self._folder = len(tokenizer), dtype, folder
        self._pieces: list[list[np.ndarray]] = [[], []]
        self._numbers: list[np.ndarray] = []  # of the documents of the tokens held out, as those are in _pieces
        self._unsaved, self._numbered = 0, True
        self.n_tokens, self.n_documents, self._n_calls = [0, 0], 0, [0, 0]
        if folder is not None and folder.progress:
            done = folder.progress
            self.n_documents, self._n_calls = done["n_documents"], list(done["n_calls"])
            self._pieces = [[np.array(tail, dtype)] for tail in done["tails"]]
            self._numbered = "documents_tail" in done  # else it was begun before documents were kept
            self._numbers = [np.array(done.get("documents_tail", []), DOCUMENT_DTYPE)]
            self.n_tokens = [n * ctx + len(tail) for n, tail in zip(folder.n_blocks, done["tails"], strict=True)]

    def missing(self, rows: Rows, column: str, *, others: bool) -> Iterator[list[Document]]:
        """Documents that have not been added yet, some at a time; `others` are those of a split for evaluation."""
        return islice(batched(read_documents(rows, column), DOCUMENTS_PER_CALL), self._n_calls[others], None)

    def add(self, documents: Sequence[Document], held_out: Sequence[bool], *, others: bool = False) -> None:
        texts = [d.content for d in documents if isinstance(d.content, str)]
        ids: list[list[int]] = []
        if texts:
            ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        encoded = iter(ids)
        for number, (document, side) in enumerate(zip(documents, held_out, strict=True), self.n_documents):
            if isinstance(document.content, str):
                piece = np.array([self._bos, *next(encoded)], dtype=self._dtype)
            else:
                piece = self._checked(document.content[: len(document.content) // self._ctx * self._ctx])
            self._pieces[side].append(piece)
            if side and self._numbered:
                self._numbers.append(np.full(len(piece), number, DOCUMENT_DTYPE))
            self.n_tokens[side] += len(piece)
            self._unsaved += len(piece)
        self.n_documents += len(documents)
        self._n_calls[others] += 1
        if self._unsaved >= TOKENS_BETWEEN_SAVES:
            self.save()

    def has_block(self, held_out: bool) -> bool:
        """Whether a side has text for one block."""
        return self.n_tokens[held_out] >= self._ctx

    def check(self, source: str) -> None:
        """Raises ValueError if a side has not even one block."""
        for name, side in (("training", False), ("held-out", True)):
            if not self.has_block(side):
                raise ValueError(
                    f"data {source!r}: {self.n_documents} documents give {self.n_tokens[side]} {name} tokens, "
                    f"fewer than one block of {self._ctx}; pass more text or a smaller --ctx"
                )

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._n_ids:
            raise ValueError(
                f"token ids from {ids.min()} to {ids.max()}: the tokenizer has {self._n_ids}, so another one wrote them"
            )
        return ids.astype(self._dtype)

    def save(self) -> None:
        """Moves whole blocks to the disk, if there is a folder for them."""
        self._unsaved = 0
        if self._folder is not None:
            self._folder.append(self.blocks(False), False)
            self._folder.append(self.blocks(True), True, self.documents())
            tails = [np.concatenate([*pieces, self._none]).tolist() for pieces in self._pieces]
            progress = {"n_documents": self.n_documents, "n_calls": self._n_calls, "tails": tails}
            if self._numbered:
                progress["documents_tail"] = np.concatenate(self._numbers).tolist()
            self._folder.note(progress)

    def blocks(self, held_out: bool) -> np.ndarray:
        """Whole blocks since the last call; the tokens that do not fill one stay."""
        self._pieces[held_out].append(self._none)
        blocks = self._cut(self._pieces[held_out])
        blocks[:, 0] = self._bos
        return blocks

    def documents(self) -> np.ndarray | None:
        """Document numbers of the held-out blocks since the last call, if they are kept."""
        if not self._numbered:
            return None
        self._numbers.append(np.empty(0, DOCUMENT_DTYPE))
        return self._cut(self._numbers)

    def _cut(self, pieces: list[np.ndarray]) -> np.ndarray:
        """Whole blocks of what the pieces hold together; the rest stays in them."""
        joined = np.concatenate(pieces)
        n_whole = len(joined) // self._ctx * self._ctx
        pieces[:] = [joined[n_whole:].copy()]
        return joined[:n_whole].reshape(-1, self._ctx)

    @property
    def _none(self) -> np.ndarray:
        return np.empty(0, self._dtype)


def batched(items: Iterable[Document], n: int) -> Iterator[list[Document]]:
    """Lists of `n` items, the last perhaps shorter."""
    rest = iter(items)
    while some := list(islice(rest, n)):
        yield some


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
