"""Activations in shuffled batches: a pure function of (seed, position)."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.harvesting import Harvest, describe_activations
from prolu.activations.language_model import LanguageModel
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.transfer import Transfer
from prolu.runtime.mesh import ALONE, Mesh
from prolu.runtime.rng import keyed_generator
from prolu.sae.scaling import normalise, normalise_


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
        mesh: Mesh = ALONE,
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
            mesh: the ranks that train on it; each harvests its share of a window, and its batches are its rows of the
                whole ones, which are the same for every mesh.

        Raises:
            ValueError: a batch does not fit into a window, a block not into the model, or the store holds other
                activations.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        mesh.check("batch_size", batch_size, "data")
        self.mesh = mesh
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
        most = self._rows_per_window if mesh.n_ranks == 1 else self._batches_per_window * batch_size // mesh.n_data
        self._acts = torch.empty(most, lm.d_in, device=self.device)
        self._norms = torch.empty(most, device=self.device)

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
        n_data = self.mesh.n_data
        rows = self._order[row // n_data : (row + self.batch_size) // n_data]
        return Batch(self._acts[rows], self._norms[rows])

    def fresh(self, n_tokens: int, *key: int | str) -> Iterator[Batch]:
        """About `n_tokens` activations of training blocks drawn by (seed, key), whatever position the stream is at.

        In whole passes of the language model, so that asking for more does not change what comes first; ends
        early where the corpus does.
        """
        order = torch.randperm(len(self.blocks.train), generator=keyed_generator(self.seed, *key)).numpy()
        per_pass = max(1, self.lm.batch_tokens // self.blocks.ctx)
        n_blocks = min(len(order), math.ceil(n_tokens / (self.blocks.ctx - self._first)))
        passes, mesh = [order[i : i + per_pass] for i in range(0, n_blocks, per_pass)], self.mesh
        for first in range(0, len(passes), mesh.n_ranks):
            for raw in self._shown(passes[first : first + mesh.n_ranks]):
                yield Batch(*normalise(raw.float().flatten(0, 1)))

    def _shown(self, passes: list[np.ndarray]) -> Iterator[Float[Tensor, "n positions d_in"]]:
        """Activations of a pass for each rank at most: each makes its own, and shows it to the others."""
        mesh, per_block = self.mesh, self.blocks.ctx - self._first
        if mesh.n_ranks == 1:
            yield from self._raw(passes[0])
            return
        asked = passes[mesh.rank : mesh.rank + 1]
        own = [piece.to(torch.float32, copy=True) for blocks in asked for piece in self._raw(blocks)]
        for rank, blocks in enumerate(passes):
            raw = torch.cat(own) if rank == mesh.rank else self._acts.new_empty(len(blocks), per_block, self.d_in)
            yield mesh.broadcast_(raw, rank)

    def _raw(self, chosen: np.ndarray) -> Iterator[Float[Tensor, "n positions d_in"]]:
        """Activations of these blocks that are trained on, piece by piece; the next may overwrite them."""
        for piece in self._source.at(self.lm.hook, chosen):
            yield self._to_device(piece)[:, self._first :]

    def _blocks_of(self, epoch: int, window: int) -> np.ndarray:
        order = torch.randperm(len(self.blocks.train), generator=keyed_generator(self.seed, "blocks", epoch))
        return order[window * self._blocks_per_window :][: self._blocks_per_window].numpy()

    def _hold(self, epoch: int, window: int) -> None:
        """Fills the window, unless it is the one at hand."""
        if self._held == (epoch, window):
            return
        self._held = None
        chosen = self._blocks_of(epoch, window)
        n_rows = len(chosen) * (self.blocks.ctx - self._first)
        order = torch.randperm(n_rows, generator=keyed_generator(self.seed, "rows", epoch, window))
        if self.mesh.n_ranks == 1:
            self._fill_(self._acts, self._norms, chosen)
        else:
            order = self._exchange(chosen, order)
        last = (window + 1) * self._blocks_per_window >= len(self.blocks.train)
        following = self._blocks_of(*((epoch + 1, 0) if last else (epoch, window + 1)))
        self._source.expect(self.lm.hook, following[self.mesh.share_of(len(following))])
        self._order = order.to(self.device)
        self._held = (epoch, window)

    def _fill_(self, acts: Tensor, norms: Tensor, chosen: np.ndarray) -> None:
        """Writes these blocks' activations, normalised, and their norms before."""
        start = 0
        for raw in self._raw(chosen):
            end = start + raw.shape[0] * raw.shape[1]
            rows = acts[start:end]
            rows.view(raw.shape).copy_(raw)  # straight from the source's own numbers: no copy of a piece is made
            norms[start:end] = normalise_(rows)
            start = end

    def _exchange(self, chosen: np.ndarray, order: Tensor) -> Tensor:
        """Harvests this rank's share of a window, and deals out its rows; gives the order of those that came.

        A rank receives its rows of every batch of the window, from each rank in the order in which they are used.
        """
        mesh, per_block, d_in = self.mesh, self.blocks.ctx - self._first, self.d_in
        bounds = [mesh.share_of(len(chosen), rank) for rank in range(mesh.n_ranks)]
        own = bounds[mesh.rank]
        held = self._acts.new_empty((own.stop - own.start) * per_block, d_in + 1)  # with the norm as one more column
        self._fill_(held[:, :d_in], held[:, d_in], chosen[own])
        whole = order[: len(order) // self.batch_size * self.batch_size]
        by_data_rank = whole.view(-1, mesh.n_data, self.batch_size // mesh.n_data).transpose(0, 1).flatten(1)
        owner = torch.empty(len(order), dtype=torch.int64)
        for rank, share in enumerate(bounds):
            owner[share.start * per_block : share.stop * per_block] = rank
        first_row = own.start * per_block
        going = [wanted[owner[wanted] == mesh.rank] - first_row for wanted in by_data_rank]
        sent = [going[rank // mesh.n_latent] for rank in range(mesh.n_ranks)]
        wanted = by_data_rank[mesh.data_rank]
        came_from = owner[wanted]
        received = [int((came_from == rank).sum()) for rank in range(mesh.n_ranks)]
        rows = mesh.exchanged(held[torch.cat(sent).to(held.device)], [len(some) for some in sent], received)
        self._acts[: len(rows)], self._norms[: len(rows)] = rows[:, :d_in], rows[:, d_in]
        return torch.empty_like(wanted).scatter_(0, came_from.argsort(stable=True), torch.arange(len(wanted)))
