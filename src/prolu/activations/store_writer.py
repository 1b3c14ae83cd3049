"""Writing a store of activations: the request is checked first, then shards are written, and writing can be resumed."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from prolu.activations.blocks_folder import copy_blocks
from prolu.activations.harvesting import Harvest, describe_activations
from prolu.activations.language_model import DTYPES, LanguageModel
from prolu.activations.store import STORE_FILE, TOKENS_FOLDER, ActivationStore, read_index, shard_name
from prolu.activations.token_blocks import LATER_FACTS, TokenBlocks, read_blocks
from prolu.runtime.checks import at_least_1
from prolu.runtime.files import check_can_be_folder, json_text, locked, nearest_existing, through_json, write_atomically
from prolu.runtime.interrupts import Interrupt
from prolu.runtime.progress import Meter
from prolu.runtime.stopping import StoppedError, one_sentence

SHARD_TOKENS = 131_072
"""The number of tokens per file, 201 MB of GPT-2's activations in fp16. At most these are lost if the process is
killed."""


class HarvestStoppedError(StoppedError):
    """The disk failed during a harvest. All shards that were finished are kept."""

    resumes = "finished shards are kept; harvest the same again to resume"


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
    """Write the activations of all training blocks at some hooks, from one pass of the language model.

    Called again with the same arguments, it resumes after the last whole shard and ends with the same bytes as an
    uninterrupted harvest.

    Args:
        lm: the language model.
        blocks: its text, which lies in `out`/tokens already or is copied there.
        out: the folder of the store.
        hooks: where to read; by default at the hook of the model.
        dtype: fp32, bf16 or fp16.
        shard_tokens: the number of tokens per file, rounded to whole passes of the language model.
        progress: whether to show the rate and the time left.

    Raises:
        ValueError: the folder holds something else, its disk has no room, or the model has no such hook. Nothing is
            written then.
        FloatingPointError: an activation is not finite in that number format.
        HarvestStoppedError: the disk is full; finished shards are kept. It is an OSError.
        KeyboardInterrupt: SIGINT or SIGTERM came; finished shards are kept.
    """
    out = Path(out)
    request = HarvestRequest(lm, blocks, hooks, dtype, shard_tokens)
    index = request.begun(out)
    per_shard = request.blocks_per_shard
    first_missing = len(index["shards"]) * per_shard
    n_left = max(0, len(blocks.train) - first_missing) * blocks.ctx
    out.mkdir(parents=True, exist_ok=True)
    with (
        one_sentence(HarvestStoppedError),
        locked(out),
        Interrupt() as interrupt,
        Meter("harvesting", n_left, shown=progress) as meter,
    ):
        _keep_tokens(blocks, out / TOKENS_FOLDER)
        _write_index(out, index)
        buffers = [torch.empty(per_shard, blocks.ctx, width, dtype=DTYPES[dtype]) for width in request.widths.values()]
        for start in range(first_missing, len(blocks.train), per_shard):
            chosen = np.arange(start, min(start + per_shard, len(blocks.train)))
            for n in _fill_(buffers, request.source.all_hooks(chosen)):
                meter.advance(n * blocks.ctx)
                if interrupt.requested:
                    raise KeyboardInterrupt
            # The index names a shard only once it lies on the disk at every hook.
            shards = [
                _write_shard(out, hook, start // per_shard, buffer[: len(chosen)])
                for hook, buffer in zip(request.source.hooks, buffers, strict=True)
            ]
            index["shards"].append(shards)
            _write_index(out, index)
    return ActivationStore(out)


def _fill_(buffers: list[Tensor], passes: Iterator[list[Tensor]]) -> Iterator[int]:
    """Write the activations of each pass, hook by hook, into the buffers; yield the pass's number of blocks."""
    start = 0
    for found in passes:
        n = len(found[0])
        for buffer, acts in zip(buffers, found, strict=True):
            buffer[start : start + n] = acts
        start += n
        yield n


class HarvestRequest:
    """What is to be harvested, and whether a folder holds a part of it already."""

    def __init__(
        self, lm: LanguageModel, blocks: TokenBlocks, hooks: Sequence[str], dtype: str, shard_tokens: int = SHARD_TOKENS
    ):
        """Check what is asked for; the arguments are those of `harvest`.

        Raises:
            ValueError: an argument is wrong.
        """
        at_least_1("shard_tokens", shard_tokens)
        self.source = Harvest(lm, blocks, hooks, dtype)
        # Whole passes, at least one, so that a resumed harvest makes the same passes as an uninterrupted one.
        per_pass = self.source.blocks_per_pass
        self.blocks_per_shard = max(1, shard_tokens // blocks.ctx // per_pass) * per_pass
        self.widths = {hook: lm.at(hook).d_in for hook in self.source.hooks}
        made = describe_activations(lm, blocks) | {
            "hooks": self.source.hooks,
            "d_in": self.widths,
            "dtype": dtype,
            "n_blocks": len(blocks.train),
            "blocks_per_shard": self.blocks_per_shard,
        }
        if lm.device.type != "cpu":  # a GPU rounds differently, and a harvest is resumed where it began
            made["lm_device"] = lm.device.type
        self.made = through_json(made)  # as an index on the disk has it, so that the two can be compared

    def begun(self, out: Path) -> dict[str, Any]:
        """Return the index of a store that this very request began, or a new one; nothing is written.

        Raises:
            ValueError: the folder holds something else, or its disk has no room.
        """
        index = self._index_of(out)
        n_left = max(0, self.made["n_blocks"] - len(index["shards"]) * self.blocks_per_shard) * self.made["ctx"]
        if n_left:
            check_disk(out, store_bytes(n_left, list(self.widths.values()), self.source.dtype))
        return index

    def _index_of(self, out: Path) -> dict[str, Any]:
        if not (out / STORE_FILE).is_file():
            check_store_folder(out)
            return {"made": self.made, "shards": []}
        index = read_index(out)
        held = index["made"]
        for name in sorted(held.keys() | self.made.keys()):
            # Paths of model and text may differ; their digests are compared.
            unknown = name in LATER_FACTS and name not in held
            if held.get(name) != self.made.get(name) and not unknown and name not in ("lm", "data"):
                raise ValueError(
                    f"out {str(out)!r} holds another store: {name} is {held.get(name)!r} there, "
                    f"{self.made.get(name)!r} here; choose another folder"
                )
        return index


def store_bytes(n_tokens: int, widths: Sequence[int], dtype: str) -> int:
    """Return the size in bytes of a store at hooks of these widths, with its token ids (4 bytes each at most)."""
    return n_tokens * (sum(widths) * DTYPES[dtype].itemsize + 4)


def check_disk(out: Path, n_bytes: int) -> None:
    """Raise ValueError unless the disk of `out` has room for this many bytes."""
    free = shutil.disk_usage(nearest_existing(out)).free
    if n_bytes > free:
        raise ValueError(
            f"out {str(out)!r}: needs {n_bytes / 1e9:,.1f} GB, its disk has {free / 1e9:,.1f} GB free; harvest fewer "
            "tokens or hooks, or train without a store"
        )


def check_store_folder(out: Path) -> None:
    """Raise ValueError if a folder holds anything but a store, begun or finished."""
    check_can_be_folder(out)
    if out.exists() and not (out / STORE_FILE).is_file():
        there = {p.name for p in out.iterdir() if not p.name.startswith(".")}
        # The tokens are written before the index is, so a killed harvest may have left nothing else.
        if there - {TOKENS_FOLDER}:
            raise ValueError(f"out {str(out)!r}: not empty, and not a store; choose another folder")


def _keep_tokens(blocks: TokenBlocks, folder: Path) -> None:
    """Write the token blocks beside their activations, unless they are there already."""
    try:
        kept = read_blocks(folder)
    except ValueError:  # they are not there, or were not finished
        copy_blocks(blocks, folder)
        kept = read_blocks(folder)
    if kept.digest() != blocks.digest():
        raise ValueError(f"tokens {str(folder)!r} holds other blocks; choose another folder")


def _write_index(out: Path, index: dict[str, Any]) -> None:
    write_atomically(out / STORE_FILE, json_text(index, indent=1) + "\n")


def _write_shard(out: Path, hook: str, number: int, acts: Tensor) -> dict[str, str]:
    file = out / hook / shard_name(number)
    file.parent.mkdir(exist_ok=True)
    data = save({"acts": acts})
    write_atomically(file, data)
    return {"file": f"{hook}/{file.name}", "sha256": hashlib.sha256(data).hexdigest()}
