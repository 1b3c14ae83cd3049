"""Standings in words: how tables on the terminal and the page write values, intervals and probabilities alike."""

import math
from collections.abc import Sequence

from prolu.evaluation.comparison.frontiers import grouped
from prolu.evaluation.comparison.metric_catalog import METRICS
from prolu.evaluation.comparison.standings import Standing

EXPLAINED = (
    "Best is the probability that no family is better, from the same seeds and documents as the intervals of verdicts. "
    "Intervals of values cover the choice of text too, which moves all families alike."
)
"""What the tables of standings say of themselves."""


def shown_value(s: Standing) -> str:
    """Return the value of a standing; a dash if it has none."""
    return "-" if math.isnan(s.value) else _number(s, s.value)


def shown_value_interval(s: Standing) -> str:
    """Return the interval of a value, as in `0.485 to 0.553`; empty if it has none."""
    return f"{_number(s, s.low)} to {_number(s, s.high)}" if math.isfinite(s.low) else ""


def _number(s: Standing, value: float) -> str:
    # Cross-entropies of some nats are compared by differences of thousandths, which three digits would hide.
    metric = METRICS[s.metric]
    return f"{value:.4f}" if metric.unit == "nats" and metric.compared_as == "difference" else f"{value:.3g}"


def shown_p_best(s: Standing) -> str:
    """Return a probability of being best as a whole percentage, as in `97%` or `>99%`; empty if there is none."""
    if math.isnan(s.p_best):
        return ""
    if 0.01 <= s.p_best <= 0.99:
        return f"{s.p_best:.0%}"
    return ">99%" if s.p_best > 0.5 else "<1%"


def shown_rank(s: Standing) -> str:
    """Return the interval of a rank, as in `rank 1 to 3`; empty if there is none."""
    if not s.worst_rank:
        return ""
    return f"rank {s.best_rank}" if s.best_rank == s.worst_rank else f"rank {s.best_rank} to {s.worst_rank}"


def direction(metric: str) -> str:
    """Return which direction of a metric is better, as in `lower is better`; empty if neither is."""
    better = METRICS[metric].better
    return "" if better == "neither" else f"{better} is better"


def tables_by_l0(standings: Sequence[Standing]) -> dict[float, dict[str, list[Standing]]]:
    """Return standings as tables: by L0, then by metric, with the families of each in their order."""
    return {
        l0: {metric: rows for (metric,), rows in grouped(some, lambda s: s.metric).items()}
        for (l0,), some in grouped(standings, lambda s: s.l0).items()
    }
