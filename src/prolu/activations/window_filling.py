"""The rows of a stream: raw activations become rows of windows, and on a mesh each rank gets the rows it needs."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.batch import Batch
from prolu.activations.held_windows import HeldWindow
from prolu.activations.inputs import Inputs
from prolu.activations.kept_tokens import NORM_TOKENS, KeptTokens, norm_threshold
from prolu.activations.token_mask import TokenMask
from prolu.activations.transfer import Transfer
from prolu.activations.windows import WindowNumber, Windows
from prolu.runtime.mesh import Mesh
from prolu.runtime.rng import keyed_generator
from prolu.sae.scaling import normalise, normalise_


class WindowFiller:
    """Fills the windows of a stream with the rows of their blocks, in an order that depends on the seed only."""

    def __init__(
        self,
        inputs: Inputs,
        windows: Windows,
        kept: KeptTokens | None,
        *,
        mesh: Mesh,
        device: torch.device,
        normalised: bool,
    ):
        """Prepare to fill windows.

        Args:
            inputs: Where raw activations are read.
            windows: Which blocks each window has.
            kept: Which tokens of a block are its rows; None for all.
            mesh: The ranks that train together.
            device: Where windows are held.
            normalised: Whether rows are scaled to norm sqrt(d_in).
        """
        self._inputs = inputs
        self._windows = windows
        self._kept = kept
        self._mesh = mesh
        self._device = device
        self._normalised = normalised
        self._max_norm: float | None = None

    def leave_out_large(self, mask: TokenMask) -> TokenMask:
        """Leave out of every window, from now on, the rows whose norm is above that of the mask.

        Returns:
            The mask with that norm, which is measured here if the mask gives only a multiple of the median.

        Raises:
            ValueError: the mask leaves out by norm, and there are several ranks.
        """
        if mask.max_norm is None and mask.max_norm_multiple is not None:
            order = torch.randperm(self._windows.n_train, generator=keyed_generator("norms")).numpy()
            rows = self.raw(order[: math.ceil(NORM_TOKENS / self._windows.ctx)])
            mask = replace(mask, max_norm=norm_threshold(rows, mask.max_norm_multiple))
        if mask.max_norm is not None and self._mesh.n_ranks > 1:
            raise ValueError("max_norm: not on a mesh, whose processes do not know the norms of each other's rows")
        self._max_norm = mask.max_norm
        return mask

    def raw(self, chosen: np.ndarray) -> Iterator[Float[Tensor, "*positions d_in"]]:
        """Yield the rows of these blocks as they come from their source, piece by piece.

        The next piece may overwrite the one before.
        """
        to_device = Transfer(self._device)  # one for each call, since a thread may be reading too
        start = 0
        for piece in self._inputs.source.at(self._inputs.hook, chosen):
            here = to_device(piece)
            if self._kept is None or not self._kept.differ:
                yield here[:, 0 if self._kept is None else self._kept.first :]
            else:
                kept = self._kept.of(chosen[start : start + len(piece)]).ravel().nonzero()[0]
                yield here.flatten(0, 1)[torch.from_numpy(kept).to(here.device)]
            start += len(piece)

    def raw_on_all_ranks(self, passes: list[np.ndarray]) -> Iterator[Float[Tensor, "n d_in"]]:
        """Yield the rows of at most one pass per rank: each rank reads its own and sends them to the others."""
        mesh = self._mesh
        if mesh.n_ranks == 1:
            for piece in self.raw(passes[0]):
                yield piece.float().reshape(-1, piece.shape[-1])
            return
        own_pass = passes[mesh.rank : mesh.rank + 1]  # empty if there are fewer passes than ranks
        # Copies, because the next piece may overwrite this one.
        own = [
            piece.to(torch.float32, copy=True).reshape(-1, piece.shape[-1])
            for blocks in own_pass
            for piece in self.raw(blocks)
        ]
        for rank, blocks in enumerate(passes):
            if rank == mesh.rank:
                rows = torch.cat(own)
            else:
                rows = torch.empty(int(self._windows.rows_of(blocks).sum()), self._inputs.d_in, device=self._device)
            yield mesh.broadcast_(rows, rank)

    def fresh(self, n_tokens: int, *key: int | str) -> Iterator[Batch]:
        """Yield the activations of blocks drawn by (seed, key), pass by pass, until there are about `n_tokens`."""
        order = self._windows.order(*key)
        per_pass = max(1, self._inputs.tokens_per_pass // self._windows.ctx)
        n_blocks = self._windows.n_blocks_with(n_tokens, order)
        passes = [order[i : i + per_pass] for i in range(0, n_blocks, per_pass)]
        for first in range(0, len(passes), self._mesh.n_ranks):
            for rows in self.raw_on_all_ranks(passes[first : first + self._mesh.n_ranks]):
                if self._normalised:
                    yield Batch(*normalise(rows))
                else:
                    # Copied, because raw activations may lie in a buffer that the next piece overwrites.
                    yield Batch(rows.clone(), torch.linalg.vector_norm(rows, dim=-1))

    def new_window(self) -> HeldWindow:
        """Return memory for the rows that this rank holds of a window."""
        return HeldWindow(self._windows.n_rows_held(self._mesh), self._inputs.d_in, self._device)

    def fill(self, held: HeldWindow, number: WindowNumber) -> Iterator[None]:
        """Fill a window, piece by piece."""
        chosen = self._windows.blocks_of(number)
        order = self._windows.row_order(number)
        if self._mesh.n_ranks == 1:
            yield from self._fill_(held.acts, held.norms, chosen)
            if self._max_norm is not None:
                n_needed = self._windows.n_batches_of(number) * self._windows.batch_size
                order = _without_large(order, held.norms.cpu(), self._max_norm, n_needed)
        else:
            order = self._exchange(held, chosen, order)
        held.order = order.to(self._device)

    def announce(self, number: WindowNumber) -> None:
        """Tell the source which of the blocks of a window this rank will ask for, some time before it does."""
        chosen = self._windows.blocks_of(number)
        self._inputs.source.expect(self._inputs.hook, chosen[self._mesh.slice_of_rank(len(chosen))])

    def _fill_(self, acts: Tensor, norms: Tensor, chosen: np.ndarray) -> Iterator[None]:
        """Write the normalised activations of these blocks, and their norms before, into buffers, piece by piece."""
        start = 0
        for raw in self.raw(chosen):
            end = start + raw.shape[:-1].numel()
            rows = acts[start:end]
            rows.view(raw.shape).copy_(raw)  # converts to fp32 on the way, without a copy of the piece in between
            # In fp32 and row by row: the norm of a row does not depend on the piece that the row came in.
            norms[start:end] = normalise_(rows) if self._normalised else torch.linalg.vector_norm(rows, dim=-1)
            start = end
            yield

    def _exchange(self, window: HeldWindow, chosen: np.ndarray, order: Tensor) -> Tensor:
        """Harvest this rank's part of a window, and swap rows with the other ranks until each has its batches' rows.

        Rows of a window are numbered block by block, as they are harvested; `order` is the shuffled order of these
        numbers in the whole window. Every batch of the window is cut into `n_data` parts, one for each data rank; all
        ranks of one data rank, which share its rows and split the latents, get the same part.

        Returns:
            The order in which this rank uses the rows in its buffers: part i of it is the rows of its part of batch i.
        """
        mesh = self._mesh
        d_in = self._inputs.d_in
        slices = [mesh.slice_of_rank(len(chosen), rank) for rank in range(mesh.n_ranks)]
        n_rows = torch.tensor([int(self._windows.rows_of(chosen[blocks]).sum()) for blocks in slices])
        harvested_by = torch.arange(mesh.n_ranks).repeat_interleave(n_rows)  # the rank that has each row of the window
        first_own_row = int(n_rows[: mesh.rank].sum())

        # One column more than d_in, so that a row's norm travels with it.
        held = window.acts.new_empty(int(n_rows[mesh.rank]), d_in + 1)
        for _ in self._fill_(held[:, :d_in], held[:, d_in], chosen[slices[mesh.rank]]):
            pass

        # The rows that each data rank uses, in the order of their use: [n_data, rows of its part of all batches].
        whole_batches = order[: len(order) // self._windows.batch_size * self._windows.batch_size]
        parts = whole_batches.view(-1, mesh.n_data, self._windows.batch_size // mesh.n_data)
        used_by = parts.transpose(0, 1).flatten(1)

        # Every rank sends each other rank those of its rows that the other uses, in the order of their use, so that
        # both sides know which row is which without sending its number.
        own_rows_used_by = [used[harvested_by[used] == mesh.rank] - first_own_row for used in used_by]
        sent = [own_rows_used_by[rank // mesh.n_latent] for rank in range(mesh.n_ranks)]
        used_here = used_by[mesh.data_rank]
        came_from = harvested_by[used_here]
        n_received = torch.bincount(came_from, minlength=mesh.n_ranks).tolist()
        rows = mesh.exchanged(held[torch.cat(sent).to(held.device)], [len(some) for some in sent], n_received)
        window.acts[: len(rows)] = rows[:, :d_in]
        window.norms[: len(rows)] = rows[:, d_in]

        # The rows lie sorted by the rank they came from and, from one rank, in the order of their use; the stable sort
        # of `came_from` is that very arrangement. Its inverse says where the row for each use lies.
        arrangement = came_from.argsort(stable=True)
        return torch.empty_like(arrangement).scatter_(0, arrangement, torch.arange(len(arrangement)))


def _without_large(order: Tensor, norms: Tensor, max_norm: float, n_needed: int) -> Tensor:
    """Return an order of rows without those above a norm, with as many rows as the batches of the window need.

    How many rows that is must be known before the window is read. So the first rows of the order come again where those
    that are left out would be missing in the last batch.
    """
    order = order[norms[order] <= max_norm]
    if not len(order):
        raise ValueError(f"max_norm {max_norm:g}: all activations of a window have a larger norm")
    return order[torch.arange(max(len(order), n_needed)) % len(order)]
