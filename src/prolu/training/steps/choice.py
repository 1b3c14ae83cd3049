"""Which kind of step a trainer uses: it follows from the density of its own last step, never from the clock."""

import json
import math
from pathlib import Path

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.weights import Weights
from prolu.training.choices import STEP_KINDS
from prolu.training.steps.base import Step
from prolu.training.steps.cpu_bf16 import Bf16Step
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.dense import DenseStep

CROSSOVERS = Path(__file__).parent / "crossovers.json"
"""Measured densities at which dense and sparse steps take the same time; `make calibrate` measures them again. A table,
because a run that timed itself would not be the same run twice."""

HYSTERESIS = 0.1
"""The fraction of the crossover by which the density must pass it before the kind of step changes: two kinds differ in
rounding, and a run whose density lies at the crossover shall not change between them at every step."""


class Steps:
    """The training steps for SAEs of one shape, by kind, such as `steps["sparse"]`.

    A step is made when it is first asked for. Trainers of SAEs of this shape may share one such object, and so the
    buffers of its steps.
    """

    def __init__(self, like: Weights, batch_size: int, precision: str = "fp32", mesh: Mesh = ALONE):
        """Args:
        like: weights of the shape that is trained; on a mesh, a rank's.
        batch_size: the largest number of tokens per step; on a mesh, a rank's.
        precision: that of the inputs of matmuls: fp32, tf32 or bf16.
        mesh: the ranks that share one SAE and one batch.
        """
        self._like = like
        self._batch_size = batch_size
        self._precision = precision
        self._mesh = mesh
        self._made: dict[str, Step] = {}

    def __getitem__(self, step_kind: str) -> Step:
        """Return the step of a kind.

        Raises:
            ValueError: there is no such kind.
        """
        check_step_kind(step_kind)
        if step_kind not in self._made:
            step = self._make(step_kind)
            on_cpu = self._like.encoder.device.type == "cpu"
            self._made[step_kind] = Bf16Step(step) if on_cpu and self._precision == "bf16" else step
        return self._made[step_kind]

    def _make(self, step_kind: str) -> Step:
        on_cpu = self._like.encoder.device.type == "cpu"
        if step_kind == "dense" and (not on_cpu or self._precision == "tf32"):
            return CudaStep(self._like, self._batch_size, self._precision, self._mesh)
        if step_kind == "dense":
            return DenseStep(self._like, self._batch_size, self._mesh)
        # Imported only when needed: numba takes a second to import, and may be missing.
        if step_kind == "sparse" and has_numba() and on_cpu:
            from prolu.training.steps.compilation import show_compilation
            from prolu.training.steps.sparse_numba import SparseNumbaStep

            show_compilation()
            return SparseNumbaStep(self._like, self._batch_size, self._mesh)
        from prolu.training.steps.sparse_torch import SparseTorchStep

        return SparseTorchStep(self._like, self._batch_size, self._mesh)


def check_step_kind(step_kind: str) -> None:
    """Raise ValueError if there is no such kind of step."""
    if step_kind not in STEP_KINDS:
        raise ValueError(f"step {step_kind!r}: must be one of {', '.join(STEP_KINDS)}")


def has_numba() -> bool:
    """Return whether the fast sparse step can be compiled here."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def crossover_density(device: str, d_in: int, d_sae: int, precision: str = "fp32") -> float:
    """Return the density, as a fraction of active latents, below which the sparse step is faster.

    It is that of the nearest shape in the table; 0 for devices and precisions without an entry, where every step is
    dense. In bf16 it is lower, because the dense step gains five faster matrix products and the sparse step one.
    """
    table = json.loads(CROSSOVERS.read_text())
    rows = [row for row in table if (row["device"], row["precision"]) == (device, precision)]
    if not rows:
        return 0.0

    def distance(row: dict) -> float:
        """Return how far a shape lies from the one asked for, in factors."""
        return abs(math.log(row["d_in"] / d_in)) + abs(math.log(row["d_sae"] / d_sae))

    return min(rows, key=distance)["density"]


def next_step_kind(last: str, density: float, crossover: float) -> str:
    """Return dense or sparse for the next step, given the kind of the last one and the density that it saw."""
    if last == "dense":
        return "sparse" if density < crossover * (1 - HYSTERESIS) else "dense"
    return "dense" if density > crossover * (1 + HYSTERESIS) else "sparse"
