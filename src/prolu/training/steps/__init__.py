"""One training step of an SAE: gradients of its loss, then a projected Adam update.

Every family of steps gives the same numbers from the same state; `dense.py` defines them.
"""

from prolu.training.steps.adam import AdamConfig, adam_update_
from prolu.training.steps.choice import Steps, crossover_density, next_step_kind
from prolu.training.steps.dense import DenseStep
from prolu.training.steps.objective import Objective, StepStats

__all__ = [
    "AdamConfig",
    "DenseStep",
    "Objective",
    "StepStats",
    "Steps",
    "adam_update_",
    "crossover_density",
    "next_step_kind",
]
