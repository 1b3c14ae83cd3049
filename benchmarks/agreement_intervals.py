"""Measure how often intervals of the agreement between seeds contain the truth, on simulated pairs of known truth.

    python benchmarks/agreement_intervals.py --n-studies 4000 --json benchmarks/agreement_coverage.json

The agreement of seeds i and j is u_i + u_j + e_ij, where u is what a seed does to all its pairs and e what is of the
pair alone; `seed_part` is the part of u in its variance. The cases `found` are of SAEs: each seed finds each of 256
features with a probability that differs between features, and between seeds, and two seeds agree by 2 |both| / (|a| +
|b|). Three intervals are compared: the jackknife over seeds, which is ours; the analysis of variance of u and e, which
needs four seeds; and a t interval over pairs as if they were independent.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from prolu.evaluation.comparison.intervals import mean_over_pairs, t_quantile

N_FEATURES = 256


class Case(NamedTuple):
    """How many seeds there are, and what makes pairs differ."""

    n_seeds: int
    """The number of seeds."""
    seed_part: float = 0.5
    """The part of the variance of a pair that its two seeds do, from 0 to 1."""
    is_skewed: bool = False
    """Whether u and e are exponential, not normal."""
    found_spread: float | None = None
    """Where features are found or not: the spread of seeds in the logit of the probability; otherwise None."""


CASES = {
    f"{n} seeds, {name}": case._replace(n_seeds=n)
    for name, case in {
        "pairs alone": Case(0, seed_part=0),
        "half seeds": Case(0),
        "seeds alone": Case(0, seed_part=1),
        "half seeds, skewed": Case(0, is_skewed=True),
        "found": Case(0, found_spread=0.0),
        "found, seeds differ": Case(0, found_spread=0.5),
    }.items()
    for n in (3, 4, 5, 10)
}


def drawn(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Draw the agreement of all pairs of seeds, [n_seeds, n_seeds]."""
    n = case.n_seeds
    if case.found_spread is not None:
        logits = np.linspace(-3, 3, N_FEATURES) + rng.normal(0, case.found_spread, (n, 1))
        found = (rng.random((n, N_FEATURES)) < 1 / (1 + np.exp(-logits))).astype(float)
        sizes = found.sum(1)
        return 2 * (found @ found.T) / (sizes[:, None] + sizes)
    values = rng.exponential(1, (n + 1, n)) - 1 if case.is_skewed else rng.normal(0, 1, (n + 1, n))
    of_seed = math.sqrt(case.seed_part / 2) * values[0]
    return of_seed[:, None] + of_seed + math.sqrt(1 - case.seed_part) * values[1:]


def truth_of(case: Case, rng: np.random.Generator) -> float:
    """Return the mean agreement of all pairs that there could be."""
    if case.found_spread is None:
        return 0.0
    return float(np.mean([drawn(case._replace(n_seeds=2), rng)[0, 1] for _ in range(20_000)]))


def half_widths(values: np.ndarray) -> dict[str, float]:
    """Return half the width of the three intervals around the mean over pairs."""
    n = len(values)
    above = np.triu(values, 1)
    of_pairs = values[np.triu_indices(n, 1)]
    n_pairs = len(of_pairs)
    mean = of_pairs.mean()
    both = above + above.T
    # The effects of seeds in the model of u and e, and what they leave of each pair.
    of_seed = (both.sum(1) / (n - 1) - mean) * (n - 1) / (n - 2)
    left = (values - mean - of_seed[:, None] - of_seed)[np.triu_indices(n, 1)]
    if n > 3:
        pair_variance = np.square(left).sum() / (n * (n - 3) / 2)
        seed_variance = max(0.0, np.square(of_seed).sum() / (n - 1) - pair_variance / (n - 2))
        by_model = t_quantile(n - 1) * math.sqrt(4 * seed_variance / n + pair_variance / n_pairs)
    else:
        by_model = math.nan
    return {
        "jackknife": mean_over_pairs(values).half_width,
        "analysis of variance": by_model,
        "pairs as independent": t_quantile(n_pairs - 1) * of_pairs.std(ddof=1) / math.sqrt(n_pairs),
    }


def coverage(case: Case, n_studies: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return, for each interval, the fraction of studies in which it contains the truth, and its mean width."""
    rng = np.random.default_rng(seed)
    truth = truth_of(case, rng)
    tries = [drawn(case, rng) for _ in range(n_studies)]
    errors = [abs(mean_over_pairs(values).mean - truth) for values in tries]
    halves = [half_widths(values) for values in tries]
    return {
        name: {
            "coverage": float(np.mean([error <= each[name] for error, each in zip(errors, halves, strict=True)])),
            "width": float(np.mean([2 * each[name] for each in halves])),
        }
        for name in halves[0]
    }


def _shown(measured: dict[str, float]) -> str:
    return "-" if math.isnan(measured["width"]) else f"{measured['coverage']:.1%} ({measured['width']:.3f})"


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-studies", type=int, default=4000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {name: coverage(case, args.n_studies) for name, case in CASES.items()}
    table = Table(title=f"coverage of nominal 95% (mean width), {args.n_studies} studies per case")
    table.add_column("case", no_wrap=True)
    for method in next(iter(found.values())):
        table.add_column(method, justify="right")
    for name, by_method in found.items():
        shown = (
            f"{m['coverage']:.1%} ({m['width']:.3f})" if not math.isnan(m["width"]) else "-" for m in by_method.values()
        )
        table.add_row(name, *shown)
    Console(width=110).print(table)
    if args.json:
        args.json.write_text(json.dumps({"n_studies": args.n_studies, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
