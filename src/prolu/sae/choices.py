"""Names that configs choose from, in a file without PyTorch: the command line needs them for its help."""

from typing import Literal, get_args

Normalisation = Literal["per_token", "none"]
"""How activations are scaled before an SAE sees them."""
NORMALISATIONS = get_args(Normalisation)

TAKES_L0 = ("topk", "batchtopk")
"""The nonlinearities whose one argument is the L0 that is asked for, so that a target L0 needs no controller."""

TAKES_TARGET = ("quadratic_l0", "quadratic_tanh")
"""The penalties whose one argument is the L0 that is asked for."""
