"""The exactly sparse step on a CPU: one dense matmul, then only pairs on the support (numba).

    m = (x - b_dec) W_enc, a chunk of tokens at a time      the only matmul
    pairs (token, latent) on the support, by token          count, then fill
    error and its product with each pair's decoder row      while the token's row is in the cache
    pairs by latent                                         counting sort
    both weight gradients of a latent, then its update      while the latent's rows are in the cache

An auxiliary term is a second batch: its pairs are those of rows batch ... 2 batch, with targets and errors of their
own, and from the sort on they are pairs like the others.

Nothing of size batch x d_sae is ever made. What a nonlinearity or a penalty is, this file does not know: it
applies their own functions to the pairs.
"""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numba import get_num_threads, set_num_threads
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.nonlinearities import Auxiliary, Nonlinearity, Parameters, Pullback
from prolu.sae.weights import Weights
from prolu.training.steps import numba_kernels as kernels
from prolu.training.steps.adam import AdamConfig
from prolu.training.steps.base import Step
from prolu.training.steps.objective import Objective, StepStats, smallest_on

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

    def __init__(self, like: Weights, batch_size: int, mesh: Mesh = ALONE):
        self.mesh = mesh
        rows = min(batch_size, ROWS_PER_CHUNK)
        dtype = like.encoder.numpy().dtype
        self._m = like.encoder.new_empty(rows, like.d_sae)
        self._centred, self._error = (like.encoder.new_empty(batch_size, like.d_in) for _ in range(2))
        self._counts = np.empty(rows, np.int64)
        self._starts = np.zeros(2 * batch_size + 1, np.int64)
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
            gradient.copy_(small[name]) if name in small else gradient.zero_()
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
        """One projected Adam update, in place; no gradient matrix is made, unless a clip or other ranks need it."""
        if adam.max_grad_norm is not None or self.mesh.n_data > 1:
            return super().update_(weights, first, second, acts, objective, n_updates=n_updates, lr=lr, adam=adam)
        codes, small, stats = self._pair_gradients(weights, acts, objective)
        c = adam.constants(n_updates, lr, weights.encoder.numpy().dtype)
        matrices = (weights.encoder, weights.decoder, first.encoder, second.encoder, first.decoder, second.decoder)
        kernels.latent_updates(*codes, *(t.numpy() for t in matrices), c)
        vectors = [(weights.b_dec, first.b_dec, second.b_dec, small["b_dec"])]
        vectors += [(weights.own[n], first.own[n], second.own[n], small[n]) for n in weights.own if n in small]
        for p, m, v, g in vectors:
            kernels.adam_row(p.numpy(), g.numpy(), m.numpy(), v.numpy(), c)
        return stats

    def _pair_gradients(
        self, weights: Weights, acts: Tensor, objective: Objective
    ) -> tuple[tuple[np.ndarray, ...], dict[str, Tensor], StepStats]:
        """All but the two matrices: pairs sorted by latent, gradients of the vectors, statistics."""
        batch, code, term = len(acts), objective.nonlinearity, objective.auxiliary
        whole_batch = batch * self.mesh.n_data
        set_num_threads(min(torch.get_num_threads(), MOST_THREADS))
        n_rows = batch if term is None else 2 * batch
        centred, error = self._rows(n_rows)
        torch.sub(acts, weights.b_dec, out=centred[:batch])
        n = self._encode(weights.encoder, weights.own, code, centred[:batch], self._starts[: batch + 1])
        latents, m = self._held(n)
        own = {name: self._gathered(f"own {name}", latents, p) for name, p in weights.own.items()}
        values = code.value(m, own)
        scale = 2 / (whole_batch * weights.d_in)
        upstream, mse = self._decode(
            weights, 0, latents, values, weights.b_dec, acts.contiguous(), scale, error[:batch]
        )
        back, penalty = objective.pull_back(upstream, values, m, own, whole_batch)
        smallest, fired, auxiliary, to_decoder = smallest_on(code, values), None, torch.zeros_like(mse), values
        if term is not None:
            fired = torch.from_numpy(np.bincount(latents[values.numpy() > 0], minlength=weights.d_sae)).to(values.dtype)
            latents, also, auxiliary = self._auxiliary(weights, term, n, centred, error, scale)
            back = _joined(back, also.back)
            to_decoder = torch.cat([values, also.values if term.trains_decoder else torch.zeros_like(also.values)])
        by_latent, n_pairs = self._by_latent, len(latents)
        tokens, source = (self._pairs.array(name, n_pairs, np.int32) for name in ("tokens", "source"))
        kernels.sort_by_latent(self._starts[: n_rows + 1], latents, weights.d_sae, 2, by_latent, tokens, source)
        to_m, m_sums = self._sorted("to_m", source, back.m)
        small = {
            name: m_sums if gradient is back.m else self._sorted("to_own", source, gradient)[1]
            for name, gradient in back.parameters.items()
        }
        to_input = self.mesh.sum_over_latents_(m_sums @ weights.encoder, "b_dec")
        small["b_dec"] = error[:batch].sum(0) - to_input
        sorted_values, counted = self._pairs.array("sorted_values", n_pairs), torch.empty_like(m_sums)
        kernels.gather_and_count(by_latent, source, to_decoder.numpy(), sorted_values, counted.numpy())
        off = batch * weights.d_sae - n
        penalty = (penalty + off * objective.penalty.at_zero) / whole_batch
        stats = StepStats(mse, penalty, auxiliary, counted if fired is None else fired, smallest)
        kernels.split_evenly(by_latent, PAIRS_PER_LATENT, self._blocks)
        codes = (self._blocks, by_latent, tokens, sorted_values, to_m, centred.numpy(), error.numpy())
        return codes, small, stats

    def _rows(self, n: int) -> tuple[Tensor, Tensor]:
        """Centred input and error, a row a token; twice as many once there is an auxiliary term."""
        if len(self._centred) < n:
            self._centred, self._error = (self._like.encoder.new_empty(n, self._like.d_in) for _ in range(2))
        return self._centred[:n], self._error[:n]

    def _held(self, end: int, start: int = 0) -> tuple[np.ndarray, Tensor]:
        """Latents and m of pairs found so far."""
        m = torch.from_numpy(self._pairs.array("m", end, keep=start)[start:])
        return self._pairs.array("latents", end, np.int32, keep=start)[start:], m

    def _decode(
        self, weights: Weights, first_row: int, latents: np.ndarray, values: Tensor, bias: Tensor, target: Tensor,
        scale: float, error: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Fills `error`, scaled; gives its product with each pair's decoder row, and the mean squared error.

        The pairs are those of as many rows as `target` has, from `first_row` on.
        """
        rows = len(target)
        starts = self._starts[first_row : first_row + rows + 1]
        starts = starts if starts[0] == 0 else starts - starts[0]
        upstream = self._pairs.array("also upstream" if first_row else "upstream", len(latents))
        squares, x = self._squares[:rows], target.numpy()
        codes, rest = (starts, latents, values.numpy(), weights.decoder.numpy()), (x, x.dtype.type(scale))
        if self.mesh.n_latent > 1:
            kernels.reconstruct(*codes, error.numpy())
            self.mesh.sum_over_latents_(error, "reconstruction").add_(bias)
            kernels.look_back(starts, latents, weights.decoder.numpy(), *rest, error.numpy(), upstream, squares)
        else:
            kernels.decode(*codes, bias.numpy(), *rest, error.numpy(), upstream, squares)
        mean = squares.sum(dtype=np.float64) / (target.numel() * self.mesh.n_data)
        return torch.from_numpy(upstream), torch.tensor(mean)

    def _auxiliary(
        self, weights: Weights, term: Auxiliary, n: int, centred: Tensor, error: Tensor, scale: float
    ) -> tuple[np.ndarray, "_Also", Tensor]:
        """Appends an auxiliary term's pairs and rows; gives all latents, its own gradients, and its value."""
        batch = len(centred) // 2
        centred[batch:] = centred[:batch]
        target = centred[:batch] if term.target == "centred_input" else error[:batch] * (-1 / scale)
        starts = self._starts[batch : 2 * batch + 1]
        if term.of_dead:
            assert term.among is not None
            dead = term.among.nonzero().squeeze(1)
            own = {name: p[dead] for name, p in weights.own.items()}
            total = self._encode(weights.encoder[dead], own, term.code, centred[:batch], starts, n)
            latents, m = self._held(total, n)
            np.take(dead.numpy().astype(np.int32), latents, out=latents)
        else:
            total = 2 * n
            starts[1:] = self._starts[1 : batch + 1] + n
            latents, m = self._held(total, n)
            main = self._held(n)
            latents[:], m[:] = main[0], main[1]
        own = {name: self._gathered(f"also own {name}", latents, p) for name, p in weights.own.items()}
        values, nothing = term.code.value(m, own), torch.zeros_like(weights.b_dec)
        upstream, mean = self._decode(
            weights, batch, latents, values, nothing, target, scale * term.coeff, error[batch:]
        )
        also = _Also(values, term.code.pullback(upstream, m, own))
        return self._held(total)[0], also, term.coeff * mean

    def _encode(
        self, encoder: Tensor, own: Parameters, code: Nonlinearity, centred: Tensor, starts: np.ndarray, n: int = 0
    ) -> int:
        """Appends, by token, the pairs that are on or have a gradient to the `n` found so far; fills `starts`.

        Returns how many there are now.
        """
        first, threshold, selection = n, code.threshold(own), code.selection
        starts[0] = n
        for start in range(0, len(centred), len(self._m)):
            chunk = centred[start : start + len(self._m)]
            m = torch.mm(chunk, encoder.T, out=self._m.view(-1)[: len(chunk) * len(encoder)].view(len(chunk), -1))
            if threshold is None:
                m.masked_fill_(~code.support(m, own), -torch.inf)
            floor = (threshold if threshold is not None else torch.full_like(m[0], torch.finfo(m.dtype).min)).numpy()
            if selection is not None and not selection.over_batch:
                kernels.keep_largest(m.numpy(), floor, selection.k)
            counts = self._counts[: len(chunk)]
            kernels.count(m.numpy(), floor, counts)
            of_chunk = starts[start : start + len(chunk) + 1]
            np.cumsum(counts, out=of_chunk[1:])
            of_chunk[1:] += n
            held, n = n, int(of_chunk[-1])
            expected = first + (n - first) * len(centred) // (start + len(chunk))
            latents = self._pairs.array("latents", expected, np.int32, keep=held)
            kernels.fill(m.numpy(), floor, of_chunk, latents, self._pairs.array("m", expected, keep=held))
            if selection is not None and selection.over_batch:
                n = self._cut(floor, selection.k * len(centred), starts[: start + len(chunk) + 1])
        return n

    def _cut(self, threshold: np.ndarray, k: int, starts: np.ndarray) -> int:
        """Keeps, of the pairs so far, those that lie farthest above their threshold: k, and ties."""
        first, n = int(starts[0]), int(starts[-1])
        if n - first <= k:
            return n
        latents, m = self._held(n, first)
        above = m.numpy() - threshold[latents]
        kept = above >= np.partition(above, n - first - k)[n - first - k]
        starts[:] = first + np.concatenate([[0], np.cumsum(kept)])[starts - first]
        n_kept = int(starts[-1]) - first
        latents[:n_kept], m.numpy()[:n_kept] = latents[kept], m.numpy()[kept]
        return first + n_kept

    def _gathered(self, name: str, source: np.ndarray, values: Tensor) -> Tensor:
        out = self._pairs.array(name, len(source))
        kernels.gather(source, values.numpy(), out)
        return torch.from_numpy(out)

    def _sorted(self, name: str, source: np.ndarray, values: Tensor) -> tuple[np.ndarray, Tensor]:
        """Values by latent, and their sum over each latent's pairs."""
        out, sums = self._pairs.array(name, len(source)), values.new_empty(len(self._by_latent) - 1)
        kernels.gather_and_sum(self._by_latent, source, values.numpy(), out, sums.numpy())
        return out, sums


class _Also(NamedTuple):
    """What an auxiliary term's pairs give."""

    values: Tensor
    back: Pullback


def _joined(main: Pullback, also: Pullback) -> Pullback:
    """Gradients of both sets of pairs, one after the other; a parameter that one of them leaves alone gets 0 there."""
    nothing = torch.zeros_like(main.m), torch.zeros_like(also.m)
    names = [*main.parameters, *(name for name in also.parameters if name not in main.parameters)]
    joined = {
        name: torch.cat([main.parameters.get(name, nothing[0]), also.parameters.get(name, nothing[1])])
        for name in names
    }
    return Pullback(torch.cat([main.m, also.m]), joined)
