"""Text to token blocks: which text is read, how much of it, and where its blocks go."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from prolu.activations.blocks_folder import BlocksFolder
from prolu.activations.chats import ChatTemplate
from prolu.activations.documents import HELD_OUT_FRACTION, Documents, is_held_out
from prolu.activations.packer import AS_TEXT, HELD_OUT, PARSED, TRAIN, Packer
from prolu.activations.resolving import absolute_paths, plain_source
from prolu.activations.text_rows import SplitRows
from prolu.activations.token_blocks import TokenBlocks, holds_blocks, read_blocks
from prolu.activations.tokenizers import bos_token_id, token_dtype, tokenizer_digest
from prolu.runtime.checks import one_of
from prolu.runtime.progress import Meter
from prolu.runtime.stopping import StoppedError, one_sentence

logger = logging.getLogger(__name__)

POOL_PER_SCORED_TOKEN = 8
"""The number of held-out tokens that are read for each token that is scored. It is large enough that the scored blocks
come from many documents, and small enough that most texts hold so many in their held-out tenth."""

HELD_OUT_POOL = POOL_PER_SCORED_TOKEN * 32_768
"""The number of held-out tokens in the pool where it is not known how many are scored: enough for the usual number."""

MAX_EVAL_SPLIT_TOKENS = 2**20
"""The number of tokens that earlier versions read of a split for evaluation."""


class ReadingStoppedError(StoppedError):
    """The disk failed while token blocks were written into a folder. Those that were written are kept."""

    resumes = "the token blocks that were written are kept; read the same text into the same folder again to resume"


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
    held_out_pool: int = HELD_OUT_POOL,
    folder: str | Path | None = None,
    progress: bool = False,
) -> TokenBlocks:
    """Read text, or token ids, and cut it into blocks of `ctx` tokens.

    Texts are tokenised, joined with BOS between them and cut into blocks; a tail that is shorter than a block is
    dropped. Rows of token ids that fill whole blocks are cut one by one: a row of 256 gives two blocks of 128. Rows of
    any other length are joined with BOS between them, as texts are. The first token of every block is overwritten with
    BOS. A mask beside the ids (`attention_mask`) says which of them are text; rows that seem to be padded and have no
    mask are refused. Rows without text are left out, counted and reported.

    A row may also be a chat, a list of messages with a role and a content each. The tokenizer's chat template turns it
    into text, whose markers become special tokens, and the role of every token is kept (see `TokenMask.keep_roles`).

    Which tokens are scored does not depend on `max_train_tokens`: they are chosen among the first `held_out_pool`
    tokens of the held-out documents.

    Args:
        source: `builtin` (the interpreter's own standard library), a .txt, .jsonl, .parquet or .arrow file, a list of
            such files or of texts, a folder of such files, the name of a dataset on the Hugging Face hub, a `Dataset`
            or `IterableDataset` of the datasets library (or its dict of them, by split), or a folder of token blocks,
            which are then read as they are. Paths may be `str` or `Path`.
        tokenizer: a fast transformers tokenizer.
        ctx: the number of tokens per block.
        max_train_tokens: reading of training text stops once there are this many tokens.
        text_column: the column that holds the text, the chats, or the token ids, where there are columns.
        data_config: the configuration of the dataset, where it has several, as its card lists them.
        split: the rows to train on: a split, or a slice of one, as in `train[0:40%]`.
        eval_split: the rows to evaluate on, as in `train[90:95%]`; if empty, some documents of `split`.
        special_tokens: how the name of a special token, such as `<|endoftext|>`, is tokenised inside a text: as `text`,
            or `parsed` into that token.
        held_out_fraction: the fraction of the documents of `split` to evaluate on, where `eval_split` is empty.
        held_out_pool: the number of held-out tokens to read at least, if the text has as many. The command line reads
            eight times as many as are scored. 0 reads the text as the versions before this option did, so that their
            studies can be resumed: reading ends with the training tokens, and tokens at the end of a row of token ids
            that do not fill a block are dropped.
        folder: where to write the blocks, which are then memory-mapped; writing that was interrupted is resumed.
        progress: whether to show the rate and the time left.

    Raises:
        ValueError: there is no such source, column or split, the splits overlap, the tokenizer does not have some of
            the token ids, there is too little text for one block on either side, or the folder holds something else.
        ReadingStoppedError: the disk of the folder is full; what was written is kept. It is an OSError.
    """
    if ctx < 2:
        raise ValueError(f"ctx {ctx}: a block must hold at least 2 tokens")
    source = plain_source(source)
    # Finished blocks are read as they are: their folder says how they were split, and nothing here can change it.
    if isinstance(source, str) and holds_blocks(source):
        return _finished_blocks(source, tokenizer, ctx)
    one_of("special_tokens", special_tokens, (AS_TEXT, PARSED))
    if held_out_pool < 0:
        raise ValueError(f"held_out_pool {held_out_pool}: must be 0 or more")
    rows = SplitRows(source, split, data_config)
    eval_rows = SplitRows(source, eval_split, data_config) if eval_split else None
    if eval_rows is not None and rows.overlaps(eval_rows):
        raise ValueError(f"eval_split {eval_split!r}: overlaps split {split!r}, so what is trained on would be scored")
    text = _Text(
        rows, eval_rows, text_column, max_train_tokens, float(held_out_fraction), held_out_pool, special_tokens
    )
    if folder is None:
        return _pack_in_memory(text, tokenizer, ctx, shown=progress)
    return _pack_into_folder(text, tokenizer, ctx, Path(folder), shown=progress)


class _Text(NamedTuple):
    """What a call of `load_blocks` asks for: which rows are read, and how many tokens are taken from them."""

    rows: SplitRows
    """The rows to train on."""
    eval_rows: SplitRows | None
    """The rows of a split for evaluation; None if documents of `rows` are held out."""
    column: str
    """The column that holds the text or the token ids."""
    max_train_tokens: int
    """The number of training tokens after which no more are read."""
    held_out_fraction: float
    """The fraction of the documents of `rows` that are held out, where there are no rows for evaluation."""
    held_out_pool: int
    """The number of held-out tokens to read at least; 0 for the rule of earlier versions."""
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
            "held_out_fraction": self.held_out_fraction,
            "held_out_pool": self.held_out_pool,
        }

    def packer(self, tokenizer: Any, ctx: int, folder: BlocksFolder | None) -> Packer:
        """Return a packer for this text."""
        return Packer(tokenizer, ctx, folder, self.special_tokens, drop_ends_of_rows=not self.held_out_pool)


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
    packer = text.packer(tokenizer, ctx, None)
    _pack(packer, text, ChatTemplate(tokenizer), shown=shown)
    return TokenBlocks(
        train=packer.take_blocks(TRAIN),
        held_out=packer.take_blocks(HELD_OUT),
        held_out_documents=packer.take_documents(),
        train_roles=packer.take_roles(TRAIN),
        held_out_roles=packer.take_roles(HELD_OUT),
        roles=tuple(packer.roles.names),
        chat_template=packer.chat_template if packer.has_chats else "",
        n_documents=packer.n_documents,
        n_rows_left_out=packer.n_rows_left_out,
        n_tokens_dropped=packer.n_tokens_dropped,
        **text.describe(),
    )


def _pack_into_folder(text: _Text, tokenizer: Any, ctx: int, folder: Path, *, shown: bool) -> TokenBlocks:
    # Writing that was interrupted is resumed only if all of this is still the same: anything else would mix two texts,
    # or two tokenizers, in one folder.
    made = text.describe() | {
        "ctx": ctx,
        "tokenizer": tokenizer_digest(tokenizer),
        "files": [rows.fingerprint() for rows in (text.rows, text.eval_rows) if rows is not None],
    }
    template = ChatTemplate(tokenizer)
    with one_sentence(ReadingStoppedError), BlocksFolder(folder, made, token_dtype(tokenizer)) as on_disk:
        if not on_disk.finished:
            # A folder that was begun by an earlier version, or for another number of scored tokens, is finished so.
            as_begun = {name: on_disk.made[name] for name in ("special_tokens", "held_out_pool")}
            begun = text._replace(**as_begun)
            packer = begun.packer(tokenizer, ctx, on_disk)
            _pack(packer, begun, template, shown=shown)
            packer.save()
            on_disk.finish()
    blocks = read_blocks(folder)
    template.check(blocks.chat_template, f"tokens {str(folder)!r}")
    return blocks


def _pack(packer: Packer, text: _Text, template: ChatTemplate, *, shown: bool) -> None:
    """Pack documents until there are enough tokens on both sides; those that the packer already holds are skipped.

    Raises:
        ValueError: there is too little text for one block on either side.
    """
    template.check(packer.chat_template, f"data {text.rows.source!r}")
    packer.chat_template = template.digest
    read = [Documents(text.rows, text.column, template)]
    _pack_training_split(packer, text, read[0], shown=shown)
    if text.eval_rows is not None:
        read.append(Documents(text.eval_rows, text.column, template))
        wanted = packer.blocks_of(text.held_out_pool or MAX_EVAL_SPLIT_TOKENS)
        for documents in packer.missing(read[1], eval_split=True):
            if packer.n_blocks(HELD_OUT) >= wanted:
                break
            packer.add(documents, [HELD_OUT] * len(documents), eval_split=True)
    packer.check(text.rows.source)
    if packer.n_without_roles:
        logger.warning(
            "data %s: of %s chats it cannot be told which token is of which message, since the chat template changes "
            "what it writes; their tokens have no role",
            text.rows.source, f"{packer.n_without_roles:,}",
        )  # fmt: skip
    # Packing that is resumed reads all rows again, and so counts them from the start.
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
    holds_out = text.eval_rows is None and text.held_out_fraction > 0
    # At least a block, which the rule of earlier versions wanted too.
    wanted = max(1, packer.blocks_of(text.held_out_pool)) if holds_out else 0
    total = text.max_train_tokens + wanted * packer.ctx
    with Meter("reading text", total, shown=shown) as meter:
        done = 0
        for documents in packer.missing(read, eval_split=False):
            n_train, n_held_out = packer.n_tokens
            read_before = done
            done = min(n_train, text.max_train_tokens) + min(n_held_out, wanted * packer.ctx)
            meter.advance(done - read_before)
            enough_to_train_on = n_train >= text.max_train_tokens
            # If tokens to score on are held out of this split, reading goes on until there are enough of them.
            if enough_to_train_on and packer.n_blocks(HELD_OUT) >= wanted:
                break
            # Only held-out documents are packed then, so that what is trained on does not depend on the pool.
            training_side = None if enough_to_train_on and text.held_out_pool else TRAIN
            sides = [
                HELD_OUT if holds_out and is_held_out(document.key, text.held_out_fraction) else training_side
                for document in documents
            ]
            packer.add(documents, sides, eval_split=False)
