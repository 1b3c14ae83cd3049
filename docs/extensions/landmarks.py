"""Gives names to the parts of a page that furo and Sphinx leave without one, so that screen readers tell them apart."""

from pathlib import Path
from typing import Any

NAMED = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="All pages">',
    '<aside class="toc-drawer': '<aside aria-label="On this page" class="toc-drawer',
}
"""What stands in the pages as they are built, and what takes its place."""


def name_parts(app: Any, problem: Exception | None) -> None:
    """Name the parts of all pages once they are built."""
    if problem is not None or app.builder.format != "html":
        return
    for file in Path(app.outdir).rglob("*.html"):
        text = named = file.read_text(encoding="utf-8")
        for unnamed, part in NAMED.items():
            named = named.replace(unnamed, part)
        if named != text:
            file.write_text(named, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Register the extension."""
    app.connect("build-finished", name_parts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
