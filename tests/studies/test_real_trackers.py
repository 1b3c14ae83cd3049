"""W&B (offline) and TensorBoard themselves, from an environment of their own: what they hold when it is read back."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from prolu import ActivationStream, Results, RunConfig, grid, run_sweep
from support.sweeps import contents

pytestmark = pytest.mark.slow  # makes an environment once (a minute), starts its Python

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-trackers"
PACKAGES = ["wandb==0.31.0", "tensorboard==2.21.0"]


@pytest.fixture(scope="module")
def their_python():
    """The Python of an environment that has both, and sees the packages of this one; made once."""
    python, made = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if not made.exists() or made.read_text() != " ".join(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        place = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        theirs = subprocess.run([python, *place], capture_output=True, text=True, check=True).stdout.strip()
        Path(theirs, "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [python, "-m", "pip"]
        asked = subprocess.run([*pip, "index", "versions", "wandb", "--retries", "1"], capture_output=True, check=False)
        if asked.returncode != 0:
            pytest.skip(f"PyPI does not answer, and {ENVIRONMENT.name} is not made yet")
        constraints = ["--constraint", ROOT / "constraints.txt"]
        subprocess.run([*pip, "install", "--quiet", *constraints, *PACKAGES], check=True, timeout=1800)
        made.write_text(" ".join(PACKAGES))
    return python


@pytest.fixture(scope="module")
def sweep(their_python, tiny_lm_folder, stories_file, tmp_path_factory):
    """Runs `real_trackers.py`; gives back the finished process."""
    home = tmp_path_factory.mktemp("home")

    def run(out, kill_at=0, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        environment |= {"WANDB_MODE": "offline", "HOME": str(home), "PYTHONPATH": str(ROOT / "src")} | variables
        command = [
            their_python,
            ROOT / "tests" / "support" / "real_trackers.py",
            tiny_lm_folder,
            stories_file,
            out,
            kill_at,
        ]
        words = [str(part) for part in command]
        return subprocess.run(
            words, cwd=home, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_lm, tiny_blocks):
    """The same sweep without, in this environment."""
    out = tmp_path_factory.mktemp("plain") / "a"
    runs = grid(RunConfig(d_sae=32, n_tokens=64 * 30, coeff=0.02, lr=3e-3), nonlinearity=["relu", "prolu_ste"])
    run_sweep(runs, ActivationStream(tiny_lm, tiny_blocks, 64, 3, 2048), out, eval_tokens=320, progress=False)
    return out


def curves(study):
    return {
        run.folder.name: [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        for run in Results.load(study).runs
    }


def check_tensorboard(found, study):
    for run in Results.load(study).runs:
        scalars, lines = found[run.folder.name], curves(study)[run.folder.name]
        for name in ("mse", "l0", "lr", "penalty", "dead", "tokens"):
            assert [step for step, _ in scalars[name]] == [line["step"] for line in lines]
            assert [value for _, value in scalars[name]] == pytest.approx([line[name] for line in lines], rel=1e-6)
        assert scalars["held_out/l0"] == [[30, pytest.approx(run.record["l0"], rel=1e-6)]]
        assert scalars["held_out/degradation"][0][1] == pytest.approx(run.record["degradation"], rel=1e-5)


def check_wandb(runs, study):
    results = {run.folder.name: run.record for run in Results.load(study).runs}
    assert {run["name"] for run in runs} == results.keys()
    for run in runs:
        lines, record = curves(study)[run["name"]], results[run["name"]]
        told = [{name: line[name] for name in lines[0]} for line in run["history"]]
        assert told == lines  # floats as JSON has them, to the bit
        assert run["group"] == "a"
        assert run["config"]["nonlinearity"] == record["nonlinearity"]
        assert run["config"]["n_steps"] == 30
        assert run["config"]["stream"]["ctx"] == 32
        for name in ("l0", "degradation", "fvu", "converged"):
            assert run["summary"][f"held_out/{name}"] == record[name]
        assert run["exit"] == 0


def test_what_they_hold_and_that_no_bit_changes(sweep, plain, tmp_path):
    done = sweep(tmp_path / "a")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    check_tensorboard(found["tensorboard"], plain)
    check_wandb(found["wandb"], plain)
    assert len({run["id"] for run in found["wandb"]}) == 2
    written = contents(tmp_path / "a")
    assert {k: v for k, v in written.items() if str(k).split("/")[0] not in ("wandb", "tensorboard")} == contents(plain)


def test_killed_and_resumed_the_curves_are_whole(sweep, plain, tmp_path):
    """Steps 11 to 25 are made twice: TensorBoard forgets the first ones, W&B's newer folder has the whole curve."""
    killed = sweep(tmp_path / "a", kill_at=25)
    assert killed.returncode == 9, killed.stderr[-3000:]
    done = sweep(tmp_path / "a")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(list((tmp_path / "a" / "tensorboard").glob("*/events*"))) == 4
    check_tensorboard(found["tensorboard"], plain)
    before, after = found["wandb"][:2], found["wandb"][2:]
    check_wandb(after, plain)
    assert {run["id"] for run in before} == {run["id"] for run in after}


def test_one_that_cannot_write_is_dropped_and_the_other_goes_on(sweep, plain, tmp_path):
    assert sweep(tmp_path / "a", kill_at=25).returncode == 9
    folder = tmp_path / "a" / "tensorboard"
    folder.rename(tmp_path / "away")
    folder.write_text("in the way")
    done = sweep(tmp_path / "a")
    assert done.stderr.count("tracker tensorboard: dropped") == 1
    assert done.returncode == 0, done.stderr[-3000:]
    assert Results.load(tmp_path / "a").records == Results.load(plain).records


def test_without_a_login_it_is_refused(sweep, tmp_path):
    done = sweep(tmp_path / "a", WANDB_MODE="online")
    assert "nobody is logged in" in done.stderr
    assert not (tmp_path / "a").exists()


def test_a_server_that_does_not_answer_hurts_nothing(sweep, plain, tmp_path):
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "5"}
    done = sweep(tmp_path / "a", WANDB_MODE="online", WANDB_API_KEY="a" * 40, **away)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("tracker wandb: dropped") == 1
    assert Results.load(tmp_path / "a").records == Results.load(plain).records
    check_tensorboard(json.loads(done.stdout.splitlines()[-1])["tensorboard"], plain)
