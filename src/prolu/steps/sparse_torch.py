"""The exactly sparse step in plain torch: a second reference, and the step where numba is missing."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.steps.base import Step
from prolu.steps.objective import Objective, StepStats
from prolu.weights import Weights

ROWS_PER_CHUNK = 1024
"""Tokens per encoder matmul."""


class _Pairs(NamedTuple):
    """Pairs on the support, in order of token."""

    token: Tensor
    latent: Tensor
    m: Tensor


class SparseTorchStep(Step):
    """The sparse step for SAEs of one shape."""

    def __init__(self, like: Weights, batch_size: int):
        self._m = like.encoder.new_empty(min(batch_size, ROWS_PER_CHUNK), like.d_sae)
        self._gradients = like.zeros_like()

    def gradients(
        self, weights: Weights, acts: Float[Tensor, "batch d_in"], objective: Objective
    ) -> tuple[Weights, StepStats]:
        """Gradients with respect to every weight, and what was seen. The gradients are the buffers' own."""
        if objective.auxiliary is not None:
            raise NotImplementedError("auxiliary terms are the dense step's")
        batch, d_in = acts.shape
        grads = self._gradients
        centred = acts - weights.b_dec
        pairs = self._encode(weights, centred, objective)
        own = {name: p[pairs.latent] for name, p in weights.own.items()}
        values = objective.nonlinearity.value(pairs.m, own)
        token_starts = _starts(pairs.token, batch)
        error = _weighted_sums(weights.decoder, pairs.latent, token_starts, values)
        error.add_(weights.b_dec).sub_(acts)
        mse = error.square().sum(dtype=torch.float64) / (batch * d_in)
        error *= 2 / (batch * d_in)
        # The product of a token's error with the decoder row of each of its pairs.
        upstream = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            error, weights.decoder, pairs.latent, token_starts, pairs.token, 0
        )
        back, penalty = objective.pull_back(upstream, values, pairs.m, own, batch)
        order = torch.argsort(pairs.latent, stable=True)
        latent_starts = _starts(pairs.latent, weights.d_sae)
        tokens = pairs.token[order]
        grads.encoder.copy_(_weighted_sums(centred, tokens, latent_starts, back.m[order]))
        grads.decoder.copy_(_weighted_sums(error, tokens, latent_starts, values[order]))
        for name, gradient in back.parameters.items():
            grads.own[name].zero_().index_add_(0, pairs.latent, gradient)
        m_sum = torch.zeros_like(grads.encoder[:, 0]).index_add_(0, pairs.latent, back.m)
        grads.b_dec.copy_(error.sum(0) - m_sum @ weights.encoder)
        off = batch * weights.d_sae - len(values)
        fired = torch.bincount(pairs.latent, values > 0, weights.d_sae).to(values.dtype)
        penalty = (penalty + off * objective.penalty.at_zero) / batch
        return grads, StepStats(mse, penalty, torch.zeros_like(mse), fired)

    def _encode(self, weights: Weights, centred: Tensor, objective: Objective) -> _Pairs:
        threshold = objective.nonlinearity.threshold(weights.own)
        found = []
        for start in range(0, len(centred), len(self._m)):
            chunk = centred[start : start + len(self._m)]
            m = torch.mm(chunk, weights.encoder.T, out=self._m[: len(chunk)])
            on = m > threshold if threshold is not None else objective.nonlinearity.support(m, weights.own)
            flat = on.view(-1).nonzero().squeeze(1)
            token = torch.div(flat, weights.d_sae, rounding_mode="floor")
            found.append(_Pairs(token + start, flat - token * weights.d_sae, m.view(-1)[flat]))
        return _Pairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _starts(keys: Tensor, n: int) -> Tensor:
    """Where each key's pairs start once they are sorted by key."""
    return torch.cumsum(torch.bincount(keys, minlength=n), 0) - torch.bincount(keys, minlength=n)


def _weighted_sums(rows: Tensor, which: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights[t] * rows[which[t]] over each run of pairs."""
    return torch.nn.functional.embedding_bag(which, rows, starts, mode="sum", per_sample_weights=weights)
