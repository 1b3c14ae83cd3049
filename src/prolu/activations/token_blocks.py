"""Token blocks, [n_blocks, ctx] ids that begin with BOS, in memory or in a folder: all that a stream reads of a text.

blocks.json       where the text comes from, how many blocks there are, SHA-256 of the ids
train.bin         ids to train on, little-endian uint16 or uint32, block after block
held_out.bin      ids of other documents, for evaluation only
documents.bin     the number of the document of each held-out id, little-endian uint32
"""

import hashlib
import os
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from prolu.runtime.files import (
    FolderBusyError,
    json_text,
    locked,
    read_json_object,
    through_json,
    write_at,
    write_atomically,
)

BLOCKS_FILE = "blocks.json"
SIDES = ("train.bin", "held_out.bin")
"""The files of the two sides: `SIDES[held_out]`."""
DOCUMENTS_FILE = "documents.bin"
DOCUMENT_DTYPE = np.dtype(np.uint32)

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
"""The facts that version 0.1.0 did not keep yet, with what was always so then. They are compared only where they are
kept, since the digest of the tokens says whether they mattered."""

BLOCKS_PER_COPY = 2**16
"""The number of blocks written at once when blocks are copied."""


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

    @property
    def ctx(self) -> int:
        """The number of tokens per block."""
        return self.train.shape[1]

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
            # A bool is an int to isinstance, and no number of tokens.
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
        blocks = TokenBlocks(
            train=train,
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
    if documents_digest is not None and _sha256([folder / DOCUMENTS_FILE]) != documents_digest:
        raise ValueError(f"{folder / DOCUMENTS_FILE}: not what was written (SHA-256)")
    return blocks


def _n_tokens_dropped(progress: Mapping[str, Any]) -> int:
    # A copy of blocks has no tails, and keeps their length.
    return progress.get("n_tokens_dropped", sum(map(len, progress.get("tails", ()))))


def _sha256(files: Sequence[Path]) -> str:
    """Return SHA-256 over the content of all files, one after the other."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while part := content.read(2**24):
                total.update(part)
    return total.hexdigest()


def _mapped(file: Path, dtype: np.dtype, n_blocks: int, ctx: int) -> np.ndarray:
    size = file.stat().st_size if file.is_file() else -1
    if n_blocks < 1 or ctx < 1 or dtype not in (np.uint16, np.uint32) or size != n_blocks * ctx * dtype.itemsize:
        raise ValueError(f"{file}: not the {n_blocks} blocks of {ctx} tokens that its index names")
    return np.memmap(file, dtype, "r", shape=(n_blocks, ctx))


def copy_blocks(blocks: TokenBlocks, folder: Path) -> None:
    """Write finished blocks into a folder of their own."""
    made = {name: getattr(blocks, name) for name in (*FACTS, "ctx")}
    with BlocksFolder(folder, made, blocks.train.dtype) as copy:
        if copy.finished:
            return
        _copy_side(copy, blocks.train, False, None)
        _copy_side(copy, blocks.held_out, True, blocks.held_out_documents)
        copy.note({name: getattr(blocks, name) for name in ("n_documents", "n_rows_left_out", "n_tokens_dropped")})
        copy.finish()


def _copy_side(copy: "BlocksFolder", rows: np.ndarray, held_out: bool, documents: np.ndarray | None) -> None:
    # Some at a time, because the rows may be a memory map of more than fits into memory.
    for start in range(copy.n_blocks[held_out], len(rows), BLOCKS_PER_COPY):
        some = slice(start, start + BLOCKS_PER_COPY)
        copy.append(rows[some], held_out, None if documents is None else documents[some])


def _is_same(name: str, there: Any, here: Any) -> bool:
    """Return whether a fact about the text is the same; two paths of one file are."""
    if name == "source" and isinstance(there, str) and isinstance(here, str):
        return os.path.realpath(there) == os.path.realpath(here)
    return there == here


class BlocksFolder:
    """Token blocks while they are written; whatever was noted survives a kill at any moment.

    `with BlocksFolder(...) as folder:` keeps other processes out; the folder is created with the first block.
    """

    def __init__(self, folder: Path, made: Mapping[str, Any], dtype: np.dtype):
        """Begin a folder of token blocks, or resume it where `note` was last called.

        Args:
            folder: the folder, which need not exist.
            made: everything that decides the blocks; blocks that are there already must have been made from the same.
            dtype: the number format of the ids.

        Raises:
            ValueError: the folder holds something else.
        """
        self._folder = folder
        self.made = through_json(made)
        """Everything that decides the blocks."""
        self._not_kept: Set[str] = set()
        self._dtype = dtype
        self.n_blocks = [0, 0]
        """The numbers of blocks on the training side and on the held-out side."""
        self.finished = False
        """Whether all blocks are there and sealed by their digest."""
        self.progress: dict[str, Any] = {}
        """What was last noted by the writer, in its own terms."""
        if holds_blocks(folder):
            self._resume()
        elif folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
            raise ValueError(f"tokens {str(folder)!r}: not empty, and no token blocks; choose another folder")
        self._lock = ExitStack()
        self._is_locked = False

    def __enter__(self) -> "BlocksFolder":
        if self._folder.exists() and not self.finished:  # any number of processes may read finished blocks
            self._take_lock()
            if holds_blocks(self._folder):
                self._resume()  # the previous owner may have added blocks before it let go of the lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        self._is_locked = False

    def _take_lock(self) -> None:
        self._lock.enter_context(locked(self._folder))
        self._is_locked = True

    def _begin(self) -> None:
        """Create the folder and lock it.

        Raises:
            FolderBusyError: another process has begun the same folder since this one looked.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if holds_blocks(self._folder):
            # What that process wrote was not looked at, so this one may not write over it: a second try reads it.
            raise FolderBusyError(f"folder {str(self._folder)!r}: another process has just begun there; try again")
        self.note({})

    def _resume(self) -> None:
        index = read_json_object(self._folder / BLOCKS_FILE, "token blocks")
        try:
            made = index["made"]
            self.progress = index["progress"]
            self.n_blocks = list(index["n_blocks"])
            self.finished = index["sha256"] is not None
            # A folder of an earlier version is finished as it was begun, and does not say more than it did.
            self._not_kept = LATER_FACTS.keys() - made.keys()
            self.made |= {name: LATER_FACTS[name] for name in self._not_kept}
            # A folder keeps the pool that it was begun with, since what is asked for follows from the number of tokens
            # to score on: another study of the same text may ask for another, and need no other blocks.
            self.made["held_out_pool"] = made.get("held_out_pool", LATER_FACTS["held_out_pool"])
            if type(self.made["held_out_pool"]) is not int:
                raise TypeError
            held = {name: made.get(name) for name in made.keys() | (self.made.keys() - self._not_kept)}
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{self._folder / BLOCKS_FILE}: not an index of token blocks") from None
        for name, value in sorted(held.items()):
            if not _is_same(name, value, self.made.get(name)):
                raise ValueError(
                    f"tokens {str(self._folder)!r} holds other blocks: {name} is {value!r} there, "
                    f"{self.made.get(name)!r} here; choose another folder"
                )

    def append(self, blocks: np.ndarray, held_out: bool, documents: np.ndarray | None = None) -> None:
        """Add whole blocks to a side, with the documents of their tokens if these are kept.

        Documents are kept for all blocks of a side or for none.
        """
        if not self._is_locked:
            # Not before the first block: a request that turns out to be wrong leaves nothing behind.
            self._begin()
        self._write_at_end(SIDES[held_out], held_out, blocks, self._dtype)
        if documents is not None:
            self._write_at_end(DOCUMENTS_FILE, held_out, documents, DOCUMENT_DTYPE)
        self.n_blocks[held_out] += len(blocks)

    def _write_at_end(self, file: str, held_out: bool, rows: np.ndarray, dtype: np.dtype) -> None:
        # The end by the count of blocks, not by the size of the file: what a killed process appended without noting it
        # is overwritten.
        end = self.n_blocks[held_out] * self.made["ctx"] * dtype.itemsize
        write_at(self._folder / file, end, np.ascontiguousarray(rows, dtype).tobytes())

    def note(self, progress: dict[str, Any]) -> None:
        """Record the blocks added so far, and what the writer needs in order to resume behind them."""
        self.progress = progress
        self._write_index(None)

    def finish(self) -> None:
        """Seal the folder with the digests of its files; nothing can be added afterwards."""
        self.finished = True
        documents = self._folder / DOCUMENTS_FILE
        documents_digest = _sha256([documents]) if documents.exists() else None
        self._write_index(_sha256([self._folder / side for side in SIDES]), documents_digest)

    def _write_index(self, sha256: str | None, documents: str | None = None) -> None:
        index = {
            "made": {name: value for name, value in self.made.items() if name not in self._not_kept},
            "dtype": self._dtype.name,
            "n_blocks": self.n_blocks,
            "sha256": sha256,
            "documents": documents,
            "progress": self.progress,
        }
        write_atomically(self._folder / BLOCKS_FILE, json_text(index) + "\n")
