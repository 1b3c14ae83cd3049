"""Whole commands on a mesh: `torchrun ... -m prolu train --mesh`; what they leave, how they refuse, stop and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from prolu import SAE
from prolu.runtime.files import read_json_lines
from support.mesh_worker import torchrun

pytestmark = pytest.mark.slow

ARGS = ("--nonlinearity", "prolu_ste", "--d-sae", "96", "--coeff", "0.01", "--batch-size", "400",
        "--eval-tokens", "2048", "--window-tokens", "8192", "--latent-pages", "none", "--resample-fractions", "0.5",
        "--resample-dead-below", "0.05", "--resample-candidates", "3000", "--resample-count-fraction", "0.3",
        "--threads", "2", "--checkpoint-minutes", "0")  # fmt: skip
TOKENS = ("--n-tokens", "24000")
ROWS_ARGS = ("--nonlinearity", "relu", "--d-sae", "64", "--coeff", "0.01", "--n-tokens", "20000", "--batch-size",
             "64", "--eval-tokens", "600", "--lr", "5e-3", "--latent-pages", "none", "--threads", "2",
             "--checkpoint-minutes", "0")  # fmt: skip


def record_of(out):
    (record,) = read_json_lines(out / "results.jsonl")
    return record


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process leaves."""
    out = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "prolu", "train", "--out", str(out), *ARGS, *TOKENS]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return out


def check_like(out, alone):
    """The same files, and figures that differ by rounding only."""
    names = [sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) for folder in (out, alone)]
    assert names[0] == names[1]
    ours, theirs = record_of(out), record_of(alone)
    assert ours.keys() == theirs.keys()
    assert ours["resampled"] == theirs["resampled"]
    for name, value in theirs.items():
        if isinstance(value, float):
            assert ours[name] == pytest.approx(value, rel=0.01, abs=1e-3), name
    assert [json.loads(line)["step"] for line in (out / ours["run_id"] / "metrics.jsonl").open()] == [
        json.loads(line)["step"] for line in (alone / ours["run_id"] / "metrics.jsonl").open()
    ]
    assert json.loads((out / "config.json").read_text()) == json.loads((alone / "config.json").read_text())
    assert SAE.load(out / ours["run_id"]).config == SAE.load(alone / ours["run_id"]).config


@pytest.mark.parametrize("mesh", ["latent=2", "data=2", "data=2,latent=2"])
def test_leaves_what_one_process_leaves(mesh, alone, tmp_path):
    out, n = tmp_path / "run", 4 if "," in mesh else 2
    done = torchrun(n, "-m", "prolu", "train", "--out", str(out), *ARGS, *TOKENS, "--mesh", mesh)
    assert done.returncode == 0, done.stderr[-3000:]
    check_like(out, alone)
    assert done.stdout.count("report: ") == 1
    told = [line for line in read_json_lines(out / "log.jsonl") if line["event"] == "mesh"]
    assert len(told) == 1


def begin(n, out, mesh):
    """The same command, longer and started beside; returns once a checkpoint is there."""
    command = [sys.executable, "-m"]
    command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m"] if mesh else []
    command += ["prolu", "train", "--out", str(out), *ARGS, *TOKENS, *(("--mesh", mesh) if mesh else ())]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list((out / "checkpoints").glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def workers_of(process):
    """Process numbers of the ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if "prolu" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.parametrize(("first", "second"), [("data=2,latent=2", "latent=2"), ("latent=2", ""), ("", "data=2")])
def test_killed_on_one_mesh_it_goes_on_on_another(first, second, alone, tmp_path):
    """A rank is killed: all end. What was saved is taken up by other ranks, in the same folder."""
    out = tmp_path / "run"
    process = begin(4 if "," in first else 2, out, first)
    ranks = workers_of(process) if first else [process.pid]
    assert ranks
    os.kill(ranks[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0, stderr[-2000:]
    assert not (out / "results.jsonl").exists()
    process = begin(2, out, second)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    check_like(out, alone)
    resumed = [line for line in read_json_lines(out / "log.jsonl") if line["event"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0]["step"] > 0


@pytest.fixture(scope="module")
def rows_alone(tmp_path_factory):
    """Rows in a file, and what one process leaves of them."""
    folder = tmp_path_factory.mktemp("rows")
    g = np.random.default_rng(0)
    codes = (g.random((6000, 64)) < 0.05) * g.random((6000, 64))
    np.save(folder / "rows.npy", (codes @ g.normal(size=(64, 16))).astype(np.float32))
    command = [sys.executable, "-m", "prolu", "train", "--out", str(folder / "run"), *ROWS_ARGS]
    command += ["--activations", str(folder / "rows.npy")]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return folder


@pytest.mark.parametrize("mesh", ["latent=2", "data=2"])
def test_rows_without_a_language_model(mesh, rows_alone, tmp_path):
    """No language model rounds differently on each rank, so figures are far closer than those above.

    ReLU, because it is continuous: where ProLU's gate is decided by rounding, a whole latent comes or goes.
    """
    out, rows = tmp_path / "run", str(rows_alone / "rows.npy")
    done = torchrun(2, "-m", "prolu", "train", "--out", str(out), *ROWS_ARGS, "--activations", rows, "--mesh", mesh)
    assert done.returncode == 0, done.stderr[-3000:]
    check_like(out, rows_alone / "run")
    ours, theirs = record_of(out), record_of(rows_alone / "run")
    assert theirs["degradation"] is None
    for name in ("mse", "fvu"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    # A latent whose pre-activation is 0 to rounding may be active in one and not in the other: two such at most.
    assert ours["l0"] == pytest.approx(theirs["l0"], abs=2.5 / theirs["eval_tokens"])


def test_asked_to_stop_all_ranks_save_and_stop(alone, tmp_path):
    out = tmp_path / "run"
    process = begin(2, out, "latent=2")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert stderr.count("prolu: interrupted; what was finished is saved; run the same command again to resume") == 1, (
        stderr[-3000:]
    )
    assert list((out / "checkpoints").glob("step-*"))
    process = begin(2, out, "latent=2")
    process.communicate(timeout=300)
    assert process.returncode == 0
    check_like(out, alone)


def test_refused_by_all_ranks_in_one_sentence(tmp_path):
    out = tmp_path / "run"
    done = torchrun(2, "-m", "prolu", "train", "--out", str(out), *ARGS, *TOKENS, "--mesh", "latent=2", "--d-sae", "97")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("prolu: ")]
    assert said == ["prolu: d_sae 97: not divisible by the mesh's latent=2"]
    assert "exitcode  : 2" in done.stderr
    assert not out.exists()
