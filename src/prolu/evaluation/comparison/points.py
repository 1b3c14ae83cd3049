"""A family's runs in numbers: points of a figure, each a mean over seeds, and the area that a frontier covers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from prolu.evaluation.comparison.frontiers import (
    Record,
    budget,
    family,
    grouped,
    hook_of,
    pareto_mask,
    replicate,
    setting,
    setting_value,
    study_of,
)
from prolu.evaluation.comparison.intervals import Mean, mean_over_seeds
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, main_metric


class Point(NamedTuple):
    """The runs of one setting of a family, which differ in their init seed only, as one point in a plane."""

    family: str
    setting: float | None
    """The target L0 if there was one, otherwise the coefficient."""
    d_sae: int | None
    n_tokens: int | None
    study: str
    """The name of the study; empty for a single study."""
    x: float
    """The mean over init seeds of the figure on the horizontal axis."""
    y: float
    """The mean over init seeds of the figure on the vertical axis."""
    x_half_width: float
    """Half the width of the 95% t interval of x; nan with one seed."""
    y_half_width: float
    """Half the width of the 95% t interval of y; nan with one seed."""
    n_seeds: int
    run_ids: tuple[str, ...]
    converged: bool
    """Whether all its runs have converged."""
    hook: str = ""
    """The hook, where studies at several hooks are shown together; empty otherwise."""


def points(records: Sequence[Record], x: str = "l0", y: str = "degradation") -> list[Point]:
    """Return one point per family and setting: the means of two figures over init seeds, with 95% t intervals.

    Two runs count as two seeds of one setting if they differ in `init_seed` and in no other setting. Runs that have
    not converged are included, and their points marked.

    Args:
        records: the runs, as in `Results.records`.
        x: the figure on the horizontal axis, by its name in results.jsonl.
        y: the figure on the vertical axis, likewise.
    """
    found = [_point(name, runs, x, y) for (name, _), runs in grouped(records, family, setting).items()]
    return sorted(found, key=lambda point: (point.family, point.study, point.x))


def _point(name: str, runs: Sequence[Record], x: str, y: str) -> Point:
    first = runs[0]
    xs = mean_over_seeds([run[x] for run in runs])
    ys = mean_over_seeds([run[y] for run in runs])
    return Point(
        family=name,
        setting=setting_value(first),
        d_sae=first.get("d_sae"),
        n_tokens=first.get("n_tokens"),
        study=study_of(first),
        x=xs.mean,
        y=ys.mean,
        x_half_width=xs.half_width,
        y_half_width=ys.half_width,
        n_seeds=len(runs),
        run_ids=tuple(run["run_id"] for run in runs),
        converged=all(run["converged"] for run in runs),
        hook=hook_of(first),
    )


def hypervolume(
    records: Sequence[Record], reference: tuple[float, float], *, unconverged: bool = True, y: str = CE_INCREASE
) -> dict[str, Mean]:
    """Return, for each family, the area in the plane of log L0 and CE increase that its runs beat.

    The area is bounded by the reference point; larger is better. It is in units of nats, for log L0 has none. Only runs
    of the largest training budget count, since a longer training beats a better family.

    Args:
        records: the runs. Those of several studies come from `pool`, so that each has its stream seed.
        reference: L0 and CE increase of a point that is worse than all that is to count; runs beyond it add nothing.
        unconverged: whether runs that have not converged are used too.
        y: the metric that takes the place of the CE increase, by its name in results.jsonl.

    Raises:
        ValueError: the reference's L0 is not above 0.
    """
    if reference[0] <= 0:
        raise ValueError(f"reference L0 {reference[0]}: must be above 0")
    longest = max((n for r in records if (n := budget(r)) is not None), default=None)
    of_budget = [r for r in records if budget(r) in (longest, None)]
    used = [r for r in of_budget if (r["converged"] or unconverged) and r["l0"] > 0]
    areas: dict[str, list[float]] = {}
    # An area per replicate, then their mean: the frontier of all seeds together would grow with their number.
    for (name, _), runs in grouped(used, family, replicate).items():
        areas.setdefault(name, []).append(_area(runs, y, math.log(reference[0]), reference[1]))
    return {name: mean_over_seeds(by_seed) for name, by_seed in areas.items()}


def _area(runs: Sequence[Record], y_name: str, worst_x: float, worst_y: float) -> float:
    """Return the area between the runs' staircase-shaped frontier and the point (worst_x, worst_y)."""
    inside = [(math.log(r["l0"]), r[y_name]) for r in runs]
    inside = [(x, y) for x, y in inside if x < worst_x and y < worst_y]
    mask = pareto_mask([x for x, _ in inside], [y for _, y in inside])
    best = sorted({point for point, is_best in zip(inside, mask, strict=True) if is_best})
    if not best:
        return 0.0
    # The height of a step is worst_y minus the lowest CE increase so far, and the step extends to the next run.
    right_edges = [x for x, _ in best[1:]] + [worst_x]
    return float(sum((right - x) * (worst_y - y) for (x, y), right in zip(best, right_edges, strict=True)))


class FamilySummary(NamedTuple):
    """How many runs a family has, over which range of L0, and how good its frontier is."""

    family: str
    """The name of the family."""
    n_runs: int
    """The number of its runs."""
    n_converged: int
    """The number of those that have converged."""
    l0_range: tuple[float, float]
    """The least and the greatest L0 of all its runs."""
    hypervolume: Mean | None
    """The hypervolume of its runs of the largest training budget; None if there are none."""


def summaries(records: Sequence[Record]) -> tuple[tuple[float, float], list[FamilySummary]]:
    """Return the reference point of the hypervolumes, and a summary of each family.

    The reference point has the greatest L0 and the greatest CE increase of any run. Where no run was scored in a
    language model, the FVU takes the place of the CE increase.
    """
    metric = main_metric(records)
    reference = (max(r["l0"] for r in records), max(r[metric] for r in records))
    volumes = hypervolume(records, reference, y=metric) if reference[0] > 0 else {}
    found = []
    for (name,), runs in grouped(records, family).items():
        l0s = [r["l0"] for r in runs]
        n_converged = sum(bool(r["converged"]) for r in runs)
        found.append(FamilySummary(name, len(runs), n_converged, (min(l0s), max(l0s)), volumes.get(name)))
    return reference, found
