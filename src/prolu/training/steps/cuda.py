"""The dense step for a GPU: the equations of `stacked`, compiled by torch.compile, an update in one CUDA graph.

It trains one SAE, or a stack of SAEs of one shape and family in one update. The CPU never waits for the GPU in a step.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.checks import one_of
from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.nonlinearities import Selection
from prolu.sae.weights import Weights
from prolu.training.choices import PRECISIONS
from prolu.training.moments import Moments
from prolu.training.steps.adam import AdamConfig, Update, clip_scale, project_
from prolu.training.steps.base import Step, gather_of
from prolu.training.steps.cuda_graphs import CudaGraphs
from prolu.training.steps.objective import Objective, StepStats
from prolu.training.steps.stacked import (
    activate,
    among_only,
    compared_by,
    decode_and_send_back,
    encode,
    gradients_of_stack,
    member,
    pull_back,
    stack_of_one,
    update_stack_,
)

MOST_COMPILED = 1024
"""The number of variants of one function that may be compiled: of each family, shape and precision there is one. Beyond
its own limit of 8, torch.compile would run the function uncompiled, with a warning only."""


class CudaStep(Step):
    """The GPU's step for SAEs of one shape. Trainers share its input buffers and the memory of its graphs.

    On a mesh it is neither compiled nor captured, because sums over ranks lie between its matmuls.
    """

    def __init__(self, like: Weights, batch_size: int, precision: str = "fp32", mesh: Mesh = ALONE, *, n_saes: int = 1):
        """Args: see `Steps`; `like` are the weights of one SAE, and `n_saes` is the number of SAEs of a stack.

        Raises:
            ValueError: there is no such precision.
        """
        one_of("precision", precision, PRECISIONS)
        self._precision = precision
        self.mesh = mesh
        self._on_gpu = like.encoder.device.type == "cuda" and mesh.n_ranks == 1
        self._encode = self._compiled(encode)
        self._gradients = self._compiled(gradients_of_stack)
        self._activate = self._compiled(activate)
        self._pull_back = self._compiled(pull_back)
        self._update_ = self._compiled(update_stack_)
        # A captured graph reads its inputs from the addresses at which they were captured, so these buffers never move.
        self._acts = like.encoder.new_empty(batch_size, like.d_in)
        self._target = None if like.b_out is None else like.encoder.new_empty(batch_size, like.d_out)
        self._rates = like.encoder.new_empty(2, n_saes)
        self._coeffs = like.encoder.new_empty(n_saes)
        self._among = torch.zeros(n_saes, like.d_sae, dtype=torch.bool, device=like.encoder.device)
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._graphs: dict[Hashable, CudaGraphs] = {}

    def gradients(
        self,
        weights: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[Weights, StepStats]:
        """Return the gradient of the loss with respect to every weight, and statistics of the batch."""
        gradients, stats = self.gradients_of_stack(stack_of_one(weights), acts, _objective_of_one(objective), target)
        return member(gradients, 0), stats.of_member(0)

    def update_(
        self,
        weights: Weights,
        moments: Moments,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        update: Update,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> StepStats:
        """Make one projected Adam update, in place; return statistics from before it."""
        stack = stack_of_one(weights)
        moments = Moments(*map(stack_of_one, moments))
        return self.update_stack_(stack, moments, acts, _objective_of_one(objective), [update], target).of_member(0)

    def gradients_of_stack(
        self,
        weights: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[Weights, StepStats]:
        """Return the gradients and the statistics of each SAE of a stack; their first dimension is the SAE.

        Args:
            weights: of the stack.
            acts: the batch.
            objective: the loss; its coefficient is a tensor [n_saes], and `among` of its auxiliary term, if that is
                given, is [n_saes, d_sae].
            target: the targets of transcoders; None for SAEs.
        """
        return self._gradients_now(weights, acts, target, self._in_place(objective))

    def update_stack_(
        self,
        weights: Weights,
        moments: Moments,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        updates: Sequence[Update],
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> StepStats:
        """Make one update of each SAE of a stack, in place; return their statistics from before it.

        The updates, one for each SAE, differ in their learning rates only; the objective is as in `gradients_of_stack`.
        A stack's first update compiles, its second is captured, and from then on the graph is replayed. Where prefixes
        are drawn for every batch, no graph is captured, since its shapes would be those of one draw.
        """
        objective = self._in_place(objective)
        rates = [[update.step_size for update in updates], [update.second_moment_scale for update in updates]]
        self._rates.copy_(self._sent(torch.tensor(rates, dtype=self._rates.dtype)), non_blocking=True)
        adam = updates[0].adam
        if self._pool is None or len(acts) != len(self._acts) or objective.prefixes_are_drawn:
            return self._update_now_(weights, moments, acts, target, objective, adam)
        self._acts.copy_(acts)
        if self._target is not None and target is not None:
            self._target.copy_(target)
        graphs = self._graphs.setdefault(graph_key(weights, moments, objective, adam), CudaGraphs(self._pool))
        graphs.begin()
        stats = graphs.run(
            "update", lambda: self._update_now_(weights, moments, self._acts, self._target, objective, adam)
        )
        # The next replay overwrites the graph's own tensors.
        return StepStats(*(t.clone() for t in stats))

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as torch.compile makes it, where there is a GPU."""
        if not self._on_gpu:
            return function
        compiled = torch.compile(function, dynamic=False)

        def call(*arguments: Any) -> Any:
            # This surrounds every call, because past its limit torch.compile never compiles a function again.
            with _compiling():
                return compiled(*arguments)

        return call

    def _in_place(self, objective: Objective) -> Objective:
        """Return the objective with its tensors copied to where a captured graph reads them."""
        assert isinstance(objective.coeff, Tensor)
        self._coeffs.copy_(self._sent(objective.coeff), non_blocking=True)
        term = objective.auxiliary
        if term is not None and term.among is not None:
            self._among.copy_(term.among)
            term = replace(term, among=self._among)
        return replace(objective, coeff=self._coeffs[:, None, None], auxiliary=term)

    def _sent(self, numbers: Tensor) -> Tensor:
        """Return numbers so that copying them to the GPU does not keep the CPU waiting."""
        return numbers.pin_memory() if self._on_gpu and not numbers.is_cuda else numbers

    def _update_now_(
        self,
        weights: Weights,
        moments: Moments,
        acts: Tensor,
        target: Tensor | None,
        objective: Objective,
        adam: AdamConfig,
    ) -> StepStats:
        gradients, stats = self._gradients_now(weights, acts, target, objective)
        self._sum_over_data_(gradients)
        objective.add_weight_terms_(weights, gradients)
        clip = None
        if adam.max_grad_norm is not None:
            project_(gradients.decoder, weights.decoder)
            each = [clip_scale(member(gradients, i), adam, self.mesh) for i in range(len(self._coeffs))]
            clip = torch.stack(each).reciprocal()
        self._update_(weights, gradients, moments, self._rates, clip, adam)
        return stats

    def _gradients_now(
        self, weights: Weights, acts: Tensor, target: Tensor | None, objective: Objective
    ) -> tuple[Weights, StepStats]:
        with _fp32_matmuls_in(self._precision):
            centred, m = self._encode(weights, acts, self._precision)
            bounds = self._bounds(weights, m, objective)
            constants = (self._precision, self.mesh)
            if not objective.prefixes_are_drawn:
                return self._gradients(weights, acts, centred, m, bounds, objective, *constants, target)
            # Each draw has blocks of other sizes, so the code that depends on them is not compiled.
            blocks = objective.blocks(weights.d_sae)
            objective = replace(objective, prefixes=())
            code = self._activate(weights, m, bounds[0], objective)
            decoded = decode_and_send_back(weights, acts, code.latents, blocks, *constants, target)
            return self._pull_back(weights, acts, centred, m, bounds[1], code, decoded, objective, *constants, target)

    def _bounds(self, weights: Weights, m: Tensor, objective: Objective) -> tuple[Tensor | None, Tensor | None]:
        """Return the bound of the objective's selection and that of its auxiliary term's; None where there is none."""
        nonlinearity, term = objective.nonlinearity, objective.auxiliary
        bound = auxiliary_bound = None
        if nonlinearity.selection is not None:
            bound = self._bound(nonlinearity.selection, m, compared_by(nonlinearity, weights.own))
        if term is not None and term.nonlinearity.selection is not None:
            threshold = among_only(compared_by(term.nonlinearity, weights.own), term)
            auxiliary_bound = self._bound(term.nonlinearity.selection, m, threshold)
        return bound, auxiliary_bound

    def _bound(self, selection: Selection, m: Tensor, threshold: Tensor) -> Tensor:
        """Return how far above its threshold an entry must lie to be selected; it broadcasts against m."""
        if self._on_gpu and m.dtype == torch.float32:
            # Imported only when needed: it takes a second, and is missing where there is no GPU.
            from prolu.training.steps.selection_triton import bound_of_batch, bound_of_rows

            if selection.over_batch:
                return bound_of_batch(m, threshold, min(selection.k * m.shape[1], m[0].numel()))
            return bound_of_rows(m, threshold, min(selection.k, m.shape[2]))
        gather = gather_of(self.mesh)
        if selection.over_batch and self.mesh.n_ranks > 1:
            selection = replace(selection, k=selection.k * self.mesh.n_data)
            gather = lambda best: self.mesh.gathered_over_all(best, "selection")  # noqa: E731
        bounds = [selection.bound(each - t, gather) for each, t in zip(m, threshold, strict=True)]
        return torch.stack(bounds).view(len(m), -1, 1)


def graph_key(weights: Weights, moments: Moments, objective: Objective, adam: AdamConfig) -> Hashable:
    """Return what an update's graph depends on: all addresses that differ between SAEs, and all constants."""
    addresses = [t.data_ptr() for t in (*weights.tensors(), *moments.tensors())]
    terms = (objective.auxiliary, objective.prefixes, objective.weight_terms)
    return (objective.nonlinearity, objective.penalty, *terms, adam, *addresses)


def _objective_of_one(objective: Objective) -> Objective:
    """Return the objective of one SAE as that of a stack of one."""
    coeff = torch.as_tensor(objective.coeff, dtype=torch.float64).reshape(1)
    term = objective.auxiliary
    if term is not None and term.among is not None:
        term = replace(term, among=term.among.unsqueeze(0))
    return replace(objective, coeff=coeff, auxiliary=term)


@contextmanager
def _compiling() -> Iterator[None]:
    """Let torch.compile keep enough variants, and not advise tf32 to those who asked for fp32."""
    import torch._dynamo

    limits: dict[str, Any] = {"recompile_limit": MOST_COMPILED, "accumulated_recompile_limit": MOST_COMPILED}
    with torch._dynamo.config.patch(limits), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        yield


@contextmanager
def _fp32_matmuls_in(precision: str) -> Iterator[None]:
    """Within the block, let fp32 matmuls on a GPU round their inputs to tf32 if `precision` is tf32, else not.

    PyTorch has one such setting for the whole process, so it is put back afterwards.
    """
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    flags.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        flags.allow_tf32 = before
