"""Numba kernels of the sparse step: pairs found, decoded, sorted by latent, and spent on a latent's rows.

Every sum goes over one token's or one latent's pairs in a fixed order, never over what a thread happened to get.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
from numba import njit, prange

FAST: Any = {"reassoc", "contract", "nsz", "arcp"}
"""Reorders sums for vector units; keeps infinities and NaN as they are."""


def _jit(**options: Any) -> Callable[[Callable], Callable]:
    """Compiled once, kept on the disk. Kernels are `no_type_check`: nothing may wrap what numba compiles."""
    return njit(cache=True, nogil=True, error_model="numpy", **options)


@_jit(parallel=True)
@no_type_check
def count(m, threshold, counts):
    """Pairs with m > threshold in each token's row."""
    for i in prange(m.shape[0]):
        row, n = m[i], 0
        for j in range(row.shape[0]):
            n += row[j] > threshold[j]
        counts[i] = n


@_jit(parallel=True)
@no_type_check
def fill(m, threshold, starts, latents, values):
    """Writes those pairs, in order of latent; blocks of 16 entries without one are skipped at a glance."""
    n_latents = m.shape[1]
    for i in prange(m.shape[0]):
        row, at, j = m[i], starts[i], 0
        while j + 16 <= n_latents:
            n = 0
            for k in range(j, j + 16):
                n += row[k] > threshold[k]
            if n > 0:
                for k in range(j, j + 16):
                    if row[k] > threshold[k]:
                        latents[at], values[at] = k, row[k]
                        at += 1
            j += 16
        for k in range(j, n_latents):
            if row[k] > threshold[k]:
                latents[at], values[at] = k, row[k]
                at += 1


@_jit(parallel=True)
@no_type_check
def keep_largest(m, threshold, k):
    """Puts -inf wherever m - threshold is not among a token's k largest that are above 0; ties stay.

    The k-th largest of the maxima of 16 neighbours is a bound from below, so few entries are ever sorted.
    """
    n_latents = m.shape[1]
    n_groups = (n_latents + 15) // 16
    for i in prange(m.shape[0]):
        row = m[i]
        best = np.empty(n_groups, m.dtype)
        for g in range(n_groups):
            start, end = 16 * g, min(16 * g + 16, n_latents)
            top = row[start] - threshold[start]
            for j in range(start + 1, end):
                top = max(top, row[j] - threshold[j])
            best[g] = top
        bound = m.dtype.type(0)
        if n_groups >= k:
            bound = max(bound, np.partition(best, n_groups - k)[n_groups - k])
        above, n = np.empty(n_latents, m.dtype), 0
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
            if not row[j] - threshold[j] >= bound:
                row[j] = -np.inf


@_jit(fastmath=FAST, inline="never")
@no_type_check
def add_rows(out, rows, which, weights, start, end):
    """Out += sum of weights[t] * rows[which[t]], eight rows a pass over out."""
    d, t = out.shape[0], start
    while t + 8 <= end:
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        w4, w5, w6, w7 = weights[t + 4], weights[t + 5], weights[t + 6], weights[t + 7]
        r0, r1, r2, r3 = rows[which[t]], rows[which[t + 1]], rows[which[t + 2]], rows[which[t + 3]]
        r4, r5, r6, r7 = rows[which[t + 4]], rows[which[t + 5]], rows[which[t + 6]], rows[which[t + 7]]
        for k in range(d):
            low = (w0 * r0[k] + w1 * r1[k]) + (w2 * r2[k] + w3 * r3[k])
            out[k] += low + ((w4 * r4[k] + w5 * r5[k]) + (w6 * r6[k] + w7 * r7[k]))
        t += 8
    while t + 2 <= end:
        w0, w1, r0, r1 = weights[t], weights[t + 1], rows[which[t]], rows[which[t + 1]]
        for k in range(d):
            out[k] += w0 * r0[k] + w1 * r1[k]
        t += 2
    if t < end:
        w0, r0 = weights[t], rows[which[t]]
        for k in range(d):
            out[k] += w0 * r0[k]


@_jit(fastmath=FAST, inline="never")
@no_type_check
def dot(a, b):
    """Sum of a * b."""
    total = a.dtype.type(0)
    for k in range(a.shape[0]):
        total += a[k] * b[k]
    return total


@_jit(parallel=True, fastmath=FAST)
@no_type_check
def decode(starts, latents, values, decoder, b_dec, x, scale, error, upstream, squares):
    """Error (x_hat - x) * scale and its product with the decoder row of every pair; squared error by token."""
    for i in prange(x.shape[0]):
        e, start, end = error[i], starts[i], starts[i + 1]
        for k in range(e.shape[0]):
            e[k] = b_dec[k]
        add_rows(e, decoder, latents, values, start, end)
        total = x.dtype.type(0)
        for k in range(e.shape[0]):
            r = e[k] - x[i, k]
            total += r * r
            e[k] = r * scale
        squares[i] = total
        for t in range(start, end):
            upstream[t] = dot(e, decoder[latents[t]])


@_jit(parallel=True, fastmath=FAST)
@no_type_check
def reconstruct(starts, latents, values, decoder, out):
    """What these latents add to each token's reconstruction: the first part of `decode`, where ranks share the rest."""
    for i in prange(out.shape[0]):
        for k in range(out.shape[1]):
            out[i, k] = 0
        add_rows(out[i], decoder, latents, values, starts[i], starts[i + 1])


@_jit(parallel=True, fastmath=FAST)
@no_type_check
def look_back(starts, latents, decoder, x, scale, error, upstream, squares):
    """The rest of `decode`: `error` comes as the whole reconstruction."""
    for i in prange(x.shape[0]):
        e, total = error[i], x.dtype.type(0)
        for k in range(e.shape[0]):
            r = e[k] - x[i, k]
            total += r * r
            e[k] = r * scale
        squares[i] = total
        for t in range(starts[i], starts[i + 1]):
            upstream[t] = dot(e, decoder[latents[t]])


@_jit(parallel=True)
@no_type_check
def sort_by_latent(starts, latents, n_latents, n_parts, by_latent, tokens, source):
    """Counting sort: pairs of latent j are by_latent[j]..by_latent[j + 1]; their tokens, and where they were."""
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
                tokens[to], source[to] = i, t


@_jit(parallel=True)
@no_type_check
def gather(source, values, out):
    """Values in the order of source."""
    for t in prange(source.shape[0]):
        out[t] = values[source[t]]


@_jit(parallel=True)
@no_type_check
def gather_and_sum(by_latent, source, values, gathered, sums):
    """Values in the order of source, and their sum over each latent's pairs."""
    for j in prange(sums.shape[0]):
        total = values.dtype.type(0)
        for t in range(by_latent[j], by_latent[j + 1]):
            gathered[t] = values[source[t]]
            total += gathered[t]
        sums[j] = total


@_jit(parallel=True)
@no_type_check
def gather_and_count(by_latent, source, values, gathered, counts):
    """Values in the order of source, and how many of each latent's are positive."""
    for j in prange(counts.shape[0]):
        n = 0
        for t in range(by_latent[j], by_latent[j + 1]):
            gathered[t] = values[source[t]]
            n += gathered[t] > 0
        counts[j] = n


@_jit()
@no_type_check
def split_evenly(by_latent, cost_of_latent, blocks):
    """Bounds of blocks of latents with about equally many pairs, a latent counting as so many pairs itself."""
    n_latents, n_blocks = by_latent.shape[0] - 1, blocks.shape[0] - 1
    total, block = by_latent[n_latents] + cost_of_latent * n_latents, 0
    for j in range(n_latents):
        while block * total <= (by_latent[j] + cost_of_latent * j) * n_blocks:
            blocks[block] = j
            block += 1
    blocks[block:] = n_latents


@_jit(fastmath=FAST, inline="never")
@no_type_check
def adam_row(p, g, first, second, c):
    """Adam on one row; c holds beta1, 1 - beta1, beta2, 1 - beta2, step size, 1 / sqrt(bias 2), eps."""
    for k in range(p.shape[0]):
        m = c[0] * first[k] + c[1] * g[k]
        v = c[2] * second[k] + c[3] * g[k] * g[k]
        first[k], second[k] = m, v
        p[k] -= c[4] * m / (np.sqrt(v) * c[5] + c[6])


@_jit(parallel=True, fastmath=FAST)
@no_type_check
def latent_gradients(blocks, by_latent, tokens, values, to_m, centred, error, encoder_out, decoder_out):
    """Both weight gradients, written out."""
    for block in prange(blocks.shape[0] - 1):
        for j in range(blocks[block], blocks[block + 1]):
            encoder_out[j, :] = 0
            decoder_out[j, :] = 0
            add_rows(encoder_out[j], centred, tokens, to_m, by_latent[j], by_latent[j + 1])
            add_rows(decoder_out[j], error, tokens, values, by_latent[j], by_latent[j + 1])


@_jit(parallel=True, fastmath=FAST)
@no_type_check
def latent_updates(
    blocks, by_latent, tokens, values, to_m, centred, error,
    encoder, decoder, encoder_first, encoder_second, decoder_first, decoder_second, constants,
):  # fmt: skip
    """Both weight gradients of a latent, projection, Adam, unit norm: its rows are touched once."""
    d = encoder.shape[1]
    for block in prange(blocks.shape[0] - 1):
        gradient = np.empty(d, encoder.dtype)
        for j in range(blocks[block], blocks[block + 1]):
            start, end = by_latent[j], by_latent[j + 1]
            gradient[:] = 0
            add_rows(gradient, centred, tokens, to_m, start, end)
            adam_row(encoder[j], gradient, encoder_first[j], encoder_second[j], constants)
            row = decoder[j]
            gradient[:] = 0
            if end > start:
                add_rows(gradient, error, tokens, values, start, end)
                along = dot(gradient, row)
                for k in range(d):
                    gradient[k] -= along * row[k]
            adam_row(row, gradient, decoder_first[j], decoder_second[j], constants)
            inverse = row.dtype.type(1) / np.sqrt(dot(row, row))
            for k in range(d):
                row[k] *= inverse
