"""Draw the figures of docs/findings/comparison.md and comparison2026.md again, from the tables that lie beside them.

python scripts/draw_comparison.py
"""

import csv
from pathlib import Path
from typing import Any

from prolu.evaluation.comparison.figures import draw_frontier, save_figure

DOCS = Path(__file__).parents[1] / "docs"
FIGURES = {
    "comparison.png": "comparison.csv",
    "comparison2026.png": "comparison2026.csv",
    "comparison2026-stories.png": "comparison2026-stories260K.csv",
}
"""The table from which each figure is drawn."""


def main() -> None:
    """Draw each figure. A table with several studies has a column for them, and the first stream seed's is drawn."""
    for figure, table in FIGURES.items():
        with (DOCS / "findings" / table).open(newline="") as file:
            records = [_record(row) for row in csv.DictReader(file) if row.get("study", "comparison") == "comparison"]
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
