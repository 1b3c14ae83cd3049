"""Activations in shuffled batches: a pure function of (seed, position)."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.blocks import TokenBlocks
from prolu.lm import LanguageModel
from prolu.passes import Harvest, describe_activations
from prolu.rng import keyed_generator
from prolu.sae import normalise, normalise_
from prolu.transfer import Transfer


class Batch(NamedTuple):
    """One batch of activations from shuffled token positions."""

    acts: Float[Tensor, "batch d_in"]
    """Normalised: each row has norm sqrt(d_in)."""
    raw_norm: Float[Tensor, " batch"]
    """Norm of each row before."""


class Place(NamedTuple):
    """Where a batch lies: everything about it follows from this and the seed."""

    epoch: int
    window: int
    """Window within the epoch."""
    row: int
    """First row of the batch in the window's shuffled order."""


@runtime_checkable
class Source(Protocol):
    """Where raw activations come from: the language model (`Harvest`), or the disk (`ActivationStore`)."""

    dtype: str
    """Number format they were rounded to."""

    def check(self, facts: dict[str, Any]) -> None:
        """Raises ValueError unless it has the activations that `facts` describe."""

    def at(self, hook: str, chosen: np.ndarray) -> Iterator[Float[Tensor, "n ctx d_in"]]:
        """Activations of these training blocks, in this order, some at a time; the next may overwrite them."""
        ...

    def expect(self, hook: str, chosen: np.ndarray) -> None:
        """These blocks will be asked for next."""


class ActivationStream:
    """An endless sequence of batches; `stream[i]` is batch number i, whenever and wherever it is asked for.

    Every epoch, a seeded permutation assigns blocks to windows. A window is harvested with the language
    model, or read from a store, and its rows are shuffled by a permutation seeded by (seed, epoch, window). Only
    one window is held in memory, so asking in order is fast and jumping costs one window.
    """

    def __init__(
        self,
        lm: LanguageModel,
        blocks: TokenBlocks,
        batch_size: int = 4096,
        seed: int = 0,
        window_tokens: int = 262_144,
        *,
        acts_dtype: str = "fp32",
        train_on_bos: bool = True,
        source: Source | None = None,
        device: str | torch.device = "cpu",
    ):
        """Args:
            lm: the model at the hook to train on.
            blocks: its text.
            batch_size: tokens per batch.
            seed: of the order.
            window_tokens: tokens shuffled together; a corpus smaller than that is one window.
            acts_dtype: fp32, bf16 or fp16: activations are rounded so before they are normalised, in fp32. Of a
                source, its own.
            train_on_bos: whether the first position of every block is trained on.
            source: a store of these activations, or a harvest shared with streams at other hooks; by default a
                harvest of its own.
            device: where windows are held, and SAEs trained on their batches.

        Raises:
            ValueError: a batch does not fit into a window, a block not into the model, or the store holds other
                activations.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        self.lm, self.blocks, self.batch_size, self.seed, self.train_on_bos = lm, blocks, batch_size, seed, train_on_bos
        self._source: Source = source or Harvest(lm, blocks, dtype=acts_dtype)
        self._facts = describe_activations(lm, blocks) | {"hook": lm.hook, "acts_dtype": self._source.dtype}
        if source is not None:
            source.check(self._facts)
        self._blocks_per_window = min(window_tokens // blocks.ctx, len(blocks.train))
        self.window_tokens = self._blocks_per_window * blocks.ctx
        self._first = 0 if train_on_bos else 1
        per_block = blocks.ctx - self._first
        self._rows_per_window = self._blocks_per_window * per_block
        if batch_size > self._rows_per_window:
            raise ValueError(
                f"batch_size {batch_size}: larger than a window of {self._rows_per_window} tokens "
                f"(window_tokens {window_tokens}, training text of {blocks.train.size})"
            )
        self._n_full, rest = divmod(len(blocks.train), self._blocks_per_window)
        self._batches_per_window = self._rows_per_window // batch_size
        self.batches_per_epoch = self._n_full * self._batches_per_window + rest * per_block // batch_size
        self._held: tuple[int, int] | None = None
        self._to_device = Transfer(device)
        self._acts = torch.empty(self._rows_per_window, lm.d_in, device=self.device)
        self._norms = torch.empty(self._rows_per_window, device=self.device)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.lm.d_in

    @property
    def device(self) -> torch.device:
        """Where its batches are."""
        return self._to_device.device

    @property
    def dropped_tokens_per_epoch(self) -> int:
        """Tokens at the ends of windows that do not fill a batch; first positions, if not trained on, not counted."""
        return len(self.blocks.train) * (self.blocks.ctx - self._first) - self.batches_per_epoch * self.batch_size

    def describe(self) -> dict[str, Any]:
        """All that decides the stream's numbers."""
        return self._facts | {
            "batch_size": self.batch_size,
            "window_tokens": self.window_tokens,
            "train_on_bos": self.train_on_bos,
            "seed": self.seed,
            "device": self.device.type,
        }

    def place(self, index: int) -> Place:
        """Where batch number `index` lies."""
        if index < 0:
            raise IndexError(f"batch {index}: counted from 0")
        epoch, within = divmod(index, self.batches_per_epoch)
        window, batch = divmod(within, self._batches_per_window)
        return Place(epoch, window, batch * self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        epoch, window, row = self.place(index)
        self._hold(epoch, window)
        rows = self._order[row : row + self.batch_size]
        return Batch(self._acts[rows], self._norms[rows])

    def fresh(self, n_tokens: int, *key: int | str) -> Iterator[Batch]:
        """About `n_tokens` activations of training blocks drawn by (seed, key), whatever position the stream is at.

        In whole passes of the language model, so that asking for more does not change what comes first; ends
        early where the corpus does.
        """
        order = torch.randperm(len(self.blocks.train), generator=keyed_generator(self.seed, *key)).numpy()
        per_pass = max(1, self.lm.batch_tokens // self.blocks.ctx)
        per_block = self.blocks.ctx - self._first
        for i in range(0, min(len(order), math.ceil(n_tokens / per_block)), per_pass):
            for piece in self._source.at(self.lm.hook, order[i : i + per_pass]):
                raw = self._to_device(piece)[:, self._first :]
                yield Batch(*normalise(raw.float().flatten(0, 1)))

    def _blocks_of(self, epoch: int, window: int) -> np.ndarray:
        order = torch.randperm(len(self.blocks.train), generator=keyed_generator(self.seed, "blocks", epoch))
        return order[window * self._blocks_per_window :][: self._blocks_per_window].numpy()

    def _hold(self, epoch: int, window: int) -> None:
        """Fills the window, unless it is the one at hand."""
        if self._held == (epoch, window):
            return
        self._held = None
        chosen, start = self._blocks_of(epoch, window), 0
        for piece in self._source.at(self.lm.hook, chosen):
            raw = self._to_device(piece)[:, self._first :]
            end = start + raw.shape[0] * raw.shape[1]
            rows = self._acts[start:end]
            rows.view(raw.shape).copy_(raw)  # straight from the source's own numbers: no copy of a piece is made
            self._norms[start:end] = normalise_(rows)
            start = end
        last = (window + 1) * self._blocks_per_window >= len(self.blocks.train)
        self._source.expect(self.lm.hook, self._blocks_of(*((epoch + 1, 0) if last else (epoch, window + 1))))
        order = torch.randperm(start, generator=keyed_generator(self.seed, "rows", epoch, window))
        self._order = order.to(self.device)
        self._held = (epoch, window)
