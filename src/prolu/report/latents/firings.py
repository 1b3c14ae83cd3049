"""When and how strongly each latent of one SAE is active on held-out text, and examples of that."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prolu.activations.kept_tokens import kept_of_scored
from prolu.activations.language_model import LanguageModel
from prolu.activations.rows import ActivationRows, RowArrays
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.token_mask import NO_MASK, TokenMask
from prolu.evaluation.held_out import choose_blocks
from prolu.report.latents.accumulators import Histogram, KeptFirings
from prolu.report.latents.cofiring import CoFiring, CoFirings
from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE
from prolu.sae.scaling import normalise

ENTRIES_PER_PASS = 2**22
"""How many activations of latents are held at once: 16 MB in fp32. One token block is always held whole."""

SAMPLE = 200
"""How many activations per latent are drawn at random. The bands of activation are quantiles of this sample."""

N_TOGETHER = 5
"""How many latents that are active together with a latent are named."""

N_BANDS = 5
"""The number of bands of activation: fifths of the sample."""

BEFORE = 40
"""How many tokens an example shows before the one that it is about, unless the token block begins later."""
WIDTH = 64
"""How many tokens an example shows in all."""

Advance = Callable[[int], None]
"""A function that is called with a number of tokens when so many more are done; it draws a progress bar."""


@dataclass(frozen=True, eq=False)
class HeldOutText:
    """Held-out token blocks and their activations, computed once for all SAEs at a hook; 4 d_in bytes per token."""

    tokens: np.ndarray
    """Token ids [n, ctx]; of rows that come from no language model, the number of each in its file, [n, 1]."""
    acts: Float[Tensor, "n ctx d_in"]
    shown: Bool[Tensor, "n ctx"]
    """The tokens at which latents are looked at: all but BOS, at position 0 of each block of text, and
    what a mask leaves out."""

    @classmethod
    def read(
        cls, lm: LanguageModel, blocks: TokenBlocks, n_tokens: int, advance: Advance, mask: TokenMask = NO_MASK
    ) -> "HeldOutText":
        """Return `n_tokens` held-out tokens, rounded up to whole token blocks, or all if there are fewer."""
        chosen = choose_blocks(blocks, n_tokens)
        tokens = np.asarray(blocks.held_out[chosen])
        n_blocks = max(1, lm.batch_tokens // blocks.ctx)
        acts: list[Tensor] = []
        for start in range(0, len(tokens), n_blocks):
            acts.append(lm.activations(tokens[start : start + n_blocks]).cpu())
            advance(acts[-1].shape[0] * blocks.ctx)
        joined = torch.cat(acts)
        kept = kept_of_scored(mask, lm, blocks, chosen, joined)
        shown = torch.ones(tokens.shape, dtype=torch.bool) if kept is None else kept
        shown[:, 0] = False
        return cls(tokens, joined, shown)

    @classmethod
    def of_rows(cls, rows: ActivationRows, n_rows: int, advance: Advance) -> "HeldOutText":
        """Return `n_rows` held-out rows, or all if there are fewer, each as a block of its own."""
        chosen = choose_blocks(rows, n_rows)
        held_out = rows.held_out
        is_array = isinstance(held_out, RowArrays)
        numbers = held_out.numbers_in_files(chosen) if is_array else _positions(chosen, rows.ctx)
        acts = held_out[chosen].float().flatten(0, 1)[:, None]
        advance(len(acts))
        return cls(numbers[:, None], acts, torch.ones(len(acts), 1, dtype=torch.bool))

    @property
    def ctx(self) -> int:
        """The number of tokens per block."""
        return self.tokens.shape[1]


def _positions(chosen: np.ndarray, ctx: int) -> np.ndarray:
    """Return the numbers of the rows in some blocks of rows."""
    return (chosen[:, None] * ctx + np.arange(ctx)).ravel()


class Example(NamedTuple):
    """A latent's activations around one token."""

    position: int
    """The position of that token in the text: block * ctx + place in the block."""
    start: int
    """The position of the first token of the window around it."""
    activations: np.ndarray
    """The latent's activations on the tokens of the window."""


class Examples(NamedTuple):
    """Text on which one latent is active."""

    strongest: list[Example]
    """The largest activations, at most one per token block, the largest first."""
    bands: list[list[Example]]
    """Activations drawn at random from each fifth of them; the weakest fifth is the first."""


@dataclass(frozen=True, eq=False)
class Firings:
    """When and how strongly the latents of an SAE are active on held-out text.

    The first position of every token block, BOS, is left out: its activations are unlike all others, and it is no text.
    Tokens that the study's mask leaves out are left out too.
    """

    n_tokens: int
    """The number of tokens without those that are left out."""
    n_active: Int[np.ndarray, " d_sae"]
    """The number of tokens on which each latent is active."""
    mean: Float[np.ndarray, " d_sae"]
    """The mean activation over the tokens on which the latent is active; 0 if it never is."""
    max: Float[np.ndarray, " d_sae"]
    """The largest activation."""
    histogram: Int[np.ndarray, "d_sae bins"]
    """Activations above 0, counted in equal bins from 0 to `reach`."""
    reach: Float[np.ndarray, " d_sae"]
    """The smallest power of two above the largest activation."""
    examples: list[Examples]
    """One entry per latent."""
    together: list[list[CoFiring]]
    """For each latent, the others that are active on the same tokens most often."""
    together_share: float
    """The fraction of the tokens that was used to count which latents are active together; 1 if all were."""


def collect(sae: SAE, text: HeldOutText, n_examples: int, advance: Advance = lambda n: None) -> Firings:
    """Return what the latents of an SAE do on a text.

    The text passes through `sae.encode` twice: once to count and to choose examples, once to read the activations
    around them. At most 2^22 activations of latents, or those of one token block, are held at once; how many does not
    change the result.

    Args:
        sae: the SAE.
        text: the text with its activations.
        n_examples: the number of strongest examples per latent, and roughly that of all bands together.
        advance: called with the number of tokens of every part that is done, twice the text in all.
    """
    d_sae = sae.config.d_sae
    n_active = np.zeros(d_sae, np.int64)
    total = np.zeros(d_sae)
    histogram = Histogram(d_sae)
    strongest = KeptFirings(d_sae, n_examples)
    sample = KeptFirings(d_sae, SAMPLE)
    together = CoFirings(d_sae)
    # A random number per position of the text: the firings with the smallest ones are a uniform sample, the same one
    # in whatever parts the text is read.
    priority = torch.rand(text.tokens.size, generator=keyed_generator("examples"), dtype=torch.float64).numpy()
    for first, latents in encoded(sae, text):
        flat = latents.flatten(0, 1)
        # Only the activations above 0 are counted, one entry each: far fewer than all.
        tokens, which = flat.nonzero().T.numpy()
        values = flat[tokens, which].numpy()
        positions = first * text.ctx + tokens
        n_active += np.bincount(which, minlength=d_sae)
        total += np.bincount(which, values, d_sae)
        histogram.add(which, values, latents.amax((0, 1)).numpy())
        sample.offer(which, priority[positions], positions, values)
        strongest.offer(*_strongest_of_blocks(latents, first))
        together.add(tokens, which, priority[first * text.ctx :][: len(flat)])
        advance(latents.shape[0] * text.ctx)
    places = [_places(*rows, n_examples) for rows in zip(strongest.by_latent(), sample.by_latent(), strict=True)]
    return Firings(
        n_tokens=int(text.shown.sum()),
        n_active=n_active,
        mean=total / n_active.clip(1),
        max=histogram.largest,
        histogram=histogram.counts,
        reach=histogram.reach,
        examples=_with_windows(sae, text, places, advance),
        together=together.strongest(N_TOGETHER),
        together_share=together.share,
    )


def encoded(sae: SAE, text: HeldOutText) -> Iterator[tuple[int, Tensor]]:
    """Yield the text in parts: the number of the first token block, and latents [blocks, ctx, d_sae].

    They are 0 at the tokens that are not shown.
    """
    n_blocks = max(1, ENTRIES_PER_PASS // (text.ctx * sae.config.d_sae))
    for first in range(0, len(text.acts), n_blocks):
        raw = text.acts[first : first + n_blocks].to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        with torch.no_grad():
            # The language model has centred them already, where it does that.
            x = normalise(raw)[0] if sae.config.normalisation == "per_token" else raw
            latents = sae.encode_normalised(x).float().cpu()
        latents[~text.shown[first : first + n_blocks]] = 0
        yield first, latents


def _strongest_of_blocks(latents: Tensor, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return, as `KeptFirings.offer` takes them, each latent's largest activation in each block where it is active.

    One per block, because the tokens around a strong activation are often strong too: without this all examples of a
    latent could come from one sentence.
    """
    largest = latents.amax(1).numpy()
    place = latents.argmax(1).numpy()
    block, which = np.nonzero(largest)
    values = largest[block, which]
    positions = (first + block) * latents.shape[1] + place[block, which]
    return which, -values, positions, values


def _places(strongest: np.ndarray, sample: np.ndarray, n_examples: int) -> list[np.ndarray]:
    """Return the positions to show of one latent: the strongest, then those of each band, largest activation first."""
    per_band = math.ceil(n_examples / N_BANDS)
    by_value = sample[np.argsort(sample["value"], kind="stable")]
    places = [strongest["position"]]
    for band in np.array_split(by_value, N_BANDS):
        drawn = np.sort(band, order="key")[:per_band]  # keys are random, so the smallest are a random draw
        places.append(drawn[np.argsort(-drawn["value"], kind="stable")]["position"])
    return places


def _with_windows(
    sae: SAE, text: HeldOutText, places: Sequence[Sequence[np.ndarray]], advance: Advance
) -> list[Examples]:
    """Return the examples at these places, whose activations are read in one pass over the text.

    Args:
        sae: the SAE.
        text: the text with its activations.
        places: per latent, the positions of its strongest examples and then of those of each band.
        advance: called with the number of tokens of every part that is done.
    """
    parts = [part for latent_parts in places for part in latent_parts]
    sizes = [len(part) for part in parts]
    positions = np.concatenate(parts)
    # Every latent has 1 + N_BANDS parts, and every part its own number of examples.
    which = np.repeat(np.repeat(np.arange(len(places)), 1 + N_BANDS), sizes)
    width = min(WIDTH, text.ctx)
    block, place = np.divmod(positions, text.ctx)
    start = (place - BEFORE).clip(0, text.ctx - width)  # so that a window stays inside its token block
    order = np.argsort(block, kind="stable")
    windows = np.empty((len(positions), width), np.float32)
    for first, latents in encoded(sae, text):
        low, high = np.searchsorted(block[order], (first, first + len(latents)))
        here = order[low:high]  # the examples in this part of the text
        columns = start[here, None] + np.arange(width)
        windows[here] = latents.numpy()[block[here, None] - first, columns, which[here, None]]
        advance(latents.shape[0] * text.ctx)
    starts = block * text.ctx + start
    rows = zip(positions.tolist(), starts.tolist(), windows, strict=True)
    # The examples lie in one row, in the order of `places`, from which they are dealt out again.
    examples = iter([Example(*row) for row in rows])
    dealt = iter([[next(examples) for _ in range(size)] for size in sizes])
    return [Examples(next(dealt), [next(dealt) for _ in range(N_BANDS)]) for _ in places]
