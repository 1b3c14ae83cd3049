"""Keep the docstrings of attributes as they stand: napoleon takes the text before their first colon for a type."""

from typing import Any

from sphinx.application import Sphinx

ATTRIBUTES = ("attribute", "data", "property")

_kept: dict[str, list[str]] = {}


def keep(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Remember the docstring of an attribute before napoleon changes it."""
    if what in ATTRIBUTES:
        _kept[name] = list(lines)


def put_back(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Replace what napoleon has made of it by the remembered docstring."""
    if name in _kept:
        lines[:] = _kept.pop(name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Call one function before napoleon, which listens at priority 500, and the other after it."""
    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", put_back, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
