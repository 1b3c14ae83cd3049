"""Print the comparisons of docs/findings from the tables of results beside them, by `prolu.matched`.

    python benchmarks/findings.py                                           # of comparison.md
    python benchmarks/findings.py comparison2026.csv comparison2026-stories260K.csv    # of comparison2026.md
    python benchmarks/findings.py causes.csv causes-hard.csv                           # of causes.md
    python benchmarks/findings.py synthetic.csv                                        # of synthetic.md

What is compared is the CE increase, or the FVU where there is no language model. The tables of results have no sums by
document, so these intervals cover seeds only.
"""

import argparse
import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

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

CAUSES = (
    ("prolu_relu", "relu"),
    ("relu, refitted", "relu"),
    ("prolu_relu", "relu, refitted"),
    ("prolu_ste", "prolu_relu"),
    ("jumprelu(1)", "prolu_relu"),
    ("prolu_ste", "relu"),
)
"""The pairs of the study `causes`, within each penalty: the whole gain; what less suppression gives; what the other
forward pass gives beyond it; and what other gradients give."""


def under(family: str, penalty: str) -> str:
    """Return the name of a family under a penalty: the penalty stands before what else is said of the family."""
    nonlinearity, *options = family.split(", ")
    return ", ".join([f"{nonlinearity} + {penalty}", *options])


SYNTHETIC = (
    ("prolu_relu + sqrt_l1", "relu + l1"),
    ("prolu_ste + sqrt_l1", "relu + l1"),
    ("jumprelu(1) + l0", "relu + l1"),
    ("batchtopk", "relu + l1"),
    ("batchtopk", "jumprelu(1) + l0"),
    ("jumprelu(1) + l0", "prolu_relu + sqrt_l1"),
    ("batchtopk", "batchtopk, frozen decoder"),
    ("batchtopk", "batchtopk, frozen encoder"),
)
"""The pairs of the study `synthetic`: challenger and baseline."""

TRUTHS = ("truth_found", "truth_f1", "truth_slope", "truth_suppression")
"""The scores against known features in the table of the study `synthetic`."""

PAIRS = {
    "comparison2026": PAIRS_2026,
    "synthetic": SYNTHETIC,
    "causes": tuple((under(c, p), under(b, p)) for p in ("l1", "sqrt_l1") for c, b in CAUSES),
}
"""The pairs of each study, by the beginning of its table's name, up to the first hyphen."""


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
        interval = "(one seed)" if math.isnan(v.low) else f"[{v.low:+.0%}, {v.high:+.0%}]".replace("%", "")
        change = f"{v.change:+.0%}".replace("+0%", "0%").replace("-0%", "0%")
        cells.append("out of reach" if math.isnan(v.change) else f"{change} {interval}{doubt}")
    return f"| {name} | {' | '.join(cells)} | {verdicts[0].n_unconverged} of {verdicts[0].n_runs} |"


def targets_of(runs: list[dict[str, Any]]) -> list[float]:
    """Return the target L0s of some runs, ascending."""
    return sorted({run["target_l0"] for run in runs})


def metric_of(runs: list[dict[str, Any]]) -> str:
    """Return the field that is compared: the CE increase, or the FVU of runs without a language model."""
    return "fvu" if all(run["degradation"] is None for run in runs) else "degradation"


def comparisons_of(file: Path) -> dict[str, list[Verdict]]:
    """Return the verdicts on a study's pairs, at its target L0s."""
    (runs,) = read_studies(file).values()
    study = Tabled(runs)
    return {
        f"{c} against {b}": [matched([study], c, b, l0, y=metric_of(runs)) for l0 in targets_of(runs)]
        for c, b in PAIRS[file.stem.split("-")[0]]
    }


def shares(file: Path) -> list[str]:
    """Return rows for `causes`: the share of ProLU_ReLU's gain, in logarithms, that a refitted ReLU has at each L0."""
    found = comparisons_of(file)
    rows = []
    for penalty in ("l1", "sqrt_l1"):
        relu = under("relu", penalty)
        wholes = found[f"{under('prolu_relu', penalty)} against {relu}"]
        parts = found[f"{under('relu, refitted', penalty)} against {relu}"]
        cells = [
            "-" if math.isnan(whole.change) or whole.change >= 0 else f"{_log(part) / _log(whole):.0%}"
            for whole, part in zip(wholes, parts, strict=True)
        ]
        rows.append(f"| less suppression's share of the gain, {penalty} | {' | '.join(cells)} |")
    return rows


def _log(verdict: Verdict) -> float:
    return math.log1p(verdict.change)


def means(file: Path) -> None:
    """Print each family's mean at each target L0, with the number of converged runs if not all are."""
    (runs,) = read_studies(file).values()
    targets = targets_of(runs)
    print(f"| target L0 | {' | '.join(f'{target:g}' for target in targets)} |")
    print(f"|{'---|' * (len(targets) + 1)}")
    for family in dict.fromkeys(run["family"] for run in runs):
        cells = []
        for target in targets:
            some = [run for run in runs if run["family"] == family and run["target_l0"] == target]
            n_converged = sum(bool(run["converged"]) for run in some)
            mean = sum(run[metric_of(runs)] for run in some) / len(some)
            l0 = sum(run["l0"] for run in some) / len(some)
            notes = [] if n_converged == len(some) else [f"({n_converged})"]
            notes += [f"at L0 {l0:.1f}"] if abs(l0 / target - 1) > 0.05 else []
            cells.append(" ".join([f"{mean:.3f}".removeprefix("0"), *notes]))
        print(f"| {family} | {' | '.join(cells)} |")
    print()


def truths(file: Path) -> list[str]:
    """Return rows for `synthetic`: at each target L0 and of each family, the scores against the known features.

    Each is the mean over seeds with the half of its 95% t interval; a hyphen, where no feature was found.
    """
    (runs,) = read_studies(file).values()
    rows = []
    for target in targets_of(runs):
        for family in dict.fromkeys(run["family"] for run in runs):
            some = [run for run in runs if run["family"] == family and run["target_l0"] == target]
            cells = [_mean_with_interval([run[name] for run in some]) for name in ("l0", *TRUTHS)]
            rows.append(f"| {target:g} | {family} | {' | '.join(cells)} |")
    return rows


def _mean_with_interval(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return "-"
    half = stats.t.ppf(0.975, len(there) - 1) * stats.sem(there)
    return " ±".join(f"{number:.2f}".removeprefix("0") for number in (sum(there) / len(there), half))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="tables of the studies comparison2026 or causes, in docs/findings")
    files = [FINDINGS / name for name in parser.parse_args().files]
    for file in files:
        means(file)
    tables = [(comparisons_of(file), targets_of(*read_studies(file).values())) for file in files]
    for found, targets in tables or [(comparisons(), TARGETS)]:
        print(f"| at equal L0 | {' | '.join(f'{target:g}' for target in targets)} | runs not converged |")
        print(f"|{'---|' * (len(targets) + 2)}")
        for name, verdicts in found.items():
            print(row_of(name, verdicts))
        print()
    for file in files:
        if file.stem.startswith("causes"):
            print("\n".join(shares(file)))
        if file.stem.startswith("synthetic"):
            print("\n".join(truths(file)))


if __name__ == "__main__":
    main()
