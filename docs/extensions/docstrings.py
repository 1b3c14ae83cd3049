"""Docstrings of attributes as they stand: napoleon takes what comes before their first colon for a type."""

from typing import Any

from sphinx.application import Sphinx

ATTRIBUTES = ("attribute", "data", "property")

_kept: dict[str, list[str]] = {}


def keep(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon."""
    if what in ATTRIBUTES:
        _kept[name] = list(lines)


def put_back(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """After it."""
    if name in _kept:
        lines[:] = _kept.pop(name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Napoleon listens at priority 500."""
    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", put_back, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
