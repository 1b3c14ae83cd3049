"""The dense step for a GPU: matmuls in tf32 or bf16, the rest fused by torch.compile, an update in one CUDA graph.

Weights and moments stay in fp32, and every matmul accumulates in fp32. m comes out of its matmul in fp32 too: whether a
latent is active is decided there, and storing m in bf16 would flip gates. A CPU runs the same code unfused and gives
the same numbers up to the order of sums, because a product of two bf16 numbers is exact in fp32.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.checks import one_of
from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.weights import Weights
from prolu.training.config import PRECISIONS
from prolu.training.moments import Moments
from prolu.training.steps.adam import AdamConfig, Update, clip_scale, project_
from prolu.training.steps.base import Step
from prolu.training.steps.dense import DenseStep
from prolu.training.steps.objective import Objective, StepStats


class CudaStep(Step):
    """The GPU's step for SAEs of one shape. Trainers share its input buffer and the memory of its graphs.

    On a mesh it is neither compiled nor captured, because sums over ranks lie between its matmuls.
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
        self._on_gpu = like.encoder.device.type == "cuda" and mesh.n_ranks == 1
        self._gradients = torch.compile(_gradients, dynamic=False) if self._on_gpu else _gradients
        self._fused_update_ = torch.compile(_fused_update_, dynamic=False) if self._on_gpu else _fused_update_
        # A captured graph reads its inputs where they were when it was captured: so these two never move.
        self._acts = like.encoder.new_empty(batch_size, like.d_in)
        self._rates = like.encoder.new_empty(2)
        # One pool for all graphs: they are never replayed at the same time, so they can share memory.
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, StepStats] | None] = {}

    @cached_property
    def _reference(self) -> DenseStep:
        """The fp32 step that computes what is not plain, so that it need not be written for a GPU again.

        Selections sort a token's or a batch's entries, and the latents of an auxiliary term change from step to step:
        neither fuses, and a captured graph would go on using the latents that it was captured with.
        """
        return DenseStep(self._like, self._batch_size, self.mesh)

    def gradients(
        self, weights: Weights, acts: Float[Tensor, "batch d_in"], objective: Objective
    ) -> tuple[Weights, StepStats]:
        """Return the gradient of the loss with respect to every weight, and statistics of the batch."""
        if not is_plain(objective):
            return self._reference.gradients(weights, acts, objective)
        with _fp32_matmuls_in(self._precision):
            return self._gradients(weights, acts, objective, self._precision, self.mesh)

    def update_(
        self,
        weights: Weights,
        moments: Moments,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        update: Update,
    ) -> StepStats:
        """Make one projected Adam update, in place; return statistics from before it.

        A trainer's first update compiles, its second is captured, and from then on the graph is replayed.
        """
        rates = torch.tensor([update.step_size, update.second_moment_scale], dtype=self._rates.dtype)
        self._rates.copy_(rates)

        def once(x: Tensor) -> StepStats:
            return Step.update_(self, weights, moments, x, objective, update)

        if not self._on_gpu or len(acts) != len(self._acts) or not is_plain(objective):
            return once(acts)
        self._acts.copy_(acts)
        # A graph holds addresses and constants. The objective is among them: a coefficient that changes (a warm-up, an
        # L0 controller) makes a key of its own at every step, so such a step is never replayed.
        tensors = (*weights.tensors(), *moments.tensors())
        key = (objective, update.adam, *(t.data_ptr() for t in tensors))
        if key not in self._graphs:
            self._graphs[key] = None
            return once(self._acts)
        captured = self._graphs[key]
        if captured is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                stats = once(self._acts)
            self._graphs[key] = captured = (graph, stats)
        graph, stats = captured
        graph.replay()
        # The next replay overwrites the graph's own tensors.
        return StepStats(*(t.clone() for t in stats))

    def _apply_(self, weights: Weights, gradients: Weights, moments: Moments, update: Update) -> None:
        adam = update.adam
        scale = None
        if adam.max_grad_norm is not None:
            project_(gradients.decoder, weights.decoder)
            scale = clip_scale(gradients, adam.max_grad_norm, self.mesh).reciprocal()
        # Rates from the tensor that `update_` has filled, and not from `update`: a captured graph would keep a number.
        self._fused_update_(weights, gradients, moments, self._rates, scale, adam)


def is_plain(objective: Objective) -> bool:
    """Return whether each entry alone decides if it is active, and there is no auxiliary term."""
    return objective.auxiliary is None and objective.nonlinearity.selection is None


def _matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Return a @ b, accumulated and returned in fp32 (or in fp64, of fp64)."""
    if precision != "bf16":
        return a @ b
    a = a.bfloat16()
    b = b.bfloat16()
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _gradients(
    weights: Weights, acts: Tensor, objective: Objective, precision: str, mesh: Mesh = ALONE
) -> tuple[Weights, StepStats]:
    """Return gradients and statistics by the equations of the dense step, on whole matrices."""
    batch = len(acts) * mesh.n_data
    d_in = acts.shape[1]
    nonlinearity = objective.nonlinearity
    own = weights.own
    centred = acts - weights.b_dec
    m = _matmul(centred, weights.encoder.T, precision)
    support = nonlinearity.support(m, own)
    latents = torch.where(support, nonlinearity.value(m, own), 0)
    recon = mesh.sum_over_latents_(_matmul(latents, weights.decoder, precision), "reconstruction")
    error = recon + weights.b_dec - acts
    mse = error.square().sum(dtype=torch.float64) / (batch * d_in)
    error = error * (2 / (batch * d_in))
    upstream = _matmul(error, weights.decoder.T, precision)
    back, penalty = objective.pull_back(upstream, latents, m, own, batch)
    # Selected, not multiplied by the mask: 0 * inf would be NaN.
    to_m = torch.where(support, back.m, 0)
    nothing = torch.zeros_like(m)
    gradients = Weights(
        encoder=_matmul(to_m.T, centred, precision),
        decoder=_matmul(latents.T, error, precision),
        b_dec=error.sum(0) - mesh.sum_over_latents_(to_m.sum(0) @ weights.encoder, "b_dec"),
        own={name: torch.where(support, back.parameters.get(name, nothing), 0).sum(0) for name in own},
    )
    fired = (latents > 0).sum(0, dtype=acts.dtype)
    return gradients, StepStats(mse, penalty / batch, torch.zeros_like(mse), fired, torch.zeros_like(mse))


def _fused_update_(
    weights: Weights,
    gradients: Weights,
    moments: Moments,
    rates: Tensor,
    scale: Tensor | None,
    adam: AdamConfig,
) -> None:
    """Project (unless a clip has done it already), apply Adam and renormalise decoder rows, in place.

    Args:
        weights: what is updated.
        gradients: the gradient of each weight.
        moments: Adam's moments, updated too.
        rates: `Update.step_size` and `Update.second_moment_scale`.
        scale: the factor by which a clip scales all gradients; None without a clip.
        adam: Adam's constants.
    """
    if scale is None:
        project_(gradients.decoder, weights.decoder)
    state = (w.tensors() for w in (weights, gradients, moments.first, moments.second))
    for p, gradient, m, v in zip(*state, strict=True):
        g = gradient if scale is None else gradient * scale
        m.lerp_(g, 1 - adam.beta1)
        v.lerp_(g * g, 1 - adam.beta2)
        p.sub_(rates[0] * m / (v.sqrt() * rates[1] + adam.eps))
    weights.decoder.div_(torch.linalg.vector_norm(weights.decoder, dim=1, keepdim=True))


@contextmanager
def _fp32_matmuls_in(precision: str) -> Iterator[None]:
    """Let the GPU's fp32 matmuls use tf32 here and nowhere else: the setting belongs to the whole process."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    flags.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        flags.allow_tf32 = before
