"""The exactly sparse step on a CPU: one dense matmul, then only pairs on the support (numba).

    m = (x - b_dec) W_enc, a chunk of tokens at a time      the only matmul
    pairs (token, latent) on the support, by token          count, then fill
    error and its product with each pair's decoder row      while the token's row is in the cache
    pairs by latent                                         counting sort
    both weight gradients of a latent, then its update      while the latent's rows are in the cache

Nothing of size batch x d_sae is ever made. What a nonlinearity or a penalty is, this file does not know: it
applies their own functions to the pairs.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from numba import get_num_threads, njit, prange, set_num_threads
from torch import Tensor

from prolu.steps.adam import AdamConfig
from prolu.steps.base import Step
from prolu.steps.objective import Objective, StepStats
from prolu.weights import Weights

ROWS_PER_CHUNK = 1024
"""Tokens per encoder matmul."""

MOST_THREADS = get_num_threads()
"""As many as numba was started with."""

FAST: Any = {"reassoc", "contract", "nsz", "arcp"}
"""Reorders sums for vector units; keeps infinities and NaN as they are."""

LATENT_BLOCKS = 64
"""Blocks of latents of about equal work; fixed, so that no sum depends on the number of threads."""


def _jit(**options: Any) -> Callable[[Callable], Callable]:
    """Compiled once, kept on the disk. Kernels are `no_type_check`: nothing may wrap what numba compiles."""
    return njit(cache=True, nogil=True, error_model="numpy", **options)


@_jit(parallel=True)
@no_type_check
def _count(m, threshold, counts):
    """Pairs with m > threshold in each token's row."""
    for i in prange(m.shape[0]):
        row, n = m[i], 0
        for j in range(row.shape[0]):
            n += row[j] > threshold[j]
        counts[i] = n


@_jit(parallel=True)
@no_type_check
def _fill(m, threshold, starts, latents, values):
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


@_jit(fastmath=FAST, inline="never")
@no_type_check
def _add_rows(out, rows, which, weights, start, end):
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
def _dot(a, b):
    total = a.dtype.type(0)
    for k in range(a.shape[0]):
        total += a[k] * b[k]
    return total


@_jit(parallel=True, fastmath=FAST)
@no_type_check
def _decode(starts, latents, values, decoder, b_dec, x, scale, error, upstream, squares):
    """Error (x_hat - x) * scale and its product with the decoder row of every pair; squared error by token."""
    for i in prange(x.shape[0]):
        e, start, end = error[i], starts[i], starts[i + 1]
        for k in range(e.shape[0]):
            e[k] = b_dec[k]
        _add_rows(e, decoder, latents, values, start, end)
        total = x.dtype.type(0)
        for k in range(e.shape[0]):
            r = e[k] - x[i, k]
            total += r * r
            e[k] = r * scale
        squares[i] = total
        for t in range(start, end):
            upstream[t] = _dot(e, decoder[latents[t]])


@_jit(parallel=True)
@no_type_check
def _sort_by_latent(starts, latents, n_latents, n_parts, by_latent, tokens, source):
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
def _gather(source, values, out):
    for t in prange(source.shape[0]):
        out[t] = values[source[t]]


@_jit(parallel=True)
@no_type_check
def _sum_by_latent(by_latent, values, out):
    """Sums of consecutive runs of values, one a latent."""
    for j in prange(by_latent.shape[0] - 1):
        total = values.dtype.type(0)
        for t in range(by_latent[j], by_latent[j + 1]):
            total += values[t]
        out[j] = total


@_jit(fastmath=FAST, inline="never")
@no_type_check
def _adam_row(p, g, first, second, c):
    """Adam on one row; c holds beta1, 1 - beta1, beta2, 1 - beta2, step size, 1 / sqrt(bias 2), eps."""
    for k in range(p.shape[0]):
        m = c[0] * first[k] + c[1] * g[k]
        v = c[2] * second[k] + c[3] * g[k] * g[k]
        first[k], second[k] = m, v
        p[k] -= c[4] * m / (np.sqrt(v) * c[5] + c[6])


@_jit(parallel=True, fastmath=FAST)
@no_type_check
def _latent_gradients(blocks, by_latent, tokens, values, to_m, centred, error, encoder_out, decoder_out):
    """Both weight gradients, written out."""
    for block in prange(blocks.shape[0] - 1):
        for j in range(blocks[block], blocks[block + 1]):
            encoder_out[j, :] = 0
            decoder_out[j, :] = 0
            _add_rows(encoder_out[j], centred, tokens, to_m, by_latent[j], by_latent[j + 1])
            _add_rows(decoder_out[j], error, tokens, values, by_latent[j], by_latent[j + 1])


@_jit(parallel=True, fastmath=FAST)
@no_type_check
def _latent_updates(
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
            _add_rows(gradient, centred, tokens, to_m, start, end)
            _adam_row(encoder[j], gradient, encoder_first[j], encoder_second[j], constants)
            row = decoder[j]
            gradient[:] = 0
            if end > start:
                _add_rows(gradient, error, tokens, values, start, end)
                along = _dot(gradient, row)
                for k in range(d):
                    gradient[k] -= along * row[k]
            _adam_row(row, gradient, decoder_first[j], decoder_second[j], constants)
            inverse = row.dtype.type(1) / np.sqrt(_dot(row, row))
            for k in range(d):
                row[k] *= inverse


class _Pairs:
    """Arrays that grow with the number of pairs and are never given back."""

    def __init__(self, dtype: np.dtype):
        self._dtype, self._kept = dtype, {}

    def array(self, name: str, n: int, dtype: Any = None, keep: int = 0) -> np.ndarray:
        """An array of at least n entries, cut to n; its first `keep` entries survive growth."""
        old = self._kept.get(name)
        if old is None or len(old) < n:
            new = np.empty(max(1024, int(1.3 * n)), dtype or self._dtype)
            if old is not None and keep:
                new[:keep] = old[:keep]
            self._kept[name] = old = new
        return old[:n]


class SparseNumbaStep(Step):
    """The sparse step for SAEs of one shape."""

    def __init__(self, like: Weights, batch_size: int):
        rows = min(batch_size, ROWS_PER_CHUNK)
        dtype = like.encoder.numpy().dtype
        self._m = like.encoder.new_empty(rows, like.d_sae)
        self._centred, self._error = (like.encoder.new_empty(batch_size, like.d_in) for _ in range(2))
        self._counts = np.empty(rows, np.int64)
        self._starts = np.zeros(batch_size + 1, np.int64)
        self._by_latent = np.empty(like.d_sae + 1, np.int64)
        self._squares = np.empty(batch_size, dtype)
        self._pairs = _Pairs(dtype)

    def gradients(
        self, weights: Weights, acts: Float[Tensor, "batch d_in"], objective: Objective
    ) -> tuple[Weights, StepStats]:
        """Gradients with respect to every weight, written out, and what was seen."""
        codes, small, stats = self._pair_gradients(weights, acts, objective)
        gradients = weights.zeros_like()
        _latent_gradients(*codes, gradients.encoder.numpy(), gradients.decoder.numpy())
        gradients.b_dec.copy_(small["b_dec"])
        for name, gradient in gradients.own.items():
            gradient.copy_(small[name])
        return gradients, stats

    def update_(
        self,
        weights: Weights,
        first: Weights,
        second: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        *,
        n_updates: int,
        lr: float,
        adam: AdamConfig,
    ) -> StepStats:
        """One projected Adam update, in place; no gradient matrix is ever made."""
        codes, small, stats = self._pair_gradients(weights, acts, objective)
        c = adam.constants(n_updates, lr, weights.encoder.numpy().dtype)
        matrices = (weights.encoder, weights.decoder, first.encoder, second.encoder, first.decoder, second.decoder)
        _latent_updates(*codes, *(t.numpy() for t in matrices), c)
        vectors = [(weights.b_dec, first.b_dec, second.b_dec, small["b_dec"])]
        vectors += [(weights.own[n], first.own[n], second.own[n], small[n]) for n in weights.own]
        for p, m, v, g in vectors:
            _adam_row(p.numpy(), g.numpy(), m.numpy(), v.numpy(), c)
        return stats

    def _pair_gradients(
        self, weights: Weights, acts: Tensor, objective: Objective
    ) -> tuple[tuple[np.ndarray, ...], dict[str, Tensor], StepStats]:
        """All but the two matrices: pairs sorted by latent, gradients of the vectors, statistics."""
        if objective.auxiliary is not None:
            raise NotImplementedError("auxiliary terms are the dense step's")
        batch, d_in = acts.shape
        set_num_threads(min(torch.get_num_threads(), MOST_THREADS))
        x, error, centred = acts.contiguous().numpy(), self._error[:batch], self._centred[:batch]
        torch.sub(acts, weights.b_dec, out=centred)
        latents, m = self._encode(weights, centred, objective)
        n, starts = len(latents), self._starts[: batch + 1]
        own = {name: p[latents.astype(np.int64)] for name, p in weights.own.items()}
        values = objective.nonlinearity.value(m, own)
        upstream = torch.from_numpy(self._pairs.array("upstream", n))
        squares = self._squares[:batch]
        scale = x.dtype.type(2 / (batch * d_in))
        decoder, b_dec = weights.decoder.numpy(), weights.b_dec.numpy()
        _decode(starts, latents, values.numpy(), decoder, b_dec, x, scale, error.numpy(), upstream.numpy(), squares)
        back, penalty = objective.pull_back(upstream, values, m, own, batch)
        tokens, source = (self._pairs.array(name, n, np.int32) for name in ("tokens", "source"))
        _sort_by_latent(starts, latents, weights.d_sae, 2, self._by_latent, tokens, source)
        by_latent = self._by_latent
        to_m = self._sorted("to_m", source, back.m)
        small = {name: self._summed(self._sorted("own", source, g)) for name, g in back.parameters.items()}
        small["b_dec"] = error.sum(0) - self._summed(to_m) @ weights.encoder
        sorted_values = self._sorted("sorted_values", source, values)
        on = torch.from_numpy(self._sorted("own", source, (values > 0).to(values.dtype)))
        fired = self._summed(on.numpy())
        off = batch * weights.d_sae - n
        stats = StepStats(
            torch.tensor(squares.sum(dtype=np.float64) / (batch * d_in)),
            (penalty + off * objective.penalty.at_zero) / batch,
            torch.zeros((), dtype=torch.float64),
            fired,
        )
        work = by_latent + 4 * np.arange(len(by_latent))
        blocks = np.searchsorted(work, np.linspace(0, work[-1], LATENT_BLOCKS + 1)).astype(np.int64)
        blocks[0], blocks[-1] = 0, weights.d_sae
        return (blocks, by_latent, tokens, sorted_values, to_m, centred.numpy(), error.numpy()), small, stats

    def _encode(self, weights: Weights, centred: Tensor, objective: Objective) -> tuple[np.ndarray, Tensor]:
        """Pairs on the support by token: fills `_starts`, returns latents and m of the pairs."""
        threshold = objective.nonlinearity.threshold(weights.own)
        n = 0
        for start in range(0, len(centred), len(self._m)):
            chunk = centred[start : start + len(self._m)]
            m, counts = self._m[: len(chunk)], self._counts[: len(chunk)]
            torch.mm(chunk, weights.encoder.T, out=m)
            if threshold is None:
                m.masked_fill_(~objective.nonlinearity.support(m, weights.own), -torch.inf)
            bound = threshold if threshold is not None else torch.full_like(m[0], torch.finfo(m.dtype).min)
            _count(m.numpy(), bound.numpy(), counts)
            starts = self._starts[start : start + len(chunk) + 1]
            np.cumsum(counts, out=starts[1:])
            starts[1:] += n
            starts[0] = n
            held, n = n, int(starts[-1])
            expected = n * len(centred) // (start + len(chunk))
            latents = self._pairs.array("latents", expected, np.int32, keep=held)
            values = self._pairs.array("m", expected, keep=held)
            _fill(m.numpy(), bound.numpy(), starts, latents, values)
        return self._pairs.array("latents", n, np.int32), torch.from_numpy(self._pairs.array("m", n))

    def _sorted(self, name: str, source: np.ndarray, values: Tensor) -> np.ndarray:
        out = self._pairs.array(name, len(source))
        _gather(source, values.numpy(), out)
        return out

    def _summed(self, values: np.ndarray) -> Tensor:
        out = np.empty(len(self._by_latent) - 1, values.dtype)
        _sum_by_latent(self._by_latent, values, out)
        return torch.from_numpy(out)
