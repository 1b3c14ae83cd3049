"""The writer of token blocks: a folder that grows, and that a process killed at any moment can resume."""

import os
from collections.abc import Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from prolu.activations.token_blocks import (
    BLOCKS_FILE,
    DOCUMENT_DTYPE,
    DOCUMENTS_FILE,
    FACTS,
    LATER_FACTS,
    ROLE_DTYPE,
    ROLES_FILES,
    SIDES,
    TokenBlocks,
    holds_blocks,
    sha256_of,
)
from prolu.runtime.files import (
    FolderBusyError,
    json_text,
    locked,
    read_json_object,
    through_json,
    write_at,
    write_atomically,
)

BLOCKS_PER_COPY = 2**16
"""The number of blocks written at once when blocks are copied."""


def copy_blocks(blocks: TokenBlocks, folder: Path) -> None:
    """Write finished blocks into a folder of their own."""
    made = {name: getattr(blocks, name) for name in (*FACTS, "ctx")}
    with BlocksFolder(folder, made, blocks.train.dtype) as copy:
        if copy.finished:
            return
        _copy_side(copy, blocks.train, False, None, blocks.train_roles)
        _copy_side(copy, blocks.held_out, True, blocks.held_out_documents, blocks.held_out_roles)
        noted = ["n_documents", "n_rows_left_out", "n_tokens_dropped"]
        noted += ["roles", "chat_template"] if blocks.train_roles is not None else []
        copy.note({name: getattr(blocks, name) for name in noted})
        copy.finish()


def _copy_side(
    copy: "BlocksFolder", rows: np.ndarray, held_out: bool, documents: np.ndarray | None, roles: np.ndarray | None
) -> None:
    # Some at a time, because the rows may be a memory map of more than fits into memory.
    for start in range(copy.n_blocks[held_out], len(rows), BLOCKS_PER_COPY):
        some = slice(start, start + BLOCKS_PER_COPY)
        copy.append(rows[some], held_out, *(None if t is None else t[some] for t in (documents, roles)))


def _is_same(name: str, there: Any, here: Any) -> bool:
    """Return whether a fact about the text is the same; two paths of one file are."""
    if name == "source" and isinstance(there, str) and isinstance(here, str):
        return os.path.realpath(there) == os.path.realpath(here)
    return there == here


class BlocksFolder:
    """A folder of token blocks that is being written. What was written before the last `note` survives a kill.

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
        """What the writer passed to `note` last; this class does not interpret it."""
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
            # This process has not read what the other one wrote, so it must not overwrite it; a second try will read
            # it.
            raise FolderBusyError(f"folder {str(self._folder)!r}: another process has just begun there; try again")
        self.note({})

    def _resume(self) -> None:
        index = read_json_object(self._folder / BLOCKS_FILE, "token blocks")
        try:
            made = index["made"]
            self.progress = index["progress"]
            self.n_blocks = list(index["n_blocks"])
            self.finished = index["sha256"] is not None
            # A folder that an earlier version began gets no facts that this version has added.
            self._not_kept = LATER_FACTS.keys() - made.keys()
            self.made |= {name: LATER_FACTS[name] for name in self._not_kept}
            # A folder keeps the held-out pool that it was begun with. The pool asked for depends on the number of
            # tokens to score on, so another study of the same text may ask for another pool although the same blocks
            # serve it.
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

    def append(
        self,
        blocks: np.ndarray,
        held_out: bool,
        documents: np.ndarray | None = None,
        roles: np.ndarray | None = None,
    ) -> None:
        """Add whole blocks to a side, with the documents and the roles of their tokens if these are kept.

        Documents are kept for all blocks of a side or for none, and roles for all blocks of both sides or for none.
        """
        if not self._is_locked:
            # The folder is created only with the first block, so that a request that turns out to be wrong leaves
            # nothing behind.
            self._begin()
        self._write_at_end(SIDES[held_out], held_out, blocks, self._dtype)
        if documents is not None:
            self._write_at_end(DOCUMENTS_FILE, held_out, documents, DOCUMENT_DTYPE)
        if roles is not None:
            self._write_at_end(ROLES_FILES[held_out], held_out, roles, ROLE_DTYPE)
        self.n_blocks[held_out] += len(blocks)

    def _write_at_end(self, file: str, held_out: bool, rows: np.ndarray, dtype: np.dtype) -> None:
        # The end follows from the count of blocks, not from the size of the file, so that blocks which a killed process
        # appended without noting them are overwritten.
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
        documents_digest = sha256_of([documents]) if documents.exists() else None
        roles = [self._folder / file for file in ROLES_FILES]
        roles_digest = sha256_of(roles) if all(file.exists() for file in roles) else None
        self._write_index(sha256_of([self._folder / side for side in SIDES]), documents_digest, roles_digest)

    def _write_index(self, sha256: str | None, documents: str | None = None, roles: str | None = None) -> None:
        index = {
            "made": {name: value for name, value in self.made.items() if name not in self._not_kept},
            "dtype": self._dtype.name,
            "n_blocks": self.n_blocks,
            "sha256": sha256,
            "documents": documents,
            # Only chats have roles. For other texts the field is left out, so that their index is as in earlier
            # versions.
            **({} if roles is None else {"roles": roles}),
            "progress": self.progress,
        }
        write_atomically(self._folder / BLOCKS_FILE, json_text(index) + "\n")
