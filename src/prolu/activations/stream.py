"""Activations in shuffled batches: `stream[i]` is a pure function of the stream's seed and i."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.harvesting import ActivationSource, Harvest
from prolu.activations.held_windows import HeldWindow, ReadAhead, WindowReader, reads_ahead
from prolu.activations.inputs import Inputs
from prolu.activations.language_model import LanguageModel
from prolu.activations.row_batches import as_arrays
from prolu.activations.rows import Array, Rows, rows_of_arrays
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.transfer import Transfer
from prolu.activations.windows import Place, WindowNumber, Windows
from prolu.runtime.checks import at_least_1
from prolu.runtime.devices import numbered
from prolu.runtime.mesh import ALONE, Mesh
from prolu.runtime.rng import keyed_generator
from prolu.sae.choices import Normalisation
from prolu.sae.scaling import normalise, normalise_

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """One batch of activations from shuffled token positions."""

    acts: Float[Tensor, "batch d_in"]
    """The normalised activations: each row has norm sqrt(d_in)."""
    raw_norm: Float[Tensor, " batch"]
    """The norm of each row before it was normalised."""
    target: Float[Tensor, "batch d_out"] | None = None
    """The activations of the same tokens at the hook that transcoders write at, as they come from the language model;
    None in a stream without such a hook."""

    def scaled(self, normalisation: Normalisation) -> tuple[Tensor, Tensor | None]:
        """Return inputs and targets in the space in which an SAE with this normalisation works.

        With `none`, both are as they come from the language model. With `per_token`, the factor that scales an input x
        to norm sqrt(d_in) scales its target too: sqrt(d_in) / norm(x). So an output can be scaled back without knowing
        its target. The target of an input of zeros is scaled to zeros.
        """
        root = math.sqrt(self.acts.shape[1])
        if normalisation == "none":
            return self.acts * (self.raw_norm / root)[:, None], self.target
        if self.target is None:
            return self.acts, None
        return self.acts, self.target * torch.where(self.raw_norm > 0, root / self.raw_norm, 0)[:, None]


class ActivationStream:
    """An endless sequence of batches; `stream[i]` is batch number i, whenever and wherever it is asked for.

    In every epoch, a seeded permutation assigns token blocks to windows. A window is harvested with the language model,
    or read from a store, and its rows are shuffled by a permutation seeded by (seed, epoch, window). Only one window is
    trained on at a time, so asking in order is fast and jumping costs one window; the next one may be read meanwhile.

    The number of a batch is thus all that a checkpoint must keep of a stream, and all runs of a study see the same
    batches.

    A stream of a short text begins anew when the text ends, and says so once, unless `tells_repeats` is set to False.

    `ActivationStream.from_rows` makes a stream of activations that come from no language model. Its tokens are rows.
    """

    def __init__(
        self,
        lm: LanguageModel | None,
        blocks: TokenBlocks | Rows,
        batch_size: int = 4096,
        seed: int = 0,
        window_tokens: int = 262_144,
        *,
        acts_dtype: str = "fp32",
        train_on_bos: bool = True,
        source: ActivationSource | None = None,
        hook_out: str = "",
        normalised: bool = True,
        device: str | torch.device = "cpu",
        mesh: Mesh = ALONE,
        read_ahead: ReadAhead = "auto",
    ):
        """Prepare a stream; nothing is harvested before the first batch is asked for.

        Args:
            lm: the language model at the hook to train at; None for rows.
            blocks: its text, or rows.
            batch_size: the number of tokens per batch.
            seed: the seed of the order.
            window_tokens: the number of tokens shuffled together; a smaller corpus is one window.
            acts_dtype: fp32, bf16 or fp16, to which activations are rounded before they are normalised in fp32. With a
                `source`, its number format takes the place of this.
            train_on_bos: whether to train on the first position of every block.
            source: a store of these activations, or a harvest shared with streams at other hooks; by default a harvest
                of the stream's own.
            hook_out: the hook that transcoders write at, read in the same passes; empty for SAEs.
            normalised: whether rows are scaled to norm sqrt(d_in); otherwise they stay as they come from the language
                model.
            device: where windows are held, and SAEs are trained on their batches.
            mesh: the ranks that train together. Each harvests its part of a window, and its batches are its rows of the
                whole batches, which are the same for every mesh.
            read_ahead: whether a thread fills the next window while one is trained on, in the memory of one more
                window. No number depends on it. auto: from a store, for training on a GPU. on: also on a CPU, and from
                a language model, which must then not be given hooks by anybody else (as `splice` does) until the stream
                is closed; not on a mesh, and not for a harvest at several hooks. off: never.

        Raises:
            ValueError: a batch does not fit into a window, a block does not fit into the model, the store holds other
                activations, `hook_out` is no other hook of the model, or the stream cannot be read ahead; or a text has
                no language model.
        """
        at_least_1("batch_size", batch_size)
        mesh.check("batch_size", batch_size, "data")
        self.mesh = mesh
        self._lm = lm
        self.blocks = blocks
        self.batch_size = batch_size
        self.seed = seed
        self.train_on_bos = train_on_bos
        self._normalised = normalised
        inputs = Inputs.of(lm, blocks, source, hook_out=hook_out, acts_dtype=acts_dtype)
        self.hook = inputs.hook
        """The hook at which activations are read; empty for rows."""
        self.d_in = inputs.d_in
        """The width of the activations."""
        self._source = inputs.source
        self._facts = inputs.facts
        self._tokens_per_pass = inputs.tokens_per_pass

        self._first = 0 if train_on_bos else 1
        rows_per_block = blocks.ctx - self._first
        self._windows = Windows.of(blocks, rows_per_block, batch_size=batch_size, window_tokens=window_tokens)
        self.window_tokens = self._windows.n_blocks * blocks.ctx
        self.batches_per_epoch = self._windows.batches_per_epoch

        self.tells_repeats = mesh.is_first
        """Whether it will be said, once, when the text is read a second time."""
        self.device = numbered(device)
        """The device on which the batches are."""
        self.reads_ahead = reads_ahead(
            read_ahead,
            # Not for a model on another device: whether anybody else gives it hooks is not known here.
            pays=self.device.type != "cpu" and not isinstance(self._source, Harvest),
            n_hooks=len(self._source.hooks) if isinstance(self._source, Harvest) else 1,
            n_ranks=mesh.n_ranks,
        )
        """Whether a thread fills the next window while one is trained on."""
        self.n_windows = 2 if self.reads_ahead else 1
        """The number of windows that are held in memory."""
        n_rows = self._windows.n_rows_held(mesh)
        self._reader = WindowReader(
            self._filling,
            self._announce,
            lambda: HeldWindow(n_rows, self.d_in, self.device),
            ahead=self.reads_ahead,
        )
        self._targets: ActivationStream | None = None
        if hook_out and lm is not None:
            # The order of rows follows from seed, epoch and window alone, so a stream at the other hook has the same.
            self._targets = ActivationStream(
                lm.at(hook_out),
                blocks,
                batch_size,
                seed,
                window_tokens,
                train_on_bos=train_on_bos,
                source=self._source,
                normalised=False,
                device=device,
                mesh=mesh,
                read_ahead="on" if self.reads_ahead else "off",
            )
            self._targets.tells_repeats = False
            self._facts |= {"hook_out": hook_out}

    @classmethod
    def from_rows(
        cls,
        train: Array | Sequence[Array] | Iterable[Any] | Rows,
        held_out: Array | Sequence[Array] | Iterable[Any] | None = None,
        batch_size: int = 4096,
        seed: int = 0,
        window_tokens: int = 262_144,
        *,
        held_out_fraction: float = 0.1,
        name: str = "rows",
        keep: str | Path | None = None,
        device: str | torch.device = "cpu",
        mesh: Mesh = ALONE,
        read_ahead: ReadAhead = "auto",
    ) -> "ActivationStream":
        """Return a stream of rows that come from no language model.

        Wherever tokens are counted, as in `RunConfig.n_tokens`, rows are meant. SAEs are scored on held-out rows, in
        all figures that need no language model.

        Args:
            train: the rows to train on, an array or tensor [n, d_in] of floating-point numbers or several such, which
                are not copied; batches of rows, as a DataLoader or an iterator gives them, which are read once, now
                (see `as_arrays`); or rows that are made by something else.
            held_out: the rows to score on, likewise; by default some of `train`, chosen at random.
            batch_size: the number of rows per batch.
            seed: the seed of the order.
            window_tokens: the number of rows shuffled together.
            held_out_fraction: the fraction of `train` that is held out where `held_out` is not given.
            name: what the rows are called in config.json and reports.
            keep: a folder in which to keep the rows of batches. Where they are there already, they are read from it,
                and no batch is asked for; so a study is resumed on the same rows, whatever order a DataLoader has now.
                By default batches are held in memory.
            device: where windows are held, and SAEs are trained on their batches.
            mesh: the ranks that train together.
            read_ahead: whether a thread fills the next window while one is trained on.

        Raises:
            ValueError: the rows cannot be used (see the sentence), or a batch does not fit into a window.
        """
        if not isinstance(train, Rows):
            folder = None if keep is None else Path(keep)
            arrays = as_arrays("train", train, folder)
            scored = None if held_out is None else as_arrays("held_out", held_out, folder)
            train = rows_of_arrays(arrays, scored, held_out_fraction=held_out_fraction, name=name)
        return cls(
            None,
            train,
            batch_size,
            seed,
            window_tokens,
            device=device,
            mesh=mesh,
            read_ahead=read_ahead,
        )

    @property
    def lm(self) -> LanguageModel:
        """The language model at the hook.

        Raises:
            ValueError: the stream is one of rows, which come from none.
        """
        if self._lm is None:
            raise ValueError(f"lm: the rows of {self.blocks.source} come from no language model")
        return self._lm

    @property
    def d_out(self) -> int | None:
        """The width of the targets of transcoders; None in a stream for SAEs."""
        return None if self._targets is None else self._targets.d_in

    @property
    def hook_out(self) -> str:
        """The hook that transcoders write at; empty in a stream for SAEs."""
        return "" if self._targets is None else self._targets.hook

    @property
    def dropped_tokens_per_epoch(self) -> int:
        """The number of tokens at the ends of windows that do not fill a batch.

        First positions that are not trained on are not counted.
        """
        return len(self.blocks.train) * self._windows.rows_per_block - self.batches_per_epoch * self.batch_size

    def epochs(self, n_tokens: int) -> float:
        """Return how many times the text is seen in the batches of `n_tokens` tokens."""
        return n_tokens // self.batch_size / self.batches_per_epoch

    def describe(self) -> dict[str, Any]:
        """Return everything that decides the stream's numbers."""
        described = self._facts | {
            "batch_size": self.batch_size,
            "window_tokens": self.window_tokens,
            "train_on_bos": self.train_on_bos,
            "seed": self.seed,
            "device": self.device.type,
        }
        if self._lm is None:
            del described["train_on_bos"]  # rows have none
        elif self._lm.device.type != self.device.type:  # GPUs and CPUs round differently; two GPUs do not
            described["lm_device"] = self.lm.device.type
        return described

    def place(self, index: int) -> Place:
        """Return where batch number `index` lies."""
        return self._windows.place(index)

    def __getitem__(self, index: int) -> Batch:
        epoch, window, row = self.place(index)
        number = WindowNumber(epoch, window)
        if epoch and self.tells_repeats:
            self.tells_repeats = False
            logger.warning(
                "from batch %s on, the %s is read again: it has %s training %ss, and one pass gives %s batches",
                f"{index:,}", self.blocks.kind, f"{self.blocks.n_train_tokens:,}", self.blocks.unit,
                f"{self.batches_per_epoch:,}",
            )  # fmt: skip
        # What is held now decides only whether the window must be filled again, never what is in it.
        held = self._reader.get(number, self._windows.following(number, self.blocks))
        n_data = self.mesh.n_data
        rows = held.order[row // n_data : (row + self.batch_size) // n_data]
        target = None if self._targets is None else self._targets[index].acts
        return Batch(held.acts[rows], held.norms[rows], target)

    def close(self) -> None:
        """Stop reading ahead, and wait until no thread does. Batches can still be asked for, which begins it again."""
        self._reader.close()
        if self._targets is not None:
            self._targets.close()

    def fresh(self, n_tokens: int, *key: int | str) -> Iterator[Batch]:
        """Yield about `n_tokens` activations of training blocks drawn by (seed, key), whatever the stream's position.

        They come in whole passes of the language model, so that asking for more does not change what comes first, and
        end early if the corpus does.
        """
        if self._targets is None:
            yield from self._fresh(n_tokens, *key)
            return
        # In turns, so that one pass serves both hooks.
        for batch, written in zip(self._fresh(n_tokens, *key), self._targets.fresh(n_tokens, *key), strict=True):
            yield batch._replace(target=written.acts)

    def _fresh(self, n_tokens: int, *key: int | str) -> Iterator[Batch]:
        order = torch.randperm(len(self.blocks.train), generator=keyed_generator(self.seed, *key)).numpy()
        per_pass = max(1, self._tokens_per_pass // self.blocks.ctx)
        n_blocks = min(len(order), math.ceil(n_tokens / self._windows.rows_per_block))
        passes = [order[i : i + per_pass] for i in range(0, n_blocks, per_pass)]
        for first in range(0, len(passes), self.mesh.n_ranks):
            for raw in self._raw_on_all_ranks(passes[first : first + self.mesh.n_ranks]):
                rows = raw.float().flatten(0, 1)
                if self._normalised:
                    yield Batch(*normalise(rows))
                else:
                    # Copied, because raw activations may lie in a buffer that the next piece overwrites.
                    yield Batch(rows.clone(), torch.linalg.vector_norm(rows, dim=-1))

    def _raw_on_all_ranks(self, passes: list[np.ndarray]) -> Iterator[Float[Tensor, "n positions d_in"]]:
        """Yield the activations of at most one pass per rank: each rank computes its own and sends it to the others."""
        mesh = self.mesh
        if mesh.n_ranks == 1:
            yield from self._raw(passes[0])
            return
        own_pass = passes[mesh.rank : mesh.rank + 1]  # empty if there are fewer passes than ranks
        # Copies, because the next piece may overwrite this one.
        own = [piece.to(torch.float32, copy=True) for blocks in own_pass for piece in self._raw(blocks)]
        for rank, blocks in enumerate(passes):
            if rank == mesh.rank:
                raw = torch.cat(own)
            else:
                raw = torch.empty(len(blocks), self._windows.rows_per_block, self.d_in, device=self.device)
            yield mesh.broadcast_(raw, rank)

    def _raw(self, chosen: np.ndarray) -> Iterator[Float[Tensor, "n positions d_in"]]:
        """Yield the activations of these blocks that are trained on, piece by piece; the next may overwrite them."""
        to_device = Transfer(self.device)  # one for each call, since a thread may be reading too
        for piece in self._source.at(self.hook, chosen):
            yield to_device(piece)[:, self._first :]

    def _blocks_of(self, epoch: int, window: int) -> np.ndarray:
        """Return the blocks of a window: a part of the epoch's permutation, which depends on seed and epoch only."""
        order = torch.randperm(len(self.blocks.train), generator=keyed_generator(self.seed, "blocks", epoch))
        return order[window * self._windows.n_blocks :][: self._windows.n_blocks].numpy()

    def _filling(self, held: HeldWindow, number: WindowNumber) -> Iterator[None]:
        """Fill a window, piece by piece."""
        chosen = self._blocks_of(*number)
        # Drawn for the whole window, on the CPU and by a generator of its own: so the order depends neither on the mesh
        # nor on the device nor on what was drawn before.
        generator = keyed_generator(self.seed, "rows", *number)
        order = torch.randperm(len(chosen) * self._windows.rows_per_block, generator=generator)
        if self.mesh.n_ranks == 1:
            yield from self._fill_(held.acts, held.norms, chosen)
        else:
            order = self._exchange(held, chosen, order)
        held.order = order.to(self.device)

    def _announce(self, number: WindowNumber) -> None:
        """Tell the source which of the blocks of a window this rank will ask for, some time before it does."""
        chosen = self._blocks_of(*number)
        self._source.expect(self.hook, chosen[self.mesh.slice_of_rank(len(chosen))])

    def _fill_(self, acts: Tensor, norms: Tensor, chosen: np.ndarray) -> Iterator[None]:
        """Write the normalised activations of these blocks, and their norms before, into buffers, piece by piece."""
        start = 0
        for raw in self._raw(chosen):
            end = start + raw.shape[0] * raw.shape[1]
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
        mesh = self.mesh
        slices = [mesh.slice_of_rank(len(chosen), rank) for rank in range(mesh.n_ranks)]
        own = slices[mesh.rank]
        n_rows = torch.tensor([(blocks.stop - blocks.start) * self._windows.rows_per_block for blocks in slices])
        harvested_by = torch.arange(mesh.n_ranks).repeat_interleave(n_rows)  # the rank that has each row of the window
        first_own_row = own.start * self._windows.rows_per_block

        # One column more than d_in, so that a row's norm travels with it.
        held = window.acts.new_empty(int(n_rows[mesh.rank]), self.d_in + 1)
        for _ in self._fill_(held[:, : self.d_in], held[:, self.d_in], chosen[own]):
            pass

        # The rows that each data rank uses, in the order of their use: [n_data, rows of its part of all batches].
        whole_batches = order[: len(order) // self.batch_size * self.batch_size]
        parts = whole_batches.view(-1, mesh.n_data, self.batch_size // mesh.n_data)
        used_by = parts.transpose(0, 1).flatten(1)

        # Every rank sends each other rank those of its rows that the other uses, in the order of their use, so that
        # both sides know which row is which without sending its number.
        own_rows_used_by = [used[harvested_by[used] == mesh.rank] - first_own_row for used in used_by]
        sent = [own_rows_used_by[rank // mesh.n_latent] for rank in range(mesh.n_ranks)]
        used_here = used_by[mesh.data_rank]
        came_from = harvested_by[used_here]
        n_received = torch.bincount(came_from, minlength=mesh.n_ranks).tolist()
        rows = mesh.exchanged(held[torch.cat(sent).to(held.device)], [len(some) for some in sent], n_received)
        window.acts[: len(rows)] = rows[:, : self.d_in]
        window.norms[: len(rows)] = rows[:, self.d_in]

        # The rows lie sorted by the rank they came from and, from one rank, in the order of their use; the stable sort
        # of `came_from` is that very arrangement. Its inverse says where the row for each use lies.
        arrangement = came_from.argsort(stable=True)
        return torch.empty_like(arrangement).scatter_(0, arrangement, torch.arange(len(arrangement)))
