"""How a stream is divided: epochs into windows of token blocks, windows into batches."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prolu.activations.rows import ActivationRows
from prolu.activations.token_blocks import TokenBlocks
from prolu.runtime.mesh import Mesh
from prolu.runtime.rng import keyed_generator


class WindowNumber(NamedTuple):
    """Which window of a stream is meant."""

    epoch: int
    """The number of times that the whole text has been read before."""
    window: int
    """The window within the epoch."""


class Place(NamedTuple):
    """Where a batch lies in the stream: its activations follow from this and from the seed."""

    epoch: int
    """The number of times that the whole text has been read before."""
    window: int
    """The window within the epoch."""
    row: int
    """The first row of the batch in the window's shuffled order."""


class Windows:
    """Which token blocks each window of a stream has, and where every batch lies. All of it follows from the seed.

    The rows of a block are its positions that are trained on. No batch spans two windows: the rows at the end of a
    window that do not fill a batch are dropped. Where blocks differ in their number of rows, windows do too, and epochs
    may differ in their number of batches.
    """

    def __init__(
        self,
        blocks: TokenBlocks | ActivationRows,
        rows_per_block: int | np.ndarray,
        *,
        batch_size: int,
        window_tokens: int,
        seed: int,
    ):
        """Divide a text, or rows, into windows of at most `window_tokens` tokens; a smaller text is one window.

        Args:
            blocks: The text or the rows.
            rows_per_block: The number of rows of every training block, or of each, [n_blocks].
            batch_size: The number of rows per batch.
            window_tokens: The number of tokens per window, those that are not trained on included.
            seed: The seed of the order of blocks.

        Raises:
            ValueError: A batch does not fit into a window.
        """
        self.n_train = len(blocks.train)
        """The number of token blocks that are trained on."""
        self.ctx = blocks.ctx
        """The number of tokens per block."""
        self._rows_per_block = rows_per_block
        self.batch_size = batch_size
        self._seed = seed
        self.n_blocks = min(window_tokens // blocks.ctx, self.n_train)
        """The number of token blocks per window; the last window of an epoch may have fewer."""
        n_rows = 0
        if self.n_blocks:
            n_full, n_left = divmod(self.n_train, self.n_blocks)
            # If a batch fits into this many rows, every epoch has at least one batch: even if the blocks with the most
            # rows are in the last window, which may be short, the other windows have this many rows on average.
            n_rows = (self.n_rows - self._most_rows(n_left)) // n_full
        if batch_size > n_rows:
            raise ValueError(
                f"batch_size {batch_size}: larger than a window of {n_rows} {blocks.unit}s "
                f"(window_tokens {window_tokens}, training {blocks.kind} of {blocks.n_train_tokens})"
            )
        self._ends: list[np.ndarray] = []

    @property
    def n_rows(self) -> int:
        """The number of rows of an epoch, including those that do not fill a batch."""
        return int(np.sum(self._rows_per_block)) if self._differ else self.n_train * int(self._rows_per_block)

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches of the first epoch, and of all if blocks are alike."""
        return int(self._ends_in(0)[-1])

    @property
    def _differ(self) -> bool:
        return isinstance(self._rows_per_block, np.ndarray)

    def _most_rows(self, n_blocks: int) -> int:
        """Return the most rows that so many blocks have."""
        if isinstance(self._rows_per_block, np.ndarray):
            return int(np.sort(self._rows_per_block)[self.n_train - n_blocks :].sum())
        return n_blocks * self._rows_per_block

    def rows_of(self, chosen: np.ndarray) -> np.ndarray:
        """Return the number of rows of each of these blocks."""
        if isinstance(self._rows_per_block, np.ndarray):
            return self._rows_per_block[chosen]
        return np.full(len(chosen), self._rows_per_block)

    def order(self, *key: int | str) -> np.ndarray:
        """Return the numbers of all blocks in an order that depends on the seed and the key only."""
        return torch.randperm(self.n_train, generator=keyed_generator(self._seed, *key)).numpy()

    def n_blocks_with(self, n_rows: int, order: np.ndarray) -> int:
        """Return how many blocks of an order have so many rows; all of them if there are fewer."""
        if isinstance(self._rows_per_block, np.ndarray):
            return min(len(order), int(np.searchsorted(np.cumsum(self._rows_per_block[order]), n_rows)) + 1)
        return min(len(order), math.ceil(n_rows / self._rows_per_block))

    def blocks_of(self, number: WindowNumber) -> np.ndarray:
        """Return the blocks of a window, in the order in which its rows are numbered."""
        return self.order("blocks", number.epoch)[number.window * self.n_blocks :][: self.n_blocks]

    def row_order(self, number: WindowNumber) -> Tensor:
        """Return the shuffled order of a window's rows, which are numbered block by block."""
        # Drawn for the whole window, on the CPU and by a generator of its own: so the order depends neither on the mesh
        # nor on the device nor on what was drawn before.
        n_rows = int(self.rows_of(self.blocks_of(number)).sum())
        return torch.randperm(n_rows, generator=keyed_generator(self._seed, "rows", *number))

    def n_batches_of(self, number: WindowNumber) -> int:
        """Return the number of batches of a window."""
        ends = self._ends_in(number.epoch)
        return int(ends[number.window] - (ends[number.window - 1] if number.window else 0))

    def _ends_in(self, epoch: int) -> np.ndarray:
        """Return for each window of an epoch the number of batches up to its end."""
        epoch = epoch if self._differ else 0
        while len(self._ends) <= epoch:
            starts = np.arange(0, self.n_train, self.n_blocks)
            if isinstance(self._rows_per_block, np.ndarray):
                n_rows = np.add.reduceat(self.rows_of(self.order("blocks", len(self._ends))), starts)
            else:
                n_rows = np.minimum(self.n_blocks, self.n_train - starts) * self._rows_per_block
            self._ends.append(np.cumsum(n_rows // self.batch_size))
        return self._ends[epoch]

    def following(self, number: WindowNumber) -> WindowNumber:
        """Return the next window after this one that has at least one batch."""
        epoch, window = number
        while True:
            window += 1
            if window == len(self._ends_in(epoch)):
                epoch, window = epoch + 1, 0
            if self.n_batches_of(following := WindowNumber(epoch, window)):
                return following

    def place(self, index: int) -> Place:
        """Return where batch number `index` of the stream lies."""
        if index < 0:
            raise IndexError(f"batch {index}: batches are counted from 0")
        epoch, left = (0, index) if self._differ else divmod(index, self.batches_per_epoch)
        while left >= (n := int(self._ends_in(epoch)[-1])):
            epoch, left = epoch + 1, left - n
        ends = self._ends_in(epoch)
        window = int(np.searchsorted(ends, left, side="right"))
        batch = left - (int(ends[window - 1]) if window else 0)
        return Place(epoch, window, batch * self.batch_size)

    def n_rows_held(self, mesh: Mesh) -> int:
        """Return the number of rows of a window that a rank holds at a time, at most."""
        most = self._most_rows(self.n_blocks)
        if mesh.n_ranks == 1:
            # Rows that fill no batch are held too, because they lie between the others.
            return most
        # A rank is sent only its part of each batch.
        return most // self.batch_size * self.batch_size // mesh.n_data
