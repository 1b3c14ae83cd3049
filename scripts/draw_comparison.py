"""Draw the figures of comparison.md, comparison2026.md and real-model.md in docs/findings from the tables beside them.

python scripts/draw_comparison.py
"""

import csv
from pathlib import Path
from typing import Any

from prolu.evaluation.comparison.figures import draw_frontier, save_figure

DOCS = Path(__file__).parents[1] / "docs"
FIGURES = {
    "comparison.png": ("comparison.csv", {"study": "comparison"}),
    "comparison2026.png": ("comparison2026.csv", {}),
    "comparison2026-stories.png": ("comparison2026-stories260K.csv", {}),
    "real-model.png": ("real-model.csv", {"init_seed": 0}),
}
"""The table from which each figure is drawn, and which of its rows, by the values of some columns."""


def main() -> None:
    """Draw each figure."""
    for figure, (table, wanted) in FIGURES.items():
        with (DOCS / "findings" / table).open(newline="") as file:
            records = [_record(row) for row in csv.DictReader(file)]
        records = [r for r in records if wanted.items() <= r.items()]
        save_figure(draw_frontier(records, "l0", "degradation"), DOCS / "figures" / figure)


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
