"""Studies of rows that come from no language model: trained, scored, resumed and reported as any other."""

import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from prolu import ActivationStream, HeldOut, Results, RunConfig, Trainer, evaluate, grid, run_sweep
from prolu.evaluation.document_sums import read_documents_of
from prolu.evaluation.held_out import HeldOutRows, held_out_of
from prolu.report.terminal import print_summary
from prolu.report.writer import write_report
from prolu.studies.results import pool
from support.interruptions import dies_at_step
from support.sweeps import contents
from support.synthetic import sparse_activations

BASE = RunConfig(d_sae=24, n_tokens=64 * 40, coeff=0.02, lr=3e-3, normalisation="none")
RUNS = [
    replace(BASE, resample_fractions=(0.5,), resample_candidates=500, resample_dead_below=0.01),
    replace(BASE, nonlinearity="prolu_ste", penalty="sqrt_l1", target_l0=5.0),
    replace(BASE, nonlinearity="batchtopk(4)", penalty="none", aux_dead_tokens=640, matryoshka=(6, 12)),
    replace(BASE, nonlinearity="prolu_relu", normalisation="per_token"),
]
ROWS = sparse_activations(3000, 10, n_features=16, dtype=torch.float32) * torch.linspace(0.5, 2, 3000)[:, None]


def stream(rows=ROWS, **options):
    return ActivationStream.from_rows(rows, **({"batch_size": 64, "seed": 3, "window_tokens": 640} | options))


def sweep(runs, out, rows=ROWS, **options):
    return run_sweep(runs, stream(rows), out, **({"eval_tokens": 200, "progress": False} | options))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return sweep(RUNS, tmp_path_factory.mktemp("rows") / "study")


@pytest.mark.parametrize("i", range(len(RUNS)))
def test_a_run_alone_is_the_same_run_to_the_bit(study, tmp_path, i):
    alone = sweep([RUNS[i]], tmp_path / "alone")
    assert alone.records == [study.records[i]]
    assert contents(alone.runs[0].folder) == contents(study.runs[i].folder)


def test_a_study_that_was_cut_off_is_resumed_to_the_bit(study, tmp_path):
    out = tmp_path / "resumed"
    dies_at_step(23, lambda: sweep(RUNS, out, checkpoint_seconds=0))
    assert (out / "checkpoints").is_dir()
    sweep(RUNS, out)
    assert contents(out) == contents(study.folder)


def test_the_config_names_the_rows_and_other_rows_are_refused(study, tmp_path):
    described = study.config["stream"]
    assert described == stream().describe() | {"data_digest": stream().blocks.digest()}
    assert study.config["amounts"] == {
        "documents": None,
        "rows_left_out": 0,
        "tokens_dropped": 0,
        "train_tokens": 2700,
        "held_out_tokens": 300,
        "eval_tokens": 200,
        "tokens_dropped_per_epoch": 2700 - 64 * (4 * 10 + 2),
        "epochs": 40 / 42,
    }
    other = ROWS.clone()
    other[5, 5] += 1
    with pytest.raises(ValueError, match=r"holds another study: stream\.data_digest"):
        sweep(RUNS, study.folder, other)
    with pytest.raises(ValueError, match=r"n_tokens 20000: the data has 2,700 training rows, .* seen 7\.4 times"):
        sweep([replace(BASE, n_tokens=20_000)], tmp_path / "long")
    with pytest.raises(ValueError, match="eval_tokens 32768: the data has only 300 held-out rows to score on"):
        sweep([BASE], tmp_path / "scored", eval_tokens=32_768)
    assert not list(tmp_path.iterdir())


def test_results_hold_every_figure_that_needs_no_language_model(study):
    held_out = held_out_of(stream(), 200)
    for run in study.runs:
        figures = evaluate(run.load(), held_out)
        unknown = {name for name, value in figures.items() if math.isnan(value)}
        assert {"ce_clean", "ce_recon", "ce_zero", "degradation", "recovered", "kl", "degradation_bits"} == unknown
        assert {name: run.record[name] for name in figures} == {
            k: None if k in unknown else v for k, v in figures.items()
        }
        assert not any(name.endswith("_no_bos") for name in run.record)
        assert run.record["eval_tokens"] == 200
        x = held_out.acts[:, 0]
        sae = run.load()
        error = (sae(x) - x).double().square().sum()
        fvu = (error / (x.double() - x.double().mean(0)).square().sum()).item()
        assert run.record["fvu_raw"] == pytest.approx(fvu, rel=1e-5)
        assert run.record["l0"] == pytest.approx((sae.encode(x) > 0).sum().item() / 200)
    assert study.records[1]["coeff"] != BASE.coeff  # the L0 controller has moved it
    assert study.records[0]["resampled"]
    assert [p["d_sae"] for p in study.records[2]["prefixes"]] == [6, 12]
    assert all(p["degradation"] is None and p["fvu"] > 0 for p in study.records[2]["prefixes"])


def test_sums_by_block_give_the_figures(study):
    sums = read_documents_of(study.runs[0].folder)
    record = study.records[0]
    assert record["unit"] == "block"
    assert sums.n_tokens.sum() == 200
    assert sums.l0.sum() / 200 == pytest.approx(record["l0"])
    assert sums.squared_error.sum() / 2000 == pytest.approx(record["mse"])
    assert sums.n_predicted.sum() == 0


def test_the_rows_of_a_language_model_have_the_scores_of_its_text(tiny_lm, tiny_blocks):
    """Figures without predictions are the same whether the activations are read from the model or given."""
    of_text = HeldOut(tiny_lm, tiny_blocks, tiny_blocks.held_out.size)
    acts = tiny_lm.activations(tiny_blocks.held_out).flatten(0, 1)
    of_rows = HeldOutRows(ActivationStream.from_rows(acts, acts, batch_size=64).blocks, len(acts))
    assert of_rows.n_tokens == of_text.n_tokens
    study_stream = ActivationStream(tiny_lm, tiny_blocks, batch_size=64)
    trainer = Trainer(replace(BASE, normalisation="per_token"), 16, 64)
    for i in range(20):
        trainer.step(study_stream[i].acts)
    sae = trainer.sae()
    rows, text = evaluate(sae, of_rows), evaluate(sae, of_text)
    same = ["l0", "l1", "sqrt_l1", "dead_fraction", "dense_fraction", "mse", "fvu", "norm_ratio", "relative_bias"]
    same += ["fvu_raw"]
    assert {name: rows[name] for name in same} == pytest.approx({name: text[name] for name in same}, rel=1e-9)


def test_held_out_rows_are_scored_in_at_most_a_thousand_blocks_of_neighbours():
    rows = np.random.default_rng(0).normal(size=(5000, 4))
    held_out = HeldOutRows(stream(rows[:2000], held_out=rows[2000:]).blocks, 2500)
    assert held_out.n_tokens == 2500
    assert len(held_out.documents) == 1000
    counts = np.bincount(held_out.document_rows.ravel())
    assert set(counts) == {2, 3}
    assert (np.diff(held_out.document_rows.ravel()) >= 0).all()


def test_the_results_can_be_read_without_the_rows(study):
    loaded = Results.load(study.folder)
    assert loaded.records == json.loads(json.dumps(study.records))
    assert loaded.runs[0].load().provenance["data"] == "rows"


def test_the_report_compares_by_the_variance_that_is_left(study):
    drawn = write_report([study])
    page = drawn.page.read_text()
    assert "FVU at equal L0" in page
    assert "Activations from no language model, 2,560 training rows of rows, scored on 200 held-out rows." in page
    assert "CE increase" not in page.partition("<script>")[0].partition("<h2>All runs")[0].replace("no CE increase", "")
    assert (drawn.page.parent / "figures" / "fvu-against-l0.svg").is_file()
    assert (drawn.page.parent / "figures" / "fvu-against-l0-first-6.svg").is_file()
    assert (drawn.page.parent / "results.csv").is_file()
    console = Console(file=io.StringIO(), width=100)
    print_summary(drawn, all_verdicts=True, console=console)
    printed = console.file.getvalue()
    assert re.search(r"4 SAEs, rows, 2,560 rows", printed)
    assert re.search(r"L0 +FVU +MSE +dead", printed)
    assert "recovered" not in printed
    alone = write_report([study.folder])
    assert alone.page.read_text() == page


def test_the_best_run_is_the_one_that_leaves_least_variance(study):
    l0 = study.records[2]["l0"]
    near = [r for r in study.records if max(r["l0"] / l0, l0 / r["l0"]) <= 1.25]
    best = study.best(l0, unconverged=True)
    assert best.record["fvu"] == min(r["fvu"] for r in near)
    assert study.frontier().y == "fvu"


def test_studies_of_the_same_rows_can_be_shown_together(study, tmp_path):
    other = sweep([replace(BASE, coeff=0.05)], tmp_path / "other")
    assert len(pool([study, other])) == 5
    elsewhere = sweep([BASE], tmp_path / "elsewhere", ROWS[:2000])
    with pytest.raises(ValueError, match="cannot be compared: held_out_digest is"):
        pool([study, elsewhere])


def test_intervals_cover_seeds_and_blocks_of_held_out_rows(tmp_path):
    runs = grid(BASE, nonlinearity=["relu", "prolu_relu"], coeff=[0.01, 0.05], init_seed=[0, 1, 2])
    found = sweep(runs, tmp_path / "seeds").verdicts()
    assert found
    for v in found:
        assert (v.metric, v.unit, v.n_seeds, v.n_documents) == ("fvu", "block", 3, 200)
        assert v.covers == "init seeds and held-out blocks"
        assert v.low < v.change < v.high
