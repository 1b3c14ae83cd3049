"""The scores of saved SAEs side by side, as `prolu eval` prints them."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from prolu.runtime.names import shown

NARROWEST = 12
"""The columns that a number takes at least: a sign, six digits, a point and an exponent."""

GAP = 2
"""The columns between two SAEs."""


def score_table(scores: Sequence[tuple[str, Mapping[str, float]]], width: int) -> list[str]:
    """Return the lines of a table with a row per figure and a column per SAE, none wider than the terminal.

    One SAE needs no head: its name stands in the command above. SAEs that do not fit beside one another are continued
    in further tables below.

    Args:
        scores: The name and the figures of each SAE.
        width: The width of the terminal.
    """
    if len(scores) == 1:
        return [f"{figure:24} {value:.6g}" for figure, value in scores[0][1].items()]
    figures = list(dict.fromkeys(name for _, found in scores for name in found))
    first = max(map(len, figures))
    room = width - first
    n_fitting = max(1, room // (NARROWEST + GAP))
    # The same number of SAEs in each table, as nearly as can be.
    n_tables = -(-len(scores) // n_fitting)
    per_table = -(-len(scores) // n_tables)
    lines: list[str] = []
    for start in range(0, len(scores), per_table):
        beside = scores[start : start + per_table]
        names = [shown(name) for name, _ in beside]
        column = max(NARROWEST, min(max(map(len, names)), room // per_table - GAP))
        lines += [""] if lines else []
        lines += _heads(names, first, column)
        for figure in figures:
            cells = [f"{found[figure]:.6g}" if figure in found else "" for _, found in beside]
            lines.append((f"{figure:{first}}" + "".join(f"{cell:>{column + GAP}}" for cell in cells)).rstrip())
    return lines


def _heads(names: Sequence[str], first: int, column: int) -> Iterator[str]:
    """Yield the lines with the names of SAEs, broken where they are too long for their column, and a rule."""
    broken = [textwrap.wrap(name, column) or [""] for name in names]
    depth = max(map(len, broken))
    # Short names stand at the bottom, right above their numbers.
    aligned = [[""] * (depth - len(parts)) + parts for parts in broken]
    for parts in zip(*aligned, strict=True):
        yield (" " * first + "".join(f"{part:>{column + GAP}}" for part in parts)).rstrip()
    # Plain dashes, because not every encoding of a file that output is sent to has characters for drawing lines.
    yield "-" * (first + len(names) * (column + GAP))
