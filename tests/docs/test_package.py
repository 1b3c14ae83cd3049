"""What an installation gets: what importing costs, the version, the data files, the ranges of dependencies."""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

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


def test_importing_all_of_prolu_imports_nothing_slow_but_torch():
    """The time itself is measured by benchmarks/importing.py."""
    new = imported_by("import torch; from prolu import *") - imported_by("import torch")
    assert "prolu.training.trainer" in new
    assert {name.partition(".")[0] for name in new} & SLOW_TO_IMPORT == set()


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        [],
        ["train", "--help"],
        ["sweep", "--help"],
        ["sweep", "comparison", "--help"],
        ["eval", "--help"],
        ["export", "--help"],
        ["push", "--help"],
        ["--version"],
        ["train", "--no-such-flag"],
        ["sweep", "nonsense"],
    ],
)
def test_help_does_not_wait_for_torch(args):
    after = imported_by(
        f"""
import sys
from contextlib import redirect_stdout
from prolu.cli.entry_point import main
with redirect_stdout(sys.stderr):
    try:
        main({args!r})
    except SystemExit:
        pass
"""
    )
    assert "prolu.cli.training_requests" in after
    assert {name.partition(".")[0] for name in after} & (SLOW_TO_IMPORT - {"tyro"} | {"torch", "numpy"}) == set()


def test_a_lazy_name_is_the_one_of_its_module_and_others_are_missing():
    code = """
import sys, prolu, prolu.sae, prolu.interop
assert "torch" not in sys.modules
for package, name in ((prolu, "SAEs"), (prolu, "__wrapped__"), (prolu.sae, "Weights"), (prolu.interop, "pack")):
    try:
        getattr(package, name)
    except AttributeError as problem:
        assert name in str(problem) and package.__name__ in str(problem), problem
    else:
        raise AssertionError(name)
assert prolu.SAE is prolu.sae.SAE is sys.modules["prolu.sae.autoencoder"].SAE
assert prolu.interop.import_sae is sys.modules["prolu.interop.exchange"].import_sae
from prolu import cli
assert cli is sys.modules["prolu.cli"]
"""
    assert "torch" in imported_by(code)


def test_prolu_lists_its_public_names_only():
    assert dir(prolu) == sorted(prolu.__all__)
    for name in prolu.__all__:
        assert getattr(prolu, name) is not None


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
