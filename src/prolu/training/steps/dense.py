"""The dense step in plain torch: five matmuls by hand, no autograd, buffers that are never given back.

    m = (x - b_dec) W_enc      f = nonlinearity(m) on the support      e = f W_dec + b_dec - x
    df = 2 e W_dec^T / (batch d_in)      dm, d_own = pullback(df) with the penalty's gradient
    dW_dec = f^T e      dW_enc = (x - b_dec)^T dm      db_dec = sum(e) - (sum of dm) W_enc^T

That of a transcoder has another target, e = f W_dec + b_out + x W_skip - y, and

    db_dec = -(sum of dm) W_enc^T      db_out = sum(e)      dW_skip = x^T e

It defines correctness: every other kind of step is tested against it, and it is tested against autograd.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.nonlinearities import Auxiliary, Nonlinearity, Parameters, Pullback, active_mask, distance
from prolu.sae.weights import Weights
from prolu.training.steps.base import Step, gather_of
from prolu.training.steps.objective import Objective, StepStats

ROWS_PER_CHUNK = 1024
"""The number of tokens per encoder matmul: enough for the full speed of a matmul, and it bounds the memory of m."""

ENTRIES_PER_SLAB = 2**18
"""The number of entries per elementwise pass: temporaries of 1 MB in fp32 stay in the cache and cost no page faults."""


class DenseStep(Step):
    """The dense step for SAEs of one shape."""

    def __init__(self, like: Weights, batch_size: int, mesh: Mesh = ALONE):
        """Args: see `Steps`."""
        self.mesh = mesh
        rows = min(batch_size, ROWS_PER_CHUNK)
        shape = (rows, like.d_sae)
        self._gradients = like.zeros_like()
        self._m = like.encoder.new_empty(shape)
        self._latents = like.encoder.new_empty(shape)
        self._upstream = like.encoder.new_empty(shape)
        self._support = like.encoder.new_empty(shape, dtype=_MASKS[like.encoder.dtype])
        self._slab = max(1, ENTRIES_PER_SLAB // like.d_sae)

    def gradients(
        self,
        weights: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[Weights, StepStats]:
        """Return gradients, in the step's own buffers, and statistics of the batch."""
        batch = len(acts) * self.mesh.n_data
        d_out = weights.d_out
        grads = self._gradients
        for tensor in grads.tensors():
            tensor.zero_()
        # Totals over the batch in fp64: a long fp32 sum would lose digits.
        mse, penalty, auxiliary = acts.new_zeros(3, dtype=torch.float64)
        fired = torch.zeros_like(grads.encoder[:, 0])
        m_sum = torch.zeros_like(fired)
        smallest = torch.full_like(fired[0], torch.inf)
        batch_bound = self._bound_of_batch(weights, acts, objective.nonlinearity)
        objective, of_means = self._for_batch(weights, acts, objective, batch_bound)
        # On a mesh the first rank of a row adds b_dec, so that the sum over ranks has it once.
        bias = weights.output_bias if self.mesh.latent_rank == 0 else torch.zeros_like(weights.output_bias)
        wanted = weights.for_decoder(acts, target)
        blocks = objective.blocks(weights.d_sae)
        for chunk, goal in zip(acts.split(len(self._m)), wanted.split(len(self._m)), strict=True):
            m = self._m[: len(chunk)]
            latents = self._latents[: len(chunk)]
            upstream = self._upstream[: len(chunk)]
            centred = chunk - weights.b_dec
            torch.mm(centred, weights.encoder.T, out=m)
            bound = batch_bound if batch_bound is not None else self._bound_of_tokens(m, weights.own, objective)
            smallest = smallest.minimum(self._activate_(m, latents, weights.own, objective, fired, bound))
            errors = self._errors(latents, weights.decoder, bias, goal, blocks)
            mse += errors[-1].square().sum(dtype=torch.float64) / (batch * d_out)
            residual = -errors[-1] if objective.auxiliary else errors[-1]
            error = self._send_back_(errors, latents, weights.decoder, upstream, blocks, batch)
            penalty += self._pull_back_(m, latents, upstream, weights.own, objective, batch)
            if term := objective.auxiliary:
                of_term = residual if term.target == "residual" else goal - weights.output_bias
                auxiliary += self._auxiliary_(weights, term, m, of_term, upstream, batch)
            m_sum += upstream.sum(0)
            grads.encoder.addmm_(upstream.T, centred)
            grads.output_bias.add_(error.sum(0))
            if grads.skip is not None:
                grads.skip.addmm_(chunk.T, error)
        # b_dec is subtracted at the input, and in an SAE added at the output too. Summing dm over tokens first makes
        # this part a product with a vector, where autograd would pay a sixth matmul.
        grads.b_dec.sub_(self.mesh.sum_over_latents_(m_sum @ weights.encoder, "b_dec"))
        penalty = penalty / batch if of_means is None else of_means
        return grads, StepStats(mse, penalty, auxiliary, fired, smallest.where(smallest.isfinite(), 0))

    def _errors(
        self, latents: Tensor, decoder: Tensor, bias: Tensor, goal: Tensor, blocks: Sequence[slice]
    ) -> list[Tensor]:
        """Return the error of the reconstruction from all latents up to the end of each block."""
        recon = bias
        errors = []
        for block in blocks:
            recon = torch.addmm(recon, latents[:, block], decoder[block])
            # On a mesh there is one block only (`check_mesh`), so that the sum over ranks has it once.
            errors.append(self.mesh.sum_over_latents_(recon, "reconstruction") - goal)
        return errors

    def _send_back_(
        self,
        errors: Sequence[Tensor],
        latents: Tensor,
        decoder: Tensor,
        upstream: Tensor,
        blocks: Sequence[slice],
        batch: int,
    ) -> Tensor:
        """Add to the decoder's gradient, and fill `upstream` with the gradient of the error with respect to latents.

        Returns:
            The gradient with respect to the reconstruction, which the output bias has too; `errors` are used up.
        """
        scale = 2 / (batch * decoder.shape[1] * len(blocks))
        error = None
        for block, of_prefix in zip(reversed(blocks), reversed(errors), strict=True):
            of_prefix.mul_(scale)
            # Summed from the back: a block sees the errors of all prefixes that contain it.
            error = of_prefix if error is None else error.add_(of_prefix)
            self._gradients.decoder[block].addmm_(latents[:, block].T, error)
            torch.mm(error, decoder[block].T, out=upstream[:, block])
        assert error is not None
        return error

    def _slabs(self, n_rows: int) -> list[slice]:
        """Cut `n_rows` rows into slices, each of so many whole rows that it has about `ENTRIES_PER_SLAB` entries."""
        return [slice(i, min(i + self._slab, n_rows)) for i in range(0, n_rows, self._slab)]

    def _bound_of_batch(self, weights: Weights, acts: Tensor, nonlinearity: Nonlinearity) -> Tensor | None:
        """Return how far above its threshold a latent must lie to be active, for a selection over the whole batch.

        It takes an encoder matmul of its own, since the bound must be known before the first chunk is decoded. None for
        other nonlinearities.
        """
        if nonlinearity.selection is None or not nonlinearity.selection.over_batch:
            return None
        n = nonlinearity.selection.k * len(acts) * self.mesh.n_data
        best = acts.new_empty(0)
        for chunk in acts.split(len(self._m)):
            m = torch.mm(chunk - weights.b_dec, weights.encoder.T, out=self._m[: len(chunk)])
            best = torch.cat([best, distance(nonlinearity, m, weights.own).flatten()])
            best = best.topk(min(n, len(best)), sorted=False).values
        if self.mesh.n_ranks > 1:
            best = self.mesh.gathered_over_all(best, "selection")
            best = best.topk(min(n, len(best)), sorted=False).values
        return best.min().clamp(min=0)

    def _for_batch(
        self, weights: Weights, acts: Tensor, objective: Objective, batch_bound: Tensor | None
    ) -> tuple[Objective, Tensor | None]:
        """Return the objective with the coefficient that a penalty of means has for this batch, and that penalty.

        Like a bound over the batch, it takes an encoder matmul of its own. Other objectives are returned as they are.
        """
        if not objective.penalty.is_of_means:
            return objective, None
        sums = torch.zeros_like(weights.encoder[:, 0])
        for chunk in acts.split(len(self._m)):
            m = torch.mm(chunk - weights.b_dec, weights.encoder.T, out=self._m[: len(chunk)])
            latents = self._latents[: len(chunk)]
            bound = batch_bound if batch_bound is not None else self._bound_of_tokens(m, weights.own, objective)
            self._activate_(m, latents, weights.own, objective, torch.zeros_like(sums), bound)
            sums += objective.penalty.value(objective.nonlinearity.penalised(latents, m, weights.own)).sum(0)
        factors, total = objective.of_batch(sums, len(acts) * self.mesh.n_data, self.mesh)
        return replace(objective, coeff=objective.coeff * factors), total

    def _bound_of_tokens(self, m: Tensor, own: Parameters, objective: Objective) -> Tensor | None:
        """Return the same bound for each token, where a selection takes latents of several ranks; else None."""
        nonlinearity = objective.nonlinearity
        if nonlinearity.selection is None or self.mesh.n_latent == 1:
            return None
        return nonlinearity.selection.bound(distance(nonlinearity, m, own), gather_of(self.mesh))

    def _activate_(
        self, m: Tensor, latents: Tensor, own: Parameters, objective: Objective, fired: Tensor, bound: Tensor | None
    ) -> Tensor:
        """Fill `latents` and the mask of active entries, and add to `fired`.

        Returns:
            The smallest active latent of a selection; infinity where there is none.
        """
        nonlinearity = objective.nonlinearity
        smallest = m.new_full((), torch.inf)
        for rows in self._slabs(len(m)):
            mask = self._support[rows]
            slab = latents[rows]
            bound_here = bound if bound is None or not bound.ndim else bound[rows]
            # True becomes -1, all bits set, which `_keep_` needs.
            torch.neg(_selected(nonlinearity, m[rows], own, bound_here).to(mask.dtype), out=mask)
            slab.copy_(nonlinearity.value(m[rows], own))
            _keep_(slab, mask)
            fired += torch.gt(slab, 0, out=torch.empty_like(slab)).sum(0)
            if nonlinearity.selection is not None:
                smallest = smallest.minimum(slab.masked_fill(slab <= 0, torch.inf).min())
        return smallest

    def _pull_back_(
        self, m: Tensor, latents: Tensor, upstream: Tensor, own: Parameters, objective: Objective, batch: int
    ) -> Tensor:
        """Turn `upstream` from the gradient on latents into the gradient on m; add to the own parameters' gradients.

        Returns:
            The sum of the penalty over these tokens.
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
        """Add an auxiliary term's gradient on m to `upstream`, and its other gradients to the buffers.

        Returns:
            The term's value for these tokens.
        """
        chosen = m if term.among is None else m.masked_fill(~term.among, -torch.inf)
        active = active_mask(term.nonlinearity, chosen, weights.own, gather_of(self.mesh))
        if term.among is not None:
            active = active & term.among
        # True becomes -1, all bits set, which `_keep_` needs.
        mask = -active.to(self._support.dtype)
        latents = _keep_(term.nonlinearity.value(m, weights.own).clone(), mask)
        scale = term.coeff / (batch * target.shape[1])
        if term.target is None:
            value = self.mesh.sum_over_latents_(scale * latents.sum(dtype=torch.float64), "scalars")
            to_latents = torch.full_like(latents, scale)
        else:
            error = self.mesh.sum_over_latents_(latents @ weights.decoder, "reconstruction").sub_(target)
            value = scale * error.square().sum(dtype=torch.float64)
            error *= 2 * scale
            if term.trains_decoder:
                self._gradients.decoder.addmm_(latents.T, error)
            to_latents = error @ weights.decoder.T
        back = term.nonlinearity.pullback(to_latents, m, weights.own)
        to_m = _keep_(back.m.clone(), mask)
        self._accumulate_(back, to_m, mask)
        upstream += to_m
        return value

    def _accumulate_(self, back: Pullback, to_m: Tensor, mask: Tensor) -> None:
        """Add the gradients on own parameters, summed over tokens; `to_m` is `back.m`, masked already."""
        for name, gradient in back.parameters.items():
            # A bias often has the gradient of m itself: that one is masked already, and must not be copied again.
            kept = to_m if gradient is back.m else _keep_(gradient.clone(), mask)
            self._gradients.own[name].add_(kept.sum(0))


def _selected(nonlinearity: Nonlinearity, m: Tensor, own: Parameters, bound: Tensor | None) -> Tensor:
    """Return which entries are active.

    Args:
        nonlinearity: the SAE's.
        m: pre-activations of some rows.
        own: the nonlinearity's own parameters.
        bound: that of a selection, where finding it takes more than these rows or these latents.
    """
    if bound is None:
        return active_mask(nonlinearity, m, own)
    return nonlinearity.support(m, own) & (distance(nonlinearity, m, own) >= bound)


_MASKS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""The integers that are as wide as each number, for masks that act on bits."""


def _keep_(values: Tensor, mask: Tensor) -> Tensor:
    """Keep values where the mask is -1 and put +0 where it is 0, in place.

    The mask acts on bits, because 0 * inf would be NaN, and because `torch.where` on an irregular mask was measured
    twenty times slower on a CPU.
    """
    values.view(mask.dtype).bitwise_and_(mask)
    return values
