"""The runs of a study, sorted: Pareto-best ones, groups that differ in their seed only, curves of families.

A curve reads a family's CE increase (or another figure) at any L0 between its runs, so that families can be compared at
equal L0. These comparisons have no intervals; `verdicts` has.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

import numpy as np

from prolu.training.config import RunConfig, family_of

Record = Mapping[str, Any]
"""One finished run: a line of results.jsonl."""

AnyRecord = TypeVar("AnyRecord", bound=Record)
Item = TypeVar("Item")

CONVERGENCE_TOLERANCE = 0.05
"""The largest relative change of held-out L0 and MSE, over the last fifth of training at full learning rate, with
which a run counts as converged."""

SETTING_FIELDS = tuple(f.name for f in fields(RunConfig) if f.name not in ("init_seed", "nonlinearity", "penalty"))
"""The fields of a run's config that tell the settings of one family apart."""


def is_converged(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Return whether held-out L0 and MSE changed by less than `CONVERGENCE_TOLERANCE` between two probes."""
    return all(
        # The floor makes a figure that is 0 at both probes count as unchanged.
        abs(after[name] - before[name]) < CONVERGENCE_TOLERANCE * max(abs(before[name]), 1e-12)
        for name in ("l0", "mse")
    )


def pareto_best(records: Iterable[AnyRecord], x: str = "l0", y: str = "degradation") -> list[AnyRecord]:
    """Return the runs that no other of these runs at the same hook beats, in the order given.

    One run beats another if it is at least as low in both x and y, and lower in one of them.
    """
    runs = list(records)
    best: set[int] = set()
    for (_,), places in grouped(range(len(runs)), lambda place: hook_of(runs[place])).items():
        mask = pareto_mask([runs[place][x] for place in places], [runs[place][y] for place in places])
        best.update(place for place, is_best in zip(places, mask, strict=True) if is_best)
    return [run for place, run in enumerate(runs) if place in best]


def pareto_mask(x: Sequence[float], y: Sequence[float]) -> list[bool]:
    """Return, for each point (x, y), whether no other point beats it, as in `pareto_best`."""
    points = list(zip(x, y, strict=True))
    # Of points that are equal none beats another, so all of them are kept.
    return [not any(a <= p and b <= q and (a, b) != (p, q) for a, b in points) for p, q in points]


def family(record: Record) -> str:
    """Return a run's family, such as `prolu_ste + l1`; a run that was fine-tuned from a saved SAE is of its own.

    Where studies at several hooks are shown together, a family is named with its hook: SAEs at two hooks reconstruct
    different activations, so their CE increases say nothing about each other.
    """
    name = family_of(record["nonlinearity"], record["penalty"], fine_tuned=record.get("init_digest") is not None)
    hook = hook_of(record)
    return at_hook(hook, name) if hook else name


def hook_of(record: Record) -> str:
    """Return the hook of a run where studies at several hooks are shown together; empty otherwise."""
    return str(record.get("hook", ""))


def at_hook(hook: str, name: str) -> str:
    """Return the name of a family, or a statement about families, at one of several hooks."""
    return f"{hook}: {name}"


def by_hook(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the runs at each hook as those of a study by itself, whose families are named without the hook."""
    return {
        hook: [{name: value for name, value in r.items() if name != "hook"} for r in some]
        for (hook,), some in grouped(records, hook_of).items()
    }


def study_of(record: Record) -> str:
    """Return the name of the study that a run of several pooled studies is from; empty for a single study."""
    return str(record.get("study", ""))


def study_names(records: Sequence[Record]) -> list[str]:
    """Return the names of the studies that the runs are from, in order of appearance."""
    return list(dict.fromkeys(map(study_of, records)))


def init_seed(record: Record) -> int | None:
    """Return the seed of a run's starting weights; None where it is not known, as for an imported SAE."""
    return record.get("init_seed", 0)


def setting(record: Record) -> tuple[str, ...]:
    """Return everything that was asked of a run but its family and its seed.

    Runs of one family that agree in this differ in their seed only.
    """
    study = study_of(record)
    if init_seed(record) is None:
        # Whether two imported SAEs differ in their seed only is not known, so each is a setting of its own.
        return (study, str(record["run_id"]))
    target_l0 = record.get("target_l0")
    # With a target L0 the coefficient is a result of training, which differs between seeds.
    names = [name for name in SETTING_FIELDS if target_l0 is None or name != "coeff"]
    return (study, str(target_l0), *(str(record.get(name)) for name in names))


def grouped(items: Iterable[Item], *keys: Callable[[Item], Hashable]) -> dict[tuple[Any, ...], list[Item]]:
    """Return the items that agree in all keys together; groups, and the items in each, in order of appearance."""
    found: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        found.setdefault(tuple(key(item) for key in keys), []).append(item)
    return found


class Curve(NamedTuple):
    """A family's points in ascending order of x, with y interpolated linearly in log x between them."""

    x: np.ndarray
    y: np.ndarray

    def at(self, x: float | np.ndarray) -> np.ndarray:
        """Return the interpolated y at x, which must lie between the first and the last point."""
        return np.asarray(np.interp(np.log(x), np.log(self.x), self.y))


def curve(records: Sequence[Record], x: str = "l0", y: str = "degradation") -> Curve:
    """Return the curve through some runs, without those whose x is 0, for that has no logarithm."""
    points = sorted((r[x], r[y]) for r in records if r[x] > 0 and math.isfinite(r[y]))
    return Curve(np.array([p for p, _ in points]), np.array([q for _, q in points]))


def curves(
    records: Sequence[Record], x: str = "l0", y: str = "degradation", *, unconverged: bool = False
) -> dict[str, Curve]:
    """Return the curve of each family that has two or more points.

    Runs that differ in their seed only are one point, their mean. Where several studies are pooled, a family is
    represented by its Pareto-best points in L0 and CE increase: the others say nothing about what it can reach.

    Args:
        records: runs of one study, or of several.
        x: the figure on the horizontal axis.
        y: the figure on the vertical axis.
        unconverged: whether runs that have not converged are used too.
    """
    used = [r for r in records if r["converged"] or unconverged]
    by_family: dict[str, list[Record]] = {}
    for (name, _), runs in grouped(used, family, setting).items():
        by_family.setdefault(name, []).extend(_mean_of_seeds(runs, {x, y, "l0", "degradation"}))
    if len(study_names(records)) > 1:
        by_family = {name: pareto_best(rows) for name, rows in by_family.items()}
    found = {name: curve(rows, x, y) for name, rows in by_family.items()}
    return {name: c for name, c in found.items() if len(c.x) >= 2}


def _mean_of_seeds(runs: Sequence[Record], names: set[str]) -> list[Record]:
    """Return one record with the means of the named figures, or the runs themselves if their seeds do not differ."""
    if len({r.get("init_seed") for r in runs}) < len(runs):
        return list(runs)
    means = {name: sum(r[name] for r in runs) / len(runs) for name in names}
    return [{**runs[0], **means}]


class Comparison(NamedTuple):
    """How a challenger's y compares with a baseline's at equal x, over the range of x that both reach."""

    low: float
    high: float
    """The ends of that range."""
    change: float
    """The mean of challenger / baseline - 1 over the range, in equal steps of log x."""
    smallest: float
    largest: float
    """The least and the greatest value of challenger / baseline - 1 in the range."""


def compare(challenger: Curve, baseline: Curve, n_points: int = 33) -> Comparison | None:
    """Return the comparison of two curves at `n_points` values of x, or None where their ranges do not overlap."""
    low = max(challenger.x[0], baseline.x[0])
    high = min(challenger.x[-1], baseline.x[-1])
    if low >= high:
        return None
    grid = np.geomspace(low, high, n_points)
    change = challenger.at(grid) / baseline.at(grid) - 1
    return Comparison(low, high, change.mean(), change.min(), change.max())
