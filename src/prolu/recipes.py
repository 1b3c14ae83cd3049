"""Named studies: functions from the width of the activations to runs and the batch they train on."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from prolu.training import RunConfig


class Recipe(NamedTuple):
    """What a sweep trains."""

    runs: list[RunConfig]
    batch_size: int


DEMO_COEFFS = {
    "relu + l1": (1.0e-3, 1.6e-3, 2.7e-3),
    "prolu_relu + l1": (6.7e-4, 1.2e-3, 2.1e-3),
    "prolu_ste + l1": (6.7e-4, 1.2e-3, 2.1e-3),
    "relu + sqrt_l1": (4.2e-4, 7.5e-4, 1.3e-3),
    "prolu_relu + sqrt_l1": (5.0e-4, 9.2e-4, 1.7e-3),
    "prolu_ste + sqrt_l1": (5.8e-4, 9.2e-4, 1.4e-3),
}
"""Per family, so that the families' ranges of L0 overlap: they respond very differently to one coefficient."""


def demo(d_in: int) -> Recipe:
    """Six families (three nonlinearities, two penalties), minutes on two cores.

    Coefficients are those of width 768, times 768 / d_in: the MSE is a mean over d_in, the penalty a sum.
    """
    base = RunConfig(d_sae=512, n_tokens=5000 * 512, lr=5e-3, warmup_fraction=0.02, lr_floor=0.05)
    runs = []
    for family, coeffs in DEMO_COEFFS.items():
        nonlinearity, penalty = family.split(" + ")
        for coeff in coeffs:
            scaled = float(f"{coeff * 768 / d_in:.3g}")
            runs.append(replace(base, nonlinearity=nonlinearity, penalty=penalty, coeff=scaled))
    return Recipe(runs, batch_size=512)


RECIPES: dict[str, Callable[[int], Recipe]] = {"demo": demo}
"""By the name that `prolu sweep` takes."""


def recipe_named(name: str) -> Callable[[int], Recipe]:
    """The recipe of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
