"""A part of `make datasets-fuzz`, with another seed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "checks" / "datasets_fuzz.py"


@pytest.mark.slow  # a process of its own, which imports all of `datasets`
def test_random_datasets_are_read_as_datasets_reads_them():
    ran = subprocess.run(
        [sys.executable, CHECK, "--n", "30", "--seed", "1"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.stdout.splitlines()[-1] == "datasets 30, different 0", ran.stdout + ran.stderr
