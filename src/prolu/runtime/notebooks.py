"""What a notebook shows of an object: tables in HTML, short texts, tables for pandas.

The HTML escapes all text, has no script, and sets no colour, so that it is read on white and on black alike.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from html import escape
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from prolu.runtime.names import shown
from prolu.runtime.tables import Column

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MOST_ROWS = 60
"""The number of rows that a table in a notebook has at most; a longer one would push the rest of the page away."""

RIGHT = "text-align:right;font-variant-numeric:tabular-nums"
LEFT = "text-align:left"


def html_table(caption: str, columns: Sequence[Column], *notes: str) -> str:
    """Return a table as HTML, with notes below it.

    Args:
        caption: the first line, which says what is shown.
        columns: the columns; of more than `MOST_ROWS` rows the first are shown.
        notes: sentences below the table; empty ones are left out.
    """
    n_rows = len(columns[0].cells) if columns else 0
    n_more = max(0, n_rows - MOST_ROWS)
    head = "".join(_cell("th", column.title, column, ' scope="col"') for column in columns)
    rows = [[_cell("td", column.cells[i], column) for column in columns] for i in range(n_rows - n_more)]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    below = [*(note for note in notes if note), *([f"{n_more} more rows are not shown."] if n_more else [])]
    said = "".join(f"<div><small>{html_text(note)}</small></div>" for note in below)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if n_rows else ""
    return f"<div><div>{html_text(caption)}</div>{table}{said}</div>"


def html_facts(caption: str, facts: Mapping[str, str], more: Mapping[str, str] | None = None) -> str:
    """Return facts as HTML, one in a row, with its name at the row's head.

    Args:
        caption: the first line.
        facts: the facts by name.
        more: facts that are shown when the reader opens them.
    """
    rest = f"<details><summary>{len(more)} more</summary>{_facts(more)}</details>" if more else ""
    return f"<div><div>{html_text(caption)}</div>{_facts(facts)}{rest}</div>"


def html_text(text: str) -> str:
    """Return text as it may stand between two tags or in an attribute."""
    return escape(shown(text))


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row" style="{LEFT}">{html_text(name)}</th><td style="{LEFT}">{html_text(value)}</td></tr>'
        for name, value in facts.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _cell(tag: str, text: str, column: Column, attributes: str = "") -> str:
    return f'<{tag}{attributes} style="{LEFT if column.is_text else RIGHT}">{html_text(text)}</{tag}>'


def changed_fields(config: "DataclassInstance") -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, by name."""
    return {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != _default(f)}


def _default(of: Field[Any]) -> Any:
    return of.default_factory() if of.default_factory is not MISSING else of.default


class Row(Protocol):
    """A NamedTuple of which a list is shown as a table."""

    def cells(self) -> dict[str, str]:
        """Return the texts of its row, by the titles of the columns."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


AnyRow = TypeVar("AnyRow", bound=Row)


class ShownRows(list[AnyRow]):
    """A list that a notebook shows as a table, and that pandas can take."""

    def _repr_html_(self) -> str:
        if not self:
            return html_table("none", [])
        rows = [row.cells() for row in self]
        columns = [Column(title, [row[title] for row in rows], is_text=True) for title in rows[0]]
        return html_table(f"{len(self)} of {type(self[0]).__name__}", columns)

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with a row for each item and a column for each of its fields.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return data_frame(row._asdict() for row in self)


def data_frame(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Return a pandas DataFrame of rows, with a column for every field that any row has.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ModuleNotFoundError("to_pandas: pandas is not installed; pip install 'prolu[pandas]'") from None
    return pandas.DataFrame([dict(row) for row in rows])


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    # In a notebook, IPython has been imported already. In a terminal, IPython has no kernel.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")
