"""Comparing families of SAEs: Pareto frontiers, matched sparsity, the convergence rule."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

import numpy as np

from prolu.training.config import RunConfig, family_of

Record = Mapping[str, Any]
"""One finished run: a line of results.jsonl."""

AnyRecord = TypeVar("AnyRecord", bound=Mapping[str, Any])

CONVERGENCE_TOLERANCE = 0.05
"""Largest relative change of held-out L0 and MSE over the last fifth of training at full learning rate."""


def family(record: Record) -> str:
    """What is compared: nonlinearity, penalty, and whether it began from a saved SAE."""
    return family_of(record["nonlinearity"], record["penalty"], fine_tuned=record.get("init_digest") is not None)


def is_converged(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether held-out L0 and MSE moved less than 5% between the two probes."""
    return all(
        abs(after[name] - before[name]) < CONVERGENCE_TOLERANCE * max(abs(before[name]), 1e-12)
        for name in ("l0", "mse")
    )


def pareto_best(records: Iterable[AnyRecord], x: str = "l0", y: str = "degradation") -> list[AnyRecord]:
    """Return the runs that no other of these runs beats, in the order given.

    One run beats another if it is at least as low in both x and y, and lower in one of them.
    """
    runs = list(records)
    mask = pareto_mask([run[x] for run in runs], [run[y] for run in runs])
    return [run for run, best in zip(runs, mask, strict=True) if best]


def pareto_mask(x: Sequence[float], y: Sequence[float]) -> list[bool]:
    """Return, for each point (x, y), whether no other point beats it, as in `pareto_best`."""
    points = list(zip(x, y, strict=True))
    return [not any(a <= p and b <= q and (a, b) != (p, q) for a, b in points) for p, q in points]


def studies(records: Sequence[Record]) -> list[str]:
    """Names of the studies that the runs come from, in order of appearance; one empty name for a single study."""
    return list(dict.fromkeys(r.get("study", "") for r in records))


SETTINGS = tuple(f.name for f in fields(RunConfig) if f.name not in ("init_seed", "nonlinearity", "penalty"))


def setting(record: Record) -> tuple[str, ...]:
    """All that a run was asked but its family and its seed: runs alike in it differ by init seed only.

    Where a run was asked for an L0, its coefficient is what came of that, and no setting. An SAE whose seed is not
    known, as of an import, is alike to no other.
    """
    if record.get("init_seed", 0) is None:
        return (str(record.get("study", "")), str(record["run_id"]))
    asked = record.get("target_l0") is not None
    names = [name for name in SETTINGS if not (asked and name == "coeff")]
    return (str(record.get("study", "")), str(record.get("target_l0")), *(str(record.get(name)) for name in names))


def by_setting(records: Sequence[Record]) -> dict[tuple[str, tuple[str, ...]], list[Record]]:
    """Runs that differ by init seed only, by family and setting."""
    found: dict[tuple[str, tuple[str, ...]], list[Record]] = {}
    for record in records:
        found.setdefault((family(record), setting(record)), []).append(record)
    return found


def _means(runs: Sequence[Record], names: set[str]) -> list[Record]:
    """One record with the means of runs that differ by seed; runs without seeds are told apart."""
    if len({r.get("init_seed") for r in runs}) < len(runs):
        return list(runs)
    return [{**runs[0], **{name: sum(r[name] for r in runs) / len(runs) for name in names}}]


class Curve(NamedTuple):
    """A family's points in order of x; between them, y is read linearly in log x."""

    x: np.ndarray
    y: np.ndarray

    def at(self, x: float | np.ndarray) -> np.ndarray:
        """The y at x within the range."""
        return np.asarray(np.interp(np.log(x), np.log(self.x), self.y))


def curve(records: Sequence[Record], x: str = "l0", y: str = "degradation") -> Curve:
    """The curve through some runs; runs with x of 0 have no logarithm and are left out."""
    points = sorted((r[x], r[y]) for r in records if r[x] > 0 and math.isfinite(r[y]))
    return Curve(np.array([p for p, _ in points]), np.array([q for _, q in points]))


def curves(
    records: Sequence[Record], x: str = "l0", y: str = "degradation", *, unconverged: bool = False
) -> dict[str, Curve]:
    """Curves of the converged runs (or of all), by family; families with fewer than two are left out.

    Runs that differ by init seed only are one point, their mean.

    Where several studies are pooled, a family stands for its own best: the runs that no other of the family
    beats in L0 and degradation.
    """
    by_family: dict[str, list[Record]] = {}
    used = [r for r in records if r["converged"] or unconverged]
    for (name, _), runs in by_setting(used).items():
        by_family.setdefault(name, []).extend(_means(runs, {x, y, "l0", "degradation"}))
    if len(studies(records)) > 1:
        by_family = {name: pareto_best(rows) for name, rows in by_family.items()}
    found = {name: curve(rows, x, y) for name, rows in by_family.items()}
    return {name: c for name, c in found.items() if len(c.x) >= 2}


class Comparison(NamedTuple):
    """How a challenger's y compares with a baseline's at equal x, over the range that both reach."""

    low: float
    high: float
    """Range of x."""
    change: float
    """Mean over the range (in log x) of challenger / baseline - 1."""
    smallest: float
    largest: float
    """Extremes of that over the range."""


def compare(challenger: Curve, baseline: Curve, n_points: int = 33) -> Comparison | None:
    """Relative difference at matched x; None where the ranges do not overlap."""
    low, high = max(challenger.x[0], baseline.x[0]), min(challenger.x[-1], baseline.x[-1])
    if low >= high:
        return None
    grid = np.geomspace(low, high, n_points)
    change = challenger.at(grid) / baseline.at(grid) - 1
    return Comparison(low, high, change.mean(), change.min(), change.max())
