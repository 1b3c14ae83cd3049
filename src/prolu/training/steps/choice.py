"""Which kind of step a trainer uses: by the density of its own last step, never by the clock."""

import json
import math
from pathlib import Path

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.weights import Weights
from prolu.training.steps.base import Step
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.dense import DenseStep

CROSSOVERS = Path(__file__).parent / "crossovers.json"
"""Measured densities at which dense and sparse take the same time; remade by `make calibrate`."""

HYSTERESIS = 0.1
"""The density must pass the crossover by this share before the step_kind changes."""


class Steps:
    """All families for SAEs of one shape, each made when first needed; trainers may share them."""

    def __init__(self, like: Weights, batch_size: int, precision: str = "fp32", mesh: Mesh = ALONE):
        """Args: weights and batch are a rank's, on a mesh."""
        self._like, self._batch_size, self._precision, self._mesh = like, batch_size, precision, mesh
        self._made: dict[str, Step] = {}

    def __getitem__(self, step_kind: str) -> Step:
        if step_kind not in self._made:
            self._made[step_kind] = self._make(step_kind)
        return self._made[step_kind]

    def _make(self, step_kind: str) -> Step:
        if step_kind == "dense" and (self._like.encoder.device.type == "cuda" or self._precision != "fp32"):
            return CudaStep(self._like, self._batch_size, self._precision, self._mesh)
        if step_kind == "dense":
            return DenseStep(self._like, self._batch_size, self._mesh)
        if step_kind == "sparse" and has_numba() and self._like.encoder.device.type == "cpu":
            from prolu.training.steps.sparse_numba import SparseNumbaStep

            return SparseNumbaStep(self._like, self._batch_size, self._mesh)
        from prolu.training.steps.sparse_torch import SparseTorchStep

        return SparseTorchStep(self._like, self._batch_size, self._mesh)


def has_numba() -> bool:
    """Whether the fast sparse step can be compiled here."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def crossover_density(device: str, d_in: int, d_sae: int) -> float:
    """Share of latents on below which the sparse step is faster, from the nearest shape in the table.

    0 on devices without an entry: always dense there.
    """
    rows = [row for row in json.loads(CROSSOVERS.read_text()) if row["device"] == device]
    if not rows:
        return 0.0
    return min(rows, key=lambda r: abs(math.log(r["d_in"] / d_in)) + abs(math.log(r["d_sae"] / d_sae)))["density"]


def next_step_kind(last: str, density: float, crossover: float) -> str:
    """Dense or sparse for the next step, given the last one and the density it saw."""
    if last == "dense":
        return "sparse" if density < crossover * (1 - HYSTERESIS) else "dense"
    return "dense" if density > crossover * (1 + HYSTERESIS) else "sparse"
