"""What an installation gets: what importing costs, the version, the data files, the ranges of dependencies."""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import prolu
from prolu.cli.entry_point import main

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SLOW_TO_IMPORT = {
    "datasets", "httpx", "huggingface_hub", "matplotlib", "numba", "pandas", "plotly", "pyarrow", "ray", "scipy",
    "tensorboard", "tokenizers", "transformers", "tyro", "wandb",
}  # fmt: skip


def imported_by(statement):
    """Modules that a new interpreter has afterwards."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_prolu_imports_nothing_slow_but_torch():
    """The time itself is measured by benchmarks/importing.py."""
    new = imported_by("import torch, prolu") - imported_by("import torch")
    assert "prolu.training.trainer" in new
    assert {name.partition(".")[0] for name in new} & SLOW_TO_IMPORT == set()


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"prolu {PROJECT['project']['version']}\n"
    assert prolu.__version__ == PROJECT["project"]["version"]


def test_every_data_file_is_in_the_package():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["prolu"]
    package = ROOT / "src" / "prolu"
    files = [file.relative_to(package) for file in package.rglob("*") if file.is_file() and file.suffix != ".py"]
    files = [file.as_posix() for file in files if "__pycache__" not in file.parts]
    assert "py.typed" in files
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in patterns)] == []


def test_the_oldest_versions_are_those_of_the_project():
    """constraints-oldest.txt, with which `make oldest` tests, pins each lower bound."""
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in PROJECT["project"]["dependencies"])
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert (pins[name] + ".").startswith(bound + "."), name
