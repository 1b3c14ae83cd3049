"""Print the comparisons of docs/findings/comparison.md from the table of results beside it, by `prolu.matched`.

    python benchmarks/findings.py

The table of results has no sums by document, so these intervals cover seeds only.
"""

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
            found.setdefault(row["study"], []).append({name: _value(text) for name, text in row.items()})
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


def main() -> None:
    """Print the table."""
    print(f"| at equal L0 | {' | '.join(map(str, TARGETS))} | runs still moving |")
    print(f"|{'---|' * (len(TARGETS) + 2)}")
    for name, verdicts in comparisons().items():
        print(row_of(name, verdicts))


if __name__ == "__main__":
    main()
