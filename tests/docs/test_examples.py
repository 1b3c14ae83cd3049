"""The independent evaluation: another program, from the files alone, finds the figures that we report."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prolu import ActivationStream, HeldOut, LanguageModel, RunConfig, grid, load_blocks, run_sweep
from prolu.activations.builtin import MODEL_DIR

SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate_saved_run.py"


def check(study, held_out, lm_folder, tmp_path):
    np.save(tmp_path / "tokens.npy", held_out.tokens)
    for run in study.runs:
        command = [sys.executable, SCRIPT, run.folder, tmp_path / "tokens.npy", "--lm", lm_folder]
        said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for name in ("l0", "mse"):
            assert said[name] == pytest.approx(run.record[name], rel=1e-4)
        for name in ("degradation", "ce_clean", "ce_recon"):
            assert said[name] == pytest.approx(run.record[name], abs=1e-4)


def test_it_reproduces_every_nonlinearity(tiny_lm, tiny_blocks, tiny_lm_folder, tmp_path):
    runs = grid(RunConfig(d_sae=40, n_tokens=3840, lr=5e-3), nonlinearity=["relu", "prolu_relu", "prolu_ste"])
    runs += grid(RunConfig(d_sae=40, n_tokens=3840, normalisation="none", penalty="sqrt_l1"), coeff=[0.01])
    stream = ActivationStream(tiny_lm, tiny_blocks, 64)
    study = run_sweep(runs, stream, tmp_path / "study", eval_tokens=640, progress=False)
    check(study, HeldOut(tiny_lm, tiny_blocks, 640), tiny_lm_folder, tmp_path)


@pytest.mark.slow  # reads the standard library, trains on it
def test_it_reproduces_a_run_on_the_built_in_model(tmp_path):
    lm = LanguageModel("builtin", "blocks.2.hook_resid_pre")
    blocks = load_blocks("builtin", lm.tokenizer, max_train_tokens=100_000)
    runs = [RunConfig(d_sae=256, n_tokens=50_000, coeff=0.01, lr=5e-3)]
    study = run_sweep(runs, ActivationStream(lm, blocks, 512), tmp_path / "study", eval_tokens=8192, progress=False)
    check(study, HeldOut(lm, blocks, 8192), MODEL_DIR, tmp_path)


def test_it_is_short_and_independent():
    source = SCRIPT.read_text()
    assert len(source.splitlines()) <= 80
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in found]
    assert {n.split(".")[0] for n in names} == {
        "argparse", "json", "math", "re", "pathlib", "numpy", "torch", "safetensors", "transformers",
    }  # fmt: skip
