"""Print the comparisons of docs/findings from the tables of results beside them, by `prolu.matched`.

    python benchmarks/findings.py                                           # of comparison.md
    python benchmarks/findings.py comparison2026.csv comparison2026-stories260K.csv    # of comparison2026.md

The tables of results have no sums by document, so these intervals cover seeds only.
"""

import argparse
import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prolu.evaluation.comparison.verdicts import Verdict, matched

FINDINGS = Path(__file__).parents[1] / "docs" / "findings"

TARGETS = (8, 16, 32, 64)

OTHERS = (
    ("gated + l1", "prolu_relu + sqrt_l1"),
    ("topk", "prolu_relu + sqrt_l1"),
    ("jumprelu(0.3) + l0", "prolu_relu + sqrt_l1"),
    ("jumprelu(1) + l0", "prolu_relu + sqrt_l1"),
    ("batchtopk", "prolu_relu + sqrt_l1"),
    ("topk", "gated + l1"),
    ("batchtopk", "topk"),
    ("batchtopk", "jumprelu(0.3) + l0"),
    ("batchtopk", "jumprelu(1) + l0"),
    ("jumprelu(1) + l0", "jumprelu(0.3) + l0"),
    ("prolu_relu + l1", "relu + l1"),
    ("prolu_ste + l1", "relu + l1"),
    ("prolu_relu + sqrt_l1", "relu + l1"),
    ("prolu_ste + l1", "prolu_relu + sqrt_l1"),
)
"""The pairs that are compared after ReLU and ProLU under Sqrt(L1)."""


PAIRS_2026 = (
    ("jumprelu(1) + l0", "batchtopk"),
    ("jumprelu_plain(1) + quadratic_l0", "jumprelu(1) + l0"),
    ("jumprelu_ste + tanh", "jumprelu(1) + l0"),
    ("prolu_relu + sqrt_l1", "relu + l1"),
    ("jumprelu(1) + l0", "prolu_relu + sqrt_l1"),
    ("batchtopk", "prolu_relu + sqrt_l1"),
    ("batchtopk, matryoshka", "batchtopk"),
    ("jumprelu(1) + l0, matryoshka", "jumprelu(1) + l0"),
    ("prolu_relu + sqrt_l1, matryoshka", "prolu_relu + sqrt_l1"),
    ("jumprelu(1) + l0, matryoshka", "batchtopk, matryoshka"),
    ("prolu_relu + sqrt_l1, matryoshka", "batchtopk, matryoshka"),
    ("batchtopk", "batchtopk, frozen decoder"),
    ("batchtopk", "batchtopk, soft-frozen decoder"),
    ("batchtopk", "batchtopk, frozen encoder"),
    ("relu + l1", "batchtopk, soft-frozen decoder"),
)
"""The pairs of the study `comparison2026`: challenger and baseline."""


@dataclass(frozen=True)
class Tabled:
    """A study of which only the table of results is left."""

    records: list[dict[str, Any]]
    stream_seed: int = 0
    folder: Path = FINDINGS
    config: dict[str, Any] = field(
        default_factory=lambda: {"stream": {"lm_digest": "builtin"}, "held_out_digest": "the same for all"}
    )


def read_studies(file: Path = FINDINGS / "comparison.csv") -> dict[str, list[dict[str, Any]]]:
    """Return the runs in a table of results, by the study that they are from."""
    found: dict[str, list[dict[str, Any]]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            found.setdefault(row.get("study", ""), []).append({name: _value(text) for name, text in row.items()})
    return found


def _value(text: str) -> Any:
    if text in ("", "true", "false"):
        return {"": None, "true": True, "false": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def comparisons() -> dict[str, list[Verdict]]:
    """Return the verdicts of each row of the table, at the four targets."""
    runs = read_studies()
    first = Tabled([*runs["comparison"], *runs["jumprelu-0.3"]])
    second = Tabled(runs["comparison-stream1"], stream_seed=1)
    pair = ("prolu_relu + sqrt_l1", "relu + sqrt_l1")
    rows = {
        "prolu_relu + sqrt_l1 against relu + sqrt_l1": ([first], pair),
        "the same at stream seed 1 alone": ([second], pair),
        "both stream seeds pooled": ([first, second], pair),
        "prolu_ste + sqrt_l1 against relu + sqrt_l1": ([first], ("prolu_ste + sqrt_l1", "relu + sqrt_l1")),
    }
    rows |= {f"{challenger} against {baseline}": ([first], (challenger, baseline)) for challenger, baseline in OTHERS}
    return {name: [matched(studies, *pair, l0) for l0 in TARGETS] for name, (studies, pair) in rows.items()}


def row_of(name: str, verdicts: list[Verdict]) -> str:
    """Return a row of the table in Markdown."""
    cells = []
    for v in verdicts:
        doubt = " n.d." if v.verdict == "not distinguishable" else ""
        interval = f"[{v.low:+.0%}, {v.high:+.0%}]".replace("%", "")
        change = f"{v.change:+.0%}".replace("+0%", "0%").replace("-0%", "0%")
        cells.append("out of reach" if math.isnan(v.change) else f"{change} {interval}{doubt}")
    return f"| {name} | {' | '.join(cells)} | {verdicts[0].n_unconverged} of {verdicts[0].n_runs} |"


def comparisons2026(file: Path) -> dict[str, list[Verdict]]:
    """Return the verdicts on the pairs of `comparison2026`, at the four targets."""
    (runs,) = read_studies(file).values()
    study = Tabled(runs)
    return {f"{c} against {b}": [matched([study], c, b, l0) for l0 in TARGETS] for c, b in PAIRS_2026}


def means(file: Path) -> None:
    """Print the mean CE increase of each family at each target L0, with the number of converged runs if not all are."""
    (runs,) = read_studies(file).values()
    print(f"| target L0 | {' | '.join(map(str, TARGETS))} |")
    print(f"|{'---|' * (len(TARGETS) + 1)}")
    for family in dict.fromkeys(run["family"] for run in runs):
        cells = []
        for target in TARGETS:
            some = [run for run in runs if run["family"] == family and run["target_l0"] == target]
            n_converged = sum(bool(run["converged"]) for run in some)
            mean = sum(run["degradation"] for run in some) / len(some)
            l0 = sum(run["l0"] for run in some) / len(some)
            notes = [] if n_converged == len(some) else [f"({n_converged})"]
            notes += [f"at L0 {l0:.1f}"] if abs(l0 / target - 1) > 0.05 else []
            cells.append(" ".join([f"{mean:.3f}".removeprefix("0"), *notes]))
        print(f"| {family} | {' | '.join(cells)} |")
    print()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="tables of the study comparison2026, in docs/findings")
    files = [FINDINGS / name for name in parser.parse_args().files]
    for file in files:
        means(file)
    for found in [comparisons2026(file) for file in files] or [comparisons()]:
        print(f"| at equal L0 | {' | '.join(map(str, TARGETS))} | runs still moving |")
        print(f"|{'---|' * (len(TARGETS) + 2)}")
        for name, verdicts in found.items():
            print(row_of(name, verdicts))
        print()


if __name__ == "__main__":
    main()
