"""Measure whether families are the best as often as `prolu.standings` says, on simulated studies whose truth is known.

    python benchmarks/ranks.py --n-studies 300

A study has families with three seeds each, scored on documents that they share (as in `intervals.py`). Each family's
true level is drawn anew for every study, with a relative standard deviation of `spread`. Seeds move a family by 3%,
and documents move each by its own amount. Stated probabilities are put into classes, and for each class the fraction
of families that truly have the lowest CE increase is counted. Of equal families the first counts as the best, so that
what is to be seen there is only how often a high probability is stated.
"""

import argparse
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from prolu.evaluation.comparison import replicates
from prolu.evaluation.comparison.standings import standings
from prolu.evaluation.document_sums import DocumentSums

L0 = 20.0
"""The L0 of all runs, at which families are compared."""

CLASSES = (0, 0.025, 0.25, 0.5, 0.75, 0.975, 1)
"""The ends of the classes of stated probabilities."""

NAMES = ("relu", "prolu_relu", "prolu_ste", "gated", "topk", "jumprelu")


class Case(NamedTuple):
    """The size of a study, and of each source of variation as a relative standard deviation."""

    spread: float
    """The variation of families' true levels. Seeds and documents together move a difference of two by about 4%."""
    n_families: int = 6
    n_seeds: int = 3
    n_documents: int = 120
    seed: float = 0.03
    """The variation of a run between seeds."""
    document: float = 0.6
    """The variation between documents that all runs share."""
    document_family: float = 0.2
    """The variation between documents that differs by family."""


CASES = {
    "6 families, wide apart": Case(0.15),
    "6 families, close": Case(0.05),
    "2 families, close": Case(0.05, n_families=2),
    "6 families, only seeds": Case(0.05, document=0, document_family=0),
    "2 equal families": Case(0.0, n_families=2),
    "6 equal families": Case(0.0),
}


@dataclass(frozen=True)
class SimulatedStudy:
    """A study in memory, as much of it as `prolu.standings` reads."""

    folder: Path
    records: list[dict]
    config: dict
    stream_seed: int
    documents: dict[str, DocumentSums]
    """The sums by document of each run, by the name of its folder."""
    best: str
    """The family with the lowest true CE increase."""


def _positive(rng: np.random.Generator, spread: float, n: int) -> np.ndarray:
    """Draw positive factors of mean 1 with this relative standard deviation."""
    return rng.gamma(1 / spread**2, spread**2, n) if spread else np.ones(n)


def simulated(case: Case, rng: np.random.Generator) -> SimulatedStudy:
    """Draw one study."""
    n = case.n_documents
    n_tokens = np.ceil(np.exp(rng.normal(0, 0.5, n)) * 200)
    shared = _positive(rng, case.document, n)
    names = NAMES[: case.n_families]
    levels = 0.2 * np.exp(rng.normal(0, case.spread, len(names)))
    records = []
    documents = {}
    zeros = np.zeros(n)
    for name, level in zip(names, levels, strict=True):
        by_document = shared * _positive(rng, case.document_family, n)
        for seed in range(case.n_seeds):
            increase = level * math.exp(rng.normal(0, case.seed)) * by_document * n_tokens
            run_id = f"{name}-{seed}"
            documents[run_id] = DocumentSums(
                document=np.arange(n), n_tokens=n_tokens, n_predicted=n_tokens, l0=L0 * n_tokens,
                squared_error=zeros, ce_clean=zeros, ce_recon=increase, kl=zeros,
            )  # fmt: skip
            records.append({
                "run_id": run_id, "nonlinearity": name, "penalty": "l1", "coeff": 0.1, "converged": True,
                "init_seed": seed, "l0": L0, "degradation": increase.sum() / n_tokens.sum(), "unit": "document",
            })  # fmt: skip
    return SimulatedStudy(Path(), records, {}, 0, documents, f"{names[int(levels.argmin())]} + l1")


def stated(study: SimulatedStudy) -> list[tuple[float, bool]]:
    """Return each family's stated probability of being the best, and whether it truly is."""
    with mock.patch(
        "prolu.evaluation.comparison.replicates.read_documents_of", lambda folder: study.documents[folder.name]
    ):
        found = standings(study, ["degradation"], [L0])
    return [(one.p_best, one.family == study.best) for one in found]


def calibration(case: Case, n_studies: int, n_resamples: int = 400) -> list[dict[str, float]]:
    """Return, for each class of stated probabilities, their number, their mean, and the fraction that was right."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    with mock.patch.object(replicates, "N_RESAMPLES", n_resamples):
        pairs = np.array([pair for _ in range(n_studies) for pair in stated(simulated(case, rng))], float)
    classes = np.digitize(pairs[:, 0], CLASSES[1:-1])
    found = []
    for i in range(len(CLASSES) - 1):
        some = pairs[classes == i]
        right = {"stated": some[:, 0].mean(), "right": some[:, 1].mean()} if len(some) else {}
        found.append({"n": len(some)} | {name: float(value) for name, value in right.items()})
    return found


def expected_score(found: Sequence[dict[str, float]]) -> float:
    """Return by how much stated probabilities differ from what is right, as a mean over all of them."""
    total = sum(one["n"] for one in found)
    return sum(one["n"] * abs(one["stated"] - one["right"]) for one in found if one["n"]) / total


def main() -> None:
    """Print a row for each case, and a column for each class of stated probabilities."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-studies", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {name: calibration(case, args.n_studies) for name, case in CASES.items()}
    table = Table(title=f"mean stated probability of being best, and fraction that is; {args.n_studies} studies a case")
    for head in ("case", *(f"{a:g} to {b:g}" for a, b in pairwise(CLASSES)), "mean error"):
        table.add_column(head, justify="left" if head == "case" else "right")
    for name, classes in found.items():
        cells = [f"{one['stated']:.1%}: {one['right']:.1%} ({one['n']})" if one["n"] else "-" for one in classes]
        table.add_row(name, *cells, f"{expected_score(classes):.1%}")
    Console(width=190).print(table)
    if args.json:
        args.json.write_text(json.dumps({"n_studies": args.n_studies, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
