"""The dense step in plain torch: five matmuls by hand, no autograd, buffers that live for ever.

It defines correctness: every other family is tested against it, and it against autograd.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.nonlinearities import Auxiliary, Nonlinearity, Parameters, Pullback, distance, on
from prolu.sae.weights import Weights
from prolu.training.steps.base import Step
from prolu.training.steps.objective import Objective, StepStats

ROWS_PER_CHUNK = 1024
"""Tokens per encoder matmul: large enough for full matmul speed, small enough to bound memory."""

ENTRIES_PER_SLAB = 2**18
"""Entries per elementwise pass: temporaries of 1 MB in fp32 stay in the cache and cost no page faults."""


class DenseStep(Step):
    """The dense step for SAEs of one shape."""

    def __init__(self, like: Weights, batch_size: int, mesh: Mesh = ALONE):
        self.mesh = mesh
        rows, encoder = min(batch_size, ROWS_PER_CHUNK), like.encoder
        self._gradients = like.zeros_like()
        self._m, self._latents, self._upstream = (encoder.new_empty(rows, like.d_sae) for _ in range(3))
        self._support = encoder.new_empty(rows, like.d_sae, dtype=_MASKS[encoder.dtype])
        self._slab = max(1, ENTRIES_PER_SLAB // like.d_sae)

    def gradients(
        self, weights: Weights, acts: Float[Tensor, "batch d_in"], objective: Objective
    ) -> tuple[Weights, StepStats]:
        """Gradients with respect to every weight, and what was seen. The gradients are the buffers' own."""
        batch, d_in = len(acts) * self.mesh.n_data, acts.shape[1]
        grads = self._gradients
        for tensor in grads.tensors():
            tensor.zero_()
        mse, penalty, auxiliary = acts.new_zeros(3, dtype=torch.float64)
        fired = torch.zeros_like(grads.encoder[:, 0])
        m_sum = torch.zeros_like(fired)
        batch_bound = self._bound_of_batch(weights, acts, objective.nonlinearity)
        smallest = torch.full_like(fired[0], torch.inf)
        bias = weights.b_dec if self.mesh.latent_rank == 0 else torch.zeros_like(weights.b_dec)
        for chunk in acts.split(len(self._m)):
            centred = chunk - weights.b_dec
            m, latents, upstream = (b[: len(chunk)] for b in (self._m, self._latents, self._upstream))
            torch.mm(centred, weights.encoder.T, out=m)
            bound = batch_bound if batch_bound is not None else self._bound_of_tokens(m, weights.own, objective)
            smallest = smallest.minimum(self._activate_(m, latents, weights.own, objective, fired, bound))
            error = torch.addmm(bias, latents, weights.decoder)
            self.mesh.sum_over_latents_(error, "reconstruction").sub_(chunk)
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
            grads.b_dec.add_(error.sum(0))
        # The tied bias: + at the output, - at the input. dm @ W_enc^T summed over tokens needs no matmul.
        grads.b_dec.sub_(self.mesh.sum_over_latents_(m_sum @ weights.encoder, "b_dec"))
        return grads, StepStats(mse, penalty / batch, auxiliary, fired, smallest.where(smallest.isfinite(), 0))

    def _slabs(self, n_rows: int) -> list[slice]:
        return [slice(i, min(i + self._slab, n_rows)) for i in range(0, n_rows, self._slab)]

    def _bound_of_batch(self, weights: Weights, acts: Tensor, code: Nonlinearity) -> Tensor | None:
        """Where a selection counts over the whole batch: how far above its threshold a latent must lie."""
        if code.selection is None or not code.selection.over_batch:
            return None
        n, best = code.selection.k * len(acts) * self.mesh.n_data, acts.new_empty(0)
        for chunk in acts.split(len(self._m)):
            m = torch.mm(chunk - weights.b_dec, weights.encoder.T, out=self._m[: len(chunk)])
            best = torch.cat([best, distance(code, m, weights.own).flatten()])
            best = best.topk(min(n, len(best)), sorted=False).values
        if self.mesh.n_ranks > 1:
            best = self.mesh.gathered_over_all(best, "selection")
            best = best.topk(min(n, len(best)), sorted=False).values
        return best.min().clamp(min=0)

    def _bound_of_tokens(self, m: Tensor, own: Parameters, objective: Objective) -> Tensor | None:
        """The same for each token, where a selection counts over latents on several ranks."""
        code = objective.nonlinearity
        if code.selection is None or self.mesh.n_latent == 1:
            return None
        return code.selection.bound(distance(code, m, own), self.mesh)

    def _activate_(
        self, m: Tensor, latents: Tensor, own: Parameters, objective: Objective, fired: Tensor, bound: Tensor | None
    ) -> Tensor:
        """Fills `latents` and the mask of what is on; counts what fired. Gives the smallest, of a selection."""
        code, smallest = objective.nonlinearity, m.new_full((), torch.inf)
        for rows in self._slabs(len(m)):
            mask, slab = self._support[rows], latents[rows]
            bound_here = bound if bound is None or not bound.ndim else bound[rows]
            torch.neg(_selected(code, m[rows], own, bound_here).to(mask.dtype), out=mask)
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
        mask = -on(term.code, chosen, weights.own, self.mesh).to(self._support.dtype)
        latents = _keep_(term.code.value(m, weights.own).clone(), mask)
        error = self.mesh.sum_over_latents_(latents @ weights.decoder, "reconstruction").sub_(target)
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


def _selected(code: Nonlinearity, m: Tensor, own: Parameters, bound: Tensor | None) -> Tensor:
    """What is on, with the bound of a selection where it takes more than these rows, or these latents, to find it."""
    if bound is None:
        return on(code, m, own)
    return code.support(m, own) & (distance(code, m, own) >= bound)


_MASKS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _keep_(values: Tensor, mask: Tensor) -> Tensor:
    """Values where the mask is -1, +0 where it is 0, in place. On bits: 0 * inf would be NaN, and
    `torch.where` is twenty times slower on a CPU when the mask is irregular.
    """
    values.view(mask.dtype).bitwise_and_(mask)
    return values
