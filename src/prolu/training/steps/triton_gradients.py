"""The gradients of a batch's pairs on a GPU, up to the two matrices, whose rows one kernel updates at once."""

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from prolu.sae.weights import Weights
from prolu.training.steps import triton_kernels as kernels
from prolu.training.steps.objective import Objective, StepStats
from prolu.training.steps.pair_functions import fused, latents_of_pairs, pulled_back
from prolu.training.steps.triton_pairs import STRETCH, PairFinder, Pairs, TokenPairs, launch

TILE = 8192
"""The number of entries of gathered rows that one program holds at a time, in registers."""

FORMATS = {torch.float32: (triton.language.float32, np.float32), torch.float64: (triton.language.float64, np.float64)}
"""Triton's and NumPy's names of the format of the weights, which is that of sums too."""


class _Decoded(NamedTuple):
    """What one pass over the tokens computes."""

    error: Tensor
    """The scaled error of each token."""
    upstream: Tensor
    """The gradient of the error with respect to f, of each pair."""
    squares: Tensor
    """The squared norm of each token's unscaled error."""
    penalties: Tensor
    """The penalty of each token's pairs."""


class GradientInputs(NamedTuple):
    """What the kernels need for the gradients of both matrices, in the order of their parameters."""

    by_latent: Tensor
    """Where each latent's pairs start, and where the last one's end: [d_sae + 1]."""
    tokens: Tensor
    """The token of each pair, in order of latent like the next two."""
    to_m: Tensor
    """The gradient with respect to m, of each pair, in the format of gathered rows."""
    values: Tensor
    """f of each pair, in the same format."""
    centred: Tensor
    """x - b_dec of each token, in the same format."""
    error: Tensor
    """The scaled error of each token, in the same format."""
    partial: Tensor
    """Sums over stretches of pairs (`partial_rows`)."""


class PairResult(NamedTuple):
    """All of a step but the gradients of the two matrices."""

    rows: GradientInputs
    """What the kernels need for these two."""
    vectors: dict[str, Tensor]
    """The gradients of b_dec and of the own parameters, by name."""
    stats: StepStats
    """Statistics of the batch."""


class PairGradients:
    """Computes the gradients of pairs for SAEs of one shape."""

    def __init__(self, like: Weights):
        """Args: see `Steps`."""
        on_gpu = like.encoder.device.type == "cuda"
        self._latents_of_pairs = fused(latents_of_pairs) if on_gpu else latents_of_pairs
        self._pulled_back = fused(pulled_back) if on_gpu else pulled_back
        block = triton.next_power_of_2(like.d_in)
        self._tile: dict[str, Any] = {
            "ACC": FORMATS[like.encoder.dtype][0],
            "PAIRS": max(1, min(8, TILE // block)),
            "BLOCK": block,
            "num_warps": 4 if block <= 1024 else 8,
        }

    def of_batch(
        self, finder: PairFinder, found: TokenPairs, weights: Weights, acts: Tensor, objective: Objective
    ) -> PairResult:
        """Decode the pairs, send errors back to them, and sum their gradients by latent."""
        pairs = finder.joined(found)
        decoder = finder.gathered(weights.decoder)
        arguments = (pairs.m, pairs.latents, weights.own)
        values, penalties = self._latents_of_pairs(*arguments, objective, weights.d_sae, decoder.dtype)
        decoded = self._decoded(pairs, values, penalties, decoder, weights.b_dec, acts, 1.0)
        n_entries = acts.numel()
        mse = decoded.squares.sum(dtype=torch.float64) / n_entries
        auxiliary = torch.zeros_like(mse)
        upstreams = (decoded.upstream,)
        if (term := objective.auxiliary) is not None:
            # The term's latents are active where the SAE's are, and its decoder is frozen, so it has a gradient on m
            # only.
            of_term = Objective(term.nonlinearity, objective.penalty, 0.0)
            theirs, nothing = self._latents_of_pairs(*arguments, of_term, weights.d_sae, decoder.dtype)
            # The target is x - b_dec. This is the same as adding b_dec to the term's reconstruction and taking x as the
            # target.
            their = self._decoded(pairs, theirs, nothing, decoder, weights.b_dec, acts, term.coeff)
            auxiliary = term.coeff * their.squares.sum(dtype=torch.float64) / n_entries
            upstreams = (decoded.upstream, their.upstream)
        rows, sums, smallest = self._by_latent(finder, pairs, weights, upstreams, decoded.error, objective)
        m_sums, fired, *own_sums = sums
        # The tied bias is added at the output and subtracted at the input.
        vectors = {"b_dec": decoded.error.sum(0) - m_sums @ weights.encoder}
        vectors |= dict(zip(weights.own, own_sums, strict=True))
        # A penalty may be above 0 at f = 0 (Sqrt(L1) is): every kind of step reports the same loss.
        n_inactive = (len(acts) * weights.d_sae - pairs.counts.sum()).double()
        of_pairs = decoded.penalties.sum(dtype=torch.float64)
        penalty = (of_pairs + n_inactive * objective.penalty.at_zero) / len(acts)
        return PairResult(rows, vectors, StepStats(mse, penalty, auxiliary, fired, smallest))

    def _decoded(
        self,
        pairs: Pairs,
        values: Tensor,
        penalties: Tensor,
        decoder: Tensor,
        bias: Tensor,
        target: Tensor,
        coeff: float,
    ) -> _Decoded:
        """Return the error f W_dec + bias - target of each token, scaled by coeff and by the mean, and what follows."""
        batch, d_in = target.shape
        scale = torch.full_like(bias[:1], 2 * coeff / target.numel())
        out = _Decoded(
            error=torch.empty_like(target),
            upstream=torch.empty_like(pairs.m),
            squares=target.new_empty(batch),
            penalties=target.new_empty(batch),
        )
        of_pairs = (pairs.starts, pairs.counts, pairs.latents, values, penalties)
        sizes = (*pairs.places, d_in)
        launch(kernels.decode, batch, *of_pairs, decoder, bias, target, scale, *out, *sizes, **self._tile)
        return out

    def _by_latent(
        self,
        finder: PairFinder,
        pairs: Pairs,
        weights: Weights,
        upstreams: tuple[Tensor, ...],
        error: Tensor,
        objective: Objective,
    ) -> tuple[GradientInputs, Tensor, Tensor]:
        """Sort the pairs by latent, and pull the gradient back to m and the own parameters.

        Returns:
            What the kernels need for the gradients of both matrices; by latent, the sums of `pulled_back`; the smallest
            active latent.
        """
        d_sae = weights.d_sae
        batch, d_in = error.shape
        n_places = len(pairs.m)
        # Stable, so that a latent's pairs stay in order of token and every sum has one order. Places without a pair
        # have a number behind the last latent's, and come last.
        latents, order = torch.sort(pairs.latents, stable=True)
        bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=latents.device)
        by_latent = torch.searchsorted(latents, bounds, out_int32=True)
        tokens, to_m, values, columns, smallest = self._pulled_back(
            pairs.m, upstreams, pairs.tokens, order, latents, weights.own, objective, batch, d_sae, pairs.centred.dtype
        )
        sums = columns.new_empty(len(columns), d_sae)
        sizes = {"COLUMNS": triton.next_power_of_2(len(columns)), "BLOCK": 64, "num_warps": 1}
        launch(kernels.latent_sums, d_sae, by_latent, columns, sums, n_places, d_sae, len(columns), **sizes)
        of_stretches = error.new_empty(n_places // STRETCH, 2, d_in)
        rows = GradientInputs(by_latent, tokens, to_m, values, pairs.centred, finder.gathered(error), of_stretches)
        launch(kernels.partial_rows, len(of_stretches), latents, *rows[1:], d_sae, d_in, STRETCH=STRETCH, **self._tile)
        return rows, sums, smallest

    def latent_rows_(self, rows: GradientInputs, encoder: Tensor, *others: Tensor, update: bool) -> None:
        """Update both matrices, or write their gradients into them."""
        sizes = {"UPDATE": update, "STRETCH": STRETCH, **self._tile}
        launch(kernels.latent_rows, len(encoder), *rows, encoder, *others, encoder.shape[1], **sizes)
