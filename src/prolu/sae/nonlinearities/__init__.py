"""Activation functions of an SAE, by name. One of your own, put into a table here, trains like the others."""

import re
from collections.abc import Callable

from prolu.sae.nonlinearities.base import (
    Auxiliary,
    Nonlinearity,
    Parameters,
    Pullback,
    Selection,
    activate,
    distance,
    on,
)
from prolu.sae.nonlinearities.fixed_threshold import Thresholded
from prolu.sae.nonlinearities.gated import Gated
from prolu.sae.nonlinearities.jumprelu import JumpReLU
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
    "distance",
    "heaviside",
    "nonlinearity_named",
    "on",
    "prolu",
]

NONLINEARITIES: dict[str, Nonlinearity] = {
    "relu": ReLU(),
    "prolu_relu": PROLU_RELU,
    "prolu_ste": PROLU_STE,
    "gated": Gated(),
    "jumprelu": JumpReLU(),
    "thresholded": Thresholded(),
}
"""By the name that configs and files use."""

WITH_ARGUMENTS: dict[str, Callable[..., Nonlinearity]] = {
    "prolu": lambda b_ste, m_ste, m_gg: GeneralisedProLU(float(b_ste), float(m_ste), float(m_gg)),
    "jumprelu": lambda bandwidth: JumpReLU(float(bandwidth)),
    "topk": lambda k: TopK(Selection(int(k))),
    "batchtopk": lambda k: BatchTopK(Selection(int(k)).k),
}
"""By the name before the brackets: `prolu(b_ste,m_ste,m_gg)`, `jumprelu(bandwidth)`, `topk(k)`, `batchtopk(k)`."""

TAKES_L0 = ("topk", "batchtopk")
"""Families whose one argument is the L0 that is asked for."""

CALL = re.compile(r"(\w+)\(([^()]*)\)")

CHOICES = f"{', '.join(NONLINEARITIES)}, prolu(b_ste,m_ste,m_gg), jumprelu(bandwidth), topk(k) or batchtopk(k)"


def nonlinearity_named(name: str) -> Nonlinearity:
    """The nonlinearity of that name: of `NONLINEARITIES`, or of `WITH_ARGUMENTS` as in `prolu(0.5,1,0)`, `topk(32)`.

    Raises:
        ValueError: there is none.
    """
    if name in NONLINEARITIES:
        return NONLINEARITIES[name]
    if name in TAKES_L0:
        raise ValueError(f"nonlinearity {name!r}: say how many latents, as in {name}(32), or give a target_l0")
    written = CALL.fullmatch(name)
    if written and written[1] in WITH_ARGUMENTS:
        try:
            return WITH_ARGUMENTS[written[1]](*written[2].split(","))
        except (ValueError, TypeError) as problem:
            reason = problem if isinstance(problem, ValueError) else "another number of arguments"
            raise ValueError(f"nonlinearity {name!r}: {reason}") from None
    raise ValueError(f"nonlinearity {name!r}: choose one of {CHOICES}")
