"""The exactly sparse step on a CPU: one dense matmul, then only pairs on the support (numba).

    m = (x - b_dec) W_enc, a chunk of tokens at a time      the only matmul
    pairs (token, latent) on the support, by token          count, then fill
    error and its product with each pair's decoder row      while the token's row is in the cache
    pairs by latent                                         counting sort
    both weight gradients of a latent, then its update      while the latent's rows are in the cache

Nothing of size batch x d_sae is ever made. What a nonlinearity or a penalty is, this file does not know: it
applies their own functions to the pairs.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numba import get_num_threads, set_num_threads
from torch import Tensor

from prolu.steps import numba_kernels as kernels
from prolu.steps.adam import AdamConfig
from prolu.steps.base import Step
from prolu.steps.objective import Objective, StepStats
from prolu.weights import Weights

ROWS_PER_CHUNK = 1024
"""Tokens per encoder matmul."""

MOST_THREADS = get_num_threads()
"""As many as numba was started with."""

LATENT_BLOCKS = 64
"""Blocks of latents of about equal work, from which threads help themselves."""

PAIRS_PER_LATENT = 4
"""Work of updating a latent's rows, in pairs."""


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
        self._blocks = np.empty(LATENT_BLOCKS + 1, np.int64)
        self._squares = np.empty(batch_size, dtype)
        self._pairs = _Pairs(dtype)
        self._like = like

    @cached_property
    def _gradients(self) -> Weights:
        """Made when first asked for: the fused update does without."""
        return self._like.zeros_like()

    def gradients(
        self, weights: Weights, acts: Float[Tensor, "batch d_in"], objective: Objective
    ) -> tuple[Weights, StepStats]:
        """Gradients with respect to every weight, written out, and what was seen. They are the buffers' own."""
        codes, small, stats = self._pair_gradients(weights, acts, objective)
        gradients = self._gradients
        kernels.latent_gradients(*codes, gradients.encoder.numpy(), gradients.decoder.numpy())
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
        """One projected Adam update, in place; no gradient matrix is made, unless a clip needs its norm first."""
        if adam.max_grad_norm is not None:
            return super().update_(weights, first, second, acts, objective, n_updates=n_updates, lr=lr, adam=adam)
        codes, small, stats = self._pair_gradients(weights, acts, objective)
        c = adam.constants(n_updates, lr, weights.encoder.numpy().dtype)
        matrices = (weights.encoder, weights.decoder, first.encoder, second.encoder, first.decoder, second.decoder)
        kernels.latent_updates(*codes, *(t.numpy() for t in matrices), c)
        vectors = [(weights.b_dec, first.b_dec, second.b_dec, small["b_dec"])]
        vectors += [(weights.own[n], first.own[n], second.own[n], small[n]) for n in weights.own]
        for p, m, v, g in vectors:
            kernels.adam_row(p.numpy(), g.numpy(), m.numpy(), v.numpy(), c)
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
        n, starts, by_latent = len(latents), self._starts[: batch + 1], self._by_latent
        own = {name: self._gathered(f"own {name}", latents, p) for name, p in weights.own.items()}
        values = objective.nonlinearity.value(m, own)
        upstream, squares = self._pairs.array("upstream", n), self._squares[:batch]
        scale = x.dtype.type(2 / (batch * d_in))
        decoder, b_dec, e = weights.decoder.numpy(), weights.b_dec.numpy(), error.numpy()
        kernels.decode(starts, latents, values.numpy(), decoder, b_dec, x, scale, e, upstream, squares)
        back, penalty = objective.pull_back(torch.from_numpy(upstream), values, m, own, batch)
        tokens, source = (self._pairs.array(name, n, np.int32) for name in ("tokens", "source"))
        kernels.sort_by_latent(starts, latents, weights.d_sae, 2, by_latent, tokens, source)
        to_m, m_sums = self._sorted("to_m", source, back.m)
        small = {
            name: m_sums if gradient is back.m else self._sorted("to_own", source, gradient)[1]
            for name, gradient in back.parameters.items()
        }
        small["b_dec"] = error.sum(0) - m_sums @ weights.encoder
        sorted_values, fired = self._pairs.array("sorted_values", n), torch.empty_like(m_sums)
        kernels.gather_and_count(by_latent, source, values.numpy(), sorted_values, fired.numpy())
        off = batch * weights.d_sae - n
        stats = StepStats(
            torch.tensor(squares.sum(dtype=np.float64) / (batch * d_in)),
            (penalty + off * objective.penalty.at_zero) / batch,
            torch.zeros((), dtype=torch.float64),
            fired,
        )
        kernels.split_evenly(by_latent, PAIRS_PER_LATENT, self._blocks)
        return (self._blocks, by_latent, tokens, sorted_values, to_m, centred.numpy(), e), small, stats

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
            kernels.count(m.numpy(), bound.numpy(), counts)
            starts = self._starts[start : start + len(chunk) + 1]
            np.cumsum(counts, out=starts[1:])
            starts[1:] += n
            starts[0] = n
            held, n = n, int(starts[-1])
            expected = n * len(centred) // (start + len(chunk))
            latents = self._pairs.array("latents", expected, np.int32, keep=held)
            values = self._pairs.array("m", expected, keep=held)
            kernels.fill(m.numpy(), bound.numpy(), starts, latents, values)
        return self._pairs.array("latents", n, np.int32), torch.from_numpy(self._pairs.array("m", n))

    def _gathered(self, name: str, source: np.ndarray, values: Tensor) -> Tensor:
        out = self._pairs.array(name, len(source))
        kernels.gather(source, values.numpy(), out)
        return torch.from_numpy(out)

    def _sorted(self, name: str, source: np.ndarray, values: Tensor) -> tuple[np.ndarray, Tensor]:
        """Values by latent, and their sum over each latent's pairs."""
        out, sums = self._pairs.array(name, len(source)), values.new_empty(len(self._by_latent) - 1)
        kernels.gather_and_sum(self._by_latent, source, values.numpy(), out, sums.numpy())
        return out, sums
