"""The benchmark scripts run and write what they promise; what they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow  # starts Python anew
def test_the_step_benchmark_writes_its_figures(tmp_path):
    shape = ["--d-in", "32", "--d-sae", "64", "--batch", "128", "--l0", "8", "--rounds", "1"]
    command = [sys.executable, str(BENCHMARKS / "step.py"), *shape, "--json", str(tmp_path / "step.json")]
    subprocess.run(command, check=True, timeout=300)
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["floor_s"] > 0
    assert list(result["variants"]) == ["sparse_numba", "sparse_torch", "dense", "autograd"]
    for figures in result["variants"].values():
        assert figures["x_floor"] == pytest.approx(figures["median_s"] / result["floor_s"])


@pytest.mark.slow  # starts Python anew
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_the_gpu_benchmark_says_when_there_is_none():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "this machine has no GPU that torch can use"
