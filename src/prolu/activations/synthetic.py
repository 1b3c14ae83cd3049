"""Synthetic activations whose features are known: sums of more directions than there are dimensions.

A row is x = sum_i c_i v_i + noise. The directions v_i are fixed unit vectors, [n_features, d_in]; the code c of a row
is sparse and at least 0. Whatever may make features hard to find is a setting: how unequally often they are active,
whether they are active together, whether some are active only where another one is, and how much the magnitude of one
feature varies from row to row. An SAE that is trained on such rows can be compared with the truth
(`evaluation/truth.py`).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prolu.activations.rows import ActivationRows, KnownFeatures, RowBlocks
from prolu.runtime.checks import check_types, one_of
from prolu.runtime.rng import keyed_generator

ROWS_PER_BLOCK = 256
"""The number of rows per block. All rows of a block are drawn at once by a generator of their own, so that their bits
depend only on the block's number."""

MOST_FREQUENT = 0.5
"""The fraction of rows on which the most frequent feature may be active."""

LEAST_RARER = 2.0
"""How many times as often as its child a parent is active at least, so that it is often active without that child."""


@dataclass(frozen=True, kw_only=True)
class SyntheticFeatures:
    """The features of synthetic activations. Every row is a pure function of these settings and its number."""

    d_in: int = 64
    """The width of the rows."""
    n_features: int = 256
    """The number of features. With more than `d_in` of them they are in superposition."""
    l0: float = 8.0
    """The mean number of features that are active on a row."""
    zipf: float = 1.0
    """The exponent of the features' frequencies: the i-th most frequent one is active on a fraction of the rows that is
    proportional to i^-zipf, and at most half. 0: all are equally frequent."""
    correlation: float = 0.0
    """How strongly the activity of features is correlated, from 0 to less than 1. A feature is active where a standard
    normal variable of its own is below a threshold; this is the fraction of that variable's variance that comes from
    `n_topics` hidden variables, which the features share. Some pairs are then active together more often than by
    chance, and some less often."""
    n_topics: int = 8
    """The number of hidden variables that correlated features share."""
    children: float = 0.0
    """The fraction of the features that are active only where another one, their parent, is."""
    magnitude_spread: float = 0.0
    """The standard deviation of the log of a feature's magnitude from row to row: 0 gives it one magnitude whenever it
    is active, 1 a heavy tail."""
    noise: float = 0.0
    """The standard deviation of the noise in each coordinate. That of the sum of the features is about 1."""
    seed: int = 0
    """The seed of directions, parents and rows."""

    def __post_init__(self):
        check_types(self)
        for name in ("d_in", "n_features", "n_topics"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        if not 0 < self.l0 <= MOST_FREQUENT * self.n_features:
            most = MOST_FREQUENT * self.n_features
            raise ValueError(f"l0 {self.l0:g}: must be above 0, and at most {most:g} with {self.n_features} features")
        for name, end in (("correlation", 1.0), ("children", 1.0)):
            if not 0 <= getattr(self, name) < end:
                raise ValueError(f"{name} {getattr(self, name):g}: must be at least 0 and less than {end:g}")
        for name in ("zipf", "magnitude_spread", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name):g}: must be a number of at least 0")

    @cached_property
    def truth(self) -> "TrueFeatures":
        """The features that the settings stand for."""
        return _truth_of(self)

    def rows(self, n_train: int, n_held_out: int = 65_536, *, name: str = "synthetic") -> ActivationRows:
        """Return rows to train on and rows to score on, about so many; none is made before it is asked for.

        Args:
            n_train: the number of rows to train on, rounded up to whole blocks of 256.
            n_held_out: the number of rows to score on, likewise.
            name: what the rows are called in config.json and reports.
        """
        train = SyntheticBlocks(self, "train", -(-n_train // ROWS_PER_BLOCK))
        held_out = SyntheticBlocks(self, "held-out", -(-n_held_out // ROWS_PER_BLOCK))
        facts = {"synthetic": asdict(self)}
        return ActivationRows(train=train, held_out=held_out, source=name, dtype="fp32", facts=facts, truth=held_out)


class TrueFeatures(NamedTuple):
    """Features, in descending order of their frequency."""

    directions: Float[Tensor, "n_features d_in"]
    """The unit vector of each feature."""
    frequency: Float[Tensor, " n_features"]
    """The fraction of rows on which each is active."""
    parent: Int[Tensor, " n_features"]
    """The number of each feature's parent, or -1 if it has none."""
    topics: Float[Tensor, "n_features n_topics"]
    """The unit vector of each feature's share in the topics."""
    magnitude: float
    """The mean magnitude of a feature where it is active, the same for all: about 1 is the variance of a coordinate."""


def _truth_of(features: SyntheticFeatures) -> TrueFeatures:
    n = features.n_features

    def unit_vectors(what: str, width: int) -> Tensor:
        drawn = torch.randn(n, width, generator=keyed_generator(features.seed, what), dtype=torch.float64)
        return torch.nn.functional.normalize(drawn, dim=1)

    frequency = _frequencies(features)
    # E m^2 = (E m)^2 exp(spread^2) for a log-normal m. The directions are drawn at random, so the products of two of
    # them average out, and E ||x||^2 is about l0 E m^2, which is set to d_in.
    magnitude = math.sqrt(features.d_in / features.l0) * math.exp(-(features.magnitude_spread**2) / 2)
    return TrueFeatures(
        unit_vectors("directions", features.d_in).float(),
        frequency,
        _parents(features, frequency),
        unit_vectors("topics", features.n_topics),
        magnitude,
    )


def _frequencies(features: SyntheticFeatures) -> Float[Tensor, " n_features"]:
    """Return frequencies proportional to i^-zipf, and at most `MOST_FREQUENT`, whose sum is l0."""
    shape = torch.arange(1, features.n_features + 1, dtype=torch.float64) ** -features.zipf
    # Bisection finds the common factor with which the sum is l0 although the frequencies are cut off at the maximum.
    low, high = 0.0, features.l0 / shape[-1].item()
    for _ in range(200):
        middle = (low + high) / 2
        if (middle * shape).clamp(max=MOST_FREQUENT).sum() < features.l0:
            low = middle
        else:
            high = middle
    return (high * shape).clamp(max=MOST_FREQUENT)


def _parents(features: SyntheticFeatures, frequency: Float[Tensor, " n_features"]) -> Int[Tensor, " n_features"]:
    """Return the parent of each feature, or -1. A parent is no child itself, and at least twice as frequent as its
    child.
    """
    n = features.n_features
    generator = keyed_generator(features.seed, "parents")
    parent = torch.full((n,), -1, dtype=torch.int64)
    # Each feature in turn, the most frequent first, so that no parent becomes a child afterwards.
    is_child = torch.rand(n, generator=generator) < features.children
    choice = torch.rand(n, generator=generator, dtype=torch.float64)
    for i in range(n):
        free = ((parent < 0) & (frequency >= LEAST_RARER * frequency[i])).nonzero()[:, 0]
        free = free[free < i]
        if is_child[i] and len(free):
            parent[i] = free[int(choice[i] * len(free))]
    return parent


class SyntheticBlocks(RowBlocks, KnownFeatures):
    """Synthetic rows in blocks of 256, each of which is drawn when it is asked for."""

    def __init__(self, features: SyntheticFeatures, side: str, n_blocks: int):
        self.features = features
        self._side = side
        self._n_blocks = n_blocks
        truth = features.truth
        has_parent = truth.parent >= 0
        # The probability that a child is active where its parent is, such that the child has its own frequency overall.
        given_parent = truth.frequency / torch.where(has_parent, truth.frequency[truth.parent], 1)
        self._threshold = torch.special.ndtri(given_parent).float()
        # Children do not depend on the topics: since their parents do, children would not have the intended frequency.
        shared = torch.where(has_parent, 0.0, features.correlation)
        self._own = (1 - shared).sqrt().float()
        self._topics = (shared.sqrt()[:, None] * truth.topics).float()
        self._children = has_parent.nonzero()[:, 0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of blocks, the number of rows in each, and their width."""
        return self._n_blocks, ROWS_PER_BLOCK, self.features.d_in

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self._n_blocks

    def __getitem__(self, chosen: np.ndarray, /) -> Float[Tensor, "n ctx d_in"]:
        """Return the rows of some blocks."""
        return self._drawn(chosen, lambda block: block.rows, self.features.d_in)

    @property
    def directions(self) -> Float[Tensor, "n_features d_in"]:
        """The unit vector of each feature."""
        return self.features.truth.directions

    def codes(self, chosen: np.ndarray) -> Float[Tensor, "n ctx n_features"]:
        """Return the true codes of the rows of some blocks."""
        return self._drawn(chosen, lambda block: block.codes, self.features.n_features)

    def _drawn(self, chosen: np.ndarray, part: Callable[["_Block"], Tensor], width: int) -> Tensor:
        found = torch.empty(len(chosen), ROWS_PER_BLOCK, width)
        for i, number in enumerate(chosen.tolist()):
            found[i] = part(self._block(number))
        return found

    def _block(self, number: int) -> "_Block":
        features = self.features
        truth = features.truth
        generator = keyed_generator(features.seed, self._side, number)
        variable = self._own * torch.randn(ROWS_PER_BLOCK, features.n_features, generator=generator)
        if features.correlation:
            variable += torch.randn(ROWS_PER_BLOCK, features.n_topics, generator=generator) @ self._topics.T
        # The variable is standard normal, so it is below the threshold as often as the feature is to be active.
        active = variable < self._threshold
        active[:, self._children] &= active[:, truth.parent[self._children]]
        spread = features.magnitude_spread
        log_magnitudes = spread * torch.randn(int(active.sum()), generator=generator) - spread**2 / 2
        codes = torch.zeros(ROWS_PER_BLOCK, features.n_features)
        codes[active] = truth.magnitude * log_magnitudes.exp()
        rows = codes @ truth.directions
        if features.noise:
            rows += features.noise * torch.randn(rows.shape, generator=generator)
        return _Block(rows, codes)


class _Block(NamedTuple):
    rows: Float[Tensor, "ctx d_in"]
    codes: Float[Tensor, "ctx n_features"]


EASY = SyntheticFeatures(d_in=64, n_features=96, l0=3.0, zipf=0.0, magnitude_spread=0.25, noise=0.01)
"""Features that are equally frequent, seldom active together and of nearly equal magnitude."""

HARD = SyntheticFeatures(
    d_in=64,
    n_features=256,
    l0=6.0,
    zipf=0.8,
    correlation=0.3,
    children=0.3,
    magnitude_spread=0.6,
    noise=0.05,
)
"""Four features for each dimension, of unequal frequency, correlated, some with parents, and of varying magnitude."""

NAMED = {"easy": EASY, "hard": HARD, "even": replace(HARD, magnitude_spread=0.0)}
"""The features that have a name: easy ones, hard ones, and the hard ones with one magnitude throughout."""


def features_named(name: str) -> SyntheticFeatures:
    """Return the features of this name.

    Raises:
        ValueError: there are none.
    """
    return NAMED[one_of("synthetic", name, NAMED)]
