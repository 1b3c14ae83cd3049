"""Token blocks, [n_blocks, ctx] ids that begin with BOS, in memory or in a folder: all that a stream reads of a text.

blocks.json       where they come from, how many there are, SHA-256 of the ids
train.bin         ids to train on, little-endian uint16 or uint32, block after block
held_out.bin      ids of other documents, for evaluation only
documents.bin     for each id held out, the number of its document, little-endian uint32
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from prolu.runtime.files import owned, write_at, write_atomically

BLOCKS_FILE = "blocks.json"
SIDES = ("train.bin", "held_out.bin")
"""Files of the two sides; `SIDES[held_out]`."""
DOCUMENTS_FILE, DOCUMENT_DTYPE = "documents.bin", np.dtype(np.uint32)


FACTS = {"source": str, "text_column": str, "split": str, "eval_split": str, "max_train_tokens": int}
"""What an index says of a text, by kind."""

BLOCKS_PER_COPY = 2**16
"""Blocks written at once where they are copied."""


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
    held_out_documents: np.ndarray | None = None
    """Of every token held out, the number of its document, [n_blocks, ctx]; a BOS written over a token has that
    token's. None where blocks were written before this was kept."""

    @property
    def ctx(self) -> int:
        """Tokens per block."""
        return self.train.shape[1]

    def digest(self) -> str:
        """SHA-256 of all token ids: names the data of a study."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        total = hashlib.sha256(np.ascontiguousarray(self.train).data)
        total.update(np.ascontiguousarray(self.held_out).data)
        return total.hexdigest()


def holds_blocks(folder: str | Path) -> bool:
    """Whether a folder was made by `BlocksFolder`, finished or not."""
    return (Path(folder) / BLOCKS_FILE).is_file()


def read_blocks(folder: str | Path) -> TokenBlocks:
    """Finished blocks in a folder, memory-mapped; every id is read once, to check the digest.

    Raises:
        ValueError: none there, not finished, or not what was written.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / BLOCKS_FILE).read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{folder}: no token blocks here (no {BLOCKS_FILE})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{folder / BLOCKS_FILE}: not JSON") from None
    try:
        if index["sha256"] is None:
            raise ValueError(f"{folder}: its tokenising was interrupted; run the command that began it again")
        made, dtype = index["made"], np.dtype(index["dtype"])
        sides = {side: _mapped(folder / SIDES[side], dtype, index["n_blocks"][side], made["ctx"]) for side in (0, 1)}
        facts = {name: made[name] for name in FACTS}
        if not all(type(value) is FACTS[name] for name, value in facts.items()):
            raise TypeError
        documents, digest = None, index.get("documents")
        if digest is not None:
            documents = _mapped(folder / DOCUMENTS_FILE, DOCUMENT_DTYPE, index["n_blocks"][1], made["ctx"])
        blocks = TokenBlocks(
            train=sides[0], held_out=sides[1], held_out_documents=documents,
            n_documents=index["progress"]["n_documents"], **facts,
        )  # fmt: skip
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{folder / BLOCKS_FILE}: not an index of token blocks") from None
    if blocks.digest() != index["sha256"]:
        raise ValueError(f"{folder}: its token ids are not what was written (SHA-256)")
    if digest is not None and _sha256([folder / DOCUMENTS_FILE]) != digest:
        raise ValueError(f"{folder / DOCUMENTS_FILE}: not what was written (SHA-256)")
    return blocks


def _sha256(files: Sequence[Path]) -> str:
    """Over all files, one after the other."""
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
    """Writes finished blocks into a folder of their own."""
    with BlocksFolder(folder, {name: getattr(blocks, name) for name in (*FACTS, "ctx")}, blocks.train.dtype) as copy:
        if not copy.finished:
            for held_out, rows in ((False, blocks.train), (True, blocks.held_out)):
                numbers = blocks.held_out_documents if held_out else None
                for start in range(copy.n_blocks[held_out], len(rows), BLOCKS_PER_COPY):
                    some = slice(start, start + BLOCKS_PER_COPY)
                    copy.append(rows[some], held_out, None if numbers is None else numbers[some])
            copy.note({"n_documents": blocks.n_documents})
            copy.finish()


class BlocksFolder:
    """Token blocks while they are written; what was noted survives any end of the process.

    `with BlocksFolder(...) as folder:` keeps other processes out; the folder is created by the first block.
    """

    def __init__(self, folder: Path, made: Mapping[str, Any], dtype: np.dtype):
        """Begins, or goes on where `note` was last called.

        Args:
            made: all that decides the blocks; what is there must have been made so too.

        Raises:
            ValueError: the folder holds something else.
        """
        self._folder, self._made, self._dtype = folder, json.loads(json.dumps(made)), dtype
        self.n_blocks, self.finished = [0, 0], False
        self.progress: dict[str, Any] = {}
        """As last noted."""
        if holds_blocks(folder):
            self._go_on()
        elif folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
            raise ValueError(f"tokens {str(folder)!r}: not empty, and no token blocks; choose another folder")
        self._lock = ExitStack()

    def __enter__(self) -> "BlocksFolder":
        if self._folder.exists() and not self.finished:  # any number may read what is finished
            self._lock.enter_context(owned(self._folder))
            if holds_blocks(self._folder):
                self._go_on()  # its last owner may have come further since
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def _go_on(self) -> None:
        try:
            index = json.loads((self._folder / BLOCKS_FILE).read_text(encoding="utf-8"))
            made, self.progress = index["made"], index["progress"]
            self.n_blocks, self.finished = list(index["n_blocks"]), index["sha256"] is not None
            held = {name: made.get(name) for name in made.keys() | self._made.keys()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{self._folder / BLOCKS_FILE}: not an index of token blocks") from None
        for name, value in sorted(held.items()):
            if value != self._made.get(name):
                raise ValueError(
                    f"tokens {str(self._folder)!r} holds other blocks: {name} is {value!r} there, "
                    f"{self._made.get(name)!r} here; choose another folder"
                )

    def append(self, blocks: np.ndarray, held_out: bool, documents: np.ndarray | None = None) -> None:
        """Adds whole blocks, and the documents of their tokens if they are kept for all blocks of that side; what a
        process that died had added without noting it is overwritten.
        """
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            self._lock.enter_context(owned(self._folder))
            self.note({})
        at = self.n_blocks[held_out] * self._made["ctx"] * self._dtype.itemsize
        write_at(self._folder / SIDES[held_out], at, np.ascontiguousarray(blocks, self._dtype).tobytes())
        if documents is not None:
            at = self.n_blocks[held_out] * self._made["ctx"] * DOCUMENT_DTYPE.itemsize
            write_at(self._folder / DOCUMENTS_FILE, at, np.ascontiguousarray(documents, DOCUMENT_DTYPE).tobytes())
        self.n_blocks[held_out] += len(blocks)

    def note(self, progress: dict[str, Any]) -> None:
        """So far has been read what `progress` says, and all blocks that came of it lie in the files."""
        self.progress = progress
        self._write_index(None)

    def finish(self) -> None:
        """Nothing will be added: the whole is sealed."""
        self.finished = True
        documents = self._folder / DOCUMENTS_FILE
        self._write_index(
            _sha256([self._folder / side for side in SIDES]), _sha256([documents]) if documents.exists() else None
        )

    def _write_index(self, sha256: str | None, documents: str | None = None) -> None:
        index = {
            "made": self._made, "dtype": self._dtype.name, "n_blocks": self.n_blocks, "sha256": sha256,
            "documents": documents, "progress": self.progress,
        }  # fmt: skip
        write_atomically(self._folder / BLOCKS_FILE, json.dumps(index) + "\n")


def bos_token_id(tokenizer: Any) -> int:
    """The token that begins every block: BOS, or EOS where a tokenizer has no BOS."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a BOS nor an EOS token to begin a block with")
