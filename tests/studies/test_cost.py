"""What a study will cost, against what one costs."""

import json

import pytest

from prolu import ActivationStream, RunConfig, Trainer, grid, run_sweep
from prolu.cli.entry_point import main
from prolu.studies.cost import estimate
from prolu.studies.model_sizes import outline
from prolu.studies.rates import Rates, measure
from prolu.studies.recipes import RECIPES

RATES = Rates(flops=1e9, dense_step=0.4, sparse_step=0.1)
SIZES = {"window_tokens": 2048, "eval_tokens": 640, "ctx": 32}


def cost_of(runs, *lms, batch_size=64, **changes):
    return estimate(runs, lms, batch_size=batch_size, rates=RATES, **(SIZES | changes))


def test_bytes_are_those_of_a_real_sweep(tiny_lm_folder, tiny_lm, tiny_blocks, tmp_path):
    runs = grid(RunConfig(d_sae=400, n_tokens=640), nonlinearity=["relu", "prolu_ste"])
    cost = cost_of(runs, outline(str(tiny_lm_folder), "blocks.1.hook_resid_pre"))
    run_sweep(runs, ActivationStream(tiny_lm, tiny_blocks, 64), tmp_path / "a", eval_tokens=320, progress=False)
    on_disk = sum(file.stat().st_size for file in tmp_path.rglob("sae.safetensors"))
    assert cost.disk == pytest.approx(on_disk, rel=0.02)
    state = Trainer(runs[0], tiny_lm.d_in, 64).state
    tensors = [*state.weights.tensors(), *state.moments.tensors(), state.last_fired]
    assert cost.checkpoint == pytest.approx(2 * sum(t.nbytes for t in tensors), rel=0.02)


def test_cost_grows_as_it_should(tiny_lm_folder):
    lm = outline(str(tiny_lm_folder), "blocks.1.hook_resid_pre")
    assert (lm.d_model, lm.blocks_below, lm.blocks_above) == (16, 1, 2)
    one = cost_of([RunConfig(d_sae=100, n_tokens=64_000)], lm, eval_tokens=0)
    longer = cost_of([RunConfig(d_sae=100, n_tokens=640_000)], lm, eval_tokens=0)
    two = cost_of(grid(RunConfig(d_sae=100, n_tokens=64_000), coeff=[1e-3, 2e-3]), lm, eval_tokens=0)
    assert one.flops_training == pytest.approx(2 * 16 * 100 * 64_000 * 1.2)
    assert longer.flops_training == pytest.approx(10 * one.flops_training)
    assert longer.seconds == pytest.approx(10 * one.seconds)
    assert (two.sae_tokens, two.tokens) == (2 * one.tokens, one.tokens)
    assert two.disk == 2 * one.disk
    assert two.flops_language_model == one.flops_language_model == 64_000 * (2 * lm.n_per_block + 4 * 32 * 16)


def test_rates_are_measured():
    rates = measure(RunConfig(d_sae=256), 16, 128)
    assert all(0 < rate < float("inf") for rate in rates)


@pytest.mark.parametrize("name", ["experiment1", "experiment2", "experiment3"])
def test_a_dry_run_prints_all_runs_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prolu.studies.cost.measure", lambda *_: RATES)
    assert main(["sweep", name, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    runs = RECIPES[name].runs_at(768)
    assert [(r["nonlinearity"], r["penalty"], r["coeff"], r["lr"]) for r in said["runs"]] == [
        (r.nonlinearity, r.penalty, r.coeff, r.lr) for r in runs
    ]
    assert said["estimate"]["n_runs"] == len(runs)
    assert said["estimate"]["tokens"] == 97_656 * 4096
    assert said["estimate"]["disk"] == len(runs) * (2 * 768 * 12_288 + 12_288 + 768) * 4
    assert main(["sweep", name, "--dry-run", "--scale", "0.01"]) == 0
    assert "976 per run" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_a_run_would(capsys):
    for flags, words in (
        (["--hook", "blocks.12.hook_resid_pre"], "blocks 0-11"),
        (["--lm", "/no/such"], "lm '/no/such'"),
        (["--scale", "0"], "scale 0"),
        (["--scale", "1e-6"], "fewer than one batch"),
        (["--hook", "transformer.h.3.output"], "dry run"),
        (["--batch-size", "0"], "batch_size 0"),
    ):
        assert main(["sweep", "experiment1", "--dry-run", *flags]) == 2
        assert words in capsys.readouterr().err
    assert main(["sweep", "experiment1", "--json"]) == 2
