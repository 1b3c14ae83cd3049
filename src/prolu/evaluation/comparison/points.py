"""Means over seeds with their intervals, and the hypervolume of a family of runs."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from prolu.evaluation.comparison.frontiers import Record, by_setting, family, pareto_mask

LEVEL = 0.95
"""Of every interval; of each alone, not of all at once."""


class Mean(NamedTuple):
    """A mean over init seeds."""

    mean: float
    half_width: float
    """Of the 95% t interval; nan with one seed."""
    n_seeds: int


class Point(NamedTuple):
    """The runs of one family that differ by init seed only."""

    family: str
    setting: float | None
    """The L0 asked for if one was, else the coefficient."""
    d_sae: int | None
    n_tokens: int | None
    study: str
    """Empty for a single study."""
    x: float
    y: float
    """Means over init seeds of the two figures asked for."""
    x_half_width: float
    y_half_width: float
    """Of their 95% t intervals; nan with one seed."""
    n_seeds: int
    run_ids: tuple[str, ...]
    converged: bool
    """Whether all its runs are."""


def points(records: Sequence[Record], x: str = "l0", y: str = "degradation") -> list[Point]:
    """One point a family and setting: means over init seeds of two figures, with t intervals. All runs, converged or
    not.

    Two runs count as two seeds of one setting if they differ in `init_seed` and in no other setting.
    """
    found = []
    for (name, _), runs in by_setting(records).items():
        r, asked = runs[0], runs[0].get("target_l0")
        xs, ys = mean_over_seeds([run[x] for run in runs]), mean_over_seeds([run[y] for run in runs])
        found.append(
            Point(
                name, r["coeff"] if asked is None else asked, r.get("d_sae"), r.get("n_tokens"), r.get("study", ""),
                xs.mean, ys.mean, xs.half_width, ys.half_width, len(runs), tuple(run["run_id"] for run in runs),
                all(run["converged"] for run in runs),
            )
        )  # fmt: skip
    return sorted(found, key=lambda point: (point.family, point.study, point.x))


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean and half the 95% interval: t(n - 1) s / sqrt(n)."""
    n, of = len(values), np.asarray(values, float)
    half = _t(n - 1) * of.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Mean(float(of.mean()), float(half), n)


@cache
def _t(df: float) -> float:
    """Student's t quantile; scipy.stats has the same function, and takes half a second to import."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.5 + LEVEL / 2))


def hypervolume(
    records: Sequence[Record], reference: tuple[float, float], *, unconverged: bool = False
) -> dict[str, Mean]:
    """The area, in the plane of log L0 and degradation, that a family's runs beat and the reference does not.

    Each init seed has its own frontier, since more runs always cover more: the mean over seeds is given.

    Args:
        records: runs; those that have not converged do not enter.
        reference: L0 and degradation of a point that is worse than what is to count; what lies beyond adds nothing.
        unconverged: whether runs that have not converged enter too.

    Raises:
        ValueError: the reference's L0 is not above 0.
    """
    if reference[0] <= 0:
        raise ValueError(f"reference L0 {reference[0]}: must be above 0")
    found: dict[str, dict[Any, list[Record]]] = {}
    for r in records:
        if (r["converged"] or unconverged) and r["l0"] > 0:
            found.setdefault(family(r), {}).setdefault(r.get("init_seed", 0), []).append(r)
    return {
        name: mean_over_seeds([_area(runs, math.log(reference[0]), reference[1]) for runs in by_seed.values()])
        for name, by_seed in found.items()
    }


class FamilySummary(NamedTuple):
    """A family's runs in numbers."""

    family: str
    n_runs: int
    n_converged: int
    l0_range: tuple[float, float]
    """Of all its runs."""
    hypervolume: Mean | None
    """Of its converged runs; None if there are none."""


def summaries(records: Sequence[Record]) -> tuple[tuple[float, float], list[FamilySummary]]:
    """Every family, and the reference of their hypervolumes: the largest L0 and the largest degradation of any run."""
    reference = max(r["l0"] for r in records), max(r["degradation"] for r in records)
    volumes = hypervolume(records, reference) if reference[0] > 0 else {}
    found = []
    for name in dict.fromkeys(map(family, records)):
        runs = [r for r in records if family(r) == name]
        l0s = [r["l0"] for r in runs]
        n_converged = sum(bool(r["converged"]) for r in runs)
        found.append(FamilySummary(name, len(runs), n_converged, (min(l0s), max(l0s)), volumes.get(name)))
    return reference, found


def _area(runs: Sequence[Record], worst_x: float, worst_y: float) -> float:
    inside = [(math.log(r["l0"]), r["degradation"]) for r in runs]
    inside = [(x, y) for x, y in inside if x < worst_x and y < worst_y]
    mask = pareto_mask([x for x, _ in inside], [y for _, y in inside])
    best = sorted({point for point, on in zip(inside, mask, strict=True) if on})
    if not best:
        return 0.0
    edges = [x for x, _ in best[1:]] + [worst_x]
    return float(sum((right - x) * (worst_y - y) for (x, y), right in zip(best, edges, strict=True)))
