"""Matrix products of bf16 numbers on a CPU, for steps that are written for fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.sae.weights import Weights
from prolu.training.moments import Moments
from prolu.training.steps.adam import Update
from prolu.training.steps.base import Step
from prolu.training.steps.objective import Objective, StepStats


class Bf16Step(Step):
    """A CPU's step whose matrix products round their inputs to bf16 and add up in fp32.

    That is what a GPU's step does in bf16. It is faster on CPUs that multiply bf16 numbers by themselves (AMX or
    AVX512-BF16); on others the products stay in fp32. A sparse step has one such product, the encoder's, and its sums
    over pairs stay in fp32 too.
    """

    def __init__(self, step: Step):
        """Args: the step in fp32."""
        self.mesh = step.mesh
        self._step = step

    def gradients(
        self,
        weights: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[Weights, StepStats]:
        """Return the gradient of the loss with respect to every weight, and statistics of the batch."""
        with bf16_products():
            return self._step.gradients(weights, acts, objective, target)

    def update_(
        self,
        weights: Weights,
        moments: Moments,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        update: Update,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> StepStats:
        """Make one training update, in place; return statistics from before it."""
        with bf16_products():
            return self._step.update_(weights, moments, acts, objective, update, target)


@contextmanager
def bf16_products() -> Iterator[None]:
    """Within the block, let fp32 matrix products on a CPU round their inputs to bf16.

    PyTorch has one such setting for the whole process, so it is put back afterwards.
    """
    flags = getattr(torch.backends.mkldnn, "matmul", None)
    if flags is None:  # PyTorch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    before = flags.fp32_precision
    flags.fp32_precision = "bf16"
    try:
        yield
    finally:
        flags.fp32_precision = before
