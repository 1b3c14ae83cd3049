"""One training step of an SAE: gradients of its loss, then a projected Adam update.

Every family of steps gives the same numbers from the same state; `dense.py` defines them.
"""

from prolu.steps.adam import AdamConfig, adam_update_
from prolu.steps.dense import DenseGradients
from prolu.steps.objective import Auxiliary, Objective, StepStats

__all__ = ["AdamConfig", "Auxiliary", "DenseGradients", "Objective", "StepStats", "adam_update_"]
