"""The README's tree shows the rooms of the package, each room lists its files, and files that pages name exist."""

import ast
import re
from pathlib import Path

import pytest

from support.markdown import blocks

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "prolu"
ROOMS = sorted(p.parent for p in PACKAGE.glob("*/__init__.py"))
HISTORY = "log.md"
"""The lab notebook keeps the names that files had when it was written."""


def contents(room):
    """The modules and inner rooms of a room."""
    modules = {p.stem for p in room.glob("*.py") if p.name != "__init__.py"}
    return modules | {p.parent.name for p in room.glob("*/__init__.py")}


def test_the_tree_is_the_disk():
    tree = next(block for block in blocks("") if block.startswith("src/prolu/"))
    listed = re.findall(r"^  (\w+)/ +\S", tree, flags=re.MULTILINE)
    assert len(listed) == len(tree.splitlines()) - 1
    assert sorted(listed) == [room.name for room in ROOMS]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_lists_its_files(room):
    docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert docstring is not None
    assert contents(room) <= set(re.findall(r"`(\w+)`", docstring))
    heads = re.findall(r"^- ((?:`\w+`(?:, )?)+):", docstring, flags=re.MULTILINE)
    assert {name.strip("`") for head in heads for name in head.split(", ")} <= contents(room)


def test_every_file_named_in_the_docs_exists():
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.name != HISTORY]
    for document in [ROOT / "README.md", *pages, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        text = document.read_text().replace("build/docs/", "")  # made, not kept
        for path in re.findall(r"\b(?:docs|tests|src|checks|benchmarks|scripts|examples)/[\w./-]+\w", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_every_link_leads_to_a_file_and_has_a_text():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    for document in pages:
        for text, target in re.findall(r"\[([^][]*)\]\(([^()\s]+)\)", document.read_text()):
            if not re.match(r"https?://|mailto:|#", target):
                assert text, f"{document.name}: a link to {target} without a text"
                assert (document.parent / target.partition("#")[0]).exists(), f"{document.name} links to {target}"


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
