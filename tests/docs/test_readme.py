"""The README's tree is the disk, and files that pages name are there. Examples and commands: test_docs.py."""

import re
from pathlib import Path

from support.markdown import blocks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_tree_is_the_disk():
    tree = next(block for block in blocks("") if block.startswith("src/prolu/"))
    listed = re.findall(r"^  (\S+)", tree, flags=re.MULTILINE)
    package = ROOT / "src" / "prolu"
    there = {p.name for p in package.glob("*.py") if p.name != "__init__.py"}
    there |= {f"{p.name}/" for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert sorted(listed) == sorted(there)
    assert all(re.match(r"  \S+ +\S", line) for line in tree.splitlines()[1:])


def test_every_file_named_in_the_docs_exists():
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]:
        text = document.read_text().replace("build/docs/", "")  # made, not kept
        for path in re.findall(r"\b(?:docs|tests|src|benchmarks|scripts|examples)/[\w./-]+\w", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
