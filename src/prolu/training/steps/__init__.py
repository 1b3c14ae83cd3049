"""One training step of an SAE: gradients of its loss, then a projected Adam update.

All kinds of steps give the same numbers from the same state, up to rounding; `dense` defines them.

- `objective`: the loss that a step minimises, and the statistics that it reports.
- `base`: the interface of a step, and the update that all steps share.
- `adam`: the projected Adam update.
- `dense`: the reference, in plain torch on whole matrices.
- `sparse_torch`: the exactly sparse step in plain torch; a second reference.
- `sparse_numba`: the fast sparse step on a CPU; `pair_finder` finds its pairs, `latent_sorter` sorts them by latent.
- `numba_pairs`, `numba_rows`, `numba_threads`: the kernels of these three, and on how many threads they run.
- `cpu_bf16`: the steps on a CPU with matrix products of bf16 numbers.
- `compilation`: shows on the terminal that kernels are being compiled.
- `jit`: how kernels are compiled, and where they are kept.
- `stacked`: the dense step's equations on whole matrices, for several SAEs of one shape and family at once.
- `cuda`: these equations on a GPU, compiled and captured in a graph; `cuda_graphs` captures and replays.
- `selection_triton`: the k-th largest entry on a GPU, for TopK and BatchTopK.
- `sparse_triton`: the sparse step on a GPU; `triton_pairs` finds its pairs, `triton_gradients` decodes them and sums
  their gradients, `pair_functions` has what the nonlinearity and the penalty compute on them.
- `triton_kernels`: the kernels of these.
- `choice`, `crossovers.json`: which kind of step is used when.
"""

from prolu.training.steps.adam import AdamConfig, Update, adam_update_
from prolu.training.steps.choice import Steps, check_step_kind, crossover_density, next_step_kind
from prolu.training.steps.dense import DenseStep
from prolu.training.steps.objective import Objective, StepStats

__all__ = [
    "AdamConfig",
    "DenseStep",
    "Objective",
    "StepStats",
    "Steps",
    "Update",
    "adam_update_",
    "check_step_kind",
    "crossover_density",
    "next_step_kind",
]
