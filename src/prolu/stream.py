"""Activations in shuffled batches: a pure function of (seed, position)."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.data import TokenBlocks
from prolu.lm import LanguageModel
from prolu.rng import keyed_generator
from prolu.sae import normalise


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


class ActivationStream:
    """An endless sequence of batches; `stream[i]` is batch number i, whenever and wherever it is asked for.

    Every epoch, a seeded permutation assigns blocks to windows. A window is harvested with the language
    model, and its rows are shuffled by a permutation seeded by (seed, epoch, window). Only one window is
    held in memory, so asking in order is fast and jumping costs one window's harvest.
    """

    def __init__(
        self,
        lm: LanguageModel,
        blocks: TokenBlocks,
        batch_size: int = 4096,
        seed: int = 0,
        window_tokens: int = 262_144,
    ):
        """Args: sizes are in tokens; a corpus smaller than a window is one window.

        Raises:
            ValueError: a batch does not fit into a window, or a block into the model.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        if blocks.ctx > lm.max_ctx:
            raise ValueError(f"ctx {blocks.ctx}: {lm.name} takes at most {lm.max_ctx} tokens")
        if len(lm.tokenizer) <= int(blocks.train.max()):
            raise ValueError("the blocks hold token ids that the language model's tokenizer does not have")
        self.lm, self.blocks, self.batch_size, self.seed = lm, blocks, batch_size, seed
        self._blocks_per_window = min(window_tokens // blocks.ctx, len(blocks.train))
        self.window_tokens = self._blocks_per_window * blocks.ctx
        if batch_size > self.window_tokens:
            raise ValueError(
                f"batch_size {batch_size}: larger than a window of {self.window_tokens} tokens "
                f"(window_tokens {window_tokens}, training text of {blocks.train.size})"
            )
        full, rest = divmod(len(blocks.train), self._blocks_per_window)
        self._batches_per_window = self.window_tokens // batch_size
        self._batches_in_rest = rest * blocks.ctx // batch_size
        self._n_full = full
        self.batches_per_epoch = full * self._batches_per_window + self._batches_in_rest
        self._lm_digest, self._data_digest = lm.digest(), blocks.digest()
        self._held: tuple[int, int] | None = None
        self._acts = torch.empty(self.window_tokens, lm.d_in)
        self._norms = torch.empty(self.window_tokens)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.lm.d_in

    @property
    def dropped_tokens_per_epoch(self) -> int:
        """Tokens at the ends of windows that do not fill a batch."""
        return self.blocks.train.size - self.batches_per_epoch * self.batch_size

    def describe(self) -> dict[str, Any]:
        """All that decides the stream's numbers."""
        return {
            "lm": self.lm.name,
            "lm_digest": self._lm_digest,
            "hook": self.lm.hook,
            "centred": self.lm.centred,
            "lm_batch_tokens": self.lm.batch_tokens,
            "data": self.blocks.source,
            "text_column": self.blocks.text_column,
            "split": self.blocks.split,
            "eval_split": self.blocks.eval_split,
            "max_train_tokens": self.blocks.max_train_tokens,
            "data_digest": self._data_digest,
            "ctx": self.blocks.ctx,
            "batch_size": self.batch_size,
            "window_tokens": self.window_tokens,
            "seed": self.seed,
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
        chosen = torch.randperm(len(self.blocks.train), generator=keyed_generator(self.seed, *key)).numpy()
        per_pass = max(1, self.lm.batch_tokens // self.blocks.ctx)
        for i in range(0, min(len(chosen), math.ceil(n_tokens / self.blocks.ctx)), per_pass):
            yield Batch(*normalise(self.lm.activations(self.blocks.train[chosen[i : i + per_pass]]).flatten(0, 1)))

    def _hold(self, epoch: int, window: int) -> None:
        """Harvests a window, unless it is the one at hand."""
        if self._held == (epoch, window):
            return
        self._held = None
        order = torch.randperm(len(self.blocks.train), generator=keyed_generator(self.seed, "blocks", epoch))
        chosen = order[window * self._blocks_per_window :][: self._blocks_per_window].numpy()
        start = 0
        per_pass = max(1, self.lm.batch_tokens // self.blocks.ctx)
        for i in range(0, len(chosen), per_pass):
            raw = self.lm.activations(self.blocks.train[chosen[i : i + per_pass]]).flatten(0, 1)
            end = start + len(raw)
            self._acts[start:end], self._norms[start:end] = normalise(raw)
            if not self._norms[start:end].isfinite().all():
                raise FloatingPointError(
                    f"activations at {self.lm.hook} are not finite in epoch {epoch}, window {window}, among blocks "
                    f"{sorted(chosen[i : i + per_pass].tolist())[:8]}...; try another dtype of the language model"
                )
            start = end
        self._order = torch.randperm(start, generator=keyed_generator(self.seed, "rows", epoch, window))
        self._held = (epoch, window)
