"""Measure how often the intervals of `prolu.matched` contain the truth, on simulated studies whose truth is known.

    python benchmarks/intervals.py --n-studies 500 --json benchmarks/coverage.json

A simulated study has two families, each with a few seeds and four settings, scored on documents of uneven length. The
log of the CE increase is linear in log L0. A seed shifts its family's curve, and each run besides; a document shifts
all runs alike, each family, and each run. The truth is the ratio over all seeds and all documents. Three intervals are
compared: ours, a percentile bootstrap over seeds and documents, and a t interval over seeds alone.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from prolu.evaluation.comparison.intervals import half_width_of_difference
from prolu.evaluation.comparison.verdicts import Verdict, matched
from prolu.evaluation.document_sums import DocumentSums

L0S = (10, 18, 32, 58)
"""The L0s of the four settings."""

L0 = 24.0
"""The L0 at which families are compared, halfway between two settings and near enough to both for every seed."""

CHALLENGER = "prolu_ste + l1"
BASELINE = "relu + l1"


class Case(NamedTuple):
    """The size of a study and of each source of variation, as a relative standard deviation."""

    n_seeds: int = 3
    """The number of seeds of each family."""
    n_documents: int = 200
    """The number of held-out documents."""
    seed: float = 0.03
    """The variation of a family's curve between seeds."""
    run: float = 0.01
    """The variation of each run around its family's curve."""
    document: float = 0.6
    """The variation between documents that all runs share. A paired comparison cancels it."""
    document_family: float = 0.3
    """The variation between documents that differs by family. It remains in a paired comparison."""
    document_run: float = 0.1
    """The variation between documents that differs by run."""
    length: float = 1.0
    """The standard deviation of the log of a document's length."""
    change: float = -0.2
    """The true relative change of the CE increase."""
    y: str = "degradation"
    """The metric that is compared: the CE increase as a ratio, or the cross-entropy itself (`ce_recon`) as a
    difference."""


CASES = {
    "3 seeds, both": Case(),
    "2 seeds, both": Case(n_seeds=2),
    "5 seeds, both": Case(n_seeds=5),
    "10 seeds, both": Case(n_seeds=10),
    "3 seeds, seeds only": Case(document_family=0, document_run=0),
    "3 seeds, documents only": Case(seed=0, run=0, document_run=0),
    "3 seeds, runs by document": Case(seed=0.01, document_family=0.05, document_run=0.5),
    "3 seeds, 40 documents": Case(n_documents=40),
    "3 seeds, no difference": Case(change=0.0),
    "3 seeds, CE as a difference": Case(y="ce_recon"),
}


@dataclass(frozen=True)
class SimulatedStudy:
    """A study in memory, as much of it as `prolu.matched` reads."""

    folder: Path
    records: list[dict]
    config: dict
    stream_seed: int
    documents: dict[str, DocumentSums]
    """The sums by document of each run, by the name of its folder."""


def simulated(case: Case, rng: np.random.Generator) -> SimulatedStudy:
    """Draw one study."""
    n = case.n_documents
    n_tokens = np.ceil(np.exp(rng.normal(0, case.length, n)) * 200)
    shared = _positive(rng, case.document, n)
    # The cross-entropy without an SAE: a document that is hard for the model is so in all runs.
    clean = 3 * _positive(rng, 0.3, n) if case.y == "ce_recon" else np.zeros(n)
    records = []
    documents = {}
    for family, level in ((CHALLENGER, 1 + case.change), (BASELINE, 1.0)):
        by_family = _positive(rng, case.document_family, n)
        for seed in range(case.n_seeds):
            moved = math.exp(rng.normal(0, case.seed))
            for asked in L0S:
                l0 = asked * math.exp(rng.normal(0, 0.03))
                increase = level * 4 / l0 * moved * math.exp(rng.normal(0, case.run))
                increase_by = increase * shared * by_family * _positive(rng, case.document_run, n)
                l0_by = l0 * _positive(rng, 0.1, n)
                run_id = f"{family}-{asked}-{seed}"
                zeros = np.zeros(n)
                documents[run_id] = DocumentSums(
                    document=np.arange(n), n_tokens=n_tokens, n_predicted=n_tokens, l0=l0_by * n_tokens,
                    squared_error=zeros, ce_clean=clean * n_tokens, ce_recon=(clean + increase_by) * n_tokens, kl=zeros,
                )  # fmt: skip
                nonlinearity, _, penalty = family.partition(" + ")
                total = n_tokens.sum()
                records.append({
                    "run_id": run_id, "nonlinearity": nonlinearity, "penalty": penalty, "coeff": asked,
                    "converged": True, "init_seed": seed, "l0": (l0_by * n_tokens).sum() / total,
                    "degradation": (increase_by * n_tokens).sum() / total, "unit": "document",
                    "ce_recon": ((clean + increase_by) * n_tokens).sum() / total,
                })  # fmt: skip
    return SimulatedStudy(Path(), records, {}, 0, documents)


def _positive(rng: np.random.Generator, spread: float, n: int) -> np.ndarray:
    """Draw positive factors of mean 1 with this relative standard deviation."""
    return rng.gamma(1 / spread**2, spread**2, n) if spread else np.ones(n)


def verdict_of(study: SimulatedStudy, l0: float = L0, y: str = "degradation") -> Verdict:
    """Compare the two families of a study with `prolu.matched`."""
    # The simulated runs have no files, so their sums by document come from memory.
    with mock.patch(
        "prolu.evaluation.comparison.replicates.read_documents_of", lambda folder: study.documents[folder.name]
    ):
        return matched(study, CHALLENGER, BASELINE, l0, y=y)


def intervals(study: SimulatedStudy, rng: np.random.Generator, l0: float, y: str) -> dict[str, tuple[float, float]]:
    """Return the three intervals for the log of the ratio, or for the difference."""
    # What `matched` computes its interval from is noted on the way, so that all three see the same resamples.
    seen: list = []

    def noted(logs: Sequence[np.ndarray], resampled: Sequence[np.ndarray], n_documents: float) -> float:
        seen.extend((logs, resampled))
        return half_width_of_difference(logs, resampled, n_documents)

    with mock.patch("prolu.evaluation.comparison.comparisons.half_width_of_difference", noted):
        ours = verdict_of(study, l0, y)
    logs, resampled = seen
    n = len(logs[0])
    mean = logs[0].mean() - logs[1].mean()
    drawn = []
    for family in resampled:
        picked = rng.integers(0, n, (len(family), n))
        drawn.append(np.take_along_axis(family, picked, 1).mean(1))
    half = student.ppf(0.975, 2 * n - 2) * math.sqrt(sum(x.var(ddof=1) / n for x in logs))
    return {
        "ours": (math.log1p(ours.low), math.log1p(ours.high)) if y == "degradation" else (ours.low, ours.high),
        "percentile bootstrap": tuple(np.percentile(drawn[0] - drawn[1], [2.5, 97.5])),
        "seeds alone": (mean - half, mean + half),
    }  # fmt: skip


def coverage(case: Case, n_studies: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return, for each method, the fraction of studies whose interval contains the truth, and its mean width."""
    is_ratio = case.y == "degradation"
    # A difference is read at a setting, where the curve is right whatever its shape.
    l0 = L0 if is_ratio else L0S[1]
    truth = math.log1p(case.change) if is_ratio else 4 / l0 * case.change
    found = list(_drawn(case, n_studies, seed, l0))
    return {
        name: {
            "coverage": sum(each[name][0] <= truth <= each[name][1] for each in found) / n_studies,
            "width": sum(each[name][1] - each[name][0] for each in found) / n_studies,
        }
        for name in found[0]
    }


def _drawn(case: Case, n_studies: int, seed: int, l0: float) -> Iterator[dict[str, tuple[float, float]]]:
    rng = np.random.default_rng(seed)
    for _ in range(n_studies):
        yield intervals(simulated(case, rng), rng, l0, case.y)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-studies", type=int, default=500)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {name: coverage(case, args.n_studies) for name, case in CASES.items()}
    table = Table(title=f"coverage of nominal 95% (mean width), {args.n_studies} studies per case")
    table.add_column("case", no_wrap=True)
    for method in next(iter(found.values())):
        table.add_column(method, justify="right")
    for name, by_method in found.items():
        table.add_row(name, *(f"{m['coverage']:.1%} ({m['width']:.3f})" for m in by_method.values()))
    Console(width=110).print(table)
    if args.json:
        args.json.write_text(json.dumps({"n_studies": args.n_studies, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
