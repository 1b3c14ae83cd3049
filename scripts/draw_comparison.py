"""Draw docs/figures/comparison.png again, from the results that docs/findings/comparison.csv keeps.

python scripts/draw_comparison.py
"""

import csv
from pathlib import Path
from typing import Any

from prolu.evaluation.comparison.figures import draw_frontier, save_figure

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Draw the study at the first stream seed; the table has two other studies beside it."""
    with (DOCS / "findings" / "comparison.csv").open() as file:
        records = [_record(row) for row in csv.DictReader(file) if row["study"] == "comparison"]
    save_figure(draw_frontier(records, "l0", "degradation"), DOCS / "figures" / "comparison.png")


def _record(row: dict[str, str]) -> dict[str, Any]:
    """Return a line of results with numbers and booleans where the table has their text."""
    return {name: _value(text) for name, text in row.items()}


def _value(text: str) -> Any:
    if text in ("True", "False", "true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text or None


if __name__ == "__main__":
    main()
