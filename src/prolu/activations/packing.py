"""Text to token blocks: documents go in, rows of `ctx` token ids come out, split by document."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prolu.activations.text_files import KEY
from prolu.activations.text_rows import Rows
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
"""The fraction of documents that are held out for evaluation."""

MAX_EVAL_SPLIT_TOKENS = 2**20
"""The number of tokens to read of a split for evaluation: a little more than the paper's 819,200."""

DOCUMENTS_PER_CALL = 64
"""The number of texts in one call of the tokenizer, and of documents in the batches that a resumed packing skips."""

TOKENS_BETWEEN_SAVES = 2**20
"""The number of tokens after which blocks are written to the disk: the most that a kill can cost."""


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
    """Read text, or token ids, and cut it into blocks of `ctx` tokens.

    Texts are tokenised, joined with BOS between them and cut into blocks; a tail that is shorter than a block is
    dropped. Rows that are token ids already are cut one by one: a row of 256 gives two blocks of 128. The first token
    of every block is overwritten with BOS.

    Args:
        source: `builtin` (the interpreter's own standard library), a .txt, .jsonl, .parquet or .arrow file, a folder
            of such files, the name of a dataset on the Hugging Face hub, a `Dataset` or `IterableDataset` of the
            datasets library (or its dict of them, by split), or a folder of token blocks, which are then read as they
            are.
        tokenizer: a fast transformers tokenizer.
        ctx: the number of tokens per block.
        max_train_tokens: reading stops when there are this many tokens to train on, and one block to evaluate on.
        text_column: the column that holds the text, or the token ids, where there are columns.
        split: the rows to train on: a split, or a slice of one, as in `train[0:40%]`.
        eval_split: the rows to evaluate on, as in `train[90:95%]`; if empty, some documents of `split`.
        held_out_fraction: the fraction of the documents of `split` to evaluate on, where `eval_split` is empty.
        folder: where to write the blocks, which are then memory-mapped; writing that was interrupted is resumed.
        progress: whether to show the rate and the time left.

    Raises:
        ValueError: there is no such source, column or split, the splits overlap, the tokenizer does not have some of
            the token ids, there is too little text for one block on either side, or the folder holds something else.
    """
    if ctx < 2:
        raise ValueError(f"ctx {ctx}: a block must hold at least 2 tokens")
    if isinstance(source, str) and holds_blocks(source):
        return _finished_blocks(source, tokenizer, ctx)
    rows = Rows(source, split)
    eval_rows = Rows(source, eval_split) if eval_split else None
    if eval_rows is not None and rows.overlaps(eval_rows):
        raise ValueError(f"eval_split {eval_split!r}: overlaps split {split!r}, so what is trained on would be scored")
    text = _Text(rows, eval_rows, text_column, max_train_tokens, held_out_fraction)
    if folder is None:
        return _pack_in_memory(text, tokenizer, ctx, shown=progress)
    return _pack_into_folder(text, tokenizer, ctx, Path(folder), shown=progress)


class _Text(NamedTuple):
    """The text that is read, and how much of it."""

    rows: Rows
    eval_rows: Rows | None
    """The rows of a split for evaluation; None if documents of `rows` are held out."""
    column: str
    max_train_tokens: int
    held_out_fraction: float

    def describe(self) -> dict[str, Any]:
        """Return the facts that token blocks keep about their text."""
        source = self.rows.source
        return {
            # A path is made absolute, so that the text is found again from any directory.
            "source": str(Path(source).resolve()) if Path(source).exists() else source,
            "text_column": self.column,
            "split": self.rows.split,
            "eval_split": "" if self.eval_rows is None else self.eval_rows.split,
            "max_train_tokens": self.max_train_tokens,
        }


def _finished_blocks(folder: str, tokenizer: Any, ctx: int) -> TokenBlocks:
    blocks = read_blocks(folder)
    if blocks.ctx != ctx:
        raise ValueError(f"ctx {ctx}: the blocks in {folder} have {blocks.ctx} tokens")
    bos = bos_token_id(tokenizer)
    if (blocks.train[:, 0] != bos).any() or (blocks.held_out[:, 0] != bos).any():
        raise ValueError(
            f"data {folder!r}: its blocks do not begin with this tokenizer's BOS, so another tokenizer made them"
        )
    return blocks


def _pack_in_memory(text: _Text, tokenizer: Any, ctx: int, *, shown: bool) -> TokenBlocks:
    packer = _Packer(tokenizer, ctx, folder=None)
    _pack(packer, text, shown=shown)
    return TokenBlocks(
        train=packer.take_blocks(False),
        held_out=packer.take_blocks(True),
        held_out_documents=packer.take_documents(),
        n_documents=packer.n_documents,
        **text.describe(),
    )


def _pack_into_folder(text: _Text, tokenizer: Any, ctx: int, folder: Path, *, shown: bool) -> TokenBlocks:
    # Blocks that were begun are gone on with only if all of this is still the same.
    made = text.describe() | {
        "ctx": ctx,
        "held_out_fraction": text.held_out_fraction,
        "tokenizer": tokenizer_digest(tokenizer),
        "files": [rows.fingerprint() for rows in (text.rows, text.eval_rows) if rows is not None],
    }
    with BlocksFolder(folder, made, _dtype(tokenizer)) as on_disk:
        if not on_disk.finished:
            packer = _Packer(tokenizer, ctx, on_disk)
            _pack(packer, text, shown=shown)
            packer.save()
            on_disk.finish()
    return read_blocks(folder)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return SHA-256 of everything that a fast tokenizer does."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _dtype(tokenizer: Any) -> np.dtype:
    # Two bytes per token where they are enough: 400M tokens of GPT-2 are then 0.8 GB.
    return np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)


def _pack(packer: "_Packer", text: _Text, *, shown: bool) -> None:
    """Pack documents until there are enough tokens on both sides; those that the packer already holds are skipped.

    Raises:
        ValueError: there is too little text for one block on either side.
    """
    with Meter("reading text", text.max_train_tokens, shown=shown) as meter:
        meter.advance(packer.n_tokens[False])
        for documents in packer.missing(text.rows, text.column, eval_split=False):
            # Reading goes on beyond the limit until there is a block to score on, if it has to come from here.
            held_out_elsewhere = text.eval_rows is not None or not text.held_out_fraction
            enough_held_out = held_out_elsewhere or packer.has_block(True)
            if packer.n_tokens[False] >= text.max_train_tokens and enough_held_out:
                break
            before = packer.n_tokens[False]
            sides = [not text.eval_rows and is_held_out(d.key, text.held_out_fraction) for d in documents]
            packer.add(documents, sides, eval_split=False)
            meter.advance(packer.n_tokens[False] - before)
    if text.eval_rows is not None:
        for documents in packer.missing(text.eval_rows, text.column, eval_split=True):
            if packer.n_tokens[True] >= MAX_EVAL_SPLIT_TOKENS:
                break
            packer.add(documents, [True] * len(documents), eval_split=True)
    packer.check(text.rows.source)


class PackingProgress(NamedTuple):
    """What a packer must know to resume, beside the whole blocks on the disk: `progress` in a folder's index."""

    n_documents: int = 0
    """The number of documents packed, on both sides together."""
    n_calls: Sequence[int] = (0, 0)
    """The numbers of batches of documents packed from the training split and from the split for evaluation."""
    tails: Sequence[Sequence[int]] = ((), ())
    """The tokens on the training side and on the held-out side that do not fill a block yet."""
    documents_tail: Sequence[int] | None = ()
    """The document of each token in the held-out tail; None in a folder begun before documents were kept."""

    @classmethod
    def read(cls, noted: Mapping[str, Any]) -> "PackingProgress":
        """Return the progress that a folder's index notes; the beginning, if it notes none."""
        if not noted:
            return cls()
        return cls(noted["n_documents"], noted["n_calls"], noted["tails"], noted.get("documents_tail"))

    def noted(self) -> dict[str, Any]:
        """Return the progress in the form in which an index notes it."""
        fields = self._asdict()
        if self.documents_tail is None:
            del fields["documents_tail"]
        return fields


class _BlockQueue:
    """Token ids, or document numbers, end to end: pieces join at the end, whole blocks leave at the front."""

    def __init__(self, ctx: int, dtype: np.dtype, tail: Sequence[int]):
        self._ctx = ctx
        self._pieces = [np.array(tail, dtype)]

    def append(self, piece: np.ndarray) -> None:
        self._pieces.append(piece)

    def take_blocks(self) -> np.ndarray:
        """Return all whole blocks, [n, ctx]; what does not fill a block stays."""
        joined = np.concatenate(self._pieces)
        n_whole = len(joined) // self._ctx * self._ctx
        # A copy, because a view of the tail would keep all of `joined` in memory.
        self._pieces = [joined[n_whole:].copy()]
        return joined[:n_whole].reshape(-1, self._ctx)

    def tail(self) -> list[int]:
        return np.concatenate(self._pieces).tolist()


class _Packer:
    """Turns documents into rows of `ctx` token ids on either side of the split, in memory or in a folder.

    Lists of two are indexed by `held_out`: False is the training side, True the held-out side.
    """

    def __init__(self, tokenizer: Any, ctx: int, folder: BlocksFolder | None):
        self._tokenizer = tokenizer
        self._ctx = ctx
        self._bos = bos_token_id(tokenizer)
        self._dtype = _dtype(tokenizer)
        self._folder = folder
        progress = PackingProgress.read({} if folder is None else folder.progress)
        n_blocks = [0, 0] if folder is None else folder.n_blocks
        self.n_tokens = [n * ctx + len(tail) for n, tail in zip(n_blocks, progress.tails, strict=True)]
        self.n_documents = progress.n_documents
        self._n_calls = list(progress.n_calls)
        self._queues = [_BlockQueue(ctx, self._dtype, tail) for tail in progress.tails]
        # The document of every held-out token, in step with the queue of held-out tokens. A folder begun without them
        # goes on without them: they must be there for all tokens or for none.
        self._documents = None
        if progress.documents_tail is not None:
            self._documents = _BlockQueue(ctx, DOCUMENT_DTYPE, progress.documents_tail)
        self._n_unsaved = 0

    def missing(self, rows: Rows, column: str, *, eval_split: bool) -> Iterator[list[Document]]:
        """Yield the batches of documents of a split that have not been added yet."""
        batches = batched(read_documents(rows, column), DOCUMENTS_PER_CALL)
        return islice(batches, self._n_calls[eval_split], None)

    def add(self, documents: Sequence[Document], held_out: Sequence[bool], *, eval_split: bool) -> None:
        """Add a batch of documents, each on its side, and save from time to time.

        Raises:
            ValueError: the tokenizer does not have some of the token ids.
        """
        texts = [document.content for document in documents if isinstance(document.content, str)]
        encoded: Iterator[list[int]] = iter(())
        if texts:  # a tokenizer does not take an empty list
            encoded = iter(self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        for number, (document, side) in enumerate(zip(documents, held_out, strict=True), self.n_documents):
            if isinstance(document.content, str):
                piece = np.array([self._bos, *next(encoded)], dtype=self._dtype)
            else:
                piece = self._cut_row(document.content)
            self._queues[side].append(piece)
            if side and self._documents is not None:
                self._documents.append(np.full(len(piece), number, DOCUMENT_DTYPE))
            self.n_tokens[side] += len(piece)
            self._n_unsaved += len(piece)
        self.n_documents += len(documents)
        self._n_calls[eval_split] += 1
        # Only here, between two batches, does the progress say exactly what has been read.
        if self._n_unsaved >= TOKENS_BETWEEN_SAVES:
            self.save()

    def _cut_row(self, ids: np.ndarray) -> np.ndarray:
        """Return as much of a row of token ids as fills whole blocks, so that no block spans two rows."""
        ids = ids[: len(ids) // self._ctx * self._ctx]
        n_known = len(self._tokenizer)
        if len(ids) and not 0 <= ids.min() <= ids.max() < n_known:
            raise ValueError(
                f"token ids from {ids.min()} to {ids.max()}: the tokenizer has {n_known}, so another one wrote them"
            )
        return ids.astype(self._dtype)

    def has_block(self, held_out: bool) -> bool:
        """Return whether a side has enough text for one block."""
        return self.n_tokens[held_out] >= self._ctx

    def check(self, source: str) -> None:
        """Raise ValueError if a side does not have even one block."""
        for name, side in (("training", False), ("held-out", True)):
            if not self.has_block(side):
                raise ValueError(
                    f"data {source!r}: {self.n_documents} documents give {self.n_tokens[side]} {name} tokens, "
                    f"fewer than one block of {self._ctx}; pass more text or a smaller --ctx"
                )

    def save(self) -> None:
        """Move whole blocks to the disk and note the progress there, if there is a folder for them."""
        self._n_unsaved = 0
        if self._folder is None:
            return
        # The progress is noted last: until then, a resumed packing overwrites what is appended here.
        self._folder.append(self.take_blocks(False), False)
        self._folder.append(self.take_blocks(True), True, self.take_documents())
        self._folder.note(self._progress().noted())

    def _progress(self) -> PackingProgress:
        tails = [queue.tail() for queue in self._queues]
        documents_tail = None if self._documents is None else self._documents.tail()
        return PackingProgress(self.n_documents, list(self._n_calls), tails, documents_tail)

    def take_blocks(self, held_out: bool) -> np.ndarray:
        """Return the whole blocks since the last call, [n, ctx]; the tokens that do not fill one stay."""
        blocks = self._queues[held_out].take_blocks()
        blocks[:, 0] = self._bos
        return blocks

    def take_documents(self) -> np.ndarray | None:
        """Return the documents of the tokens of held-out blocks since the last call; None if they are not kept."""
        return None if self._documents is None else self._documents.take_blocks()


def batched(items: Iterable[Document], n: int) -> Iterator[list[Document]]:
    """Yield lists of `n` items; the last may be shorter."""
    rest = iter(items)
    while some := list(islice(rest, n)):
        yield some


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
