"""A column of a table, whether a terminal or a notebook shows it."""

from collections.abc import Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """A column of a table, with the text of every row."""

    title: str
    cells: Sequence[str]
    is_text: bool = False
    """Whether it is aligned on the left. On a terminal it may also be broken into lines, if nothing else helps."""
    is_optional: bool = False
    """Whether a terminal leaves it out where the table would be too wide."""
