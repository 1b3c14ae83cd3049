"""What can be known before training is found before it, and figures that are not finite spoil nothing else."""

import json
import math

import pytest
import torch

from prolu import ActivationStream, HeldOut, LanguageModel, Results, RunConfig, load_blocks
from prolu.cli import main
from prolu.report import writer
from prolu.studies.folder import read_results
from support.commands import text_flags
from support.models import write_model
from support.sweeps import HOOK, sweep

RUNS = [RunConfig(d_sae=40, n_tokens=640), RunConfig(d_sae=40, n_tokens=640, nonlinearity="relu")]


def strict(text):
    """JSON as every other reader takes it: no NaN, no infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in a JSON file"))


def overflowing(folder, module, value=7e4):
    """A tiny GPT-2, one bias of which lies beyond fp16's 65,504."""
    from safetensors.torch import load_file, save_file

    write_model(folder)
    tensors = load_file(folder / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith(module)]
    tensors[name][0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("module", "where"), [("h.1.mlp.c_proj.bias", "in block 1 on"), ("h.0.attn.c_proj.bias", "in block 0 on")]
)
def test_logits_that_overflow_are_refused_before_anything_is_written(tmp_path, stories_file, capsys, module, where):
    lm = overflowing(tmp_path / "lm", module)
    size = {"d_sae": 40, "n_tokens": 640, "batch_size": 64, "eval_tokens": 320, "lm_dtype": "fp16"}
    out = tmp_path / "a"
    hook = "blocks.0.hook_resid_pre"  # below both
    assert main(["train", *text_flags(lm, stories_file, **size, hook=hook, out=out)]) == 2
    said = capsys.readouterr().err
    assert where in said
    assert "--lm-dtype bf16 or fp32" in said
    assert not out.exists()


def test_python_is_told_too(tmp_path, stories_file):
    folder = overflowing(tmp_path / "lm", "h.1.mlp.c_proj.bias")
    lm = LanguageModel(folder, "blocks.0.hook_resid_pre", dtype=torch.float16)
    blocks = load_blocks(str(stories_file), lm.tokenizer, ctx=32)
    stream = ActivationStream(lm, blocks, batch_size=64, window_tokens=2048)
    with pytest.raises(ValueError, match=r"not finite, from values in block 1 on; use --lm-dtype bf16 or fp32"):
        sweep(RUNS, stream, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    wide = LanguageModel(folder, "blocks.0.hook_resid_pre", dtype=torch.bfloat16)
    assert math.isfinite(HeldOut(wide, blocks, 320).ce_clean)


def test_damaged_weights_in_fp32(tmp_path, stories_file):
    lm = LanguageModel(overflowing(tmp_path / "lm", "wte.weight", math.inf), HOOK)
    blocks = load_blocks(str(stories_file), lm.tokenizer, ctx=32)
    with pytest.raises(ValueError, match=r"lm_dtype fp32: .* not finite, .*its weights may be damaged"):
        HeldOut(lm, blocks, 320)


def test_a_run_whose_scores_are_not_finite_fails_alone(tiny_stream, tmp_path, monkeypatch):
    from prolu.studies import run_in_training

    plain = run_in_training.score

    def poisoned(sae, held_out):
        found = plain(sae, held_out)
        if sae.config.nonlinearity == "relu":
            found.figures["degradation"] = math.nan
        return found

    monkeypatch.setattr(run_in_training, "score", poisoned)
    results = sweep(RUNS, tiny_stream, tmp_path / "a")
    assert [r["nonlinearity"] for r in results.records] == ["prolu_ste"]
    assert results.failures[RUNS[1].run_id] == "not finite: degradation"
    monkeypatch.undo()
    assert len(sweep(RUNS, tiny_stream, tmp_path / "a").records) == 2  # tried again


@pytest.fixture
def old_study(tiny_stream, tmp_path):
    """A study as an early version left it: of three runs, one has NaN for scores, and one a curve with a NaN."""
    out = tmp_path / "old"
    runs = [*RUNS, RunConfig(d_sae=40, n_tokens=640, nonlinearity="prolu_relu")]
    sweep(runs, tiny_stream, out)
    records = read_results(out)
    records[1] |= {"degradation": math.nan, "recovered": -math.inf, "ce_recon": math.nan}
    records[0]["recovered"] = math.nan
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    curve = out / records[2]["run_id"] / "metrics.jsonl"
    lines = curve.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {"l0": math.nan})
    curve.write_text("\n".join(lines) + "\n")
    return out, runs


def test_a_report_draws_the_runs_that_have_figures(old_study, caplog):
    out, runs = old_study
    drawn = writer.write_report([out])
    assert [r["run_id"] for r in drawn.records] == [runs[0].run_id, runs[2].run_id]
    assert f"left out of comparisons: {runs[1].run_id} (not finite: degradation)" in caplog.text
    assert "1 of 10 lines are left out" in caplog.text
    page = drawn.page.read_text()
    assert runs[1].run_id in page  # among those that failed
    assert "NaN" not in page.split('<script id="data"')[-1].split("</script>")[0]
    assert main(["report", str(out)]) == 0


def test_such_a_study_is_resumed_and_keeps_its_runs(old_study, tiny_stream):
    out, runs = old_study
    sweep(runs, tiny_stream, out)
    assert [r["run_id"] for r in read_results(out)] == [run.run_id for run in runs]
    assert read_results(out)[1]["degradation"] is None


def test_a_study_without_any_finite_figure_says_so(old_study):
    out, _ = old_study
    records = [r | {"mse": math.inf} for r in read_results(out)]
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(ValueError, match="no finished run has finite scores"):
        Results.load(out)


def test_no_file_of_a_study_holds_nan(tiny_stream, tmp_path):
    # Gated has no b_enc, so no fraction of it is negative.
    runs = [
        RunConfig(d_sae=40, n_tokens=640, nonlinearity="gated"),
        RunConfig(d_sae=40, n_tokens=640, coeff=1e6),
    ]
    sweep(runs, tiny_stream, tmp_path / "a")
    files = [f for f in (tmp_path / "a").rglob("*.json*") if f.is_file()]
    assert len(files) > 6
    for file in files:
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            strict(line)
    gated = next(r for r in Results.load(tmp_path / "a").records if r["nonlinearity"] == "gated")
    assert gated["negative_bias_fraction"] is None


def test_five_lines_say_what_was_found_and_stand_in_the_config(tmp_path, tiny_lm_folder, stories_file, capsys):
    size = {"d_sae": 40, "n_tokens": 640, "batch_size": 64, "eval_tokens": 320, "latent_pages": "none"}
    command = ["train", *text_flags(tiny_lm_folder, stories_file, **size, out=tmp_path / "a")]
    assert main(command) == 0
    said = capsys.readouterr().err.splitlines()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    amounts = config["amounts"]
    for line in (
        f"documents: {amounts['documents']:,}",
        f"tokens: {amounts['train_tokens']:,} to train on; dropped: {amounts['tokens_dropped']:,}",
        f"epochs: {amounts['epochs']:.2f}",
        f"held out: {amounts['held_out_tokens']:,} tokens, of which {amounts['eval_tokens']:,} are scored",
        f"model: {config['stream']['lm']}, in fp32, weights",
    ):
        assert sum(one.startswith(f"prolu: {line}") for one in said) == 1, line
    assert main(command) == 0  # resumed: said already
    assert "documents:" not in capsys.readouterr().err


def test_a_disk_without_room_for_checkpoints_is_refused(tiny_stream, tmp_path, monkeypatch):
    from collections import namedtuple

    from prolu.studies import preflight
    from prolu.studies.cost import state_bytes

    usage = namedtuple("usage", "total free")
    state = 2 * state_bytes([40], 16)
    needed = 3 * state + state // 3
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(10**9, needed - 1))
    with pytest.raises(ValueError, match=r"out .*: the study needs .* GB for checkpoints and SAEs"):
        sweep(RUNS, tiny_stream, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(10**9, needed))
    sweep(RUNS, tiny_stream, tmp_path / "a")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(10**9, 0))
    sweep(RUNS, tiny_stream, tmp_path / "a")  # nothing is left to do


def test_kernels_that_cannot_be_compiled_are_found_at_the_start(tiny_stream, tmp_path, monkeypatch):
    from prolu.training.steps import numba_rows

    def broken(*_):
        raise RuntimeError("LLVM has no such target")

    monkeypatch.setattr(numba_rows, "decode", broken)
    runs = [RunConfig(d_sae=40, n_tokens=640, step="sparse")]
    with pytest.raises(ValueError, match=r"step 'sparse': numba cannot .* \(LLVM has no such target\); choose --step"):
        sweep(runs, tiny_stream, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert sweep([RunConfig(d_sae=40, n_tokens=640, step="dense")], tiny_stream, tmp_path / "a").records


@pytest.mark.parametrize(
    "nonlinearity", ["relu", "prolu_ste", "gated", "jumprelu", "jumprelu_plain", "jumprelu_ste", "topk", "batchtopk"]
)
def test_the_tiny_step_of_every_nonlinearity_runs_and_touches_no_random_numbers(nonlinearity):
    from prolu.studies.preflight import _check_kernels

    before = torch.get_rng_state()
    for k in (16.0, 64.0) if "topk" in nonlinearity else (None,):
        run = RunConfig(d_sae=80, n_tokens=640, nonlinearity=nonlinearity, penalty="none", target_l0=k)
        _check_kernels([run])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_harvest_is_asked_too(tmp_path, stories_file, capsys):
    lm = overflowing(tmp_path / "lm", "h.1.mlp.c_proj.bias")
    place = {"hook": "blocks.0.hook_resid_pre", "n_tokens": 640, "out": tmp_path / "store"}
    assert main(["harvest", *text_flags(lm, stories_file, **place, lm_dtype="fp16")]) == 2
    assert "in block 1 on" in capsys.readouterr().err
    assert main(["harvest", *text_flags(lm, stories_file, **place)]) == 0
    assert "prolu: documents: " in capsys.readouterr().err
