"""The kernels of the sparse step on a GPU (Triton). `sparse_triton` says in which order they run.

A pair is a (token, latent) on the support. Arrays of pairs have a fixed length; places behind the last pair are never
read. ACC is the number format of sums: fp32, or fp64 where the weights are fp64. Rows that are gathered, and numbers
that multiply them, may be bf16: their products are exact in fp32. The kernels themselves round nothing to bf16.

No kernel adds to memory that another program writes: every sum has one order, so the same batch gives the same bits.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def compact(
    m, threshold, bound, latents, values, counts, d_sae, capacity, HAS_BOUND: tl.constexpr, BLOCK: tl.constexpr
):
    """Write each token's pairs, in order of latent, into `capacity` places of its own; one program per token.

        the pair is on the support if m > threshold, and m - threshold >= bound where the nonlinearity selects

    Shapes: m [batch, d_sae]; threshold [d_sae]; bound [batch]; latents and values (the m of each pair) [batch,
    capacity]; counts [batch], which is the number of pairs even where it exceeds `capacity`.
    """
    token = tl.program_id(0).to(tl.int64)
    n = 0
    for start in range(0, d_sae, BLOCK):
        latent = start + tl.arange(0, BLOCK)
        inside = latent < d_sae
        x = tl.load(m + token * d_sae + latent, mask=inside, other=0.0)
        t = tl.load(threshold + latent, mask=inside, other=0.0)
        keep = inside & (x > t)
        if HAS_BOUND:
            keep = keep & (x - t >= tl.load(bound + token))
        flags = keep.to(tl.int32)
        place = n + tl.cumsum(flags, 0) - flags
        fits = keep & (place < capacity)
        tl.store(latents + token * capacity + place, latent, mask=fits)
        tl.store(values + token * capacity + place, x, mask=fits)
        n += tl.sum(flags, 0)
    tl.store(counts + token, n)


@triton.jit
@no_type_check
def join(starts, counts, latents, values, tokens_out, latents_out, values_out, capacity, n_places, BLOCK: tl.constexpr):
    """Move all tokens' pairs from their own places into one list in order of token; one program per token.

    Shapes: starts and counts [batch]; latents and values [batch, capacity]; the outputs [n_places].
    """
    token = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + token)
    n = tl.minimum(tl.load(counts + token), capacity)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = (i < n) & (start + i < n_places)
        source = token * capacity + i
        tl.store(tokens_out + start + i, tl.zeros([BLOCK], tl.int32) + tl.program_id(0), mask=mask)
        tl.store(latents_out + start + i, tl.load(latents + source, mask=mask, other=0), mask=mask)
        tl.store(values_out + start + i, tl.load(values + source, mask=mask, other=0.0), mask=mask)


@triton.jit
@no_type_check
def decode(
    starts,
    counts,
    latents,
    values,
    penalties,
    decoder,
    bias,
    target,
    scale,
    error,
    upstream,
    squares,
    penalty_sums,
    capacity,
    n_places,
    d_in,
    ACC: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decode each token and send its error back to its pairs; one program per token.

        r = bias + sum over the token's pairs of values[t] * decoder[latents[t]] - target[token]
        squares[token] = |r|^2        error[token] = r * scale        upstream[t] = error[token] . decoder[latents[t]]

    The decoder rows that `upstream` needs are those that were just read for r.

    Shapes: starts, counts, squares and penalty_sums [batch]; latents, values, penalties and upstream [n_places];
    decoder [d_sae, d_in]; bias [d_in]; target and error [batch, d_in]; scale [1]. BLOCK is at least d_in; PAIRS
    rows are read at a time.
    """
    token = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + token)
    end = tl.minimum(start + tl.minimum(tl.load(counts + token), capacity), n_places)
    column = tl.arange(0, BLOCK)
    inside = column < d_in
    sums = tl.load(bias + column, mask=inside, other=0.0).to(ACC)
    penalty = tl.zeros([PAIRS], ACC)
    for first in range(start, end, PAIRS):
        t = first + tl.arange(0, PAIRS)
        held = t < end
        latent = tl.load(latents + t, mask=held, other=0).to(tl.int64)
        rows = tl.load(
            decoder + latent[:, None] * d_in + column[None, :], mask=held[:, None] & inside[None, :], other=0.0
        )
        f = tl.load(values + t, mask=held, other=0.0).to(ACC)
        sums += tl.sum(f[:, None] * rows.to(ACC), 0)
        penalty += tl.load(penalties + t, mask=held, other=0.0).to(ACC)
    place = token * d_in + column
    sums = tl.where(inside, sums - tl.load(target + place, mask=inside, other=0.0).to(ACC), 0.0)
    tl.store(squares + token, tl.sum(sums * sums, 0))
    tl.store(penalty_sums + token, tl.sum(penalty, 0))
    scaled = sums * tl.load(scale).to(ACC)
    tl.store(error + place, scaled, mask=inside)
    for first in range(start, end, PAIRS):
        t = first + tl.arange(0, PAIRS)
        held = t < end
        latent = tl.load(latents + t, mask=held, other=0).to(tl.int64)
        rows = tl.load(
            decoder + latent[:, None] * d_in + column[None, :], mask=held[:, None] & inside[None, :], other=0.0
        )
        tl.store(upstream + t, tl.sum(scaled[None, :] * rows.to(ACC), 1), mask=held)


@triton.jit
@no_type_check
def latent_sums(by_latent, columns, sums, n_places, d_sae, n_columns, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Write sums[c, j], the sum of columns[c] over the pairs of latent j; one program per latent.

    Shapes: by_latent [d_sae + 1]; columns [n_columns, n_places], in order of latent; sums [n_columns, d_sae]. COLUMNS
    is a power of two not below n_columns.
    """
    latent = tl.program_id(0).to(tl.int64)
    start = tl.load(by_latent + latent)
    end = tl.load(by_latent + latent + 1)
    # The columns lie n_places apart, and with many of them 32 bits are too few.
    column = tl.arange(0, COLUMNS).to(tl.int64)
    inside = column < n_columns
    total = tl.zeros([COLUMNS, BLOCK], columns.dtype.element_ty)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        place = column[:, None] * n_places + t[None, :]
        total += tl.load(columns + place, mask=inside[:, None] & (t < end)[None, :], other=0.0)
    tl.store(sums + column * d_sae + latent, tl.sum(total, 1), mask=inside)


@triton.jit
@no_type_check
def add_rows(out, rows, tokens, factors, start, end, d_in, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Return out + sum over start <= t < end of factors[t] * rows[tokens[t]]; `out` [BLOCK] has the format of sums."""
    column = tl.arange(0, BLOCK)
    inside = column < d_in
    for first in range(start, end, PAIRS):
        t = first + tl.arange(0, PAIRS)
        held = t < end
        token = tl.load(tokens + t, mask=held, other=0).to(tl.int64)
        read = tl.load(rows + token[:, None] * d_in + column[None, :], mask=held[:, None] & inside[None, :], other=0.0)
        factor = tl.load(factors + t, mask=held, other=0.0).to(out.dtype)
        out += tl.sum(factor[:, None] * read.to(out.dtype), 0)
    return out


@triton.jit
@no_type_check
def partial_rows(
    sorted_latents,
    tokens,
    to_m,
    values,
    centred,
    error,
    partial,
    d_sae,
    d_in,
    ACC: tl.constexpr,
    STRETCH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of a latent's two rows from a whole stretch of its pairs; one program per stretch.

    The list in order of latent is cut at every multiple of STRETCH pairs. A stretch of one latent only is summed here,
    so that a latent with thousands of pairs keeps many programs busy; all other stretches are left to `latent_rows`.

    Shapes: as in `latent_rows`; sorted_latents [n_places]; partial [n_places / STRETCH, 2, d_in].
    """
    stretch = tl.program_id(0).to(tl.int64)
    start = stretch * STRETCH
    latent = tl.load(sorted_latents + start)
    if (latent < d_sae) & (latent == tl.load(sorted_latents + start + STRETCH - 1)):
        column = tl.arange(0, BLOCK)
        inside = column < d_in
        zero = tl.zeros([BLOCK], ACC)
        out = partial + stretch * 2 * d_in + column
        tl.store(out, add_rows(zero, centred, tokens, to_m, start, start + STRETCH, d_in, PAIRS, BLOCK), mask=inside)
        of_decoder = add_rows(zero, error, tokens, values, start, start + STRETCH, d_in, PAIRS, BLOCK)
        tl.store(out + d_in, of_decoder, mask=inside)


@triton.jit
@no_type_check
def gradient_row(
    rows,
    partial,
    tokens,
    factors,
    start,
    end,
    d_in,
    ACC: tl.constexpr,
    STRETCH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the gradient of one row: pairs before the first whole stretch, whole stretches, and pairs behind them.

    `partial` points to the first stretch's sum of this kind of row.
    """
    column = tl.arange(0, BLOCK)
    inside = column < d_in
    first_whole = (start + STRETCH - 1) // STRETCH
    end_whole = end // STRETCH
    head_end = tl.minimum(first_whole * STRETCH, end)
    tail_start = tl.maximum(end_whole * STRETCH, head_end)
    total = add_rows(tl.zeros([BLOCK], ACC), rows, tokens, factors, start, head_end, d_in, PAIRS, BLOCK)
    for stretch in range(first_whole, end_whole):
        total += tl.load(partial + tl.cast(stretch, tl.int64) * 2 * d_in + column, mask=inside, other=0.0)
    return add_rows(total, rows, tokens, factors, tail_start, end, d_in, PAIRS, BLOCK)


@triton.jit
@no_type_check
def adam_row(p, g, first, second, place, inside, constants):
    """Return p after Adam with gradient g, and write both moments at `place`; the constants are `Update.constants`.

    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
    p <- p - step_size m / (sqrt(v) second_moment_scale + eps)
    """
    m = tl.load(constants) * tl.load(first + place, mask=inside, other=0.0) + tl.load(constants + 1) * g
    v = tl.load(constants + 2) * tl.load(second + place, mask=inside, other=0.0) + tl.load(constants + 3) * g * g
    tl.store(first + place, m, mask=inside)
    tl.store(second + place, v, mask=inside)
    return p - tl.load(constants + 4) * m / (tl.sqrt(v) * tl.load(constants + 5) + tl.load(constants + 6))


@triton.jit
@no_type_check
def latent_rows(
    by_latent,
    tokens,
    to_m,
    values,
    centred,
    error,
    partial,
    encoder,
    decoder,
    encoder_first,
    encoder_second,
    decoder_first,
    decoder_second,
    constants,
    d_in,
    UPDATE: tl.constexpr,
    ACC: tl.constexpr,
    STRETCH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradients of a latent's two rows, and update both rows by them; one program per latent.

        encoder gradient = sum over the latent's pairs of to_m[t] * centred[tokens[t]]
        decoder gradient = sum over the latent's pairs of values[t] * error[tokens[t]]

    With w the decoder row and g its gradient:  g <- g - (g . w) w;  Adam;  w <- w / |w|. The gradients stay in
    registers, and a latent's rows and moments are read once and written once. Without UPDATE, the gradients are written
    to `encoder` and `decoder`, which are then buffers, and the moments and constants are not looked at.

    Shapes: by_latent [d_sae + 1]; tokens, to_m and values [n_places], in order of latent; centred and error [batch,
    d_in]; partial as in `partial_rows`; both matrices and their moments [d_sae, d_in].
    """
    latent = tl.program_id(0).to(tl.int64)
    start = tl.load(by_latent + latent)
    end = tl.load(by_latent + latent + 1)
    column = tl.arange(0, BLOCK)
    inside = column < d_in
    place = latent * d_in + column
    g = gradient_row(centred, partial, tokens, to_m, start, end, d_in, ACC, STRETCH, PAIRS, BLOCK)
    if UPDATE:
        row = tl.load(encoder + place, mask=inside, other=0.0)
        g = adam_row(row, g, encoder_first, encoder_second, place, inside, constants)
    tl.store(encoder + place, g, mask=inside)
    g = gradient_row(error, partial + d_in, tokens, values, start, end, d_in, ACC, STRETCH, PAIRS, BLOCK)
    if UPDATE:
        row = tl.load(decoder + place, mask=inside, other=0.0)
        g -= tl.sum(g * row, 0) * row
        g = adam_row(row, g, decoder_first, decoder_second, place, inside, constants)
        # Places outside the row are 0 and stay 0: they add nothing to the norm.
        g = g / tl.sqrt(tl.sum(g * g, 0))
    tl.store(decoder + place, g, mask=inside)


@triton.jit
@no_type_check
def adam_vector(p, g, first, second, constants, n, BLOCK: tl.constexpr):
    """Apply Adam to a vector [n]; one program per BLOCK entries."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    row = tl.load(p + place, mask=inside, other=0.0)
    gradient = tl.load(g + place, mask=inside, other=0.0)
    tl.store(p + place, adam_row(row, gradient, first, second, place, inside, constants), mask=inside)
