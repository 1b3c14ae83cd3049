"""Draw docs/figures/causes.png from the tables of docs/findings/causes.md: each step from ReLU to ProLU.

python benchmarks/causes_figure.py
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from findings import CAUSES, comparisons_of, under
from prolu.evaluation.comparison.figures import save_figure

DOCS = Path(__file__).parents[1] / "docs"

TABLES = {
    "causes.csv": "built-in model",
    "causes-stories260K.csv": "stories260K",
    "causes-hard.csv": "synthetic, magnitudes vary",
    "causes-even.csv": "synthetic, one magnitude",
}
PENALTIES = {"l1": ("o", "#0072b2", "L1"), "sqrt_l1": ("s", "#d55e00", "Sqrt(L1)")}
"""The marker, colour and name of each penalty."""


def draw(ax: Axes, table: str) -> None:
    """Draw the changes of one study at each of its target L0s, a row for each pair of families."""
    found = comparisons_of(DOCS / "findings" / table)
    for row, (challenger, baseline) in enumerate(CAUSES):
        for lower, (penalty, (marker, colour, name)) in zip((-0.18, 0.18), PENALTIES.items(), strict=True):
            verdicts = found[f"{under(challenger, penalty)} against {under(baseline, penalty)}"]
            known = [v for v in verdicts if v.change == v.change]
            for i, v in enumerate(known):
                y = row + lower + 0.07 * (i - (len(known) - 1) / 2)
                ax.plot([100 * v.low, 100 * v.high], [y, y], color=colour, linewidth=1)
                label = f"under {name}" if row == 0 and i == 0 else None
                ax.plot(100 * v.change, y, marker, color=colour, markersize=4, linestyle="", label=label)
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(CAUSES)), [f"{challenger}\nagainst {baseline}" for challenger, baseline in CAUSES])
    ax.set_title(TABLES[table], fontsize=10)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)


def main() -> None:
    """Draw a panel for each study."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, len(TABLES), sharey=True)
    for ax, table in zip(axes, TABLES, strict=True):
        draw(ax, table)
        ax.set_xlabel("change of CE increase, %" if table in list(TABLES)[:2] else "change of FVU, %")
    axes[0].invert_yaxis()  # once: the panels share it
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, DOCS / "figures" / "causes.png")


if __name__ == "__main__":
    main()
