"""The sweep law, results, resume, evaluation, report."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from prolu import ActivationStream, HeldOut, Results, RunConfig, evaluate, grid, run_sweep
from prolu.evaluation.scoring import probe
from prolu.report.writer import write_report
from prolu.sae.autoencoder import SAE

BASE = RunConfig(d_sae=48, n_tokens=64 * 60, coeff=0.02, lr=3e-3)
RUNS = grid(BASE, nonlinearity=["relu", "prolu_relu", "prolu_ste"], penalty=["l1", "sqrt_l1"])


def bytes_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "log.jsonl"}


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_lm, tiny_blocks):
    out = tmp_path_factory.mktemp("studies") / "six"
    stream = ActivationStream(tiny_lm, tiny_blocks, batch_size=64, seed=3, window_tokens=2048)
    return run_sweep(RUNS, stream, out, eval_tokens=640, progress=False)


def test_grid_is_the_product_and_refuses_unknown_fields():
    assert len(RUNS) == 6
    assert len({run.run_id for run in RUNS}) == 6
    with pytest.raises(ValueError, match="'colour': not a field of RunConfig"):
        grid(BASE, colour=[1])


@pytest.mark.parametrize("i", range(6))
def test_a_run_alone_is_the_same_run_to_the_bit(study, tiny_stream, tmp_path, i):
    alone = run_sweep([RUNS[i]], tiny_stream, tmp_path / "alone", eval_tokens=640, progress=False)
    together = next(r for r in study.records if r["run_id"] == RUNS[i].run_id)
    assert alone.records == [together]
    assert bytes_of(alone.runs[0].folder) == bytes_of(study.folder / RUNS[i].run_id)


@pytest.mark.parametrize("step", ["sparse", "sparse_torch"])
def test_the_same_holds_for_sparse_steps_that_share_buffers(tiny_lm, tiny_blocks, tmp_path, step):
    runs = [replace(run, step=step, coeff=coeff) for run, coeff in zip(RUNS[1:4], (0.5, 0.002, 0.05), strict=True)]

    def sweep(some, name):
        stream = ActivationStream(tiny_lm, tiny_blocks, batch_size=64, seed=3, window_tokens=2048)
        return run_sweep(some, stream, tmp_path / name, eval_tokens=640, progress=False)

    together = sweep(runs, "together")
    for i, run in enumerate(runs):
        alone = sweep([run], f"alone{i}")
        assert alone.records == [together.records[i]]
        assert bytes_of(alone.runs[0].folder) == bytes_of(together.runs[i].folder)


BASELINES = [
    replace(BASE, nonlinearity="gated"),
    replace(BASE, nonlinearity="jumprelu(0.3)", penalty="l0", target_l0=6.0),
    replace(BASE, nonlinearity="topk", penalty="none", target_l0=6.0, aux_dead_tokens=640),
    replace(BASE, nonlinearity="batchtopk(6)", penalty="none", aux_dead_tokens=640),
]


def test_and_for_runs_whose_nonlinearities_have_other_parameters(tiny_lm, tiny_blocks, tmp_path):
    def sweep(some, name):
        stream = ActivationStream(tiny_lm, tiny_blocks, batch_size=64, seed=3, window_tokens=2048)
        return run_sweep(some, stream, tmp_path / name, eval_tokens=640, progress=False)

    together = sweep([RUNS[0], *BASELINES], "together")
    assert not together.failures
    for i, run in enumerate([RUNS[0], *BASELINES]):
        alone = sweep([run], f"alone{i}")
        assert alone.records == [together.records[i]]
        assert bytes_of(alone.runs[0].folder) == bytes_of(together.runs[i].folder)


def test_the_same_command_again_keeps_finished_runs_and_trains_the_rest(study, tiny_stream, tmp_path):
    out = tmp_path / "again"
    run_sweep(RUNS, tiny_stream, out, eval_tokens=640, progress=False)
    assert bytes_of(out) == bytes_of(study.folder)
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:4]))
    kept = (out / RUNS[0].run_id / "sae.safetensors").stat().st_mtime_ns
    run_sweep(RUNS, tiny_stream, out, eval_tokens=640, progress=False)
    assert bytes_of(out) == bytes_of(study.folder)
    assert (out / RUNS[0].run_id / "sae.safetensors").stat().st_mtime_ns == kept


def test_results_hold_every_figure_and_agree_with_a_fresh_evaluation(study, tiny_lm, tiny_blocks):
    held_out = HeldOut(tiny_lm, tiny_blocks, 640)
    for run in study.runs:
        figures = evaluate(run.load(), held_out)
        assert {name: run.record[name] for name in figures} == figures
        assert all(math.isfinite(value) for value in figures.values())
        assert run.record["degradation"] == pytest.approx(run.record["ce_recon"] - run.record["ce_clean"])
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 60
        assert rows[-1]["mse"] < rows[0]["mse"]
        assert set(rows[0]) == {"step", "tokens", "mse", "penalty", "l0", "dead", "lr", "coeff"}


def test_frontier_and_best(study, tmp_path):
    frontier = study.frontier(x="l0", y="degradation")
    assert all(run.record["converged"] for run in frontier.runs)
    frontier.plot(tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").read_text().startswith("<?xml")
    some = study.runs[2]
    at = some.record["l0"]
    assert study.best(at, nonlinearity="prolu_relu", unconverged=True).record["nonlinearity"] == "prolu_relu"
    with pytest.raises(ValueError, match="result 'beauty': choose one of"):
        study.frontier(x="beauty")


@pytest.mark.usefixtures("every_format")
def test_the_report_is_one_page_with_all_figures(study):
    page = write_report([study.folder]).page.read_text()
    assert not re.search(
        r"""(?:src|href)=["']?(?:https?:)?//""", page.split("<body>")[0] + page.split("<main>")[1].split("<script>")[0]
    )
    assert "<script src" not in page
    for run in study.runs:
        assert run.record["run_id"] in page
    names = {p.name for p in (study.folder / "figures").iterdir()}
    assert {
        f"{y}-against-{x}.svg"
        for x, y in [("l0", "degradation"), ("l1", "mse"), ("l0", "l1"), ("l0", "mse"), ("sqrt_l1", "mse")]
    } <= names
    assert len(names) == 18


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], "no runs"),
        ([BASE, BASE], "listed twice"),
        ([replace(BASE, n_tokens=63)], "fewer than one batch of 64"),
    ],
)
def test_wrong_runs_are_refused_and_nothing_is_written(tiny_stream, tmp_path, runs, words):
    with pytest.raises(ValueError, match=words):
        run_sweep(runs, tiny_stream, tmp_path / "x", eval_tokens=64, progress=False)
    assert not (tmp_path / "x").exists()


def test_a_folder_with_something_else_is_refused(study, tiny_stream, tmp_path):
    before = bytes_of(study.folder)
    with pytest.raises(ValueError, match=r"holds another study: runs.0.coeff is 0.02 there, 0.5 here"):
        run_sweep(
            [replace(RUNS[0], coeff=0.5), *RUNS[1:]],
            tiny_stream,
            study.folder,
            eval_tokens=640,
            progress=False,
        )
    assert bytes_of(study.folder) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty, and not a study"):
        run_sweep(RUNS, tiny_stream, tmp_path, progress=False)
    with pytest.raises(ValueError, match="is a file"):
        run_sweep(RUNS, tiny_stream, tmp_path / "notes.txt" / "x", progress=False)


class Identity(torch.nn.Module):
    """An SAE that reconstructs perfectly: latents are x's positive and negative parts."""

    def __init__(self, d_in):
        super().__init__()
        from prolu.sae.saved_sae import SAEConfig
        from prolu.sae.weights import Weights

        eye = torch.eye(d_in)
        both = torch.cat([eye, -eye])
        self.sae = SAE(
            SAEConfig(d_in=d_in, d_sae=2 * d_in, nonlinearity="relu"),
            Weights(both, both.clone(), torch.zeros(d_in), {"b_enc": torch.zeros(2 * d_in)}),
        )


def test_a_perfect_sae_loses_nothing(tiny_lm, tiny_blocks):
    figures = evaluate(Identity(16).sae, HeldOut(tiny_lm, tiny_blocks, 640))
    for suffix in ("", "_no_bos"):
        assert abs(figures["degradation" + suffix]) < 1e-6
        assert figures["recovered" + suffix] == pytest.approx(1, abs=1e-5)
        assert figures["fvu" + suffix] < 1e-12
    assert figures["l0"] == pytest.approx(16, abs=0.1)


def test_a_dead_sae_is_the_zero_splice(tiny_lm, tiny_blocks):
    sae = Identity(16).sae
    sae.b_enc.data.fill_(-1e6)
    held_out = HeldOut(tiny_lm, tiny_blocks, 640)
    figures = evaluate(sae, held_out)
    assert figures["ce_recon"] == figures["ce_zero"] == held_out.ce_zero
    assert figures["ce_recon_no_bos"] == figures["ce_zero_no_bos"]
    assert figures["ce_zero_no_bos"] != figures["ce_zero"]
    assert figures["recovered"] == 0
    assert figures["l0"] == 0
    assert figures["dead_fraction"] == 1
    assert figures["mse"] == pytest.approx(1, rel=1e-6)


def test_evaluation_does_not_depend_on_its_passes(tiny_lm, tiny_blocks, study, monkeypatch):
    held_out, sae = HeldOut(tiny_lm, tiny_blocks, 640), study.runs[3].load()
    whole = probe(sae, held_out)
    figures = evaluate(sae, held_out)
    assert whole == {name: figures[name] for name in ("l0", "mse")}
    monkeypatch.setattr("prolu.evaluation.scoring.ENTRIES_PER_PASS", 1)
    assert probe(sae, held_out) == pytest.approx(whole, rel=1e-6)


def test_a_torn_results_file_is_named(study, tmp_path):
    (tmp_path / "config.json").write_bytes((study.folder / "config.json").read_bytes())
    (tmp_path / "results.jsonl").write_text('{"run_id": "a"\n')
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        Results.load(tmp_path)


@pytest.mark.usefixtures("every_format")
def test_several_studies_are_pooled_with_their_names(tiny_stream, tmp_path, capsys):
    from prolu.cli.entry_point import main

    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, lr in zip(folders, (1e-3, 2e-3), strict=True):
        runs = grid(RunConfig(d_sae=40, n_tokens=1280, lr=lr), nonlinearity=["relu", "prolu_ste"], coeff=[0.01, 0.04])
        run_sweep(runs, tiny_stream, folder, eval_tokens=320, progress=False)
    capsys.readouterr()
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "both")]) == 0
    shown = capsys.readouterr().out
    assert "8 SAEs" in shown
    page = (tmp_path / "both" / "report.html").read_text()
    assert "first: 4 of 4 SAEs finished" in page
    assert "second: 4 of 4 SAEs finished" in page
    assert (tmp_path / "both" / "figures" / "degradation-against-l0.png").stat().st_size > 10_000
    assert main(["report", str(folders[0]), str(folders[0])]) == 2
    assert "listed twice" in capsys.readouterr().err
    assert main(["report", *map(str, folders)]) == 0
    assert (tmp_path / "pooled" / "report.html").exists()
