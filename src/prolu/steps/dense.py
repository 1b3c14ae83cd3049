"""The dense step in plain torch: five matmuls by hand, no autograd, buffers that live for ever.

It defines correctness: every other family is tested against it, and it against autograd.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.nonlinearities import Auxiliary, Nonlinearity, Parameters, Pullback, distance
from prolu.steps.base import Step
from prolu.steps.objective import Objective, StepStats
from prolu.steps.selection import on_with_bound, token_bounds
from prolu.weights import Weights

ROWS_PER_CHUNK = 1024
"""Tokens per encoder matmul: large enough for full matmul speed, small enough to bound memory."""

ENTRIES_PER_SLAB = 2**18
"""Entries per elementwise pass: temporaries of 1 MB in fp32 stay in the cache and cost no page faults."""


class DenseStep(Step):
    """The dense step for SAEs of one shape."""

    def __init__(self, like: Weights, batch_size: int):
        rows, encoder = min(batch_size, ROWS_PER_CHUNK), like.encoder
        self._gradients = like.zeros_like()
        self._m, self._latents, self._upstream = (encoder.new_empty(rows, like.d_sae) for _ in range(3))
        self._support = encoder.new_empty(rows, like.d_sae, dtype=_MASKS[encoder.dtype])
        self._slab = max(1, ENTRIES_PER_SLAB // like.d_sae)

    def gradients(
        self, weights: Weights, acts: Float[Tensor, "batch d_in"], objective: Objective
    ) -> tuple[Weights, StepStats]:
        """Gradients with respect to every weight, and what was seen. The gradients are the buffers' own."""
        batch, d_in, mesh = self._n_tokens(acts), acts.shape[1], self.mesh
        grads = self._gradients
        for tensor in grads.tensors():
            tensor.zero_()
        mse, penalty, auxiliary = acts.new_zeros(3, dtype=torch.float64)
        fired = torch.zeros_like(grads.encoder[:, 0])
        m_sum = torch.zeros_like(fired)
        bound = self._bound_of_batch(weights, acts, objective.nonlinearity)
        smallest = torch.full_like(fired[0], torch.inf)
        for chunk in acts.split(len(self._m)):
            centred = chunk - weights.b_dec
            m, latents, upstream = (b[: len(chunk)] for b in (self._m, self._latents, self._upstream))
            torch.mm(centred, weights.encoder.T, out=m)
            smallest = smallest.minimum(self._activate_(m, latents, weights.own, objective, fired, bound))
            recon = torch.addmm(mesh.once(weights.b_dec), latents, weights.decoder)
            error = mesh.sum_(recon, "latent").sub_(chunk)
            mse += error.square().sum(dtype=torch.float64) / (batch * d_in)
            residual = -error if objective.auxiliary else error
            error *= 2 / (batch * d_in)
            grads.decoder.addmm_(latents.T, error)
            torch.mm(error, weights.decoder.T, out=upstream)
            penalty += self._pull_back_(m, latents, upstream, weights.own, objective, batch)
            if term := objective.auxiliary:
                target = residual if term.target == "residual" else centred
                auxiliary += self._auxiliary_(weights, term, m, target, upstream, batch)
            m_sum += upstream.sum(0)
            grads.encoder.addmm_(upstream.T, centred)
            grads.b_dec.add_(mesh.once(error.sum(0)))
        # The tied bias: + at the output, - at the input. dm @ W_enc^T summed over tokens needs no matmul.
        grads.b_dec.sub_(m_sum @ weights.encoder)
        smallest, n_on = smallest.where(smallest.isfinite(), 0), fired.sum().double()
        stats = StepStats(mse, penalty / batch, auxiliary, fired, smallest, n_on)
        return self._summed(grads, stats, objective)

    def _slabs(self, n_rows: int) -> list[slice]:
        return [slice(i, min(i + self._slab, n_rows)) for i in range(0, n_rows, self._slab)]

    def _bound_of_batch(self, weights: Weights, acts: Tensor, code: Nonlinearity) -> Tensor | None:
        """Where a selection counts over the whole batch: how far above its threshold a latent must lie."""
        if code.selection is None or not code.selection.over_batch:
            return None
        n, best = code.selection.k * self._n_tokens(acts), acts.new_empty(0)
        for chunk in acts.split(len(self._m)):
            m = torch.mm(chunk - weights.b_dec, weights.encoder.T, out=self._m[: len(chunk)])
            best = torch.cat([best, distance(code, m, weights.own).flatten()])
            best = best.topk(min(n, len(best)), sorted=False).values
        return self.mesh.nth_largest(best, n, "all").clamp(min=0)

    def _activate_(
        self, m: Tensor, latents: Tensor, own: Parameters, objective: Objective, fired: Tensor, bound: Tensor | None
    ) -> Tensor:
        """Fills `latents` and the mask of what is on; counts what fired. Gives the smallest, of a selection."""
        code, smallest = objective.nonlinearity, m.new_full((), torch.inf)
        if bound is None and code.selection is not None:
            bound = token_bounds(code, code.selection, m, own, self.mesh)
        for rows in self._slabs(len(m)):
            mask, slab = self._support[rows], latents[rows]
            torch.neg(on_with_bound(code, m[rows], own, _of(rows, bound)).to(mask.dtype), out=mask)
            slab.copy_(code.value(m[rows], own))
            _keep_(slab, mask)
            fired += torch.gt(slab, 0, out=torch.empty_like(slab)).sum(0)
            if code.selection is not None:
                smallest = smallest.minimum(slab.masked_fill(slab <= 0, torch.inf).min())
        return smallest

    def _pull_back_(
        self, m: Tensor, latents: Tensor, upstream: Tensor, own: Parameters, objective: Objective, batch: int
    ) -> Tensor:
        """Turns `upstream` from the gradient on latents to the gradient on m; adds to the own parameters'.

        Returns the sum of the penalty.
        """
        penalty = m.new_zeros((), dtype=torch.float64)
        for rows in self._slabs(len(m)):
            back, part = objective.pull_back(upstream[rows], latents[rows], m[rows], own, batch)
            penalty += part
            upstream[rows] = back.m
            _keep_(upstream[rows], self._support[rows])
            self._accumulate_(back, upstream[rows], self._support[rows])
        return penalty

    def _auxiliary_(
        self, weights: Weights, term: Auxiliary, m: Tensor, target: Tensor, upstream: Tensor, batch: int
    ) -> Tensor:
        """Adds an auxiliary term's gradient on m to `upstream` and its own to the rest; returns its value."""
        chosen = m if term.among is None else m.masked_fill(~term.among, -torch.inf)
        selection, bound = term.code.selection, None
        if selection is not None:
            bound = token_bounds(term.code, selection, chosen, weights.own, self.mesh)
        mask = -on_with_bound(term.code, chosen, weights.own, bound).to(self._support.dtype)
        latents = _keep_(term.code.value(m, weights.own).clone(), mask)
        error = self.mesh.sum_(latents @ weights.decoder, "latent").sub_(target)
        value = term.coeff * error.square().sum(dtype=torch.float64) / (batch * target.shape[1])
        error *= 2 * term.coeff / (batch * target.shape[1])
        if term.trains_decoder:
            self._gradients.decoder.addmm_(latents.T, error)
        back = term.code.pullback(error @ weights.decoder.T, m, weights.own)
        to_m = _keep_(back.m.clone(), mask)
        self._accumulate_(back, to_m, mask)
        upstream += to_m
        return value

    def _accumulate_(self, back: Pullback, to_m: Tensor, mask: Tensor) -> None:
        """Adds the gradients on own parameters, summed over tokens; `to_m` is back.m, already kept."""
        for name, gradient in back.parameters.items():
            kept = to_m if gradient is back.m else _keep_(gradient.clone(), mask)
            self._gradients.own[name].add_(kept.sum(0))


def _of(rows: slice, bound: Tensor | None) -> Tensor | None:
    """Of some tokens; a bound of the whole batch is one number."""
    return bound if bound is None or bound.ndim == 1 else bound[rows]


_MASKS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _keep_(values: Tensor, mask: Tensor) -> Tensor:
    """Values where the mask is -1, +0 where it is 0, in place. On bits: 0 * inf would be NaN, and
    `torch.where` is twenty times slower on a CPU when the mask is irregular.
    """
    values.view(mask.dtype).bitwise_and_(mask)
    return values
