"""Text to token blocks: which text is read, how much of it, and where its blocks go."""

import hashlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

from prolu.activations.documents import HELD_OUT_FRACTION, Documents, is_held_out
from prolu.activations.packer import AS_TEXT, HELD_OUT, PARSED, TRAIN, Packer, token_dtype
from prolu.activations.resolving import absolute_paths, plain_source
from prolu.activations.text_rows import Rows
from prolu.activations.token_blocks import BlocksFolder, TokenBlocks, bos_token_id, holds_blocks, read_blocks
from prolu.runtime.checks import one_of
from prolu.runtime.progress import Meter

logger = logging.getLogger(__name__)

MAX_EVAL_SPLIT_TOKENS = 2**20
"""The number of tokens to read of a split for evaluation: a little more than the paper's 819,200."""


def load_blocks(
    source: Any,
    tokenizer: Any,
    ctx: int = 128,
    *,
    max_train_tokens: int = 100_000_000,
    text_column: str = "text",
    data_config: str = "",
    split: str = "train",
    eval_split: str = "",
    special_tokens: str = AS_TEXT,
    held_out_fraction: float = HELD_OUT_FRACTION,
    folder: str | Path | None = None,
    progress: bool = False,
) -> TokenBlocks:
    """Read text, or token ids, and cut it into blocks of `ctx` tokens.

    Texts are tokenised, joined with BOS between them and cut into blocks; a tail that is shorter than a block is
    dropped. Rows that are token ids already are cut one by one: a row of 256 gives two blocks of 128. The first token
    of every block is overwritten with BOS. A mask beside them (`attention_mask`) says which of the ids are text; rows
    that seem to be padded and have none are refused. Rows without text are left out, counted and reported.

    Args:
        source: `builtin` (the interpreter's own standard library), a .txt, .jsonl, .parquet or .arrow file, a list of
            such files or of texts, a folder of such files, the name of a dataset on the Hugging Face hub, a `Dataset`
            or `IterableDataset` of the datasets library (or its dict of them, by split), or a folder of token blocks,
            which are then read as they are. Paths may be `str` or `Path`.
        tokenizer: a fast transformers tokenizer.
        ctx: the number of tokens per block.
        max_train_tokens: reading stops when there are this many tokens to train on, and one block to evaluate on.
        text_column: the column that holds the text, or the token ids, where there are columns.
        data_config: the configuration of the dataset, where it has several, as its card lists them.
        split: the rows to train on: a split, or a slice of one, as in `train[0:40%]`.
        eval_split: the rows to evaluate on, as in `train[90:95%]`; if empty, some documents of `split`.
        special_tokens: what becomes of the name of a special token, such as `<|endoftext|>`, inside a text: `text`, or
            `parsed` into that token.
        held_out_fraction: the fraction of the documents of `split` to evaluate on, where `eval_split` is empty.
        folder: where to write the blocks, which are then memory-mapped; writing that was interrupted is resumed.
        progress: whether to show the rate and the time left.

    Raises:
        ValueError: there is no such source, column or split, the splits overlap, the tokenizer does not have some of
            the token ids, there is too little text for one block on either side, or the folder holds something else.
    """
    if ctx < 2:
        raise ValueError(f"ctx {ctx}: a block must hold at least 2 tokens")
    source = plain_source(source)
    # Finished blocks are read as they are: their folder says how they were split, and nothing here can change it.
    if isinstance(source, str) and holds_blocks(source):
        return _finished_blocks(source, tokenizer, ctx)
    one_of("special_tokens", special_tokens, (AS_TEXT, PARSED))
    rows = Rows(source, split, data_config)
    eval_rows = Rows(source, eval_split, data_config) if eval_split else None
    if eval_rows is not None and rows.overlaps(eval_rows):
        raise ValueError(f"eval_split {eval_split!r}: overlaps split {split!r}, so what is trained on would be scored")
    text = _Text(rows, eval_rows, text_column, max_train_tokens, held_out_fraction, special_tokens)
    if folder is None:
        return _pack_in_memory(text, tokenizer, ctx, shown=progress)
    return _pack_into_folder(text, tokenizer, ctx, Path(folder), shown=progress)


class _Text(NamedTuple):
    """What a call of `load_blocks` asks for: which rows are read, and how many tokens are taken from them."""

    rows: Rows
    """The rows to train on."""
    eval_rows: Rows | None
    """The rows of a split for evaluation; None if documents of `rows` are held out."""
    column: str
    """The column that holds the text or the token ids."""
    max_train_tokens: int
    """The number of training tokens after which reading stops."""
    held_out_fraction: float
    """The fraction of the documents of `rows` that are held out, where there are no rows for evaluation."""
    special_tokens: str
    """Whether the name of a special token in the text is read as text, or parsed into that token."""

    def describe(self) -> dict[str, Any]:
        """Return the facts that token blocks keep about their text."""
        return {
            # So that the text is found again from any directory.
            "source": absolute_paths(self.rows.source),
            "text_column": self.column,
            "data_config": self.rows.config,
            "split": self.rows.split,
            "eval_split": "" if self.eval_rows is None else self.eval_rows.split,
            "max_train_tokens": self.max_train_tokens,
            "special_tokens": self.special_tokens,
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
    packer = Packer(tokenizer, ctx, None, text.special_tokens)
    _pack(packer, text, shown=shown)
    return TokenBlocks(
        train=packer.take_blocks(TRAIN),
        held_out=packer.take_blocks(HELD_OUT),
        held_out_documents=packer.take_documents(),
        n_documents=packer.n_documents,
        n_rows_left_out=packer.n_rows_left_out,
        **text.describe(),
    )


def _pack_into_folder(text: _Text, tokenizer: Any, ctx: int, folder: Path, *, shown: bool) -> TokenBlocks:
    # Writing that was interrupted is resumed only if all of this is still the same: anything else would mix two texts,
    # or two tokenizers, in one folder.
    made = text.describe() | {
        "ctx": ctx,
        "held_out_fraction": text.held_out_fraction,
        "tokenizer": tokenizer_digest(tokenizer),
        "files": [rows.fingerprint() for rows in (text.rows, text.eval_rows) if rows is not None],
    }
    with BlocksFolder(folder, made, token_dtype(tokenizer)) as on_disk:
        if not on_disk.finished:
            packer = Packer(tokenizer, ctx, on_disk, on_disk.made["special_tokens"])
            _pack(packer, text, shown=shown)
            packer.save()
            on_disk.finish()
    return read_blocks(folder)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 digest, in hexadecimal, of the vocabulary and rules of a fast tokenizer (its tokenizer.json).

    Tokenizers with the same digest give the same tokens.
    """
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _pack(packer: Packer, text: _Text, *, shown: bool) -> None:
    """Pack documents until there are enough tokens on both sides; those that the packer already holds are skipped.

    Raises:
        ValueError: there is too little text for one block on either side.
    """
    read = [Documents(text.rows, text.column)]
    _pack_training_split(packer, text, read[0], shown=shown)
    if text.eval_rows is not None:
        read.append(Documents(text.eval_rows, text.column))
        for documents in packer.missing(read[1], eval_split=True):
            if packer.n_tokens[HELD_OUT] >= MAX_EVAL_SPLIT_TOKENS:
                break
            packer.add(documents, [HELD_OUT] * len(documents), eval_split=True)
    packer.check(text.rows.source)
    # Counted anew by a packing that is resumed, since it reads all rows again.
    packer.n_rows_left_out = sum(documents.n_left_out for documents in read)
    for documents in read:
        if documents.n_left_out:
            logger.warning(
                "data %s, split %s: %s of the %s rows read have no text and are left out (the first: %s)",
                documents.rows.source, documents.rows.split, f"{documents.n_left_out:,}", f"{documents.n_rows:,}",
                documents.first_reason,
            )  # fmt: skip


def _pack_training_split(packer: Packer, text: _Text, read: Documents, *, shown: bool) -> None:
    """Pack the split to train on; without a split for evaluation, some of its documents are held out."""
    with Meter("reading text", text.max_train_tokens, shown=shown) as meter:
        meter.advance(packer.n_tokens[TRAIN])
        for documents in packer.missing(read, eval_split=False):
            # Reading goes on beyond the limit until there is a block to score on, if it has to come from here.
            held_out_elsewhere = text.eval_rows is not None or not text.held_out_fraction
            enough_held_out = held_out_elsewhere or packer.has_block(HELD_OUT)
            if packer.n_tokens[TRAIN] >= text.max_train_tokens and enough_held_out:
                break
            before = packer.n_tokens[TRAIN]
            sides = [text.eval_rows is None and is_held_out(d.key, text.held_out_fraction) for d in documents]
            packer.add(documents, sides, eval_split=False)
            meter.advance(packer.n_tokens[TRAIN] - before)
