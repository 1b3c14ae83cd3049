"""Tables and sentences that fit a terminal of any width."""

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prolu.runtime.names import shown
from prolu.runtime.tables import Column

GAP = 2
"""The columns between two columns of a table."""

INDENT = " "
"""The indent of every line except headings."""


def fits(console: Console, columns: Sequence[Column]) -> bool:
    """Return whether a table is no wider than the terminal as it is."""
    return _width(columns) <= console.width


def print_table(console: Console, columns: Sequence[Column], *, has_head: bool = True) -> None:
    """Print a table, no wider than the terminal.

    Where it does not fit, optional columns are left out, the last first. Only then are texts broken.
    """
    kept = list(columns)
    while not fits(console, kept) and any(column.is_optional for column in kept):
        kept.remove(next(column for column in reversed(kept) if column.is_optional))
    is_narrow = not fits(console, kept)
    table = Table(box=None, show_header=has_head, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for i, column in enumerate(kept):
        title = Text((INDENT if i == 0 else "") + column.title)
        if column.is_text:
            table.add_column(title, no_wrap=not is_narrow, overflow="fold")
        else:
            table.add_column(title, justify="right", no_wrap=True)
    for first, *others in zip(*(column.cells for column in kept), strict=True):
        table.add_row(*(Text(shown(cell)) for cell in [INDENT + first, *others]))
    console.print(table)


def _width(columns: Sequence[Column]) -> int:
    return len(INDENT) + sum(max(map(len, [c.title, *c.cells])) for c in columns) + GAP * (len(columns) - 1)


def print_sentence(console: Console, text: str, indent: str = INDENT, style: str = "") -> None:
    """Print a text, broken between words where the terminal ends, with the same indent on every line."""
    for line in lines_of(text, console.width - len(indent)):
        console.print(Text(indent + line, style=style), highlight=False, soft_wrap=True)


def lines_of(text: str, width: int) -> list[str]:
    """Return a text as lines, broken between words; only a word that is wider than a line is cut."""
    return textwrap.wrap(shown(text), max(1, width), break_on_hyphens=False) or [""]


def print_place(console: Console, name: str, place: str) -> None:
    """Print a path or a command after its name, on one line of the terminal's own, so that it is copied as one."""
    console.print(Text(f"{name + ':':9} {shown(place)}"), highlight=False, soft_wrap=True)
