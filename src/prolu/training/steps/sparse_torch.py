"""The exactly sparse step in plain torch: a second reference, and the step where numba is missing.

It finds the (token, latent) pairs on the support after one dense matmul, and works on these pairs only. Off the support
every value and gradient is exactly zero, so nothing is approximated.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.nonlinearities import Auxiliary, Nonlinearity, Parameters, Pullback, active_mask
from prolu.sae.weights import Weights
from prolu.training.steps.base import Step
from prolu.training.steps.objective import Objective, StepStats, smallest_active

ROWS_PER_CHUNK = 1024
"""The number of tokens per encoder matmul, which bounds the memory of m."""


class _Pairs(NamedTuple):
    """Pairs of token and latent on the support, in order of token."""

    token: Tensor
    latent: Tensor
    m: Tensor
    """The pre-activation of each pair."""
    row: Tensor
    """The row of the error that each pair sees: its token, or with several blocks of latents block * batch + token."""

    def in_blocks(self, blocks: Sequence[slice], batch: int) -> "_Pairs":
        """Return the pairs in order of block, and within a block in order of token."""
        if len(blocks) == 1:
            return self
        ends = torch.tensor([block.stop for block in blocks])
        row = self.token + batch * torch.bucketize(self.latent, ends, right=True)
        order = torch.argsort(row, stable=True)
        return _Pairs(self.token[order], self.latent[order], self.m[order], row[order])

    def own(self, weights: Weights) -> dict[str, Tensor]:
        """Return the nonlinearity's own parameters, pair by pair."""
        return {name: p[self.latent] for name, p in weights.own.items()}


class SparseTorchStep(Step):
    """The sparse step for SAEs of one shape."""

    def __init__(self, like: Weights, batch_size: int, mesh: Mesh = ALONE):
        """Args: see `Steps`."""
        self.mesh = mesh
        self._m = like.encoder.new_empty(min(batch_size, ROWS_PER_CHUNK), like.d_sae)
        self._gradients = like.zeros_like()

    def gradients(
        self,
        weights: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[Weights, StepStats]:
        """Return gradients, in the step's own buffers, and statistics of the batch."""
        nonlinearity = objective.nonlinearity
        grads = self._gradients
        for tensor in grads.tensors():
            tensor.zero_()
        batch = len(acts) * self.mesh.n_data
        n_entries = batch * weights.d_out
        blocks = objective.blocks(weights.d_sae)
        centred = acts - weights.b_dec
        found = self._encode(centred, weights.encoder, weights.own, nonlinearity)
        pairs = found.in_blocks(blocks, len(acts))
        own = pairs.own(weights)
        values = nonlinearity.value(pairs.m, own)
        wanted = weights.for_decoder(acts, target)
        # One error for each block, [n_blocks, batch, d_out]: of the reconstruction from all latents up to its end.
        parts = self._decoded(weights, pairs, values, len(blocks) * len(acts)).view(len(blocks), len(acts), -1)
        errors = parts.cumsum(0).add_(weights.output_bias).sub_(wanted)
        error = errors[-1]
        mse = error.square().sum(dtype=torch.float64) / n_entries
        auxiliary = torch.zeros_like(mse)
        m_sum = torch.zeros_like(grads.encoder[:, 0])
        if (term := objective.auxiliary) is not None:
            # Before `error` is scaled, because the residual is its target.
            others = self._dead_pairs(centred, weights, term.nonlinearity, term.among) if term.of_dead else found
            auxiliary, its_m_sum = self._auxiliary_(weights, term, others, centred, error, wanted)
            m_sum += its_m_sum
        # A block sees the errors of all prefixes that contain it.
        seen = errors.flip(0).cumsum(0).flip(0).mul_(2 / n_entries / len(blocks))
        rows = seen.view(-1, weights.d_out)
        objective, of_means = objective.at_pairs(values, pairs.m, own, pairs.latent, weights.d_sae, batch, self.mesh)
        back, penalty = objective.pull_back(_products(weights, pairs, rows), values, pairs.m, own, batch)
        m_sum += _add_gradients_(grads, pairs, back, values, centred, rows)
        to_input = self.mesh.sum_over_latents_(m_sum @ weights.encoder, "b_dec")
        for name, gradient in weights.bias_gradients(seen[0].sum(0), to_input).items():
            grads.shared()[name].copy_(gradient)
        if grads.skip is not None:
            torch.mm(acts.T, seen[0], out=grads.skip)
        fired = torch.bincount(pairs.latent, values > 0, weights.d_sae).to(values.dtype)
        # A penalty may be above 0 at f = 0 (Sqrt(L1) is): every kind of step reports the same loss.
        n_inactive = len(acts) * weights.d_sae - len(values)
        penalty = (penalty + n_inactive * objective.penalty.at_zero) / batch if of_means is None else of_means
        return grads, StepStats(mse, penalty, auxiliary, fired, smallest_active(nonlinearity, values))

    def _auxiliary_(
        self, weights: Weights, term: Auxiliary, pairs: _Pairs, centred: Tensor, error: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add an auxiliary term's gradients to the buffers, except that of b_dec.

        Returns:
            The term's value for the batch, and the sum of its gradient on m over tokens, of each latent.
        """
        n_entries = len(centred) * self.mesh.n_data * weights.d_out
        own = pairs.own(weights)
        values = term.nonlinearity.value(pairs.m, own)
        if term.target is None:
            value = term.coeff * values.sum(dtype=torch.float64) / n_entries
            self.mesh.sum_over_latents_(value, "scalars")
            to_values = torch.full_like(values, term.coeff / n_entries)
        else:
            target = -error if term.target == "residual" else wanted - weights.output_bias
            error = self._decoded(weights, pairs, values, len(centred)).sub_(target)
            value = term.coeff * error.square().sum(dtype=torch.float64) / n_entries
            error *= 2 / n_entries * term.coeff
            to_values = _products(weights, pairs, error)
        back = term.nonlinearity.pullback(to_values, pairs.m, own)
        to_decoder = values if term.trains_decoder else None
        return value, _add_gradients_(self._gradients, pairs, back, to_decoder, centred, error)

    def _decoded(self, weights: Weights, pairs: _Pairs, values: Tensor, n_rows: int) -> Tensor:
        """Return f W_dec of each token, without b_dec; on a mesh, of the latents of all ranks."""
        out = _weighted_sums(weights.decoder, pairs.latent, _starts(pairs.row, n_rows), values)
        return self.mesh.sum_over_latents_(out, "reconstruction")

    def _encode(self, centred: Tensor, encoder: Tensor, own: Parameters, nonlinearity: Nonlinearity) -> _Pairs:
        """Return the pairs on the support, cut down to the nonlinearity's selection."""
        threshold = nonlinearity.threshold(own)
        selection = nonlinearity.selection
        found = []
        for start in range(0, len(centred), len(self._m)):
            chunk = centred[start : start + len(self._m)]
            # The encoder may hold some latents only, so the buffer is cut to a matrix of another width.
            out = self._m.view(-1)[: len(chunk) * len(encoder)].view(len(chunk), -1)
            m = torch.mm(chunk, encoder.T, out=out)
            if selection is not None:
                # A selection over the batch needs the pairs of all chunks first.
                mask = nonlinearity.support(m, own) if selection.over_batch else active_mask(nonlinearity, m, own)
            else:
                mask = m > threshold if threshold is not None else nonlinearity.support(m, own)
            flat = mask.view(-1).nonzero().squeeze(1)
            token = torch.div(flat, len(encoder), rounding_mode="floor")
            found.append(_Pairs(token + start, flat - token * len(encoder), m.view(-1)[flat], token + start))
        pairs = _Pairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        if selection is not None and selection.over_batch:
            assert threshold is not None
            above = pairs.m - threshold[pairs.latent]
            kept = above.topk(min(selection.k * len(centred), len(above)), sorted=False).values
            if len(kept):
                # Ties at the bound share a place, as in every kind of step.
                chosen = above >= kept.min()
                pairs = _Pairs(*(part[chosen] for part in pairs))
        return pairs

    def _dead_pairs(
        self, centred: Tensor, weights: Weights, nonlinearity: Nonlinearity, among: Tensor | None
    ) -> _Pairs:
        """Return the pairs of some latents only; the other rows of the encoder are not multiplied."""
        latents = torch.arange(weights.d_sae) if among is None else among.nonzero().squeeze(1)
        own = {name: p[latents] for name, p in weights.own.items()}
        pairs = self._encode(centred, weights.encoder[latents], own, nonlinearity)
        return pairs._replace(latent=latents[pairs.latent])


def _products(weights: Weights, pairs: _Pairs, error: Tensor) -> Tensor:
    """Return the product of the error that each pair sees with its decoder row."""
    starts = _starts(pairs.row, len(error))
    # The gradient of an embedding bag in its per-sample weights is this product, and makes no [n_pairs, d_in] of rows.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        error, weights.decoder, pairs.latent, starts, pairs.row, 0
    )


def _add_gradients_(
    grads: Weights, pairs: _Pairs, back: Pullback, values: Tensor | None, centred: Tensor, error: Tensor
) -> Tensor:
    """Add the pairs' part of every gradient except that of b_dec.

        dW_enc[j] += sum over pairs of j of dm * centred[token]
        dW_dec[j] += sum over pairs of j of f * error[row]

    Args:
        grads: what is added to.
        pairs: the pairs, in order of token.
        back: the gradient on m and the own parameters, pair by pair.
        values: the latents of the pairs; None if the decoder is not trained.
        centred: x - b_dec of each token.
        error: the scaled error of each row.

    Returns:
        The sum of the gradient on m over tokens, of each latent.
    """
    # Stable, so that a latent's pairs stay in order of token and every sum has one order.
    order = torch.argsort(pairs.latent, stable=True)
    starts = _starts(pairs.latent, len(grads.encoder))
    tokens = pairs.token[order]
    grads.encoder.add_(_weighted_sums(centred, tokens, starts, back.m[order]))
    if values is not None:
        grads.decoder.add_(_weighted_sums(error, pairs.row[order], starts, values[order]))
    for name, gradient in back.parameters.items():
        grads.own[name].index_add_(0, pairs.latent, gradient)
    return torch.zeros_like(grads.encoder[:, 0]).index_add_(0, pairs.latent, back.m)


def _starts(keys: Tensor, n: int) -> Tensor:
    """Return where each of n keys' pairs start once they are sorted by key."""
    counts = torch.bincount(keys, minlength=n)
    return torch.cumsum(counts, 0) - counts


def _weighted_sums(rows: Tensor, which: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of weights[t] * rows[which[t]] over each run of pairs."""
    return torch.nn.functional.embedding_bag(which, rows, starts, mode="sum", per_sample_weights=weights)
