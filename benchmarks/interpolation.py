"""Measure how wrong the curve between a family's runs is, by leaving out runs that were measured.

    python benchmarks/interpolation.py [--csv docs/findings/comparison.csv] [--json benchmarks/interpolation.json]

Each run between two others of its family and seed is left out and predicted from the rest, in three ways: linearly in
(L0, CE increase), linearly in the logs of both (a chord), and by the monotone curve that comparisons use. The runs of
the comparison lie a factor of two apart, so a left-out run lies in a gap of a factor of four; what comparisons read is
never further than a factor of 1.5 from a run. The last column is the error per product of the distances, in log L0, to
the runs on both sides: `Metric.tolerance` in the catalogue is its nine-tenths quantile for the monotone curve, by which
the error in any gap is stated. The second table has it for every metric of the catalogue.
"""

import argparse
import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from prolu.evaluation.comparison.curves import interpolated
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS, Metric

CSV = Path(__file__).parents[1] / "docs" / "findings" / "comparison.csv"

GAPS = ((1, 3.5), (3.5, 4.5), (4.5, math.inf))
"""Classes of gaps, by the ratio of the L0s on both sides of a left-out run."""

WAYS = ("linear", "log-log chord", "monotone curve")


class LeftOut(NamedTuple):
    """A run that was predicted from its neighbours."""

    before: float
    after: float
    """The distances in log L0 to the runs on both sides."""
    errors: tuple[float, ...]
    """The relative error of each way, predicted / measured - 1."""


def runs_by_curve(file: Path, study: str = "comparison", y: str = CE_INCREASE) -> list[list[tuple[float, float]]]:
    """Return the (L0, metric) of the runs of each family and seed in a table of results, where the metric is known."""
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["study"] == study and row.get(y):
                curve = (row["family"], row["init_seed"], row["n_tokens"])
                found.setdefault(curve, []).append((float(row["l0"]), float(row[y])))
    return [sorted(points) for points in found.values()]


def left_out(points: Sequence[tuple[float, float]]) -> list[LeftOut]:
    """Leave out each run of a curve but the first and the last, and predict it from the others."""
    found = []
    for i in range(1, len(points) - 1):
        others = np.array([point for j, point in enumerate(points) if j != i])
        l0, measured = points[i]
        logs = np.log(others)
        predicted = (
            float(np.interp(l0, others[:, 0], others[:, 1])),
            math.exp(np.interp(math.log(l0), logs[:, 0], logs[:, 1])),
            math.exp(interpolated(logs[:, 0], logs[:, 1], math.log(l0))),
        )
        before = math.log(l0 / points[i - 1][0])
        after = math.log(points[i + 1][0] / l0)
        found.append(LeftOut(before, after, tuple(p / measured - 1 for p in predicted)))
    return found


def rate(metric: Metric, file: Path = CSV) -> float:
    """Return the nine-tenths quantile of the errors of the monotone curve in a metric's height, per product of the
    distances; nan where the metric is not known of these runs.
    """
    rates = []
    for points in runs_by_curve(file, y=metric.name):
        x = np.log([l0 for l0, _ in points])
        heights = np.array([metric.height(y) for _, y in points])
        for i in range(1, len(points) - 1):
            read = interpolated(np.delete(x, i), np.delete(heights, i), x[i])
            rates.append(abs(read - heights[i]) / ((x[i] - x[i - 1]) * (x[i + 1] - x[i])))
    return float(np.quantile(rates, 0.9)) if rates else math.nan


def summary(found: Sequence[LeftOut], way: int) -> dict[str, float]:
    """Return the errors of one way over some left-out runs."""
    errors = np.array([one.errors[way] for one in found])
    rates = np.abs(np.log1p(errors)) / np.array([one.before * one.after for one in found])
    return {
        "n": len(found),
        "mean": float(errors.mean()),
        "median": float(np.median(np.abs(errors))),
        "90%": float(np.quantile(np.abs(errors), 0.9)),
        "max": float(np.abs(errors).max()),
        "rate, 90%": float(np.quantile(rates, 0.9)),
    }


def measured(file: Path = CSV) -> dict[str, dict[str, dict[str, float]]]:
    """Return the errors of each way, over all left-out runs and by the gap that they leave."""
    found = [one for points in runs_by_curve(file) for one in left_out(points)]
    result: dict[str, dict[str, dict[str, float]]] = {}
    for way, name in enumerate(WAYS):
        result[name] = {"all": summary(found, way)}
        for low, high in GAPS:
            some = [one for one in found if low <= math.exp(one.before + one.after) < high]
            if some:
                result[name][f"{low:g} to {high:g}"] = summary(some, way)
    return result


def main() -> None:
    """Print a line for each way and gap."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measured(args.csv)
    table = Table(title="relative error of a left-out run's CE increase")
    for head in ("way", "gap in L0", "runs", "mean", "median", "90%", "max", "per distance^2, 90%"):
        table.add_column(head, justify="left" if head == "way" else "right", no_wrap=True)
    for name, by_gap in found.items():
        for gap, e in by_gap.items():
            shown = (f"{e['mean']:+.1%}", *(f"{e[key]:.1%}" for key in ("median", "90%", "max")))
            table.add_row(name, gap, str(e["n"]), *shown, f"{e['rate, 90%']:.2f}")
    Console(width=110).print(table)
    rates = Table(title="error in a metric's height per distance^2, 90%")
    for head in ("metric", "error", "in the catalogue"):
        rates.add_column(head, justify="left" if head == "metric" else "right")
    for metric in METRICS.values():
        rates.add_row(metric.name, f"{rate(metric, args.csv):.3f}", str(metric.tolerance))
    Console(width=110).print(rates)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
