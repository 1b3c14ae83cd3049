"""How a stream is divided: epochs into windows of token blocks, windows into batches."""

from typing import NamedTuple

from prolu.activations.rows import Rows
from prolu.activations.token_blocks import TokenBlocks
from prolu.runtime.mesh import Mesh


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


class Windows(NamedTuple):
    """The sizes of windows and batches, which say where every batch lies.

    No batch spans two windows: the rows at the end of a window that do not fill a batch are dropped.
    """

    batch_size: int
    """The number of rows per batch."""
    rows_per_block: int
    """The number of positions of a token block that are trained on."""
    n_blocks: int
    """The number of token blocks per window; the last window of an epoch may have fewer."""
    batches_per_epoch: int
    """The number of batches of all windows of an epoch."""

    @classmethod
    def of(cls, blocks: TokenBlocks | Rows, rows_per_block: int, *, batch_size: int, window_tokens: int) -> "Windows":
        """Divide a text, or rows, into windows of at most `window_tokens` tokens; a smaller text is one window.

        Raises:
            ValueError: A batch does not fit into a window.
        """
        n_blocks = min(window_tokens // blocks.ctx, len(blocks.train))
        n_rows = n_blocks * rows_per_block
        if batch_size > n_rows:
            raise ValueError(
                f"batch_size {batch_size}: larger than a window of {n_rows} {blocks.unit}s "
                f"(window_tokens {window_tokens}, training {blocks.kind} of {blocks.n_train_tokens})"
            )
        n_full_windows, n_blocks_left = divmod(len(blocks.train), n_blocks)
        batches_left = n_blocks_left * rows_per_block // batch_size
        return cls(batch_size, rows_per_block, n_blocks, n_full_windows * (n_rows // batch_size) + batches_left)

    def following(self, number: WindowNumber, blocks: TokenBlocks | Rows) -> WindowNumber:
        """Return the window that comes after a window."""
        is_last = (number.window + 1) * self.n_blocks >= len(blocks.train)
        return WindowNumber(number.epoch + 1, 0) if is_last else WindowNumber(number.epoch, number.window + 1)

    @property
    def n_batches(self) -> int:
        """The number of batches of a window that is not the last one."""
        return self.n_blocks * self.rows_per_block // self.batch_size

    def place(self, index: int) -> Place:
        """Return where batch number `index` of the stream lies."""
        if index < 0:
            raise IndexError(f"batch {index}: batches are counted from 0")
        epoch, within = divmod(index, self.batches_per_epoch)
        window, batch = divmod(within, self.n_batches)
        return Place(epoch, window, batch * self.batch_size)

    def n_rows_held(self, mesh: Mesh) -> int:
        """Return the number of rows of a window that a rank holds at a time."""
        if mesh.n_ranks == 1:
            # The rows that will be dropped too, because they lie between the others.
            return self.n_blocks * self.rows_per_block
        # Only its part of each batch: it is sent no other rows.
        return self.n_batches * self.batch_size // mesh.n_data
