"""The pairs of the sparse step on a CPU in order of latent, as the gradients of the matrices need them (numba)."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from prolu.sae.weights import Weights
from prolu.training.steps import numba_pairs
from prolu.training.steps.pair_finder import GrowingArrays

SORTING_PARTS = 2
"""The number of runs of tokens that are sorted at the same time; each takes d_sae counters of its own."""

LATENT_BLOCKS = 64
"""The number of blocks of latents of about equal work, of which each thread takes the next when it is done."""

PAIRS_PER_LATENT = 4
"""The work of updating a latent's rows, as a number of pairs that take the same time."""


class PairsByLatent(NamedTuple):
    """All that the kernels need for the gradients of both matrices, in the order of their parameters."""

    blocks: np.ndarray
    """Bounds of blocks of latents of about equal work."""
    by_latent: np.ndarray
    """Where each latent's pairs start, and where the last one's end: [d_sae + 1]."""
    tokens: np.ndarray
    """The row of each pair in `centred`."""
    error_rows: np.ndarray
    """The row of each pair in `error`: the same, but for a nested loss."""
    values: np.ndarray
    """f of each pair; 0 where the decoder is not trained."""
    to_m: np.ndarray
    """The gradient with respect to m, of each pair."""
    centred: np.ndarray
    """x - b_dec of each row."""
    error: np.ndarray
    """The scaled error of each row."""


class LatentSorter:
    """Sorts pairs by latent, and then whatever belongs to the pairs, with sums over each latent's pairs.

    All that it returns lies in its own buffers, which the next batch overwrites.
    """

    def __init__(self, like: Weights):
        """Args: `like` has the shape and number format of the weights."""
        self._d_sae = like.d_sae
        self._by_latent = np.empty(like.d_sae + 1, np.int64)
        self._blocks = np.empty(LATENT_BLOCKS + 1, np.int64)
        self._arrays = GrowingArrays(like.encoder.numpy().dtype)
        self._tokens = np.empty(0, np.int32)
        self._source = np.empty(0, np.int32)

    def sort(self, starts: np.ndarray, latents: np.ndarray) -> None:
        """Sort the pairs of a batch.

        Args:
            starts: Where each token's pairs start, and where the last token's end: [n_tokens + 1].
            latents: The latent of each pair, in order of token.
        """
        self._tokens = self._arrays.array("tokens", len(latents), np.int32)
        # Where each pair was in order of token: what belongs to the pairs is gathered from there.
        self._source = self._arrays.array("source", len(latents), np.int32)
        numba_pairs.sort_by_latent(
            starts, latents, self._d_sae, SORTING_PARTS, self._by_latent, self._tokens, self._source
        )

    def sorted_and_summed(self, name: str, values: Tensor) -> tuple[np.ndarray, Tensor]:
        """Return the values of all pairs in order of latent, in an array of that name, and each latent's sum."""
        out = self._arrays.array(name, len(self._source))
        sums = values.new_empty(self._d_sae)
        numba_pairs.gather_and_sum(self._by_latent, self._source, values.numpy(), out, sums.numpy())
        return out, sums

    def sorted_and_counted(self, values: Tensor) -> tuple[np.ndarray, Tensor]:
        """Return the values of all pairs in order of latent, and the number of positive ones of each latent."""
        out = self._arrays.array("values", len(self._source))
        counts = values.new_empty(self._d_sae)
        numba_pairs.gather_and_count(self._by_latent, self._source, values.numpy(), out, counts.numpy())
        return out, counts

    def pairs(
        self, values: np.ndarray, to_m: np.ndarray, centred: Tensor, error: Tensor, prefixes: Sequence[int], batch: int
    ) -> PairsByLatent:
        """Return the sorted pairs for the kernels, with latents divided into blocks of about equal work.

        Args:
            values: f of each pair.
            to_m: the gradient with respect to m, of each pair.
            centred: x - b_dec of each row.
            error: the scaled error of each row, for every block of latents between two prefixes.
            prefixes: those of a nested loss.
            batch: the number of tokens.
        """
        numba_pairs.split_evenly(self._by_latent, PAIRS_PER_LATENT, self._blocks)
        rows = self._error_rows(prefixes, batch) if prefixes else self._tokens
        matrices = (centred.numpy(), error.numpy())
        return PairsByLatent(self._blocks, self._by_latent, self._tokens, rows, values, to_m, *matrices)

    def _error_rows(self, prefixes: Sequence[int], batch: int) -> np.ndarray:
        """Return the row of the error that each pair sees.

        The rows of the error are those of the first block, of the second ..., and then those of an auxiliary term.
        """
        rows = self._arrays.array("error rows", len(self._tokens), np.int32)
        bounds = self._by_latent[[0, *prefixes, self._d_sae]]
        for block, (start, end) in enumerate(itertools.pairwise(bounds)):
            tokens = self._tokens[start:end]
            rows[start:end] = tokens + batch * np.where(tokens < batch, block, len(prefixes))
        return rows
