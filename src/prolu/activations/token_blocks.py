"""Token blocks, [n_blocks, ctx] ids that begin with BOS, in memory or in a folder: all that a stream reads of a text.

blocks.json       where the text comes from, how many blocks there are, SHA-256 of the ids
train.bin         ids to train on, little-endian uint16 or uint32, block after block
held_out.bin      ids of other documents, for evaluation only
documents.bin     the number of the document of each held-out id, little-endian uint32
train_roles.bin, held_out_roles.bin   of chats: the number of the role of each id, uint8; 0 outside messages
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from prolu.runtime.files import read_json_object

BLOCKS_FILE = "blocks.json"
SIDES = ("train.bin", "held_out.bin")
"""The files of the two sides: `SIDES[held_out]`."""
DOCUMENTS_FILE = "documents.bin"
DOCUMENT_DTYPE = np.dtype(np.uint32)
ROLES_FILES = ("train_roles.bin", "held_out_roles.bin")
"""The files of the roles of the two sides: `ROLES_FILES[held_out]`."""
ROLE_DTYPE = np.dtype(np.uint8)

FACTS = {
    "source": str | list,
    "text_column": str,
    "split": str,
    "eval_split": str,
    "max_train_tokens": int,
    "special_tokens": str,
    "data_config": str,
    "held_out_fraction": float | int,
    "held_out_pool": int,
}
"""The facts that an index keeps about its text, with their types."""

LATER_FACTS = {"special_tokens": "parsed", "data_config": "", "held_out_fraction": 0.1, "held_out_pool": 0}
"""The facts that version 0.1.0 did not record, with the values that they had in it. They are compared only where they
are recorded; elsewhere the digest of the tokens shows whether the tokens are the same."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBlocks:
    """A corpus as two arrays of token ids, [n_blocks, ctx] each; every block begins with BOS."""

    train: np.ndarray
    """The blocks that SAEs train on."""
    held_out: np.ndarray
    """The blocks of other documents, for evaluation only."""
    source: str | list[str]
    """The name or path that the text came from; a list of paths, if it came from several files."""
    text_column: str = "text"
    """The column of the text or of the token ids."""
    data_config: str = ""
    """The configuration of the dataset; empty if it has only one, or a default."""
    split: str = "train"
    """The rows to train on."""
    eval_split: str = ""
    """The rows to score on; if empty, some of the documents of `split`."""
    special_tokens: str = "text"
    """Whether the name of a special token in the text was read as text, or parsed into that token."""
    max_train_tokens: int
    """The number of training tokens after which no more were read."""
    held_out_fraction: float = 0.1
    """The fraction of the documents of `split` that are held out, where there is no `eval_split`."""
    held_out_pool: int = 0
    """The number of held-out tokens, the first of the text, among which those that are scored are chosen; 0 if they are
    chosen among all that were read."""
    n_documents: int
    """The number of documents read, on both sides together."""
    n_rows_left_out: int = 0
    """The number of rows that were read and had no text, so that they are no documents."""
    n_tokens_dropped: int = 0
    """The number of tokens that were read and did not fill a block, on both sides together."""
    held_out_documents: np.ndarray | None = None
    """The number of the document of every held-out token, [n_blocks, ctx]; a BOS keeps the document of the token that
    it overwrote. None for blocks that were written before this was kept."""

    roles: Sequence[str] = ()
    """The roles of a text of chats, such as user and assistant; empty for another text."""
    train_roles: np.ndarray | None = None
    """The role of every training token, [n_blocks, ctx]: 1 for the first of `roles`, and 0 for tokens that are in no
    message. None for a text that is no chats."""
    held_out_roles: np.ndarray | None = None
    """The same of the held-out tokens."""
    chat_template: str = ""
    """SHA-256 of the chat template that turned chats into text; empty for another text."""

    kind = "text"
    """What messages call it."""
    unit = "token"
    """What messages call one of its positions."""

    @property
    def ctx(self) -> int:
        """The number of tokens per block."""
        return self.train.shape[1]

    @property
    def n_train_tokens(self) -> int:
        """The number of tokens to train on."""
        return self.train.size

    @property
    def n_held_out_tokens(self) -> int:
        """The number of tokens that are held out."""
        return self.held_out.size

    def digest(self) -> str:
        """Return SHA-256 of all token ids, which names the data of a study."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        total = hashlib.sha256(np.ascontiguousarray(self.train).data)
        total.update(np.ascontiguousarray(self.held_out).data)
        return total.hexdigest()


def holds_blocks(folder: str | Path) -> bool:
    """Return whether a folder was made by `BlocksFolder`, finished or not."""
    return os.path.isfile(Path(folder) / BLOCKS_FILE)  # also for a name that is too long for a file


def read_blocks(folder: str | Path) -> TokenBlocks:
    """Return the finished blocks in a folder, memory-mapped; every id is read once, to check the digest.

    Raises:
        ValueError: there are none, they are not finished, or they are not what was written.
    """
    folder = Path(folder)
    index = read_json_object(folder / BLOCKS_FILE, "token blocks")
    try:
        if index["sha256"] is None:
            raise ValueError(f"{folder}: its tokenising was interrupted; run the command that began it again")
        made = index["made"]
        dtype = np.dtype(index["dtype"])
        train, held_out = (_mapped(folder / SIDES[s], dtype, index["n_blocks"][s], made["ctx"]) for s in (0, 1))
        facts = {name: made.get(name, LATER_FACTS[name]) if name in LATER_FACTS else made[name] for name in FACTS}
        for name, value in facts.items():
            # `isinstance` takes a bool for an int, but a bool is not a number of tokens.
            if isinstance(value, bool) or not isinstance(value, FACTS[name]):
                raise TypeError
        names = facts["source"] if isinstance(facts["source"], list) else [facts["source"]]
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError
        if facts["held_out_pool"] < 0 or not 0 <= facts["held_out_fraction"] <= 1:
            raise TypeError
        documents = None
        documents_digest = index.get("documents")
        if documents_digest is not None:
            documents = _mapped(folder / DOCUMENTS_FILE, DOCUMENT_DTYPE, index["n_blocks"][1], made["ctx"])
        roles_digest = index.get("roles")
        roles: list[np.ndarray | None] = [None, None]
        if roles_digest is not None:
            roles = [_mapped(folder / ROLES_FILES[s], ROLE_DTYPE, index["n_blocks"][s], made["ctx"]) for s in (0, 1)]
            if not all(isinstance(role, str) for role in index["progress"]["roles"]):
                raise TypeError
        blocks = TokenBlocks(
            train=train,
            roles=() if roles_digest is None else tuple(index["progress"]["roles"]),
            train_roles=roles[0],
            held_out_roles=roles[1],
            chat_template="" if roles_digest is None else index["progress"]["chat_template"],
            held_out=held_out,
            held_out_documents=documents,
            n_documents=index["progress"]["n_documents"],
            n_rows_left_out=index["progress"].get("n_rows_left_out", 0),
            n_tokens_dropped=_n_tokens_dropped(index["progress"]),
            **facts,
        )
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{folder / BLOCKS_FILE}: not an index of token blocks") from None
    # Training would not notice damaged ids, and a study could never be repeated; so every reader checks them.
    if blocks.digest() != index["sha256"]:
        raise ValueError(f"{folder}: its token ids are not what was written (SHA-256)")
    if documents_digest is not None and sha256_of([folder / DOCUMENTS_FILE]) != documents_digest:
        raise ValueError(f"{folder / DOCUMENTS_FILE}: not what was written (SHA-256)")
    if roles_digest is not None and sha256_of([folder / file for file in ROLES_FILES]) != roles_digest:
        raise ValueError(f"{folder}: the roles of its tokens are not what was written (SHA-256)")
    return blocks


def _n_tokens_dropped(progress: Mapping[str, Any]) -> int:
    # Copied blocks have no tails; their index has the number of tokens instead.
    return progress.get("n_tokens_dropped", sum(map(len, progress.get("tails", ()))))


def sha256_of(files: Sequence[Path]) -> str:
    """Return SHA-256 over the content of all files, one after the other."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while part := content.read(2**24):
                total.update(part)
    return total.hexdigest()


def _mapped(file: Path, dtype: np.dtype, n_blocks: int, ctx: int) -> np.ndarray:
    size = file.stat().st_size if file.is_file() else -1
    if (
        n_blocks < 1
        or ctx < 1
        or dtype not in (np.uint8, np.uint16, np.uint32)
        or size != n_blocks * ctx * dtype.itemsize
    ):
        raise ValueError(f"{file}: not the {n_blocks} blocks of {ctx} tokens that its index names")
    return np.memmap(file, dtype, "r", shape=(n_blocks, ctx))
