"""Activation functions of an SAE, by name. One of your own, put into a table here, trains like the others.

- `base`: what a nonlinearity is: its support, its value, its pullback, and which latents of a selection are active.
- `relu`: ReLU, and what the nonlinearities share whose latents are m plus a bias.
- `prolu_family`: ProLU with its synthetic gradients, and `prolu` as a function.
- `gated`, `jumprelu`, `topk`: the baselines; BatchTopK is in the last.
- `fixed_threshold`: a JumpReLU with given thresholds, for SAEs of other libraries.
"""

from collections.abc import Callable
from dataclasses import replace

from prolu.sae.calls import form_of, made_by_call
from prolu.sae.choices import TAKES_L0
from prolu.sae.nonlinearities.base import (
    Auxiliary,
    Gather,
    Nonlinearity,
    Parameters,
    Pullback,
    Selection,
    activate,
    active_mask,
    distance,
)
from prolu.sae.nonlinearities.fixed_threshold import Thresholded
from prolu.sae.nonlinearities.gated import Gated
from prolu.sae.nonlinearities.jumprelu import JUMPRELU_STE, JumpReLU
from prolu.sae.nonlinearities.prolu_family import PROLU_RELU, PROLU_STE, GeneralisedProLU, ProLU, heaviside, prolu
from prolu.sae.nonlinearities.relu import ReLU
from prolu.sae.nonlinearities.topk import BatchTopK, TopK

__all__ = [
    "NONLINEARITIES",
    "TAKES_L0",
    "WITH_ARGUMENTS",
    "Auxiliary",
    "BatchTopK",
    "Gated",
    "Gather",
    "GeneralisedProLU",
    "JumpReLU",
    "Nonlinearity",
    "Parameters",
    "ProLU",
    "Pullback",
    "ReLU",
    "Selection",
    "Thresholded",
    "TopK",
    "activate",
    "active_mask",
    "distance",
    "heaviside",
    "nonlinearity_named",
    "prolu",
]

NONLINEARITIES: dict[str, Nonlinearity] = {
    "relu": ReLU(),
    "prolu_relu": PROLU_RELU,
    "prolu_ste": PROLU_STE,
    "gated": Gated(),
    "jumprelu": JumpReLU(),
    "jumprelu_plain": JumpReLU(is_log=False),
    "jumprelu_ste": JUMPRELU_STE,
    "thresholded": Thresholded(),
}
"""The nonlinearities without arguments, by the name that configs and files use."""

WITH_ARGUMENTS: dict[str, Callable[..., Nonlinearity]] = {
    "prolu": lambda b_ste, m_ste, m_gg: GeneralisedProLU(float(b_ste), float(m_ste), float(m_gg)),
    "jumprelu": lambda bandwidth: JumpReLU(float(bandwidth)),
    "jumprelu_plain": lambda bandwidth: JumpReLU(float(bandwidth), is_log=False),
    "jumprelu_ste": lambda bandwidth: replace(JUMPRELU_STE, bandwidth=float(bandwidth)),
    "topk": lambda k: TopK(Selection(int(k))),
    "batchtopk": lambda k: BatchTopK(int(k)),
}
"""The nonlinearities with arguments, which are written in brackets after the name, as in `topk(32)`. Each entry makes
one from its arguments as texts; their names are those that a message shows."""


def nonlinearity_named(name: str) -> Nonlinearity:
    """Return the nonlinearity of a name: one of `NONLINEARITIES`, or of `WITH_ARGUMENTS`, as in `prolu(0.5,1,0)`.

    Raises:
        ValueError: There is none of this name, or its arguments are wrong.
    """
    if name in NONLINEARITIES:
        return NONLINEARITIES[name]
    if name in TAKES_L0:
        raise ValueError(f"nonlinearity {name!r}: give the number of latents, as in {name}(32), or a target_l0")
    if (called := made_by_call("nonlinearity", name, WITH_ARGUMENTS)) is not None:
        return called
    lower = name.lower()
    if lower != name and lower.partition("(")[0] in {*NONLINEARITIES, *WITH_ARGUMENTS}:
        raise ValueError(f"nonlinearity {name!r}: names are in lower case; write {lower}")
    forms = [*NONLINEARITIES, *(form_of(each, WITH_ARGUMENTS) for each in WITH_ARGUMENTS)]
    raise ValueError(f"nonlinearity {name!r}: choose one of {', '.join(forms)}")
