"""Activations on the disk: harvested once at several hooks, in the order of the blocks, and read in any other order.

store.json                            what made them; every shard with its SHA-256
tokens/                               the token blocks (see `token_blocks.py`)
HOOK/00000.safetensors ...            `acts` [blocks, ctx, d_in] of consecutive training blocks, not normalised
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from prolu.activations.harvesting import ActivationSource, Piece
from prolu.activations.language_model import DTYPES
from prolu.activations.token_blocks import TokenBlocks, read_blocks
from prolu.runtime.files import read_json_object
from prolu.runtime.names import is_plain_name

STORE_FILE = "store.json"
TOKENS_FOLDER = "tokens"

BLOCKS_PER_READ = 64
"""The number of blocks that are read, and handed out, at once."""

READERS = 4
"""The number of threads that copy blocks into the buffer: copying from the system's file cache is bound by one core,
not by memory."""


class ActivationStore(ActivationSource):
    """A complete store of activations, written by `harvest`; blocks are read as they are asked for."""

    def __init__(self, folder: str | Path):
        """Open a store. Nothing but the headers of its shards is kept in memory.

        Raises:
            ValueError: there is no store, it is incomplete, or a shard is missing or not what the index says.
        """
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.made = index["made"]
        self.hooks = tuple(self.made["hooks"])
        self.dtype = self.made["dtype"]
        self._shards = index["shards"]
        self._widths = self.made["d_in"]
        self._n_blocks = self.made["n_blocks"]
        self._per_shard = self.made["blocks_per_shard"]
        n_missing = self.n_shards - len(self._shards)
        if n_missing:
            raise ValueError(
                f"store {str(folder)!r}: {n_missing} of {self.n_shards} shards are missing; run the harvest again to "
                "complete it"
            )
        self._starts = {hook: [self._start_of(i, hook) for i in range(self.n_shards)] for hook in self.hooks}
        self._digests = {self.folder / shard["file"]: shard["sha256"] for some in self._shards for shard in some}
        self._verified: set[Path] = set()

    @property
    def n_shards(self) -> int:
        """The number of files per hook."""
        return -(-self._n_blocks // self._per_shard)

    def blocks(self) -> TokenBlocks:
        """Return the text whose activations these are, with its held-out blocks."""
        return read_blocks(self.folder / TOKENS_FOLDER)

    def check(self, facts: dict[str, Any]) -> None:
        """Raise ValueError unless a model and blocks described by `facts` would give these activations."""
        for name in ("lm_digest", "data_digest", "ctx", "lm_batch_tokens", "lm_dtype"):
            if self.made[name] != facts[name]:
                raise ValueError(
                    f"store {str(self.folder)!r} holds other activations: {name} is {self.made[name]!r} there, "
                    f"{facts[name]!r} here"
                )
        # Stores of earlier versions do not record this; they hold what the model gives by default.
        if self.made.get("centred", facts["centred"]) != facts["centred"]:
            raise ValueError(
                f"store {str(self.folder)!r} holds other activations: centred is {self.made['centred']} there, "
                f"{facts['centred']} here"
            )
        if facts["hook"] not in self.hooks:
            raise ValueError(f"hook {facts['hook']!r}: the store {self.folder} has {', '.join(self.hooks)}")

    def at(self, hook: str, chosen: np.ndarray) -> Iterator[Piece]:
        """Yield the activations of these blocks, some at a time, in the store's number format.

        A piece is overwritten by the next one. Each shard is compared with its digest before it is first read, because
        a bit that has changed on the disk would otherwise go unnoticed into training.

        Raises:
            OSError: a shard has vanished, has become shorter, or is not what was written.
        """
        # One buffer for all blocks, filled by plain reads. Memory-mapped shards were slower and grew the process's
        # memory, and a shard cut short would have killed it instead of raising an error. Each call has a buffer of its
        # own, since a window may be read in a thread while candidates for resampling are read.
        shape = (BLOCKS_PER_READ, self.made["ctx"], self._widths[hook])
        buffer = torch.empty(shape, dtype=DTYPES[self.dtype])
        n_bytes = buffer[0].nbytes
        whole = buffer.view(torch.uint8).numpy().data.cast("B")
        into = [whole[i * n_bytes : (i + 1) * n_bytes] for i in range(len(buffer))]
        with ThreadPoolExecutor(READERS) as readers:
            for first in range(0, len(chosen), BLOCKS_PER_READ):
                some = chosen[first : first + BLOCKS_PER_READ].tolist()
                places = [self._place_of(hook, block, n_bytes) for block in some]
                with ExitStack() as opened:  # each file once, and never more files than a read has blocks
                    files = {file for file, _ in places}
                    list(readers.map(self._verify, files - self._verified))
                    handles = {file: opened.enter_context(file.open("rb", buffering=0)).fileno() for file in files}
                    reads = [(into[i], file, handles[file], at) for i, (file, at) in enumerate(places)]
                    list(readers.map(_read_all, (reads[i::READERS] for i in range(READERS))))
                yield buffer[: len(some)]

    def expect(self, hook: str, chosen: np.ndarray) -> None:
        """Ask the system to begin reading these blocks from the disk, and return at once.

        They are announced in the order of the store, which a disk reads fastest.
        """
        n_bytes = self.made["ctx"] * self._widths[hook] * DTYPES[self.dtype].itemsize
        places = (self._place_of(hook, block, n_bytes) for block in np.sort(chosen).tolist())
        for file, some in itertools.groupby(places, lambda place: place[0]):
            handle = os.open(file, os.O_RDONLY)
            try:
                for _, at in some:
                    os.posix_fadvise(handle, at, n_bytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def _place_of(self, hook: str, block: int, n_bytes: int) -> tuple[Path, int]:
        """Return the file of a block of `n_bytes`, and the byte at which the block begins there."""
        number, row = divmod(block, self._per_shard)
        return self.folder / hook / shard_name(number), self._starts[hook][number] + row * n_bytes

    def verify(self) -> list[str]:
        """Read the whole store and return the names of the files that are not what was written."""
        return [str(file.relative_to(self.folder)) for file in self._digests if not self._is_as_written(file)]

    def _verify(self, file: Path) -> None:
        if not self._is_as_written(file):
            raise OSError(f"{file}: not what was written (SHA-256); delete it and run the harvest again")
        self._verified.add(file)

    def _is_as_written(self, file: Path) -> bool:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == self._digests[file]

    def _start_of(self, number: int, hook: str) -> int:
        """Return the byte at which a shard's activations begin, once its header has been found right."""
        file = self.folder / hook / shard_name(number)
        n_rows = min(self._per_shard, self._n_blocks - number * self._per_shard)
        try:
            with safe_open(file, "pt") as shard:
                acts = shard.get_tensor("acts")  # memory-mapped: only its shape and number format are looked at
            # A safetensors file is 8 bytes with the length of its header, the header, and the tensor's bytes.
            with file.open("rb") as content:
                start = 8 + int.from_bytes(content.read(8), "little")
        except (OSError, SafetensorError) as problem:
            raise ValueError(f"store {str(self.folder)!r}: {hook}/{file.name} cannot be read ({problem})") from None
        if acts.shape != (n_rows, self.made["ctx"], self._widths[hook]) or acts.dtype != DTYPES[self.dtype]:
            raise ValueError(
                f"store {str(self.folder)!r}: {hook}/{file.name} holds {acts.dtype} {tuple(acts.shape)}, which is not "
                "what the index says"
            )
        return start


def _read_all(reads: list[tuple[memoryview, Path, int, int]]) -> None:
    """Fill memory from files; each item is (memory to fill, file, its open handle, first byte to read)."""
    for into, file, handle, at in reads:
        if os.preadv(handle, [into], at) < len(into):
            raise OSError(f"{file}: shorter than it was when the store was opened")


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"{number:05}.safetensors"


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a store, finished or not.

    Raises:
        ValueError: there is no store, or its index is damaged.
    """
    index = read_json_object(folder / STORE_FILE, "store")
    if not _is_index(index):
        raise ValueError(f"{folder / STORE_FILE}: not the index of a store")
    return index


def _is_index(index: Any) -> bool:
    """Return whether an index has the form that `harvest` writes; the shards themselves are not looked at."""
    try:
        made = index["made"]
        hooks = made["hooks"]
        shards = index["shards"]
        numbers = [made[name] for name in ("ctx", "lm_batch_tokens", "n_blocks", "blocks_per_shard")]
        numbers += [made["d_in"][hook] for hook in hooks]
        names = [made[name] for name in ("lm", "lm_digest", "lm_dtype", "data_digest")]
        names += [*hooks, *(shard["sha256"] for some in shards for shard in some)]
        files = [[f"{hook}/{shard_name(i)}" for hook in hooks] for i in range(len(shards))]
        return (
            # By type, because True is an int too.
            all(type(number) is int and number > 0 for number in numbers)
            and all(isinstance(name, str) for name in names)
            and all(map(is_plain_name, hooks))  # they are names of folders
            and made["dtype"] in DTYPES
            and len(hooks) > 0
            and [[shard["file"] for shard in some] for some in shards] == files
        )
    except (KeyError, TypeError, IndexError):
        return False
