"""numba's cache on the disk is never a reason to fail: without a place, full, damaged or taken away."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = """
from typing import no_type_check
from prolu.training.steps.jit import jit

@jit()
@no_type_check
def twice(x):
    return 2 * x

@jit()
@no_type_check
def four_times(x):
    return twice(twice(x))
"""

USE = """
import logging, resource, sys
logging.basicConfig(format="said: %(message)s")
import kernels
if sys.argv[1:] == ["full disk"]:  # folders can be made, and no file can grow
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
if sys.argv[1:] == ["gone"]:  # after the place was found, and before it is used
    import shutil
    from pathlib import Path
    shutil.rmtree(kernels.twice.stats.cache_path)
    Path(kernels.twice.stats.cache_path).write_text("")
print(kernels.four_times(3), len(kernels.four_times.stats.cache_hits))
"""


@pytest.fixture
def use(tmp_path):
    """Runs the kernels in a process with a home and a package of its own; returns what it printed and warned of."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "kernels.py").write_text(KERNELS)
    (tmp_path / "current").mkdir()

    def run(*words, **environment):
        source = Path(__file__).parents[2] / "src"
        plain = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME")}
        places = {"PYTHONPATH": f"{source}:{tmp_path / 'package'}", "HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", USE, *words],
            env=plain | places | environment,
            cwd=tmp_path / "current",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), [line for line in done.stderr.splitlines() if line.startswith("said:")]

    return run


def fill(path):
    """Put a file where a folder is wanted: not even root can write into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    return path


def test_a_second_process_finds_the_kernels(use):
    assert use() == ("12 0", [])
    assert use() == ("12 1", [])


@pytest.mark.parametrize("home", ["a file", "missing", "none"])
def test_no_place_at_all_is_said_once(use, tmp_path, home):
    fill(tmp_path / "package" / "__pycache__")
    where = {"a file": fill(tmp_path / "home"), "missing": tmp_path / "home" / "of" / "nobody", "none": ""}[home]
    given = {"NUMBA_CACHE_DIR": str(fill(tmp_path / "taken"))}
    # `~` of a user without a home, which expanduser leaves as it is
    given |= {"XDG_CACHE_HOME": "~/.cache"} if home == "none" else {"HOME": str(where)}
    printed, said = use(**given)
    assert printed == "12 0"
    assert len(said) == 1
    assert "NUMBA_CACHE_DIR" in said[0]
    assert not list((tmp_path / "current").iterdir())  # no folder named ~, whose files would be run as code
    given["NUMBA_CACHE_DIR"] = str(tmp_path / "good")  # what the sentence advises
    assert use(**given) == ("12 0", [])
    assert use(**given) == ("12 1", [])


def test_a_place_that_others_can_write_is_never_chosen(use, tmp_path):
    fill(tmp_path / "package" / "__pycache__")
    fill(tmp_path / "home")
    shared = tmp_path / "shared"
    shared.mkdir()
    _, said = use(TMPDIR=str(shared))
    assert said
    assert not list(shared.iterdir())


@pytest.mark.parametrize("fault", ["full disk", "gone"])
def test_a_cache_that_cannot_be_written_any_more(use, fault):
    printed, said = use(fault)
    assert printed == "12 0"
    assert len(said) == 1
    assert "NUMBA_CACHE_DIR" in said[0]


DAMAGES = {
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "text": lambda file: file.write_text("hello\n"),
    "the end missing": lambda file: file.write_bytes(file.read_bytes()[:-1]),
}


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", ["half", *(pytest.param(d, marks=pytest.mark.slow) for d in list(DAMAGES)[1:])])
def test_a_damaged_cache_is_made_anew(use, tmp_path, damage, ending):
    use()
    files = sorted((tmp_path / "package" / "__pycache__").glob(f"*.{ending}"))
    assert len(files) == 2  # one for each kernel
    for file in files:
        DAMAGES[damage](file)
    printed, said = use()
    assert printed == "12 0"
    assert len(said) == 1
    assert "compiled anew" in said[0]
    assert use() == ("12 1", [])


def test_a_folder_in_place_of_a_file_of_the_cache(use, tmp_path):
    use()
    for file in (tmp_path / "package" / "__pycache__").glob("*.nb?"):
        file.unlink()
        file.mkdir()
    assert use()[0] == "12 0"


def test_a_cache_that_is_removed_is_made_anew(use, tmp_path):
    use()
    shutil.rmtree(tmp_path / "package" / "__pycache__")
    assert use() == ("12 0", [])
