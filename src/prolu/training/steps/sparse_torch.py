"""The exactly sparse step in plain torch: a second reference, and the step where numba is missing."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.nonlinearities import Nonlinearity, Parameters, Pullback, on
from prolu.sae.weights import Weights
from prolu.training.steps.base import Step
from prolu.training.steps.objective import Objective, StepStats, smallest_on

ROWS_PER_CHUNK = 1024
"""Tokens per encoder matmul."""


class _Pairs(NamedTuple):
    """Pairs that are on, or have a gradient, in order of token."""

    token: Tensor
    latent: Tensor
    m: Tensor

    def own(self, weights: Weights) -> dict[str, Tensor]:
        """The nonlinearity's parameters, pair by pair."""
        return {name: p[self.latent] for name, p in weights.own.items()}


class SparseTorchStep(Step):
    """The sparse step for SAEs of one shape."""

    def __init__(self, like: Weights, batch_size: int, mesh: Mesh = ALONE):
        self.mesh = mesh
        self._m = like.encoder.new_empty(min(batch_size, ROWS_PER_CHUNK), like.d_sae)
        self._gradients = like.zeros_like()

    def gradients(
        self, weights: Weights, acts: Float[Tensor, "batch d_in"], objective: Objective
    ) -> tuple[Weights, StepStats]:
        """Gradients with respect to every weight, and what was seen. The gradients are the buffers' own."""
        code, grads, d_in = objective.nonlinearity, self._gradients, weights.d_in
        batch = len(acts) * self.mesh.n_data
        for tensor in grads.tensors():
            tensor.zero_()
        centred = acts - weights.b_dec
        pairs = self._encode(centred, weights.encoder, weights.own, code)
        own = pairs.own(weights)
        values = code.value(pairs.m, own)
        error = self._decoded(weights, pairs, values, len(acts)).add_(weights.b_dec).sub_(acts)
        mse = error.square().sum(dtype=torch.float64) / (batch * d_in)
        scale, auxiliary, m_sum = 2 / (batch * d_in), torch.zeros_like(mse), torch.zeros_like(grads.encoder[:, 0])
        if (term := objective.auxiliary) is not None:
            others = self._dead_pairs(centred, weights, term.code, term.among) if term.of_dead else pairs
            also = term.code.value(others.m, others.own(weights))
            miss = self._decoded(weights, others, also, len(acts))
            miss.sub_(-error if term.target == "residual" else centred)
            auxiliary = term.coeff * miss.square().sum(dtype=torch.float64) / (batch * d_in)
            miss *= scale * term.coeff
            back = term.code.pullback(_products(weights, others, miss), others.m, others.own(weights))
            m_sum += _spend_(grads, others, back, also if term.trains_decoder else None, centred, miss)
        error *= scale
        back, penalty = objective.pull_back(_products(weights, pairs, error), values, pairs.m, own, batch)
        m_sum += _spend_(grads, pairs, back, values, centred, error)
        grads.b_dec.copy_(error.sum(0) - self.mesh.sum_over_latents_(m_sum @ weights.encoder, "b_dec"))
        off = len(acts) * weights.d_sae - len(values)
        fired = torch.bincount(pairs.latent, values > 0, weights.d_sae).to(values.dtype)
        penalty = (penalty + off * objective.penalty.at_zero) / batch
        return grads, StepStats(mse, penalty, auxiliary, fired, smallest_on(code, values))

    def _decoded(self, weights: Weights, pairs: _Pairs, values: Tensor, n_tokens: int) -> Tensor:
        """Sum of a token's values times decoder rows, without b_dec."""
        out = _weighted_sums(weights.decoder, pairs.latent, _starts(pairs.token, n_tokens), values)
        return self.mesh.sum_over_latents_(out, "reconstruction")

    def _encode(self, centred: Tensor, encoder: Tensor, own: Parameters, code: Nonlinearity) -> _Pairs:
        threshold, selection = code.threshold(own), code.selection
        found = []
        for start in range(0, len(centred), len(self._m)):
            chunk = centred[start : start + len(self._m)]
            m = torch.mm(chunk, encoder.T, out=self._m.view(-1)[: len(chunk) * len(encoder)].view(len(chunk), -1))
            if selection is None:
                mask = m > threshold if threshold is not None else code.support(m, own)
            else:
                mask = code.support(m, own) if selection.over_batch else on(code, m, own)
            flat = mask.view(-1).nonzero().squeeze(1)
            token = torch.div(flat, len(encoder), rounding_mode="floor")
            found.append(_Pairs(token + start, flat - token * len(encoder), m.view(-1)[flat]))
        pairs = _Pairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        if selection is not None and selection.over_batch:
            assert threshold is not None
            above = pairs.m - threshold[pairs.latent]
            kept = above.topk(min(selection.k * len(centred), len(above)), sorted=False).values
            pairs = _Pairs(*(part[above >= kept.min()] for part in pairs)) if len(kept) else pairs
        return pairs

    def _dead_pairs(self, centred: Tensor, weights: Weights, code: Nonlinearity, among: Tensor | None) -> _Pairs:
        """Pairs of some latents only; the others' rows of the encoder are not multiplied."""
        latents = torch.arange(weights.d_sae) if among is None else among.nonzero().squeeze(1)
        own = {name: p[latents] for name, p in weights.own.items()}
        pairs = self._encode(centred, weights.encoder[latents], own, code)
        return pairs._replace(latent=latents[pairs.latent])


def _products(weights: Weights, pairs: _Pairs, error: Tensor) -> Tensor:
    """The product of a token's error with the decoder row of each of its pairs."""
    starts = _starts(pairs.token, len(error))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        error, weights.decoder, pairs.latent, starts, pairs.token, 0
    )


def _spend_(
    grads: Weights, pairs: _Pairs, back: Pullback, values: Tensor | None, centred: Tensor, error: Tensor
) -> Tensor:
    """Adds the pairs' part of every gradient but b_dec's; without values, the decoder's is left alone.

    Returns the sum of the gradient on m, by latent.
    """
    order = torch.argsort(pairs.latent, stable=True)
    starts, tokens = _starts(pairs.latent, len(grads.encoder)), pairs.token[order]
    grads.encoder.add_(_weighted_sums(centred, tokens, starts, back.m[order]))
    if values is not None:
        grads.decoder.add_(_weighted_sums(error, tokens, starts, values[order]))
    for name, gradient in back.parameters.items():
        grads.own[name].index_add_(0, pairs.latent, gradient)
    return torch.zeros_like(grads.encoder[:, 0]).index_add_(0, pairs.latent, back.m)


def _starts(keys: Tensor, n: int) -> Tensor:
    """Where each key's pairs start once they are sorted by key."""
    return torch.cumsum(torch.bincount(keys, minlength=n), 0) - torch.bincount(keys, minlength=n)


def _weighted_sums(rows: Tensor, which: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights[t] * rows[which[t]] over each run of pairs."""
    return torch.nn.functional.embedding_bag(which, rows, starts, mode="sum", per_sample_weights=weights)
