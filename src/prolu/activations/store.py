"""Activations on the disk: harvested once at several hooks, in the order of the blocks, and read in any other.

store.json                            what made them; every shard with its SHA-256
tokens/                               the token blocks, as `blocks.py` has them
HOOK/00000.safetensors ...            `acts` [blocks, ctx, d_in] of consecutive training blocks, not normalised
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prolu.activations.harvesting import Harvest, describe_activations
from prolu.activations.language_model import DTYPES, LanguageModel
from prolu.activations.token_blocks import TokenBlocks, copy_blocks, read_blocks
from prolu.runtime.checks import at_least_1
from prolu.runtime.files import (
    check_can_be_folder,
    nearest_existing,
    owned,
    read_json_object,
    through_json,
    write_atomically,
)
from prolu.runtime.interrupts import Interrupt
from prolu.runtime.progress import Meter

STORE_FILE, TOKENS_FOLDER = "store.json", "tokens"

SHARD_TOKENS = 131_072
"""Tokens of one file: 201 MB of GPT-2's activations in fp16. What a kill may cost."""

BLOCKS_PER_READ = 64
"""Handed out at once."""

READERS = 4
"""Threads that copy blocks into the buffer: a copy out of the system's cache is bound by one core, not by memory."""


class ActivationStore:
    """Activations that `harvest` wrote, complete; blocks are read as they are asked for."""

    def __init__(self, folder: str | Path):
        """Opens a store; no shard is read but its header.

        Raises:
            ValueError: no store there, not complete, or a shard that is gone or not what the index says.
        """
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.made, self._shards = index["made"], index["shards"]
        self.hooks, self.dtype, self._widths = tuple(self.made["hooks"]), self.made["dtype"], self.made["d_in"]
        self._n_blocks, self._per_shard = self.made["n_blocks"], self.made["blocks_per_shard"]
        missing = self.n_shards - len(self._shards)
        if missing:
            raise ValueError(f"store {str(folder)!r}: {missing} of {self.n_shards} shards are missing; harvest goes on")
        self._starts = {hook: [self._start(i, hook) for i in range(self.n_shards)] for hook in self.hooks}
        self._buffers: dict[str, Tensor] = {}

    @property
    def n_shards(self) -> int:
        """Files per hook."""
        return -(-self._n_blocks // self._per_shard)

    def blocks(self) -> TokenBlocks:
        """The text they are the activations of, and the held-out text."""
        return read_blocks(self.folder / TOKENS_FOLDER)

    def check(self, facts: dict[str, Any]) -> None:
        """Raises ValueError unless these are the activations that a model and blocks described so would give."""
        for name in ("lm_digest", "data_digest", "ctx", "lm_batch_tokens", "lm_dtype"):
            if self.made[name] != facts[name]:
                raise ValueError(
                    f"store {str(self.folder)!r} holds other activations: {name} is {self.made[name]!r} there, "
                    f"{facts[name]!r} here"
                )
        if facts["hook"] not in self.hooks:
            raise ValueError(f"hook {facts['hook']!r}: the store {self.folder} has {', '.join(self.hooks)}")

    def at(self, hook: str, chosen: np.ndarray) -> Iterator[Float[Tensor, "n ctx d_in"]]:
        """Activations of these blocks, some at a time, as they are kept; the next ones overwrite them.

        Raises:
            OSError: a shard has vanished, or has become shorter.
        """
        shape = (BLOCKS_PER_READ, self.made["ctx"], self._widths[hook])
        if hook not in self._buffers:
            self._buffers[hook] = torch.empty(shape, dtype=DTYPES[self.dtype])
        buffer = self._buffers[hook]
        into = buffer.view(torch.uint8).numpy().data.cast("B")
        size = buffer[0].nbytes

        def read(places: list[tuple[int, Path, int]], handles: dict[Path, int]) -> None:
            for i, file, at in places:
                if os.preadv(handles[file], [into[i * size : (i + 1) * size]], at) < size:
                    raise OSError(f"{file}: shorter than it was when the store was opened")

        with ThreadPoolExecutor(READERS) as readers:
            for first in range(0, len(chosen), BLOCKS_PER_READ):
                some = chosen[first : first + BLOCKS_PER_READ].tolist()
                places = [(i, *self._place(hook, block, size)) for i, block in enumerate(some)]
                with ExitStack() as opened:  # no more files at once than a read has blocks
                    files = {file for _, file, _ in places}
                    handles = {file: opened.enter_context(file.open("rb", buffering=0)).fileno() for file in files}
                    list(readers.map(read, (places[i::READERS] for i in range(READERS)), itertools.repeat(handles)))
                yield buffer[: len(some)]

    def expect(self, hook: str, chosen: np.ndarray) -> None:
        """Asks the system to begin reading these blocks from the disk, in the store's order; returns at once."""
        size = self.made["ctx"] * self._widths[hook] * DTYPES[self.dtype].itemsize
        places = (self._place(hook, block, size) for block in np.sort(chosen).tolist())
        for file, some in itertools.groupby(places, lambda place: place[0]):
            handle = os.open(file, os.O_RDONLY)
            try:
                for _, at in some:
                    os.posix_fadvise(handle, at, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def _place(self, hook: str, block: int, size: int) -> tuple[Path, int]:
        """File and byte where a block begins."""
        number, row = divmod(block, self._per_shard)
        return self.folder / hook / _name(number), self._starts[hook][number] + row * size

    def verify(self) -> list[str]:
        """Reads all; names the files that are not what was written."""
        return [
            shard["file"]
            for hooks in self._shards
            for shard in hooks
            if hashlib.sha256((self.folder / shard["file"]).read_bytes()).hexdigest() != shard["sha256"]
        ]

    def _start(self, number: int, hook: str) -> int:
        """Where a shard's activations begin, once its header has been found right."""
        file = self.folder / hook / _name(number)
        rows = min(self._per_shard, self._n_blocks - number * self._per_shard)
        try:
            with safe_open(file, "pt") as shard:
                acts = shard.get_tensor("acts")
            with file.open("rb") as header:
                start = 8 + int.from_bytes(header.read(8), "little")
        except (OSError, SafetensorError) as problem:
            raise ValueError(f"store {str(self.folder)!r}: {hook}/{file.name} cannot be read ({problem})") from None
        if acts.shape != (rows, self.made["ctx"], self._widths[hook]) or acts.dtype != DTYPES[self.dtype]:
            raise ValueError(f"store {str(self.folder)!r}: {hook}/{file.name} is {acts.dtype} {tuple(acts.shape)}")
        return start


def store_bytes(n_tokens: int, widths: Sequence[int], dtype: str) -> int:
    """Size of a store of so many tokens at hooks of these widths, its token ids (4 bytes at most) included."""
    return n_tokens * (sum(widths) * DTYPES[dtype].itemsize + 4)


def check_disk(out: Path, n_bytes: int) -> None:
    """Raises ValueError if the disk of `out` has no room for so many bytes."""
    free = shutil.disk_usage(nearest_existing(out)).free
    if n_bytes > free:
        raise ValueError(
            f"out {str(out)!r}: needs {n_bytes / 1e9:,.1f} GB, its disk has {free / 1e9:,.1f} GB free; harvest fewer "
            "tokens or hooks, or train without a store"
        )


def harvest(
    lm: LanguageModel,
    blocks: TokenBlocks,
    out: str | Path,
    *,
    hooks: Sequence[str] = (),
    dtype: str = "fp16",
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
) -> ActivationStore:
    """Writes the activations of all training blocks at some hooks, in one pass of the language model.

    Called again with the same arguments, it goes on after the last whole shard: to the byte what an uninterrupted
    harvest gives.

    Args:
        blocks: in `out`/tokens already, or copied there.
        out: folder of the store.
        hooks: those of the model by default.
        dtype: fp32, bf16 or fp16.
        shard_tokens: tokens per file, rounded to whole passes of the language model.
        progress: show the rate and the time left.

    Raises:
        ValueError: a folder that holds something else, no room on its disk, no such hook. Nothing is written then.
        FloatingPointError: an activation is not finite in that number format.
        KeyboardInterrupt: SIGINT or SIGTERM came; whole shards are kept.
    """
    out, request = Path(out), HarvestRequest(lm, blocks, hooks, dtype, shard_tokens)
    index = request.begun(out)
    source, per_shard, n_done = request.source, request.blocks_per_shard, len(index["shards"])
    out.mkdir(parents=True, exist_ok=True)
    n_left = max(0, len(blocks.train) - n_done * per_shard) * blocks.ctx
    with owned(out), Interrupt() as interrupt, Meter("harvesting", n_left, shown=progress) as meter:
        _keep_tokens(blocks, out / TOKENS_FOLDER)
        _write_index(out, index)
        buffers = [torch.empty(per_shard, blocks.ctx, width, dtype=DTYPES[dtype]) for width in request.widths.values()]
        for start in range(n_done * per_shard, len(blocks.train), per_shard):
            chosen, filled = np.arange(start, min(start + per_shard, len(blocks.train))), 0
            for found in source.all_hooks(chosen):
                n = len(found[0])
                for buffer, acts in zip(buffers, found, strict=True):
                    buffer[filled : filled + n] = acts
                filled += n
                meter.advance(n * blocks.ctx)
                if interrupt.requested:
                    raise KeyboardInterrupt
            shards = [
                _write_shard(out, hook, start // per_shard, buffer[:filled])
                for hook, buffer in zip(source.hooks, buffers, strict=True)
            ]
            index["shards"].append(shards)
            _write_index(out, index)
    return ActivationStore(out)


class HarvestRequest:
    """What is to be harvested, checked against what a folder holds."""

    def __init__(
        self, lm: LanguageModel, blocks: TokenBlocks, hooks: Sequence[str], dtype: str, shard_tokens: int = SHARD_TOKENS
    ):
        """Raises ValueError: see `harvest`."""
        at_least_1("shard_tokens", shard_tokens)
        self.source = Harvest(lm, blocks, hooks, dtype)
        per_pass = self.source.blocks_per_pass
        self.blocks_per_shard = max(1, shard_tokens // blocks.ctx // per_pass) * per_pass
        self.widths = {hook: lm.at(hook).d_in for hook in self.source.hooks}
        made = describe_activations(lm, blocks) | {"hooks": self.source.hooks, "d_in": self.widths, "dtype": dtype}
        made |= {"n_blocks": len(blocks.train), "blocks_per_shard": self.blocks_per_shard}
        self.made = through_json(made)

    def begun(self, out: Path) -> dict[str, Any]:
        """The index of a store that this very request began, or a new one; nothing is written.

        Raises:
            ValueError: the folder holds something else, or its disk has no room.
        """
        index = _prepare(out, self.made)
        n_left = max(0, self.made["n_blocks"] - len(index["shards"]) * self.blocks_per_shard) * self.made["ctx"]
        if n_left:
            check_disk(out, store_bytes(n_left, list(self.widths.values()), self.source.dtype))
        return index


def _keep_tokens(blocks: TokenBlocks, folder: Path) -> None:
    """The text lies with its activations, already or from now on."""
    try:
        kept = read_blocks(folder)
    except ValueError:  # not there, or not finished
        copy_blocks(blocks, folder)
        kept = read_blocks(folder)
    if kept.digest() != blocks.digest():
        raise ValueError(f"tokens {str(folder)!r} holds other blocks; choose another folder")


def _prepare(out: Path, made: dict[str, Any]) -> dict[str, Any]:
    """The index of an unfinished store that this very request began, or a new one."""
    if (out / STORE_FILE).is_file():
        index = _read_index(out)
        held = index["made"]
        for name in sorted(held.keys() | made.keys()):
            if held.get(name) != made.get(name) and name not in ("lm", "data"):
                raise ValueError(
                    f"out {str(out)!r} holds another store: {name} is {held.get(name)!r} there, "
                    f"{made.get(name)!r} here; choose another folder"
                )
        return index
    check_store_folder(out)
    return {"made": made, "shards": []}


def check_store_folder(out: Path) -> None:
    """Raises ValueError if something else than a store, begun or finished, lies there."""
    check_can_be_folder(out)
    if out.exists() and not (out / STORE_FILE).is_file():
        there = {p.name for p in out.iterdir() if not p.name.startswith(".")}
        if there - {TOKENS_FOLDER}:
            raise ValueError(f"out {str(out)!r}: not empty, and not a store; choose another folder")


def _write_index(out: Path, index: dict[str, Any]) -> None:
    write_atomically(out / STORE_FILE, json.dumps(index, indent=1) + "\n")


def _write_shard(out: Path, hook: str, number: int, acts: Tensor) -> dict[str, str]:
    file = out / hook / _name(number)
    file.parent.mkdir(exist_ok=True)
    data = save({"acts": acts})
    write_atomically(file, data)
    return {"file": f"{hook}/{file.name}", "sha256": hashlib.sha256(data).hexdigest()}


def _name(number: int) -> str:
    return f"{number:05}.safetensors"


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_json_object(folder / STORE_FILE, "store")
    if not _is_index(index):
        raise ValueError(f"{folder / STORE_FILE}: not the index of a store")
    return index


def _is_index(index: Any) -> bool:
    """Whether it is of the form that `harvest` writes; what lies in the folder is another question."""
    try:
        made, shards = index["made"], index["shards"]
        numbers = [made[name] for name in ("ctx", "lm_batch_tokens", "n_blocks", "blocks_per_shard")]
        numbers += [made["d_in"][hook] for hook in made["hooks"]]
        names = [made[name] for name in ("lm", "lm_digest", "lm_dtype", "data_digest")]
        names += [*made["hooks"], *(shard["sha256"] for some in shards for shard in some)]
        files = [[f"{hook}/{_name(i)}" for hook in made["hooks"]] for i in range(len(shards))]
        return (
            all(type(number) is int and number > 0 for number in numbers)
            and all(isinstance(name, str) for name in names)
            and made["dtype"] in DTYPES
            and len(made["hooks"]) > 0
            and [[shard["file"] for shard in some] for some in shards] == files
        )
    except (KeyError, TypeError, IndexError):
        return False
