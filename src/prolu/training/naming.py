"""The names of runs and of the families that comparisons put them in, made from their settings."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prolu.sae.choices import TAKES_L0, TAKES_TARGET
from prolu.training.choices import FROZEN

# The config takes its name from here.
if TYPE_CHECKING:
    from prolu.training.config import RunConfig


def run_name(config: "RunConfig") -> str:
    """Return the name of a run's folder.

    It is made from the settings in which the runs of a study usually differ, and those that `config.named` lists.
    """
    family = [_in_a_name(name) for name in (config.nonlinearity, config.resolved_penalty)]
    sparsity = f"{config.coeff:.4g}" if config.target_l0 is None else f"L{config.target_l0:g}"
    seed = f"s{config.init_seed}"
    start = [f"from{config.init_digest[:8]}"] if config.init_digest else []
    frozen = [] if config.freeze == "none" else [f"frozen_{config.freeze}"]
    skip = ["skip"] if config.skip else []
    size = [f"lr{config.lr:.4g}", f"d{config.d_sae}"]
    nested = ["nested" + ".".join(map(str, config.matryoshka))] if config.matryoshka else []
    nested += [f"drawn{config.matryoshka_drawn}"] if config.matryoshka_drawn else []
    refitted = ["refit"] if config.refit_tokens else []
    others = [f"{name}_{_in_a_name(getattr(config, name))}" for name in config.named]
    return "-".join([*family, sparsity, *size, seed, *nested, *skip, *start, *frozen, *refitted, *others])


def family_of(settings: Mapping[str, Any]) -> str:
    """Return the name of a family, as in "prolu_relu + sqrt_l1".

    The name of topk and batchtopk is without their k, since runs of one family differ in it.

    Args:
        settings: the settings of a run as `RunConfig.describe` records them, or a line of results, which has them.
            Those that are missing or None are taken for the usual ones; of an SAE that was trained elsewhere not all
            are known.
    """
    nonlinearity = settings["nonlinearity"]
    penalty = settings["penalty"]
    freeze = settings.get("freeze") or "none"
    name = nonlinearity.partition("(")[0]
    shown = name if name in TAKES_L0 else nonlinearity
    if penalty is not None and (base := penalty.partition("(")[0]) in TAKES_TARGET:
        penalty = base
    family = shown if penalty in ("none", None) else f"{shown} + {penalty}"
    family += ", matryoshka" if settings.get("matryoshka") else ""
    family += ", drawn matryoshka" if settings.get("matryoshka_drawn") else ""
    # A later version may have written a choice that this one does not know.
    family += FROZEN.get(freeze, f", {freeze} frozen")
    family += ", skip" if settings.get("skip") else ""
    family += ", refitted" if settings.get("refit_tokens") else ""
    return f"{family}, fine-tuned" if settings.get("init_digest") is not None else family


def _in_a_name(value: Any) -> str:
    """Return a value as the name of a folder may hold it."""
    return re.sub(r"[^\w.+-]+", "_", f"{value:g}" if isinstance(value, float) else str(value)).strip("_")
