"""The dense step for a GPU: matmuls in tf32 or bf16, the rest fused by torch.compile, an update in one CUDA graph.

Weights and moments stay in fp32 and every matmul accumulates there. m comes out of its matmul in fp32 too, so no gate
flips for want of digits in m's storage. A CPU runs the same code unfused and gives the same numbers, up to the order of
sums: a product of two bf16 numbers is exact in fp32.
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
from prolu.training.steps.adam import AdamConfig, clip_scale, project_
from prolu.training.steps.base import Step
from prolu.training.steps.dense import DenseStep
from prolu.training.steps.objective import Objective, StepStats


class CudaStep(Step):
    """The GPU's step for SAEs of one shape. Trainers share its input buffers and its graphs' memory.

    On a mesh it is neither fused nor captured: sums over ranks lie in between.
    """

    def __init__(self, like: Weights, batch_size: int, precision: str = "fp32", mesh: Mesh = ALONE):
        one_of("precision", precision, PRECISIONS)
        self._precision, self.mesh = precision, mesh
        self._on_gpu = like.encoder.device.type == "cuda" and mesh.n_ranks == 1
        self._gradients = torch.compile(_gradients, dynamic=False) if self._on_gpu else _gradients
        self._update_ = torch.compile(_update_, dynamic=False) if self._on_gpu else _update_
        self._acts = like.encoder.new_empty(batch_size, like.d_in)
        self._rates = like.encoder.new_empty(2)
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, StepStats] | None] = {}
        self._like, self._batch_size = like, batch_size

    @cached_property
    def _reference(self) -> DenseStep:
        """For selections and auxiliary terms; in fp32."""
        return DenseStep(self._like, self._batch_size, self.mesh)

    def gradients(
        self, weights: Weights, acts: Float[Tensor, "batch d_in"], objective: Objective
    ) -> tuple[Weights, StepStats]:
        """Gradients with respect to every weight, and what was seen."""
        if not is_plain(objective):
            return self._reference.gradients(weights, acts, objective)
        with _fp32_matmuls_in(self._precision):
            return self._gradients(weights, acts, objective, self._precision, self.mesh)

    def update_(
        self,
        weights: Weights,
        first: Weights,
        second: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        *,
        n_updates: int,
        lr: float,
        adam: AdamConfig,
    ) -> StepStats:
        """One projected Adam update, in place. A trainer's first one compiles, its second is captured and replayed."""
        bias1, bias2 = 1 - adam.beta1 ** (n_updates + 1), 1 - adam.beta2 ** (n_updates + 1)
        self._rates.copy_(torch.tensor([lr / bias1, bias2**-0.5], dtype=self._rates.dtype))

        def once(x: Tensor) -> StepStats:
            gradients, stats = self.gradients(weights, x, objective)
            self._sum_over_data_(gradients)
            scale = None
            if adam.max_grad_norm is not None:
                project_(gradients.decoder, weights.decoder)
                scale = clip_scale(gradients, adam.max_grad_norm, self.mesh).reciprocal()
            self._update_(weights, gradients, first, second, self._rates, scale, adam)
            return stats

        if not self._on_gpu or len(acts) != len(self._acts) or not is_plain(objective):
            return once(acts)
        self._acts.copy_(acts)
        key = (objective, adam, *(t.data_ptr() for w in (weights, first, second) for t in w.tensors()))
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
        return StepStats(*(t.clone() for t in stats))


def is_plain(objective: Objective) -> bool:
    """Whether what is on is decided entry by entry, and there is no auxiliary term."""
    return objective.auxiliary is None and objective.nonlinearity.selection is None


def _matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """A @ b, accumulated and given back in fp32 (or in fp64, of fp64)."""
    if precision != "bf16":
        return a @ b
    a, b = a.bfloat16(), b.bfloat16()
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _gradients(
    weights: Weights, acts: Tensor, objective: Objective, precision: str, mesh: Mesh = ALONE
) -> tuple[Weights, StepStats]:
    """The dense step's equations on whole matrices."""
    batch, d_in = len(acts) * mesh.n_data, acts.shape[1]
    code, own = objective.nonlinearity, weights.own
    centred = acts - weights.b_dec
    m = _matmul(centred, weights.encoder.T, precision)
    on = code.support(m, own)
    latents = torch.where(on, code.value(m, own), 0)
    recon = mesh.sum_over_latents_(_matmul(latents, weights.decoder, precision), "reconstruction")
    error = recon + weights.b_dec - acts
    mse = error.square().sum(dtype=torch.float64) / (batch * d_in)
    error = error * (2 / (batch * d_in))
    upstream = _matmul(error, weights.decoder.T, precision)
    back, penalty = objective.pull_back(upstream, latents, m, own, batch)
    to_m, nothing = torch.where(on, back.m, 0), torch.zeros_like(m)
    gradients = Weights(
        encoder=_matmul(to_m.T, centred, precision),
        decoder=_matmul(latents.T, error, precision),
        b_dec=error.sum(0) - mesh.sum_over_latents_(to_m.sum(0) @ weights.encoder, "b_dec"),
        own={name: torch.where(on, back.parameters.get(name, nothing), 0).sum(0) for name in own},
    )
    fired = (latents > 0).sum(0, dtype=acts.dtype)
    return gradients, StepStats(mse, penalty / batch, torch.zeros_like(mse), fired, torch.zeros_like(mse))


def _update_(
    weights: Weights,
    gradients: Weights,
    first: Weights,
    second: Weights,
    rates: Tensor,
    scale: Tensor | None,
    adam: AdamConfig,
) -> None:
    """Projection (unless a clip's `scale` says that it is done), Adam, unit rows.

    `rates`, lr / bias 1 and 1 / sqrt(bias 2), is a tensor, so that a captured graph sees it change.
    """
    if scale is None:
        project_(gradients.decoder, weights.decoder)
    state = (w.tensors() for w in (weights, gradients, first, second))
    for p, gradient, m, v in zip(*state, strict=True):
        g = gradient if scale is None else gradient * scale
        m.lerp_(g, 1 - adam.beta1)
        v.lerp_(g * g, 1 - adam.beta2)
        p.sub_(rates[0] * m / (v.sqrt() * rates[1] + adam.eps))
    weights.decoder.div_(torch.linalg.vector_norm(weights.decoder, dim=1, keepdim=True))


@contextmanager
def _fp32_matmuls_in(precision: str) -> Iterator[None]:
    """Lets the GPU's fp32 matmuls use tf32 here and nowhere else."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    flags.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        flags.allow_tf32 = before
