"""What notebooks show: tables whose text is escaped, and that have no script and no colour of their own."""

import builtins
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import pandas
import pytest

from prolu.runtime.notebooks import (
    MOST_ROWS,
    ShownRows,
    changed_fields,
    data_frame,
    html_facts,
    html_table,
    in_notebook,
)
from prolu.runtime.tables import Column
from support.shown_html import HOSTILE, check_safe


class Pair(NamedTuple):
    name: str
    size: float

    def cells(self):
        return {"name": self.name, "size": f"{self.size:.1f}"}


@pytest.mark.parametrize(
    "html",
    [
        html_table(HOSTILE, [Column(HOSTILE, [HOSTILE, HOSTILE]), Column("b", [HOSTILE, ""], is_text=True)], HOSTILE),
        html_facts(HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE}),
        ShownRows([Pair(HOSTILE, 1.0)])._repr_html_(),
    ],
)
def test_all_text_is_escaped(html):
    text = check_safe(html)
    assert "<script>" not in html
    assert "<script>alert(1)</script>\"'&" in text
    # A mark that turns the direction of text, and a command to a terminal, are written as escapes.
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert r"\u202e\x1b[2J" in text


def test_a_long_table_is_cut_and_says_so():
    def table(n):
        return check_safe(html_table("t", [Column("n", [f"row {i};" for i in range(n)])]))

    assert table(MOST_ROWS).count("row") == MOST_ROWS
    assert table(MOST_ROWS + 7).count("row ") == MOST_ROWS
    assert "7 more rows are not shown." in table(MOST_ROWS + 7)
    assert "more rows" not in table(MOST_ROWS)
    assert check_safe(html_table("nothing", [])) == "nothing"


def test_rows_are_a_list_with_a_table():
    rows = ShownRows([Pair("a", 1.25), Pair("b", 2.0)])
    assert rows == [("a", 1.25), ("b", 2.0)]
    assert check_safe(rows._repr_html_()) == "2 of Pairnamesizea1.2b2.0"
    assert check_safe(ShownRows()._repr_html_()) == "none"
    frame = rows.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.to_dict("list") == {"name": ["a", "b"], "size": [1.25, 2.0]}


def test_rows_with_other_fields_leave_cells_empty():
    frame = data_frame([{"a": 1}, {"a": 2, "b": "x"}])
    assert list(frame.columns) == ["a", "b"]
    assert frame["b"].isna().tolist() == [True, False]


def test_without_pandas_one_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_pandas(name, *rest, **more):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(ModuleNotFoundError, match=r"^to_pandas: .* not installed; pip install 'prolu\[pandas\]'$"):
        ShownRows([Pair("a", 1.0)]).to_pandas()


def test_only_what_differs_from_the_defaults():
    @dataclass
    class Settings:
        needed: int
        rate: float = 1.0
        names: list[str] = field(default_factory=list)

    assert changed_fields(Settings(3)) == {"needed": 3}
    assert changed_fields(Settings(3, 2.0, ["a"])) == {"needed": 3, "rate": 2.0, "names": ["a"]}


@pytest.mark.parametrize(
    ("shell", "found"), [(None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=object()), True)]
)
def test_a_notebook_is_a_shell_with_a_kernel(monkeypatch, shell, found):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook() is found
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()
