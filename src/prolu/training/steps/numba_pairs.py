"""Numba kernels that find the (token, latent) pairs of a sparse step and sort them by latent.

Notation, here and in `numba_rows`: token i of `batch`, latent j of `d_sae`, pair t of `n`; a pair is a token and a
latent of its support.

    by token     the pairs of token i are starts[i] <= t < starts[i + 1]
                 pair t has latent latents[t] and f = values[t]
    by latent    the pairs of latent j are by_latent[j] <= t < by_latent[j + 1]
                 pair t has token tokens[t], and stood at source[t] in the order by token

Both orders are needed: reconstructing walks the pairs of a token, and a weight gradient walks those of a latent.

Every sum runs over one token's or one latent's pairs in a fixed order, never over the pairs that a thread happened to
get. So results do not depend on the number of threads.
"""

from typing import no_type_check

import numpy as np
from numba import prange

from prolu.training.steps.jit import jit


@jit(parallel=True)
@no_type_check
def count(m, threshold, counts):
    """Count the pairs of each token: counts[i] = number of j with m[i, j] > threshold[j].

    Shapes: m [rows, d_sae], threshold [d_sae], counts [rows]. Counting before writing tells every token where its pairs
    start, so that threads write without waiting for each other.
    """
    for i in prange(m.shape[0]):
        row = m[i]
        n = 0
        for j in range(row.shape[0]):
            n += row[j] > threshold[j]
        counts[i] = n


@jit(parallel=True)
@no_type_check
def fill(m, threshold, starts, latents, values):
    """Write the pairs that `count` counted, in order of latent: latents[t] = j and values[t] = m[i, j].

    Shapes: m [rows, d_sae], threshold [d_sae], starts [rows + 1], latents and values [n]. Few entries are above their
    threshold: 16 of them are compared at once in a vector unit, and most blocks of 16 are then skipped.
    """
    n_latents = m.shape[1]
    for i in prange(m.shape[0]):
        row = m[i]
        at = starts[i]
        j = 0
        while j + 16 <= n_latents:
            n = 0
            for k in range(j, j + 16):
                n += row[k] > threshold[k]
            if n > 0:
                for k in range(j, j + 16):
                    if row[k] > threshold[k]:
                        latents[at] = k
                        values[at] = row[k]
                        at += 1
            j += 16
        for k in range(j, n_latents):
            if row[k] > threshold[k]:
                latents[at] = k
                values[at] = row[k]
                at += 1


@jit(parallel=True)
@no_type_check
def keep_largest(m, threshold, k):
    """Put -inf wherever m - threshold is not among its token's k largest that are above 0; ties stay.

    Shapes: m [rows, d_sae], threshold [d_sae]. The row is in the cache, written by the encoder's matmul just before.
    The k-th largest of the maxima of 16 neighbours bounds the k-th largest entry from below (each of those k maxima is
    an entry), so that few entries reach the partition.
    """
    n_latents = m.shape[1]
    n_groups = (n_latents + 15) // 16
    for i in prange(m.shape[0]):
        row = m[i]
        best = np.empty(n_groups, m.dtype)
        for g in range(n_groups):
            start = 16 * g
            end = min(16 * g + 16, n_latents)
            top = row[start] - threshold[start]
            for j in range(start + 1, end):
                top = max(top, row[j] - threshold[j])
            best[g] = top
        bound = m.dtype.type(0)
        if n_groups >= k:
            bound = max(bound, np.partition(best, n_groups - k)[n_groups - k])
        above = np.empty(n_latents, m.dtype)
        n = 0
        for g in range(n_groups):
            if best[g] >= bound:
                for j in range(16 * g, min(16 * g + 16, n_latents)):
                    a = row[j] - threshold[j]
                    if a >= bound and a > 0:
                        above[n] = a
                        n += 1
        if n > k:
            bound = np.partition(above[:n], n - k)[n - k]
        for j in range(n_latents):
            # Not "<": a NaN must go too.
            if not row[j] - threshold[j] >= bound:
                row[j] = -np.inf


@jit(parallel=True)
@no_type_check
def sort_by_latent(starts, latents, n_latents, n_parts, by_latent, tokens, source):
    """Sort pairs by latent, in order of token within a latent: a counting sort, whose keys are known to be small.

    Shapes: starts [n_tokens + 1]; latents, tokens and source [n]; by_latent [n_latents + 1]. `by_latent`, `tokens` and
    `source` are written. Pairs are cut into `n_parts` runs of whole tokens. Each part counts its pairs per latent; a
    sum over latents and parts gives each part its own place in every latent's run, so that parts write at the same time
    and the order is that of one part.
    """
    n_tokens = starts.shape[0] - 1
    n_pairs = starts[n_tokens]
    bounds = np.zeros(n_parts + 1, np.int64)
    for part in range(1, n_parts):
        bounds[part] = np.searchsorted(starts, n_pairs * part // n_parts)
    bounds[n_parts] = n_tokens
    counts = np.zeros((n_parts, n_latents), np.int64)
    for part in prange(n_parts):
        own = counts[part]
        for t in range(starts[bounds[part]], starts[bounds[part + 1]]):
            own[latents[t]] += 1
    # From here on counts[part, j] is where the part writes its next pair of latent j.
    total = 0
    for j in range(n_latents):
        by_latent[j] = total
        for part in range(n_parts):
            n = counts[part, j]
            counts[part, j] = total
            total += n
    by_latent[n_latents] = total
    for part in prange(n_parts):
        own = counts[part]
        for i in range(bounds[part], bounds[part + 1]):
            for t in range(starts[i], starts[i + 1]):
                to = own[latents[t]]
                own[latents[t]] = to + 1
                tokens[to] = i
                source[to] = t


@jit()
@no_type_check
def split_evenly(by_latent, cost_of_latent, blocks):
    """Split latents into blocks of about equal work: block b holds latents blocks[b] <= j < blocks[b + 1].

    Shapes: by_latent [d_sae + 1], blocks [n_blocks + 1]. The work of a latent is the number of its pairs plus
    `cost_of_latent`. Latents differ much in their pairs, so blocks of equally many latents would leave threads waiting.
    """
    n_latents = by_latent.shape[0] - 1
    n_blocks = blocks.shape[0] - 1
    total = by_latent[n_latents] + cost_of_latent * n_latents
    block = 0
    for j in range(n_latents):
        while block * total <= (by_latent[j] + cost_of_latent * j) * n_blocks:
            blocks[block] = j
            block += 1
    blocks[block:] = n_latents


@jit(parallel=True)
@no_type_check
def gather(source, values, out):
    """Write out[t] = values[source[t]]. Shapes: source and out [n], values [any]."""
    for t in prange(source.shape[0]):
        out[t] = values[source[t]]


@jit(parallel=True)
@no_type_check
def gather_and_sum(by_latent, source, values, gathered, sums):
    """Write gathered[t] = values[source[t]], and sums[j] = their sum over the pairs of latent j.

    Shapes: by_latent [d_sae + 1]; source, values and gathered [n]; sums [d_sae]. Without `FAST`: the sum of a latent
    runs in order of token.
    """
    for j in prange(sums.shape[0]):
        total = values.dtype.type(0)
        for t in range(by_latent[j], by_latent[j + 1]):
            gathered[t] = values[source[t]]
            total += gathered[t]
        sums[j] = total


@jit(parallel=True)
@no_type_check
def gather_and_count(by_latent, source, values, gathered, counts):
    """Write gathered[t] = values[source[t]], and counts[j] = the number of positive ones among the pairs of latent j.

    Shapes: as in `gather_and_sum`.
    """
    for j in prange(counts.shape[0]):
        n = 0
        for t in range(by_latent[j], by_latent[j + 1]):
            gathered[t] = values[source[t]]
            n += gathered[t] > 0
        counts[j] = n
