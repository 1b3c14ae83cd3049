"""What the latents of one SAE do on held-out text: how often and how strongly they are on, and where."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prolu.activations.language_model import LanguageModel
from prolu.activations.token_blocks import TokenBlocks
from prolu.evaluation.held_out import choose_blocks
from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE

ENTRIES_PER_PASS = 2**22
"""Latents held at once, or those of one block if it has more: 16 MB in fp32."""

N_BINS = 64
"""Bins of an activation histogram; a power of two lies at its end, so that at least half of them are used."""

SAMPLE = 200
"""Firings drawn per latent, of which the bands of activation are quantiles."""

N_BANDS = 5
"""Bands of activation: fifths of that sample."""

BEFORE, WIDTH = 20, 32
"""An example shows so many tokens before the one it is about, and so many in all."""

Advance = Callable[[int], None]
"""Told how many tokens were done."""


@dataclass(frozen=True, eq=False)
class HeldText:
    """Held-out blocks and their activations, computed once for all SAEs at a hook; 4 d_in bytes a token."""

    tokens: np.ndarray
    """Token ids [n, ctx]."""
    acts: Float[Tensor, "n ctx d_in"]

    @classmethod
    def read(cls, lm: LanguageModel, blocks: TokenBlocks, n_tokens: int, advance: Advance) -> "HeldText":
        """About `n_tokens` tokens, or what there is; the choice depends on the blocks alone."""
        tokens = np.asarray(blocks.held_out[choose_blocks(blocks, n_tokens)])
        rows, acts = max(1, lm.batch_tokens // blocks.ctx), []
        for start in range(0, len(tokens), rows):
            acts.append(lm.activations(tokens[start : start + rows]).cpu())
            advance(acts[-1].shape[0] * blocks.ctx)
        return cls(tokens, torch.cat(acts))

    @property
    def ctx(self) -> int:
        """Tokens per block."""
        return self.tokens.shape[1]


class Example(NamedTuple):
    """A latent's activations around one token."""

    position: int
    """Of that token: block * ctx + place in the block."""
    start: int
    """Position of the window's first token."""
    activations: np.ndarray
    """Over the window."""


class Examples(NamedTuple):
    """Where one latent is on."""

    top: list[Example]
    """The strongest, at most one a block."""
    bands: list[list[Example]]
    """Drawn from fifths of its activations, weakest first."""


@dataclass(frozen=True, eq=False)
class Latents:
    """All latents of an SAE on held-out text. The first position of every block, BOS, is left out."""

    n_tokens: int
    """Tokens looked at."""
    n_on: Int[np.ndarray, " d_sae"]
    """Tokens on which a latent is on."""
    mean: Float[np.ndarray, " d_sae"]
    """Mean activation where it is on; 0 if it never is."""
    max: Float[np.ndarray, " d_sae"]
    """Largest activation."""
    histogram: Int[np.ndarray, "d_sae bins"]
    """Activations above 0, counted in equal bins from 0 to `reach`."""
    reach: Float[np.ndarray, " d_sae"]
    """The least power of two above the largest activation."""
    examples: list[Examples]


def collect(sae: SAE, text: HeldText, n_examples: int, advance: Advance = lambda n: None) -> Latents:
    """Two passes of `sae.encode` over the text: what to show, then the windows around it.

    Nothing is held of more than 2^22 activations of latents (or one block's) at once; what comes out does not depend
    on how many there are.

    Args:
        n_examples: strongest examples of a latent, and about as many from all bands together.
        advance: told of every pass over the text, twice its size in all.
    """
    d_sae = sae.config.d_sae
    n_on, total = np.zeros(d_sae, np.int64), np.zeros(d_sae)
    histogram, top, sample = Histogram(d_sae), Kept(d_sae, n_examples), Kept(d_sae, SAMPLE)
    priority = torch.rand(text.tokens.size, generator=keyed_generator("examples"), dtype=torch.float64).numpy()
    for first, latents in encoded(sae, text):
        tokens, which = latents.flatten(0, 1).nonzero().T.numpy()
        values = latents.flatten(0, 1)[tokens, which].numpy()
        positions = first * text.ctx + tokens
        n_on += np.bincount(which, minlength=d_sae)
        total += np.bincount(which, values, d_sae)
        histogram.add(which, values, latents.amax((0, 1)).numpy())
        sample.offer(which, priority[positions], positions, values)
        top.offer(*_strongest_of_blocks(latents, first))
        advance(latents.shape[0] * text.ctx)
    places = [_places(*rows, n_examples) for rows in zip(top.by_latent(), sample.by_latent(), strict=True)]
    return Latents(
        n_tokens=text.tokens.size - len(text.tokens), n_on=n_on, mean=total / n_on.clip(1), max=histogram.largest,
        histogram=histogram.counts, reach=histogram.reach, examples=_with_windows(sae, text, places, advance),
    )  # fmt: skip


def encoded(sae: SAE, text: HeldText) -> Iterator[tuple[int, Tensor]]:
    """First block and latents [blocks, ctx, d_sae], BOS zeroed, of some blocks at a time."""
    n_blocks = max(1, ENTRIES_PER_PASS // (text.ctx * sae.config.d_sae))
    for first in range(0, len(text.acts), n_blocks):
        raw = text.acts[first : first + n_blocks].to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        with torch.no_grad():
            latents = sae.encode(raw).float().cpu()
        latents[:, 0] = 0
        yield first, latents


def _strongest_of_blocks(latents: Tensor, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `Kept.offer` takes, of each latent's largest activation in each block where it is on; largest first."""
    largest, place = latents.amax(1).numpy(), latents.argmax(1).numpy()
    block, which = np.nonzero(largest)
    values = largest[block, which]
    return which, -values, (first + block) * latents.shape[1] + place[block, which], values


class Histogram:
    """Counts of positive values per latent, in equal bins from 0 to a power of two that doubles when it is reached."""

    def __init__(self, n_latents: int):
        self.counts = np.zeros((n_latents, N_BINS), np.int64)
        self.largest = np.zeros(n_latents, np.float32)
        self._exponent = np.zeros(n_latents, np.int64)

    @property
    def reach(self) -> np.ndarray:
        """Upper end of the last bin."""
        return np.ldexp(1.0, self._exponent)

    def add(self, which: np.ndarray, values: np.ndarray, largest: np.ndarray) -> None:
        """Counts values of latents; `largest` is each latent's own among them."""
        begun, new = self.largest > 0, np.maximum(self.largest, largest)
        needed = np.where(new > 0, np.frexp(new)[1], 0)
        while (behind := begun & (self._exponent < needed)).any():
            merged = self.counts[behind].reshape(-1, N_BINS // 2, 2).sum(-1)
            self.counts[behind] = np.pad(merged, ((0, 0), (0, N_BINS // 2)))
            self._exponent[behind] += 1
        self.largest, self._exponent = new, np.where(begun, self._exponent, needed)
        bins = (values / self.reach[which] * N_BINS).astype(np.int64)
        self.counts += np.bincount(which * N_BINS + bins, minlength=self.counts.size).reshape(self.counts.shape)


class Kept:
    """Of all entries offered, the `n` of each latent with the smallest keys; ties go to the earlier position."""

    ENTRY = np.dtype([("latent", np.int64), ("key", np.float64), ("position", np.int64), ("value", np.float32)])
    ENTRIES_BETWEEN_MERGES = 2**21

    def __init__(self, n_latents: int, n: int):
        self._n, self._limit = n, np.full(n_latents, np.inf)
        self._entries, self._n_merged = [np.empty(0, self.ENTRY)], 0

    def offer(self, latents: np.ndarray, keys: np.ndarray, positions: np.ndarray, values: np.ndarray) -> None:
        """Takes entries, in any order."""
        near = keys <= self._limit[latents]
        new = np.empty(near.sum(), self.ENTRY)
        for name, column in zip(self.ENTRY.names or (), (latents, keys, positions, values), strict=True):
            new[name] = column[near]
        self._entries.append(new)
        if sum(map(len, self._entries)) > self._n_merged + self.ENTRIES_BETWEEN_MERGES:
            self._merge()

    def by_latent(self) -> list[np.ndarray]:
        """Entries of every latent in order of their keys."""
        entries = self._merge()
        return np.split(entries, np.searchsorted(entries["latent"], np.arange(1, len(self._limit))))

    def _merge(self) -> np.ndarray:
        entries = np.concatenate(self._entries)
        entries = entries[np.lexsort((entries["position"], entries["key"], entries["latent"]))]
        first = np.searchsorted(entries["latent"], np.arange(len(self._limit)))
        rank = np.arange(len(entries)) - first[entries["latent"]]
        entries, last = entries[rank < self._n], entries[rank == self._n - 1]
        self._limit[last["latent"]] = last["key"]
        self._entries, self._n_merged = [entries], len(entries)
        return entries


def _places(top: np.ndarray, sample: np.ndarray, n_examples: int) -> list[np.ndarray]:
    """Positions to show of one latent: the strongest, then of every band, each in falling order of activation."""
    per_band, by_value = math.ceil(n_examples / N_BANDS), sample[np.argsort(sample["value"], kind="stable")]
    bands = [np.sort(band, order="key")[:per_band] for band in np.array_split(by_value, N_BANDS)]
    return [top["position"], *(band[np.argsort(-band["value"], kind="stable")]["position"] for band in bands)]


def _with_windows(sae: SAE, text: HeldText, places: list[list[np.ndarray]], advance: Advance) -> list[Examples]:
    """The activations around each place, read in one pass over the text."""
    sizes = [len(part) for parts in places for part in parts]
    positions = np.concatenate([part for parts in places for part in parts])
    which = np.repeat(np.repeat(np.arange(len(places)), 1 + N_BANDS), sizes)
    width = min(WIDTH, text.ctx)
    block, place = np.divmod(positions, text.ctx)
    start = (place - BEFORE).clip(0, text.ctx - width)
    order = np.argsort(block, kind="stable")
    windows = np.empty((len(positions), width), np.float32)
    for first, latents in encoded(sae, text):
        low, high = np.searchsorted(block[order], (first, first + len(latents)))
        some = order[low:high]
        columns = start[some, None] + np.arange(width)
        windows[some] = latents.numpy()[block[some, None] - first, columns, which[some, None]]
        advance(latents.shape[0] * text.ctx)
    rows = zip(positions.tolist(), (block * text.ctx + start).tolist(), windows, strict=True)
    examples = iter([Example(*row) for row in rows])
    parts = iter([[next(examples) for _ in range(size)] for size in sizes])
    return [Examples(next(parts), [next(parts) for _ in range(N_BANDS)]) for _ in places]
