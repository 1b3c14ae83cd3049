"""The packer: documents go in, blocks of `ctx` tokens come out, in memory or in a folder."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from prolu.activations.blocks_folder import BlocksFolder
from prolu.activations.chats import NO_ROLE, Chat, RoleNumbers
from prolu.activations.documents import Document
from prolu.activations.packing_progress import PackingProgress
from prolu.activations.token_blocks import DOCUMENT_DTYPE, ROLE_DTYPE, SIDES
from prolu.activations.tokenizers import bos_token_id, n_token_ids, token_dtype

TRAIN = False
HELD_OUT = True
"""The two sides on which tokens are packed. They are also the indices of each list of two below."""

DOCUMENTS_PER_CALL = 64
"""The number of texts in one call of the tokenizer, and of documents in the batches that a resumed packing skips."""

TOKENS_BETWEEN_SAVES = 2**20
"""The number of tokens after which blocks are written to the disk; at most these are lost if the process is killed."""


AS_TEXT = "text"
PARSED = "parsed"
"""How the name of a special token, such as <|endoftext|>, is tokenised inside a text: as ordinary text, or as that
token."""


class _BlockQueue:
    """Token ids, or document numbers, which are cut into blocks.

    A piece is joined to the tokens that do not fill a block yet, or is cut by itself. The blocks come in the order in
    which they become whole, however often `take_blocks` is called.
    """

    def __init__(self, ctx: int, dtype: np.dtype, tail: Sequence[int]):
        self._ctx = ctx
        self._blocks = [np.empty((0, ctx), dtype)]
        self._pieces = [np.array(tail, dtype)]

    def append(self, piece: np.ndarray, *, by_itself: bool) -> None:
        """Join a piece to the tokens that do not fill a block yet; or cut it by itself, if it fills whole blocks."""
        if by_itself:
            self._cut()  # what was joined before became whole before
            self._blocks.append(piece.reshape(-1, self._ctx))
        else:
            self._pieces.append(piece)

    def take_blocks(self) -> np.ndarray:
        """Return all whole blocks, [n, ctx]; what does not fill a block stays."""
        self._cut()
        blocks = np.concatenate(self._blocks)
        self._blocks = [blocks[:0].copy()]  # a copy, because a view would keep all of `blocks` in memory
        return blocks

    def tail(self) -> list[int]:
        """Return what does not fill a block."""
        self._cut()
        return self._pieces[0].tolist()

    def _cut(self) -> None:
        if len(self._pieces) == 1:
            return
        joined = np.concatenate(self._pieces)
        n_whole = len(joined) // self._ctx * self._ctx
        self._blocks.append(joined[:n_whole].reshape(-1, self._ctx))
        # A copy, because a view of the tail would keep all of `joined` in memory.
        self._pieces = [joined[n_whole:].copy()]


class Packer:
    """Turns documents into blocks of `ctx` token ids on either side, in memory or in a folder.

    All documents on a side are joined end to end and cut into blocks, except rows of token ids that fill whole blocks:
    these are cut by themselves. With a folder, whole blocks move there from time to time, and packing that was
    interrupted is resumed from them.
    """

    def __init__(
        self,
        tokenizer: Any,
        ctx: int,
        folder: BlocksFolder | None,
        special_tokens: str = AS_TEXT,
        *,
        drop_ends_of_rows: bool = False,
    ):
        """Prepare a packer, with the progress that the folder notes.

        Args:
            tokenizer: A fast transformers tokenizer.
            ctx: The number of tokens per block.
            folder: Where to write the blocks; None keeps them in memory until they are taken.
            special_tokens: `AS_TEXT` or `PARSED`.
            drop_ends_of_rows: Whether all rows of token ids are cut by themselves, and what does not fill a block is
                dropped: the rule of earlier versions, whose folders and studies are still resumed.
        """
        self._tokenizer = tokenizer
        self.ctx = ctx
        self._bos = bos_token_id(tokenizer)
        self._dtype = token_dtype(tokenizer)
        self._n_token_ids = n_token_ids(tokenizer)
        self._drop_ends_of_rows = drop_ends_of_rows
        self._folder = folder
        self._as_text = special_tokens == AS_TEXT
        progress = PackingProgress.read({} if folder is None else folder.progress)
        n_blocks = [0, 0] if folder is None else folder.n_blocks
        self.n_tokens = [n * ctx + len(tail) for n, tail in zip(n_blocks, progress.tails, strict=True)]
        self.n_documents = progress.n_documents
        self.n_rows_left_out = progress.n_rows_left_out
        self._n_calls = list(progress.n_calls)
        self._queues = [_BlockQueue(ctx, self._dtype, tail) for tail in progress.tails]
        # The document of every held-out token, in step with the queue of held-out tokens. A folder that was begun
        # without them is finished without them, because they must be there for all tokens or for none.
        self._documents = None
        if progress.documents_tail is not None:
            self._documents = _BlockQueue(ctx, DOCUMENT_DTYPE, progress.documents_tail)
        # The role of every token on both sides, in step with the queues of tokens, if the text is chats.
        self.roles = RoleNumbers(progress.roles)
        self._role_queues = None
        if progress.roles_tails is not None:
            self._role_queues = [_BlockQueue(ctx, ROLE_DTYPE, tail) for tail in progress.roles_tails]
        self.chat_template = progress.chat_template
        self.n_without_roles = 0
        """The number of chats for which it is not known which token belongs to which message."""
        self._n_unsaved = 0

    def missing(self, documents: Iterable[Document], *, eval_split: bool) -> Iterator[list[Document]]:
        """Yield the batches of a split's documents that have not been added yet."""
        # The same batches as before an interruption, since `_n_calls` counts whole batches.
        batches = _batched(documents, DOCUMENTS_PER_CALL)
        return islice(batches, self._n_calls[eval_split], None)

    def add(self, documents: Sequence[Document], sides: Sequence[bool | None], *, eval_split: bool) -> None:
        """Add a batch of documents, each on its side, and save from time to time.

        A document whose side is None is counted, and left out.

        Raises:
            ValueError: the tokenizer does not have some of the token ids.
        """
        numbered = enumerate(zip(documents, sides, strict=True), self.n_documents)
        kept = [(number, document.content, side) for number, (document, side) in numbered if side is not None]
        # All texts of a batch in one call, because a fast tokenizer works on them in parallel.
        texts = [content for _, content, _ in kept if isinstance(content, str)]
        encoded: Iterator[list[int]] = iter(())
        if texts:  # a tokenizer does not take an empty list
            encoded = iter(self._encoded(texts))
        for number, content, side in kept:
            roles = None
            by_itself = False
            if isinstance(content, str):
                piece = np.array([self._bos, *next(encoded)], dtype=self._dtype)
            elif isinstance(content, Chat):
                piece, roles = self._chat(content)
            else:
                piece, by_itself = self._row(content)
            self._queues[side].append(piece, by_itself=by_itself)
            self._append_roles(side, roles, len(piece), by_itself=by_itself)
            if side == HELD_OUT and self._documents is not None:
                self._documents.append(np.full(len(piece), number, DOCUMENT_DTYPE), by_itself=by_itself)
            self.n_tokens[side] += len(piece)
            self._n_unsaved += len(piece)
        self.n_documents += len(documents)
        self._n_calls[eval_split] += 1
        # Progress can be saved only here, because between two batches it says exactly which documents have been read.
        if self._n_unsaved >= TOKENS_BETWEEN_SAVES:
            self.save()

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        # Without the flag, a document that only mentions <|endoftext|> would have a BOS in its middle.
        found = self._tokenizer(
            texts, add_special_tokens=False, verbose=False, split_special_tokens=self._as_text
        )  # fmt: skip
        return found["input_ids"]

    def _chat(self, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a chat, and the number of the role of each."""
        # Here names of special tokens are always parsed, because the template writes them as markers.
        found = self._tokenizer(
            chat.text, add_special_tokens=False, verbose=False, split_special_tokens=False, return_offsets_mapping=True
        )
        ids = np.array(found["input_ids"], dtype=self._dtype)
        roles = self.roles.of_tokens(chat, found["offset_mapping"])
        self.n_without_roles += not chat.spans
        if not len(ids) or ids[0] != self._bos:  # some templates begin with BOS themselves
            ids = np.concatenate(([self._bos], ids)).astype(self._dtype)
            roles = np.concatenate(([NO_ROLE], roles)).astype(ROLE_DTYPE)
        return ids, roles

    def _append_roles(self, side: bool, roles: np.ndarray | None, n: int, *, by_itself: bool) -> None:
        """Keep the roles of a document's tokens, if the text is chats."""
        if self._role_queues is None and roles is not None:
            if any(self.n_tokens):
                raise ValueError("data: some rows are chats and others are not; choose a column, or files, of one kind")
            self._role_queues = [_BlockQueue(self.ctx, ROLE_DTYPE, ()) for _ in SIDES]
        if self._role_queues is not None:
            self._role_queues[side].append(np.zeros(n, ROLE_DTYPE) if roles is None else roles, by_itself=by_itself)

    def _row(self, ids: np.ndarray) -> tuple[np.ndarray, bool]:
        """Return the tokens of a row of ids, and whether they are cut by themselves.

        A row that fills whole blocks is, so that no block spans two rows. Any other is a document, which is joined to
        others with a BOS before it, as a text is.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._n_token_ids:
            raise ValueError(
                f"token ids from {ids.min()} to {ids.max()}: the tokenizer has the ids 0-{self._n_token_ids - 1}, so "
                "another tokenizer wrote them"
            )
        n_over = len(ids) % self.ctx
        if self._drop_ends_of_rows:
            ids = ids[: len(ids) - n_over]
        elif n_over and ids[0] != self._bos:
            ids = np.concatenate(([self._bos], ids))
        return ids.astype(self._dtype), self._drop_ends_of_rows or not n_over

    def blocks_of(self, n_tokens: int) -> int:
        """Return the number of blocks that hold this many tokens."""
        return -(-n_tokens // self.ctx)

    def n_blocks(self, side: bool) -> int:
        """Return the number of whole blocks on a side."""
        return self.n_tokens[side] // self.ctx

    def check(self, source: Any) -> None:
        """Raise ValueError if a side does not have even one block."""
        for name, side in (("training", TRAIN), ("held-out", HELD_OUT)):
            if not self.n_blocks(side):
                raise ValueError(
                    f"data {source!r}: {self.n_documents} documents give {self.n_tokens[side]} {name} tokens, "
                    f"fewer than one block of {self.ctx}; pass more text or a smaller --ctx"
                )

    def save(self) -> None:
        """Move whole blocks to the disk and note the progress there, if there is a folder for them."""
        self._n_unsaved = 0
        if self._folder is None:
            return
        # The progress is noted last: until then, a resumed packing overwrites what is appended here.
        self._folder.append(self.take_blocks(TRAIN), TRAIN, roles=self.take_roles(TRAIN))
        self._folder.append(self.take_blocks(HELD_OUT), HELD_OUT, self.take_documents(), self.take_roles(HELD_OUT))
        self._folder.note(self._progress().noted())

    def _progress(self) -> PackingProgress:
        tails = [queue.tail() for queue in self._queues]
        documents_tail = None if self._documents is None else self._documents.tail()
        progress = PackingProgress(self.n_documents, list(self._n_calls), tails, documents_tail, self.n_rows_left_out)
        if self._role_queues is None:
            return progress
        roles_tails = [queue.tail() for queue in self._role_queues]
        return progress._replace(roles=self.roles.names, roles_tails=roles_tails, chat_template=self.chat_template)

    def take_blocks(self, side: bool) -> np.ndarray:
        """Return the whole blocks of a side since the last call, [n, ctx]; the tokens that do not fill one stay."""
        blocks = self._queues[side].take_blocks()
        # A block begins in the middle of a document in general, and a language model expects BOS first.
        blocks[:, 0] = self._bos
        return blocks

    @property
    def n_tokens_dropped(self) -> int:
        """The number of tokens so far that do not fill a block, on both sides together."""
        return self._progress().n_tokens_dropped

    @property
    def has_chats(self) -> bool:
        """Whether the text is chats."""
        return self._role_queues is not None

    def take_roles(self, side: bool) -> np.ndarray | None:
        """Return the roles of the tokens of a side's blocks since the last call; None if the text is no chats."""
        if self._role_queues is None:
            return None
        roles = self._role_queues[side].take_blocks()
        roles[:, 0] = NO_ROLE  # of BOS, which is no part of a message
        return roles

    def take_documents(self) -> np.ndarray | None:
        """Return the documents of the tokens of held-out blocks since the last call; None if they are not kept."""
        return None if self._documents is None else self._documents.take_blocks()


def _batched(items: Iterable[Document], n: int) -> Iterator[list[Document]]:
    """Yield lists of `n` items; the last may be shorter."""
    rest = iter(items)
    while some := list(islice(rest, n)):
        yield some
