"""What is kept while a text is read in parts: a histogram per latent, and the activations that may become examples."""

import numpy as np

N_BINS = 64
"""The number of bins of an activation histogram. The last ends at a power of two, so at least half of them are used."""


class Histogram:
    """Counts of positive values per latent, in equal bins from 0 to a power of two.

    The range of a latent doubles when a value reaches its end; then each pair of bins becomes one, so that the counts
    are those of a histogram with this range from the start, and the values need not be kept.
    """

    def __init__(self, n_latents: int):
        self.counts = np.zeros((n_latents, N_BINS), np.int64)
        self.largest = np.zeros(n_latents, np.float32)
        self._exponent = np.zeros(n_latents, np.int64)

    @property
    def reach(self) -> np.ndarray:
        """The upper end of each latent's last bin."""
        return np.ldexp(1.0, self._exponent)

    def add(self, which: np.ndarray, values: np.ndarray, largest: np.ndarray) -> None:
        """Count values.

        Args:
            which: the latent of each value.
            values: the values.
            largest: the largest of these values of each latent, [n_latents]; 0 for a latent without any.
        """
        begun = self.largest > 0
        new_largest = np.maximum(self.largest, largest)
        # frexp gives the exponent e with 2^(e - 1) <= value < 2^e.
        needed = np.where(new_largest > 0, np.frexp(new_largest)[1], 0)
        while (too_narrow := begun & (self._exponent < needed)).any():
            merged = self.counts[too_narrow].reshape(-1, N_BINS // 2, 2).sum(-1)
            self.counts[too_narrow] = np.pad(merged, ((0, 0), (0, N_BINS // 2)))
            self._exponent[too_narrow] += 1
        self.largest = new_largest
        # The first values of a latent set its range, which may be below 1; after that it only grows.
        self._exponent = np.where(begun, self._exponent, needed)
        bins = (values / self.reach[which] * N_BINS).astype(np.int64)
        counts = np.bincount(which * N_BINS + bins, minlength=self.counts.size)
        self.counts += counts.reshape(self.counts.shape)


class KeptFirings:
    """Of all firings offered, the `n` of each latent with the smallest keys; of equal keys, the earlier positions."""

    ENTRY = np.dtype([("latent", np.int64), ("key", np.float64), ("position", np.int64), ("value", np.float32)])
    ENTRIES_BETWEEN_MERGES = 2**21
    """How many firings are gathered before they are sorted: 59 MB. Sorting at each offer would take far longer."""

    def __init__(self, n_latents: int, n: int):
        self._n = n
        self._limit = np.full(n_latents, np.inf)  # the largest key that can still be kept
        self._entries = [np.empty(0, self.ENTRY)]
        self._n_merged = 0

    def offer(self, latents: np.ndarray, keys: np.ndarray, positions: np.ndarray, values: np.ndarray) -> None:
        """Take firings, in any order."""
        # Equal to the limit too, because such a firing wins by an earlier position.
        may_be_kept = keys <= self._limit[latents]
        new = np.empty(may_be_kept.sum(), self.ENTRY)
        new["latent"] = latents[may_be_kept]
        new["key"] = keys[may_be_kept]
        new["position"] = positions[may_be_kept]
        new["value"] = values[may_be_kept]
        self._entries.append(new)
        if sum(map(len, self._entries)) > self._n_merged + self.ENTRIES_BETWEEN_MERGES:
            self._merge()

    def by_latent(self) -> list[np.ndarray]:
        """Return the kept firings of every latent, in order of their keys."""
        entries = self._merge()
        return np.split(entries, np.searchsorted(entries["latent"], np.arange(1, len(self._limit))))

    def _merge(self) -> np.ndarray:
        entries = np.concatenate(self._entries)
        entries = entries[np.lexsort((entries["position"], entries["key"], entries["latent"]))]  # by latent first
        first = np.searchsorted(entries["latent"], np.arange(len(self._limit)))
        rank = np.arange(len(entries)) - first[entries["latent"]]
        last = entries[rank == self._n - 1]
        self._limit[last["latent"]] = last["key"]
        kept = entries[rank < self._n]
        self._entries = [kept]
        self._n_merged = len(kept)
        return kept
