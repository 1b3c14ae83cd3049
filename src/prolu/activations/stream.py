"""Activations in shuffled batches: `stream[i]` is a pure function of the stream's seed and i."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prolu.activations.batch import Batch
from prolu.activations.harvesting import ActivationSource
from prolu.activations.held_windows import HeldWindow, ReadAhead, WindowReader
from prolu.activations.inputs import Inputs
from prolu.activations.kept_tokens import kept_for_training
from prolu.activations.language_model import LanguageModel
from prolu.activations.row_batches import as_arrays
from prolu.activations.rows import ActivationRows, Array, rows_of_arrays
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.token_mask import NO_MASK, TokenMask
from prolu.activations.window_filling import WindowFiller
from prolu.activations.windows import Place, WindowNumber, Windows
from prolu.runtime.checks import at_least_1
from prolu.runtime.devices import numbered
from prolu.runtime.mesh import ALONE, Mesh

logger = logging.getLogger(__name__)


class ActivationStream:
    """An endless sequence of batches; `stream[i]` is batch number i, whenever and wherever it is asked for.

    In every epoch, a seeded permutation assigns token blocks to windows. A window is harvested with the language model,
    or read from a store, and its rows are shuffled by a permutation seeded by (seed, epoch, window). Only one window is
    trained on at a time, so asking in order is fast and jumping costs one window; the next one may be read meanwhile.

    The number of a batch is thus all that a checkpoint must keep of a stream, and all runs of a study see the same
    batches.

    When the text ends, the stream reads it again in another order. It warns of this once, unless `tells_repeats` is set
    to False.

    `ActivationStream.from_rows` makes a stream of activations that come from no language model. Its tokens are rows.
    """

    def __init__(
        self,
        lm: LanguageModel | None,
        blocks: TokenBlocks | ActivationRows,
        batch_size: int = 4096,
        seed: int = 0,
        window_tokens: int = 262_144,
        *,
        acts_dtype: str = "fp32",
        train_on_bos: bool = True,
        mask: TokenMask = NO_MASK,
        source: ActivationSource | None = None,
        hook_out: str = "",
        normalised: bool = True,
        device: str | torch.device = "cpu",
        mesh: Mesh = ALONE,
        read_ahead: ReadAhead = "auto",
    ):
        """Prepare a stream; nothing is harvested before the first batch is asked for, except to measure norms.

        Args:
            lm: the language model at the hook to train at; None for rows.
            blocks: its text, or rows.
            batch_size: the number of tokens per batch.
            seed: the seed of the order.
            window_tokens: the number of tokens shuffled together; a smaller corpus is one window.
            acts_dtype: fp32, bf16 or fp16, to which activations are rounded before they are normalised in fp32. With a
                `source`, its number format takes the place of this.
            train_on_bos: whether to train on the first position of every block; it changes no score.
            mask: what is left out of training, and of the scores of SAEs that are trained on this stream. Only the rows
                that are left count as tokens. A multiple of the median norm is measured now, from a few passes.
            source: a store of these activations, or a harvest shared with streams at other hooks; by default a harvest
                of the stream's own.
            hook_out: the hook that transcoders write at, read in the same passes; empty for SAEs.
            normalised: whether rows are scaled to norm sqrt(d_in); otherwise they stay as they come from the language
                model.
            device: where windows are held, and SAEs are trained on their batches.
            mesh: the ranks that train together. Each harvests a part of every window, and its batches are its rows of
                the whole batches, which do not depend on the mesh.
            read_ahead: whether a thread fills the next window while one is trained on, in the memory of one more
                window. No number depends on it. auto: from a store, for training on a GPU. on: also on a CPU, and from
                a language model, which must then not be given hooks by anybody else (as `splice` does) until the stream
                is closed; not on a mesh, and not for a harvest at several hooks. off: never.

        Raises:
            ValueError: a batch does not fit into a window, a block does not fit into the model, the store holds other
                activations, `hook_out` is no other hook of the model, the mask leaves nothing or cannot be used, or the
                stream cannot be read ahead; or a text has no language model.
        """
        at_least_1("batch_size", batch_size)
        mesh.check("batch_size", batch_size, "data")
        self.mesh = mesh
        self._lm = lm
        self.blocks = blocks
        self.batch_size = batch_size
        self.seed = seed
        self.train_on_bos = train_on_bos
        self._inputs = Inputs.of(lm, blocks, source, hook_out=hook_out, acts_dtype=acts_dtype)
        self.hook = self._inputs.hook
        """The hook at which activations are read; empty for rows."""
        self.d_in = self._inputs.d_in
        """The width of the activations."""
        self.device = numbered(device)
        """The device on which the batches are."""
        kept = kept_for_training(mask, self._lm, blocks, train_on_bos=train_on_bos)
        self._windows = Windows(
            blocks,
            blocks.ctx if kept is None else kept.per_block,
            batch_size=batch_size,
            window_tokens=window_tokens,
            seed=seed,
        )
        self.window_tokens = self._windows.n_blocks * blocks.ctx
        self._filler = WindowFiller(
            self._inputs, self._windows, kept, mesh=mesh, device=self.device, normalised=normalised
        )
        self.mask = self._filler.leave_out_large(mask)
        """What is left out. Where norms decide, the threshold is known."""
        self.tells_repeats = mesh.is_first
        """Whether a warning will be logged when the text is read a second time; False once it has been."""
        self.reads_ahead = self._inputs.reads_ahead(read_ahead, self.device, mesh)
        """Whether a thread fills the next window while one is trained on."""
        self.n_windows = 2 if self.reads_ahead else 1
        """The number of windows that are held in memory."""
        self._reader = WindowReader(
            self._filler.fill, self._filler.announce, self._filler.new_window, ahead=self.reads_ahead
        )
        self._targets = self._targets_at(hook_out) if hook_out else None

    def _targets_at(self, hook_out: str) -> "ActivationStream":
        """Return a stream of the same rows at the hook that transcoders write at."""
        # The order of rows follows from seed, epoch and window, so a stream at the other hook has the same order. Which
        # rows are left out for their norm is decided at the hook that is read; `__getitem__` and `fresh` then take the
        # same rows here.
        targets = ActivationStream(
            self.lm.at(hook_out),
            self.blocks,
            self.batch_size,
            self.seed,
            self.window_tokens,
            train_on_bos=self.train_on_bos,
            mask=replace(self.mask, max_norm=None, max_norm_multiple=None),
            source=self._inputs.source,
            normalised=False,
            device=self.device,
            mesh=self.mesh,
            read_ahead="on" if self.reads_ahead else "off",
        )
        targets.tells_repeats = False
        return targets

    @classmethod
    def from_rows(
        cls,
        train: Array | Sequence[Array] | Iterable[Any] | ActivationRows,
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
            ValueError: the rows cannot be used, for the reason that the message gives, or a batch does not fit into a
                window.
        """
        if not isinstance(train, ActivationRows):
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
    def n_train_tokens(self) -> int:
        """The number of tokens of the text that are trained on. Those that are left out for their norm are counted
        too.
        """
        return self._windows.n_rows

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches of the first epoch. Other epochs may have slightly more or fewer if a mask leaves out
        tokens.
        """
        return self._windows.batches_per_epoch

    @property
    def dropped_tokens_per_epoch(self) -> int:
        """The number of tokens at the ends of windows that do not fill a batch; tokens that a mask leaves out do not
        count.
        """
        return self.n_train_tokens - self.batches_per_epoch * self.batch_size

    def epochs(self, n_tokens: int) -> float:
        """Return how many times the text is seen in the batches of `n_tokens` tokens."""
        return n_tokens // self.batch_size / self.batches_per_epoch

    def describe(self) -> dict[str, Any]:
        """Return everything that decides the stream's numbers."""
        described = self._inputs.facts | {
            "batch_size": self.batch_size,
            "window_tokens": self.window_tokens,
            "train_on_bos": self.train_on_bos,
            "seed": self.seed,
            "device": self.device.type,
            **({"hook_out": self.hook_out} if self.hook_out else {}),
            **self.mask.describe(),
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
        if epoch and self.tells_repeats:
            self.tells_repeats = False
            logger.warning(
                "from batch %s on, the %s is read again: it has %s training %ss, and one pass gives %s batches",
                f"{index:,}", self.blocks.kind, f"{self.n_train_tokens:,}", self.blocks.unit,
                f"{self.batches_per_epoch:,}",
            )  # fmt: skip
        number = WindowNumber(epoch, window)
        held = self._held(number)
        n_data = self.mesh.n_data
        rows = held.order[row // n_data : (row + self.batch_size) // n_data]
        target = None if self._targets is None else self._targets._held(number).acts[rows]
        return Batch(held.acts[rows], held.norms[rows], target)

    def _held(self, number: WindowNumber) -> HeldWindow:
        # Which window is held now decides only whether this one must be filled, and never its content.
        return self._reader.get(number, self._windows.following(number))

    def close(self) -> None:
        """Stop reading ahead, and wait until no thread does. Batches can still be asked for, which begins it again."""
        self._reader.close()
        if self._targets is not None:
            self._targets.close()

    def fresh(self, n_tokens: int, *key: int | str) -> Iterator[Batch]:
        """Yield about `n_tokens` activations of training blocks drawn by (seed, key), whatever the stream's position.

        They come in whole passes of the language model, so that a larger `n_tokens` only adds activations at the end.
        There are fewer if the corpus has fewer.
        """
        batches = self._filler.fresh(n_tokens, *key)
        if self._targets is not None:
            # In turns, so that one pass serves both hooks.
            written = self._targets.fresh(n_tokens, *key)
            batches = (batch._replace(target=there.acts) for batch, there in zip(batches, written, strict=True))
        for batch in batches:
            yield batch if self.mask.max_norm is None else batch.of_rows(batch.raw_norm <= self.mask.max_norm)
