"""Which latents are active on the same tokens: the Jaccard index of each latent with the others."""

from typing import NamedTuple

import numpy as np

MOST_PAIRS = 2**29
"""How many pairs of latents that are active on one token are counted, the sum of L0^2 over tokens: some 6 seconds. The
default 200,000 tokens stay below it up to an L0 of 50; of more, a random share of the tokens is counted."""

LEAST_TOGETHER = 2
"""On how many tokens two latents must be active together to be listed: once is chance."""

LATENTS_AT_ONCE = 256
"""For how many latents the counts with all others are held at once: [256, d_sae] numbers."""


class CoFiring(NamedTuple):
    """How often a latent is active on the same tokens as another one."""

    other: int
    """The other latent."""
    jaccard: float
    """The number of tokens on which both are active, divided by the number on which one of them or both are."""
    share: float
    """The number of tokens on which both are active, divided by the number on which this latent is."""


class CoFirings:
    """The latents that are active on each token of a text, from which it follows which are active together.

    If there would be more than `MOST_PAIRS` pairs, half of the tokens are dropped, again and again if need be. Those
    with the smallest random numbers are kept, so the choice does not depend on the parts in which the text is read.
    """

    def __init__(self, n_latents: int):
        self.share = 1.0
        """The fraction of the tokens that is kept."""
        self._n_latents = n_latents
        self._which = [np.empty(0, np.int32)]  # the active latents, token after token
        self._lengths = [np.empty(0, np.int64)]  # the number of active latents of each token
        self._random = [np.empty(0)]
        self._n_pairs = 0.0

    def add(self, tokens: np.ndarray, which: np.ndarray, random: np.ndarray) -> None:
        """Take the firings of a part of the text.

        Args:
            tokens: for each firing the number of its token in this part, in ascending order.
            which: for each firing its latent.
            random: a random number from 0 to 1 for each token of the part, [n].
        """
        lengths = np.bincount(tokens, minlength=len(random))
        self._keep(which.astype(np.int32), lengths, random)
        while self._n_pairs > MOST_PAIRS:
            self.share /= 2
            which, lengths, random = self._joined()
            self._which, self._lengths, self._random, self._n_pairs = [], [], [], 0.0
            self._keep(which, lengths, random)

    def strongest(self, n: int) -> list[list[CoFiring]]:
        """Return for each latent the `n` others of largest Jaccard index, or fewer if fewer are active with it.

        Of equal indices, the other latent that is active together with it more often comes first, then the smaller
        number.
        """
        import scipy.sparse

        which, lengths, _ = self._joined()
        ends = np.concatenate([[0], np.cumsum(lengths)])
        shape = (len(lengths), self._n_latents)
        by_token = scipy.sparse.csr_array((np.ones(len(which), np.int32), which, ends), shape=shape)
        by_latent = by_token.T.tocsr()
        n_active = np.diff(by_latent.indptr).astype(np.float64)
        found: list[list[CoFiring]] = []
        for start in range(0, self._n_latents, LATENTS_AT_ONCE):
            rows = slice(start, min(start + LATENTS_AT_ONCE, self._n_latents))
            both = (by_latent[rows] @ by_token).toarray()
            found += _largest(both, n_active[rows], n_active, start, n)
        return found

    def _keep(self, which: np.ndarray, lengths: np.ndarray, random: np.ndarray) -> None:
        kept = (random < self.share) & (lengths > 0)
        self._which.append(which[np.repeat(kept, lengths)])
        self._lengths.append(lengths[kept])
        self._random.append(random[kept])
        self._n_pairs += float(np.square(lengths[kept], dtype=np.float64).sum())

    def _joined(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.concatenate(self._which), np.concatenate(self._lengths), np.concatenate(self._random)


def _largest(both: np.ndarray, own: np.ndarray, all_active: np.ndarray, start: int, n: int) -> list[list[CoFiring]]:
    """Return the `n` largest of some latents.

    Args:
        both: on how many tokens each of them is active together with each latent, [rows, d_sae].
        own: on how many tokens each of them is active, [rows].
        all_active: on how many tokens each latent is active, [d_sae].
        start: the number of the first of them.
        n: how many others to return.
    """
    either = own[:, None] + all_active - both
    jaccard = np.divide(both, either, out=np.zeros(both.shape), where=both >= LEAST_TOGETHER)
    jaccard[np.arange(len(own)), start + np.arange(len(own))] = 0  # no latent is listed as its own companion
    n = min(n, jaccard.shape[1])
    least = np.partition(jaccard, -n, axis=1)[:, -n, None]
    # All that are at least equal to the n-th are taken; the order below then decides among equal ones.
    rows, others = np.nonzero((jaccard >= least) & (jaccard > 0))
    order = np.lexsort((others, -both[rows, others], -jaccard[rows, others], rows))
    found: list[list[CoFiring]] = [[] for _ in own]
    for row, other in zip(rows[order].tolist(), others[order].tolist(), strict=True):
        if len(found[row]) < n:
            found[row].append(CoFiring(other, float(jaccard[row, other]), float(both[row, other] / own[row])))
    return found
