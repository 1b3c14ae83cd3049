"""The README is true: its tree is the disk, its examples and commands run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def test_the_tree_is_the_disk():
    tree = next(block for block in blocks("") if block.startswith("src/prolu/"))
    listed = re.findall(r"^  (\S+)", tree, flags=re.MULTILINE)
    package = ROOT / "src" / "prolu"
    there = {p.name for p in package.glob("*.py") if p.name != "__init__.py"}
    there |= {f"{p.name}/" for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert sorted(listed) == sorted(there)
    assert all(re.match(r"  \S+ +\S", line) for line in tree.splitlines()[1:])


def test_every_file_named_in_the_docs_exists():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for path in re.findall(r"\b(?:docs|tests|src|benchmarks|scripts|examples)/[\w./-]+\w", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


@pytest.mark.slow  # trains SAEs
def test_python_examples_run(tmp_path):
    documents = [README, *(file.read_text() for file in (ROOT / "docs").glob("*.md"))]
    for example in (example for text in documents for example in blocks("python", text)):
        subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True, timeout=600)
    assert (tmp_path / "runs/first/frontier.svg").exists()


@pytest.mark.slow  # runs the demo, about six minutes
def test_commands_run(tmp_path, tiny_lm_folder, stories_file):
    """Every command, with the small model and text of the tests in place of GPT-2 and the reader's file."""
    bin_folder = Path(sys.executable).parent
    commands = [shlex.split(line, comments=True) for line in "".join(blocks("sh")).splitlines() if line.strip()]
    for command in commands:
        if command[0] == "make":
            if command[1] == "demo":
                run([bin_folder / "prolu", "demo", "--out", tmp_path / "runs/demo"], tmp_path)
            continue  # the tests that `make test` runs are running
        replaced = [{"gpt2": tiny_lm_folder, "my_text.parquet": stories_file}.get(part, part) for part in command[1:]]
        replaced = ["blocks.1.hook_resid_pre" if part == "blocks.6.hook_resid_pre" else part for part in replaced]
        extra = ["--ctx", "32"] if "--lm" in command else []
        if command[1] in ("sweep", "train") and "--dry-run" not in command:
            extra += ["--eval-tokens", "640"]
        if command[1] == "train":
            extra += ["--n-tokens", "20000", "--d-sae", "64", "--batch-size", "256"]
        if command[1] == "harvest":
            extra += ["--n-tokens", "20000"]
        run([bin_folder / command[0], *replaced, *extra], tmp_path)
    assert (tmp_path / "runs/demo/report.html").stat().st_size > 1e6
    assert len((tmp_path / "runs/demo/results.jsonl").read_text().splitlines()) == 18
    assert (tmp_path / "runs/gpt2/report.html").exists()


def run(command, folder):
    done = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
