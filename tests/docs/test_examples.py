"""The independent evaluation: other programs, from the files alone, find the tokens and the figures that we report."""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, config

from prolu import ActivationStream, HeldOut, LanguageModel, Results, RunConfig, grid, load_blocks, run_sweep
from prolu.activations.builtin import MODEL_DIR
from prolu.activations.source import open_source
from prolu.cli.entry_point import main
from support.sweeps import HOOK

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "evaluate_saved_run.py"
TOKENS = EXAMPLES / "held_out_tokens.py"


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


def texts(n=1200):
    words = "Lily had a red ball Tom saw it in the tree and it went up".split()  # noqa: SIM905
    return [f"{i} " + " ".join(words[(3 * i + j * (1 + i % 7)) % len(words)] for j in range(20)) for i in range(n)]


def as_texts(folder, tokenizer):
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return [folder / "text.jsonl"]


def as_null_ridden(folder, tokenizer):
    found = [(text, None, "", "  \n")[i % 9 % 4] if i % 2 else text for i, text in enumerate(texts())]
    Dataset.from_dict({"body": found, "n": range(len(found))}).to_parquet(folder / "a.parquet")
    return [folder / "a.parquet", "--text-column", "body"]


def as_symlink(folder, tokenizer):
    """As in the hub's cache: a link whose target has no ending."""
    (folder / "blobs").mkdir()
    (folder / "snapshot").mkdir()
    as_texts(folder, tokenizer)[0].rename(folder / "blobs" / "0f3a")
    (folder / "snapshot" / "text.jsonl").symlink_to("../blobs/0f3a")
    return [folder / "snapshot" / "text.jsonl"]


def as_splits(folder, tokenizer):
    """A repository with two splits, of which the second is held out."""
    (folder / "repo" / "data").mkdir(parents=True)
    for split, found in (("train", texts()[:900]), ("validation", texts()[900:])):
        Dataset.from_dict({"text": found}).to_parquet(folder / f"repo/data/{split}-00000-of-00001.parquet")
    return [folder / "repo", "--eval-split", "validation"]


def as_slices(folder, tokenizer):
    Dataset.from_dict({"text": texts()}).save_to_disk(str(folder / "saved"))
    return [folder / "saved", "--split", "train[:60%]", "--eval-split", "train[70%:95%]"]


def ids_of(tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in texts()]
    return [row[: 3 + (7 * i) % 40] for i, row in enumerate(ids)]


def as_ragged(folder, tokenizer):
    Dataset.from_dict({"input_ids": ids_of(tokenizer)}).to_parquet(folder / "rows.parquet")
    return [folder / "rows.parquet", "--text-column", "input_ids"]


def as_padded(folder, tokenizer):
    rows = ids_of(tokenizer)
    length = max(map(len, rows))
    filled = [row + [0] * (length - len(row)) for row in rows]
    masks = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    Dataset.from_dict({"input_ids": filled, "attention_mask": masks}).to_parquet(folder / "padded.parquet")
    return [folder / "padded.parquet", "--text-column", "input_ids"]


FORMS = [as_texts, as_null_ridden, as_symlink, as_splits, as_slices, as_ragged, as_padded]


@pytest.fixture
def trained(tiny_lm, tiny_lm_folder, tmp_path, monkeypatch):
    """A function that trains a study of one SAE on text of a form, and returns it."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def train(form, *flags):
        source, *about = form(tmp_path, tiny_lm.tokenizer)
        command = ["train", "--lm", tiny_lm_folder, "--hook", HOOK, "--data", source, *about, "--ctx", "16", *flags]
        sizes = ["--d-sae", "40", "--batch-size", "64", "--window-tokens", "1024", "--lr", "0.005"]
        command += [*sizes, "--latent-pages", "none", "--out", tmp_path / "study"]
        assert main([str(word) for word in command]) == 0
        return Results.load(tmp_path / "study")

    return train


def run_example(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("form", FORMS)
def test_the_rule_as_it_is_written_gives_the_tokens_that_were_scored(form, trained, tmp_path, monkeypatch, capsys):
    study = trained(form, "--n-tokens", "1280", "--eval-tokens", "128")
    assert study.config["amounts"]["held_out_tokens"] > 8 * 128  # so that the pool matters
    tokens = tmp_path / "tokens.npy"
    run_example(monkeypatch, TOKENS, tmp_path / "study", tokens)  # which compares the digest of config.json
    lm, blocks = open_source(study.config["stream"])
    assert np.array_equal(np.load(tokens), HeldOut(lm, blocks, 128).tokens)
    # It finds out that it was given something else.
    file = tmp_path / "study" / "config.json"
    config_ = json.loads(file.read_text())
    config_["stream"]["held_out_pool"] //= 2
    file.write_text(json.dumps(config_))
    with pytest.raises(SystemExit, match="was scored on other tokens"):
        run_example(monkeypatch, TOKENS, tmp_path / "study", tokens)


@pytest.mark.slow  # each trains with the command, and runs two programs on what it left
@pytest.mark.parametrize("form", [as_padded, as_ragged, as_null_ridden, as_splits, as_symlink])
def test_both_programs_find_our_figures_on_the_data_of_anybody(form, trained, tmp_path, monkeypatch, capsys):
    study = trained(form, "--n-tokens", "12800", "--eval-tokens", "512", "--coeff", "0.02")
    run_example(monkeypatch, TOKENS, tmp_path / "study", tmp_path / "tokens.npy")
    capsys.readouterr()
    (run,) = study.runs
    run_example(monkeypatch, SCRIPT, run.folder, tmp_path / "tokens.npy")
    said = json.loads(capsys.readouterr().out)
    assert run.record["eval_tokens"] == 512
    for name in ("l0", "mse", "ce_clean", "ce_recon", "degradation"):
        assert said[name] == pytest.approx(run.record[name], rel=1e-6, abs=1e-6), name
    assert abs(said["degradation"]) > 1e-3  # there is a difference to find


COMMON = {"argparse", "json", "pathlib", "numpy", "torch", "transformers"}


@pytest.mark.parametrize(
    ("script", "n_lines", "others"),
    [(SCRIPT, 80, {"re", "safetensors"}), (TOKENS, 100, {"hashlib", "datasets"})],
)
def test_they_are_short_and_independent(script, n_lines, others):
    source = script.read_text()
    assert len(source.splitlines()) <= n_lines
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in found]
    assert {n.split(".")[0] for n in names} == COMMON | others
