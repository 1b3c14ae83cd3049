"""The pairs of the sparse step on a CPU: the encoder's matmul, and what of its result is on the support (numba)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from prolu.sae.nonlinearities import Nonlinearity, Parameters
from prolu.sae.weights import Weights
from prolu.training.steps import numba_pairs

ROWS_PER_CHUNK = 1024
"""The number of tokens per encoder matmul: pairs are found while a chunk of m is in the cache."""

SAMPLED_ROWS = 32
"""The number of tokens from which the bound of a selection over the batch is guessed."""


class GrowingArrays:
    """Named arrays that grow with the number of pairs and are never given back, so that steps cause no page faults."""

    def __init__(self, dtype: np.dtype):
        self._dtype = dtype
        self._kept: dict[str, np.ndarray] = {}

    def array(self, name: str, n: int, dtype: Any = None, keep: int = 0) -> np.ndarray:
        """Return the first n entries of an array; when it grows, its first `keep` entries survive."""
        old = self._kept.get(name)
        if old is None or len(old) < n:
            new = np.empty(max(1024, int(1.3 * n)), dtype or self._dtype)
            if old is not None and keep:
                new[:keep] = old[:keep]
            old = new
            self._kept[name] = new
        return old[:n]


class PairFinder:
    """Finds the (token, latent) pairs on the support, and holds their latents and pre-activations, by token."""

    def __init__(self, like: Weights, batch_size: int):
        """Args: see `Steps`."""
        rows = min(batch_size, ROWS_PER_CHUNK)
        self._m = like.encoder.new_empty(rows, like.d_sae)
        self._counts = np.empty(rows, np.int64)
        self._arrays = GrowingArrays(like.encoder.numpy().dtype)

    def find(
        self,
        encoder: Tensor,
        own: Parameters,
        nonlinearity: Nonlinearity,
        centred: Tensor,
        starts: np.ndarray,
        n: int = 0,
    ) -> int:
        """Append the pairs of all tokens on the support to the n found so far, cut to a selection; fill `starts`.

        Returns:
            The number of pairs found by now.
        """
        selection = nonlinearity.selection
        if selection is None or not selection.over_batch:
            return self._append(encoder, own, nonlinearity, centred, starts, n)[0]
        # Nearly half of all entries are above 0, and few of them are selected. So pairs are looked for above a bound
        # that is probably lower than that of the selection; where it was not, they are looked for again without it.
        found, is_whole = self._append(encoder, own, nonlinearity, centred, starts, n, above_likely_bound=True)
        return found if is_whole else self._append(encoder, own, nonlinearity, centred, starts, n)[0]

    def _append(
        self,
        encoder: Tensor,
        own: Parameters,
        nonlinearity: Nonlinearity,
        centred: Tensor,
        starts: np.ndarray,
        n: int,
        *,
        above_likely_bound: bool = False,
    ) -> tuple[int, bool]:
        """Do what `find` does; on request, look only at entries above a bound that is probably lower than the
        selection's.

        Returns:
            The number of pairs found by now, and whether they are all that `find` shall find.
        """
        first = n
        threshold = nonlinearity.threshold(own)
        selection = nonlinearity.selection
        k = selection.k * len(centred) if selection is not None and selection.over_batch else None
        bound = likely_bound = 0.0
        starts[0] = n
        for start in range(0, len(centred), len(self._m)):
            chunk = centred[start : start + len(self._m)]
            # The encoder may hold some latents only, so the buffer is cut to a matrix of another width.
            out = self._m.view(-1)[: len(chunk) * len(encoder)].view(len(chunk), -1)
            m = torch.mm(chunk, encoder.T, out=out)
            if threshold is None:
                # Without a threshold, entries off the support are set to -inf, so that all others are above the lowest
                # number.
                m.masked_fill_(~nonlinearity.support(m, own), -torch.inf)
                floor = torch.full_like(m[0], torch.finfo(m.dtype).min).numpy()
            else:
                floor = threshold.numpy()
            if selection is not None and k is None:
                numba_pairs.keep_largest(m.numpy(), floor, selection.k)
            if above_likely_bound and selection is not None and start == 0:
                likely_bound = _likely_bound(m.numpy(), floor, selection.k)
            above = floor + floor.dtype.type(likely_bound) if likely_bound > 0 else floor
            counts = self._counts[: len(chunk)]
            numba_pairs.count(m.numpy(), above, counts)
            of_chunk = starts[start : start + len(chunk) + 1]
            np.cumsum(counts, out=of_chunk[1:])
            of_chunk[1:] += n
            held = n
            n = int(of_chunk[-1])
            # Room for as many pairs per token as so far, so that an array rarely grows twice in a batch.
            expected = first + (n - first) * len(centred) // (start + len(chunk))
            latents = self._arrays.array("latents", expected, np.int32, keep=held)
            values = self._arrays.array("m", expected, keep=held)
            numba_pairs.fill(m.numpy(), above, of_chunk, latents, values)
            if k is not None:
                # After each chunk, so that no more than one chunk's pairs and the batch's k are ever held.
                n, bound = self._cut(floor, k, starts[: start + len(chunk) + 1])
        if likely_bound == 0:
            return n, True
        # What was left out is below the likely bound, but for rounding where the threshold was added to it.
        assert threshold is not None
        rounding = 4 * torch.finfo(threshold.dtype).eps * (likely_bound + threshold.abs().max().item())
        return n, bound > likely_bound + rounding

    def found(self, end: int, start: int = 0) -> tuple[np.ndarray, Tensor]:
        """Return latents and m of the pairs from `start` to `end` that have been found so far."""
        m = self._arrays.array("m", end, keep=start)[start:]
        latents = self._arrays.array("latents", end, np.int32, keep=start)[start:]
        return latents, torch.from_numpy(m)

    def _cut(self, threshold: np.ndarray, k: int, starts: np.ndarray) -> tuple[int, float]:
        """Keep those k of the pairs found so far that lie farthest above their threshold, and ties; update `starts`.

        Returns:
            The number of pairs that are left, and how far the k-th lies above its threshold; 0 if there are fewer.
        """
        first = int(starts[0])
        n = int(starts[-1])
        if n - first < k:
            return n, 0.0
        latents, m = self.found(n, first)
        above = m.numpy() - threshold[latents]
        bound = np.partition(above, n - first - k)[n - first - k]
        if n - first > k:
            kept = above >= bound
            n_kept_before = np.concatenate([[0], np.cumsum(kept)])
            starts[:] = first + n_kept_before[starts - first]
            n = int(starts[-1])
            latents[: n - first] = latents[kept]
            m.numpy()[: n - first] = m.numpy()[kept]
        return n, float(bound)


def _likely_bound(m: np.ndarray, threshold: np.ndarray, k: int) -> float:
    """Return how far above their threshold the k selected entries per token probably lie at least; 0 where unknown.

    In a sample of tokens, 1.5 times as many entries lie above it as are selected.
    """
    above = (m[:SAMPLED_ROWS] - threshold).ravel()
    n = round(1.5 * k * min(len(m), SAMPLED_ROWS))
    return max(0.0, float(np.partition(above, len(above) - n)[len(above) - n])) if n < len(above) else 0.0
