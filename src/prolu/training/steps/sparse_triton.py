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
from prolu.training.steps.triton_gradients import FORMATS, PairGradients, PairResult
from prolu.training.steps.triton_pairs import PairFinder, launch


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
        self._of_pairs = PairGradients(like)

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
        rows, vectors, stats = self._pair_gradients(*self._of_sae(None), weights, acts.contiguous(), objective)
        gradients = self._gradients
        # The kernel reads no moments and no constants without an update, so any tensor can stand in their place.
        self._of_pairs.latent_rows_(rows, gradients.encoder, gradients.decoder, *[gradients.b_dec] * 5, update=False)
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
        key = None
        if len(acts) == len(self._acts):
            key = graph_key(weights, moments, objective, update.adam)
            acts = self._acts.copy_(acts)
        finder, graphs = self._of_sae(key)
        result = self._pair_gradients(finder, graphs, weights, acts.contiguous(), objective)
        graphs.run("update", partial(self._apply_result_, weights, moments, result))
        # The next replay overwrites the graph's own tensors.
        return StepStats(*(t.clone() for t in result.stats))

    def _of_sae(self, key: Hashable) -> tuple[PairFinder, CudaGraphs]:
        """Return the finder and the graphs of an SAE. SAEs of other L0 need other numbers of places.

        The key None is that of batches for which nothing is captured: shorter ones, and those of which only the
        gradients are asked for.
        """
        if key not in self._of_saes:
            finder = PairFinder(self._like, self._batch_size, self._precision)
            self._of_saes[key] = finder, CudaGraphs(None if key is None else self._pool)
        return self._of_saes[key]

    def _apply_result_(self, weights: Weights, moments: Moments, result: PairResult) -> None:
        """Compute the gradients of both matrices, and update all weights and moments."""
        rows, vectors, _ = result
        first, second = moments
        of_rows = (first.encoder, second.encoder, first.decoder, second.decoder)
        self._of_pairs.latent_rows_(rows, weights.encoder, weights.decoder, *of_rows, self._adam, update=True)
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

    def _pair_gradients(
        self, finder: PairFinder, graphs: CudaGraphs, weights: Weights, acts: Tensor, objective: Objective
    ) -> PairResult:
        """Compute all of a step but the gradients of the two matrices, once more if not all pairs had places."""
        while True:
            if finder.fit():
                graphs.forget()
            graphs.begin()
            found = graphs.run("pairs", partial(finder.find, acts, weights, objective.nonlinearity))
            finder.count(found)
            result = graphs.run("gradients", partial(self._of_pairs.of_batch, finder, found, weights, acts, objective))
            # This waits for the number of pairs. It comes only after the decoding was queued, so that the GPU has work
            # meanwhile.
            if finder.had_places():
                return result
