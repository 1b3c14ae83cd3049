"""The script that is run on GPUs, at tiny sizes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_gpu_script_runs_without_a_gpu(tmp_path):
    found = tmp_path / "gpu.json"
    stages = "check,speed,stacks,stream,profile"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--stages", stages, "--json", str(found)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    figures = json.loads(found.read_text())
    assert len(figures["check"]) == 22
    assert all(row["right"] for row in figures["check"].values())
    assert all(row["ms"] > 0 for name, row in figures["speed"].items() if "floor" not in name)
    assert len(figures["stacks"]) == 6
    stream = figures["stream"]
    assert list(stream) == ["harvest, bf16", "harvest, fp32", "from a store"]
    assert all(stream[f"harvest, {dtype}"]["harvest_over_bare"] > 0 for dtype in ("bf16", "fp32"))
    assert stream["from a store"]["seconds_per_step"] > 0
    assert all(stream["from a store"][f"waiting_read_ahead_{way}"] < 1 for way in ("off", "on"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (2, "this machine has no GPU that torch can use\n")
