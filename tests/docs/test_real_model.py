"""`make real`: the whole study, from text to the report, on a small model in place of the one from PyPI."""

import subprocess
import sys
from pathlib import Path

import pytest

from prolu import Results
from support.sweeps import HOOK

SCRIPT = Path(__file__).parents[2] / "scripts/real_model.py"


def real(*options):
    return subprocess.run([sys.executable, SCRIPT, *options], check=False, capture_output=True, text=True)


@pytest.mark.slow  # four commands in processes of their own
def test_a_real_model_from_text_to_the_report(stories_file, tmp_path):
    out = tmp_path / "real"
    source = ["--lm", "builtin", "--hook", "blocks.2.hook_resid_pre", "--data", stories_file, "--out", out]
    done = real(*source, "--scale", "0.001", "--eval-tokens", "640")
    assert done.returncode == 0, done.stderr
    families = {run.config.family for name in ("paper", "gates") for run in Results.load(out / name).runs}
    assert len(families) == 8
    assert (out / "report/report.html").is_file()


def test_what_is_wrong_is_said_by_the_command_alone(tiny_lm_folder, tmp_path):
    done = real("--lm", tiny_lm_folder, "--hook", HOOK, "--data", tmp_path / "none.txt", "--out", tmp_path / "real")
    assert done.returncode == 2
    assert done.stderr.startswith("prolu: data")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "real").exists()
