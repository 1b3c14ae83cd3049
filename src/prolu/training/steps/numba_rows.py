"""Numba kernels that compute on rows of width d_in: decode tokens, and update the two rows of each latent.

The notation is that of `numba_pairs`. In each kernel the row that is written (a token's error, a latent's gradient)
stays in the cache, while the rows that are read stream past.
"""

from typing import Any, no_type_check

import numpy as np
from numba import prange

from prolu.training.steps.jit import jit

FAST: Any = {"reassoc", "contract", "nsz", "arcp"}
"""Lets the compiler reorder the sums of one row for vector units. Infinities and NaN keep their meaning ("ninf" and
"nnan" are left out), because a run that diverges must be seen to do so."""


@jit(fastmath=FAST, inline="never")
@no_type_check
def add_rows(out, rows, which, weights, start, end):
    """Add out[k] += sum over start <= t < end of weights[t] * rows[which[t], k].

    Shapes: out [d], rows [any, d], which and weights [n]. Eight rows are added in one pass over `out`, so that it is
    loaded and stored once for eight products. It is never inlined, so that every kernel runs the same machine code.
    """
    d = out.shape[0]
    t = start
    while t + 8 <= end:
        w0 = weights[t]
        w1 = weights[t + 1]
        w2 = weights[t + 2]
        w3 = weights[t + 3]
        w4 = weights[t + 4]
        w5 = weights[t + 5]
        w6 = weights[t + 6]
        w7 = weights[t + 7]
        r0 = rows[which[t]]
        r1 = rows[which[t + 1]]
        r2 = rows[which[t + 2]]
        r3 = rows[which[t + 3]]
        r4 = rows[which[t + 4]]
        r5 = rows[which[t + 5]]
        r6 = rows[which[t + 6]]
        r7 = rows[which[t + 7]]
        for k in range(d):
            low = (w0 * r0[k] + w1 * r1[k]) + (w2 * r2[k] + w3 * r3[k])
            out[k] += low + ((w4 * r4[k] + w5 * r5[k]) + (w6 * r6[k] + w7 * r7[k]))
        t += 8
    while t + 2 <= end:
        w0 = weights[t]
        w1 = weights[t + 1]
        r0 = rows[which[t]]
        r1 = rows[which[t + 1]]
        for k in range(d):
            out[k] += w0 * r0[k] + w1 * r1[k]
        t += 2
    if t < end:
        w0 = weights[t]
        r0 = rows[which[t]]
        for k in range(d):
            out[k] += w0 * r0[k]


@jit(fastmath=FAST, inline="never")
@no_type_check
def dot(a, b):
    """Return the sum of a[k] * b[k]; both have shape [d]."""
    total = a.dtype.type(0)
    for k in range(a.shape[0]):
        total += a[k] * b[k]
    return total


@jit(parallel=True, fastmath=FAST)
@no_type_check
def decode(starts, latents, values, decoder, b_dec, x, scale, error, upstream, squares):
    """Decode each token and send its error back to its pairs, while the token's row of the error is in the cache.

        x_hat[i] = b_dec + sum over pairs of token i of values[t] * decoder[latents[t]]
        squares[i] = |x_hat[i] - x[i]|^2
        error[i] = (x_hat[i] - x[i]) * scale
        upstream[t] = error[i] . decoder[latents[t]]

    Shapes: starts [batch + 1]; latents, values and upstream [n]; decoder [d_sae, d_out]; b_dec [d_out]; x and error
    [batch, d_out]; squares [batch]. For a transcoder, x and b_dec are its target and its output bias. `error`,
    `upstream` and `squares` are written. The decoder rows that `upstream` needs are those that were just read for
    x_hat.
    """
    for i in prange(x.shape[0]):
        e = error[i]
        start = starts[i]
        end = starts[i + 1]
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


@jit(parallel=True, fastmath=FAST)
@no_type_check
def decode_nested(ends, starts, latents, values, decoder, b_dec, x, scale, error, upstream, squares):
    """Decode each token block by block of latents, for a nested loss; otherwise as `decode`.

        x_hat_b[i] = b_dec + sum over pairs of token i with latents[t] < ends[b] of values[t] * decoder[latents[t]]
        squares[i] = |x_hat_last[i] - x[i]|^2
        error[b, i] = (sum over c >= b of x_hat_c[i] - x[i]) * scale
        upstream[t] = error[b, i] . decoder[latents[t]], with b the block of latents[t]

    Shapes: ends [n_blocks], the last of which is d_sae; error [n_blocks, batch, d_out]; the others as in `decode`. The
    pairs of a token are in order of latent, so those of a block are neighbours.
    """
    n_blocks = ends.shape[0]
    for i in prange(x.shape[0]):
        bounds = np.empty(n_blocks + 1, np.int64)
        bounds[0] = starts[i]
        for b in range(n_blocks):
            t = bounds[b]
            while t < starts[i + 1] and latents[t] < ends[b]:
                t += 1
            bounds[b + 1] = t
            e = error[b, i]
            for k in range(e.shape[0]):
                e[k] = b_dec[k] if b == 0 else error[b - 1, i, k]
            add_rows(e, decoder, latents, values, bounds[b], t)
        total = x.dtype.type(0)
        for b in range(n_blocks - 1, -1, -1):
            e = error[b, i]
            if b == n_blocks - 1:
                for k in range(e.shape[0]):
                    r = e[k] - x[i, k]
                    total += r * r
                    e[k] = r * scale
            else:
                for k in range(e.shape[0]):
                    e[k] = (e[k] - x[i, k]) * scale + error[b + 1, i, k]
            for t in range(bounds[b], bounds[b + 1]):
                upstream[t] = dot(e, decoder[latents[t]])
        squares[i] = total


@jit(parallel=True, fastmath=FAST)
@no_type_check
def reconstruct(starts, latents, values, decoder, out):
    """Write out[i] = sum over pairs of token i of values[t] * decoder[latents[t]].

    This is the first part of `decode`, for a rank of a mesh that holds some of the latents. Shapes: as there; out
    [batch, d_out].
    """
    for i in prange(out.shape[0]):
        for k in range(out.shape[1]):
            out[i, k] = 0
        add_rows(out[i], decoder, latents, values, starts[i], starts[i + 1])


@jit(parallel=True, fastmath=FAST)
@no_type_check
def send_back(starts, latents, decoder, x, scale, error, upstream, squares):
    """Compute `squares`, `error` and `upstream` as `decode` does, where `error` holds x_hat on entry.

    This is the second part of `decode`, after the ranks of a mesh have added up their parts of x_hat.
    """
    for i in prange(x.shape[0]):
        e = error[i]
        total = x.dtype.type(0)
        for k in range(e.shape[0]):
            r = e[k] - x[i, k]
            total += r * r
            e[k] = r * scale
        squares[i] = total
        for t in range(starts[i], starts[i + 1]):
            upstream[t] = dot(e, decoder[latents[t]])


@jit(fastmath=FAST, inline="never")
@no_type_check
def adam_row(p, g, first, second, constants):
    """Apply Adam to one row.

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        p <- p - step_size m / (sqrt(v) second_moment_scale + eps)

    Shapes: p, g, first (m) and second (v) [d]; `constants` [7] are those of `Update.constants`.
    """
    for k in range(p.shape[0]):
        m = constants[0] * first[k] + constants[1] * g[k]
        v = constants[2] * second[k] + constants[3] * g[k] * g[k]
        first[k] = m
        second[k] = v
        p[k] -= constants[4] * m / (np.sqrt(v) * constants[5] + constants[6])


@jit(parallel=True, fastmath=FAST)
@no_type_check
def latent_gradients(blocks, by_latent, tokens, error_rows, values, to_m, centred, error, encoder_out, decoder_out):
    """Write the gradients of both matrices, a latent's two rows at a time.

        encoder_out[j] = sum over pairs of latent j of to_m[t] * centred[tokens[t]]
        decoder_out[j] = sum over pairs of latent j of values[t] * error[error_rows[t]]

    Shapes: blocks [n_blocks + 1] (`split_evenly`); by_latent [d_sae + 1]; tokens, error_rows, values and
    to_m [n]; centred [rows, d_in] and error [any, d_out]; encoder_out [d_sae, d_in] and decoder_out [d_sae, d_out].
    """
    for block in prange(blocks.shape[0] - 1):
        for j in range(blocks[block], blocks[block + 1]):
            encoder_out[j, :] = 0
            decoder_out[j, :] = 0
            add_rows(encoder_out[j], centred, tokens, to_m, by_latent[j], by_latent[j + 1])
            add_rows(decoder_out[j], error, error_rows, values, by_latent[j], by_latent[j + 1])


@jit(parallel=True, fastmath=FAST)
@no_type_check
def latent_updates(
    blocks,
    by_latent,
    tokens,
    error_rows,
    values,
    to_m,
    centred,
    error,
    encoder,
    decoder,
    encoder_first,
    encoder_second,
    decoder_first,
    decoder_second,
    constants,
):
    """Update both rows of each latent: its gradients as in `latent_gradients`, projection, Adam, unit norm.

    With w = decoder[j] and g its gradient:  g <- g - (g . w) w;  Adam;  w <- w / |w|.

    Shapes: as in `latent_gradients`; the matrices and their moments, all updated in place; `constants` [7] are those of
    `Update.constants`. No gradient matrix is ever made: a latent's six rows are touched once, and its two gradients
    live in two rows that stay in the cache. A latent without pairs is updated too, since Adam's moments move
    a weight when its gradient is 0.
    """
    d_out = decoder.shape[1]
    for block in prange(blocks.shape[0] - 1):
        to_encoder = np.empty(encoder.shape[1], encoder.dtype)
        to_decoder = np.empty(d_out, decoder.dtype)
        for j in range(blocks[block], blocks[block + 1]):
            start = by_latent[j]
            end = by_latent[j + 1]
            to_encoder[:] = 0
            add_rows(to_encoder, centred, tokens, to_m, start, end)
            adam_row(encoder[j], to_encoder, encoder_first[j], encoder_second[j], constants)
            row = decoder[j]
            to_decoder[:] = 0
            if end > start:
                add_rows(to_decoder, error, error_rows, values, start, end)
                along = dot(to_decoder, row)
                for k in range(d_out):
                    to_decoder[k] -= along * row[k]
            adam_row(row, to_decoder, decoder_first[j], decoder_second[j], constants)
            inverse = row.dtype.type(1) / np.sqrt(dot(row, row))
            for k in range(d_out):
                row[k] *= inverse
