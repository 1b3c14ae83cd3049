"""Styles, scripts and pages that travel inside what is written."""

import json
from pathlib import Path
from typing import Any


def asset(name: str) -> str:
    """Return the text of a file of this room, named from its folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def inlined(value: Any) -> str:
    """Data as JSON that may stand inside a script element, whatever strings it holds."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
