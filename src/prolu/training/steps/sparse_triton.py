"""The exactly sparse step on a GPU (Triton): one dense matmul, then only pairs on the support.

    m = (x - b_dec) W_enc                                    the only matmul
    pairs (token, latent) on the support, by token           `compact`, `join`: m is read once
    error and its product with each pair's decoder row       `decode`: one program per token
    pairs by latent                                          a stable sort
    nonlinearity and penalty, forward and back               their own functions, on arrays of pairs
    both weight gradients of a latent, then its update       `latent_rows`: one program per latent

Like the sparse step on a CPU, this file does not know what the nonlinearity or the penalty is. In bf16, the inputs of
the encoder's matmul, the rows that are gathered, and the numbers that multiply gathered rows are rounded. Sums, m,
weights, moments, and the error where it meets decoder rows are in fp32.

**How many pairs there are** is known on the GPU only. Arrays of pairs have a fixed number of places, which follows from
the SAE's batches before. While the GPU decodes, the host reads how many pairs the batch had. If they did not fit, the
arrays grow and the batch is computed again: nothing has been updated yet. So no pair is ever left out, the numbers do
not depend on the number of places, and the GPU never waits for the host, as the host reads a number that is there long
before the GPU is done with what it was given.

**An update is three graphs** (`cuda_graphs`), since starting some thirty kernels one by one takes longer than they run:
one up to the number of pairs, one up to the gradients, and the update itself. They are captured anew when the number
of places changes.

**Every sum has one order**: no kernel adds to what another program writes. The same batch gives the same bits.

Memory in numbers of 4 bytes, with F = d_sae, d = d_in, B = batch, n = places for pairs: 6 F d (weights and Adam) +
B F (m) + 2 B d (centred input and error) + about 20 n + 2 n d / 128 (sums of stretches) + in bf16 F d (rounded rows).
"""

from collections.abc import Hashable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.checks import one_of
from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.weights import Weights
from prolu.training.choices import PRECISIONS
from prolu.training.moments import Moments
from prolu.training.steps import triton_kernels as kernels
from prolu.training.steps.adam import Update
from prolu.training.steps.base import Step
from prolu.training.steps.cuda import CudaStep, graph_key
from prolu.training.steps.cuda_graphs import CudaGraphs
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


class _GradientInputs(NamedTuple):
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


class _Result(NamedTuple):
    """All of a step but the gradients of the two matrices."""

    rows: _GradientInputs
    """What the kernels need for these two."""
    vectors: dict[str, Tensor]
    """The gradients of b_dec and of the own parameters, by name."""
    stats: StepStats
    """Statistics of the batch."""


class SparseTritonStep(Step):
    """The GPU's sparse step for SAEs of one shape.

    The GPU's dense step takes its place for what it cannot compute: auxiliary terms whose pairs are not the SAE's or
    that train the decoder (AuxK is both), transcoders, and a mesh of several ranks.
    """

    def __init__(self, like: Weights, batch_size: int, precision: str = "fp32", mesh: Mesh = ALONE):
        """Args: see `Steps`.

        Raises:
            ValueError: there is no such precision.
        """
        one_of("precision", precision, PRECISIONS)
        self._like = like
        self._batch_size = batch_size
        self._precision = precision
        self.mesh = mesh
        on_gpu = like.encoder.device.type == "cuda"
        self._on_gpu = on_gpu
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._of_saes: dict[Hashable, tuple[PairFinder, CudaGraphs]] = {}
        # A captured graph reads its inputs from the addresses at which they were captured, so these buffers never move.
        self._acts = like.encoder.new_empty(batch_size, like.d_in)
        self._coeff = like.encoder.new_empty(())
        self._adam = like.encoder.new_empty(len(Update(0, 0.0).constants(np.dtype(np.float64))))
        self._latents_of_pairs = fused(latents_of_pairs) if on_gpu else latents_of_pairs
        self._pulled_back = fused(pulled_back) if on_gpu else pulled_back
        block = triton.next_power_of_2(like.d_in)
        self._tile: dict[str, Any] = {
            "ACC": FORMATS[like.encoder.dtype][0],
            "PAIRS": max(1, min(8, TILE // block)),
            "BLOCK": block,
            "num_warps": 4 if block <= 1024 else 8,
        }

    @cached_property
    def _gradients(self) -> Weights:
        """Buffers for gradients, made when first asked for: the fused update does without."""
        return self._like.zeros_like()

    @cached_property
    def _dense(self) -> CudaStep:
        """The step that computes what this one does not."""
        return CudaStep(self._like, self._batch_size, self._precision, self.mesh)

    def gradients(
        self,
        weights: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[Weights, StepStats]:
        """Return gradients, written out into the step's own buffers, and statistics of the batch."""
        if not self._is_mine(objective):
            return self._dense.gradients(weights, acts, objective, target)
        finder, _ = self._of_sae(None)
        rows, vectors, stats = self._pair_gradients(finder, CudaGraphs(None), weights, acts.contiguous(), objective)
        gradients = self._gradients
        # The kernel reads no moments and no constants without an update, so any tensor can stand in their place.
        self._latent_rows_(rows, gradients.encoder, gradients.decoder, *[gradients.b_dec] * 5, update=False)
        gradients.b_dec.copy_(vectors["b_dec"])
        for name, gradient in gradients.own.items():
            gradient.copy_(vectors[name])
        return gradients, stats

    def update_(
        self,
        weights: Weights,
        moments: Moments,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        update: Update,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> StepStats:
        """Make one projected Adam update, in place; return statistics from before it.

        No gradient matrix is made, unless it is needed whole, for a clip, which takes the norm of all gradients.
        """
        if not self._is_mine(objective):
            return self._dense.update_(weights, moments, acts, objective, update, target)
        if update.adam.max_grad_norm is not None:
            return super().update_(weights, moments, acts, objective, update)
        constants = torch.from_numpy(update.constants(np.dtype(FORMATS[weights.encoder.dtype][1])))
        # From pinned memory, so that the host does not wait until the GPU has come here.
        self._adam.copy_(constants.pin_memory() if self._on_gpu else constants, non_blocking=True)
        if isinstance(objective.coeff, Tensor):
            self._coeff.copy_(objective.coeff.reshape(()))
        else:
            self._coeff.fill_(objective.coeff)
        objective = replace(objective, coeff=self._coeff)
        finder, graphs = self._of_sae(graph_key(weights, moments, objective, update.adam))
        if len(acts) == len(self._acts):
            acts = self._acts.copy_(acts)
        else:
            graphs = CudaGraphs(None)
        result = self._pair_gradients(finder, graphs, weights, acts.contiguous(), objective)
        graphs.run("update", partial(self._apply_result_, weights, moments, result))
        # The next replay overwrites the graph's own tensors.
        return StepStats(*(t.clone() for t in result.stats))

    def _of_sae(self, key: Hashable) -> tuple[PairFinder, CudaGraphs]:
        """Return the finder and the graphs of an SAE; the key None is that of all whose gradients alone are asked for.

        SAEs of other L0 need other numbers of places, so each has its own.
        """
        if key not in self._of_saes:
            finder = PairFinder(self._like, self._batch_size, self._precision)
            self._of_saes[key] = finder, CudaGraphs(self._pool)
        return self._of_saes[key]

    def _apply_result_(self, weights: Weights, moments: Moments, result: _Result) -> None:
        """Compute the gradients of both matrices, and update all weights and moments."""
        rows, vectors, _ = result
        first, second = moments
        of_rows = (first.encoder, second.encoder, first.decoder, second.decoder)
        self._latent_rows_(rows, weights.encoder, weights.decoder, *of_rows, self._adam, update=True)
        trained = [(weights.b_dec, vectors["b_dec"], first.b_dec, second.b_dec)]
        trained += [(p, vectors[name], first.own[name], second.own[name]) for name, p in weights.own.items()]
        for vector in trained:
            n = len(vector[0])
            launch(kernels.adam_vector, triton.cdiv(n, 1024), *vector, self._adam, n, BLOCK=1024)

    def _is_mine(self, objective: Objective) -> bool:
        term = objective.auxiliary
        of_whole = objective.prefixes or objective.weight_terms or objective.penalty.is_of_means
        if self._like.b_out is not None or of_whole:
            return False
        if term is None:
            return self.mesh.n_ranks == 1
        of_same_pairs = not term.of_dead and term.target == "centred_target"
        return self.mesh.n_ranks == 1 and of_same_pairs and not term.trains_decoder

    def _latent_rows_(self, rows: _GradientInputs, encoder: Tensor, *others: Tensor, update: bool) -> None:
        """Update both matrices, or write their gradients into them."""
        sizes = {"UPDATE": update, "STRETCH": STRETCH, **self._tile}
        launch(kernels.latent_rows, len(encoder), *rows, encoder, *others, encoder.shape[1], **sizes)

    def _pair_gradients(
        self, finder: PairFinder, graphs: CudaGraphs, weights: Weights, acts: Tensor, objective: Objective
    ) -> _Result:
        """Compute all of a step but the gradients of the two matrices, once more if not all pairs had places."""
        while True:
            if finder.fit():
                graphs.forget()
            graphs.begin()
            found = graphs.run("pairs", partial(finder.find, acts, weights, objective.nonlinearity))
            finder.count(found)
            result = graphs.run("gradients", partial(self._of_pairs, finder, found, weights, acts, objective))
            # This waits for the number of pairs. It comes only after the decoding was queued, so that the GPU has work
            # meanwhile.
            if finder.had_places():
                return result

    def _of_pairs(
        self, finder: PairFinder, found: TokenPairs, weights: Weights, acts: Tensor, objective: Objective
    ) -> _Result:
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
        return _Result(rows, vectors, StepStats(mse, penalty, auxiliary, fired, smallest))

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
    ) -> tuple[_GradientInputs, Tensor, Tensor]:
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
        rows = _GradientInputs(by_latent, tokens, to_m, values, pairs.centred, finder.gathered(error), of_stretches)
        launch(kernels.partial_rows, len(of_stretches), latents, *rows[1:], d_sae, d_in, STRETCH=STRETCH, **self._tile)
        return rows, sums, smallest
