"""Results as they are met in Python: short texts, tables in notebooks, pandas, figures, what a run knows."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pandas
import pytest
import torch
from matplotlib.figure import Figure

from prolu import ActivationStream, Results, RunConfig, grid, run_sweep
from prolu.evaluation.comparison.frontiers import family
from prolu.runtime.notebooks import ShownRows
from prolu.sae.autoencoder import SAE
from prolu.studies.runs import Frontier, Run
from support.made_studies import bent
from support.shown_html import HOSTILE, check_safe

BASE = RunConfig(d_sae=24, n_tokens=64 * 30, coeff=0.02, lr=3e-3)
RUNS = [
    *grid(BASE, nonlinearity=["relu", "prolu_ste"], init_seed=[0, 1]),
    replace(BASE, nonlinearity="topk", target_l0=4.0, resample_fractions=(0.5,), resample_candidates=500),
]


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_lm, tiny_blocks):
    stream = ActivationStream(tiny_lm, tiny_blocks, batch_size=64, seed=3, window_tokens=2048)
    return run_sweep(RUNS, stream, tmp_path_factory.mktemp("shown") / "study", eval_tokens=640, progress=False)


def with_records(study, *changes):
    """The study with some fields of its runs changed, which a longer training would have made."""
    records = [record | change for record, change in zip(study.records, changes, strict=False)]
    return Results(study.folder, records)


def test_texts_are_short(study):
    assert repr(study) == f"Results({study.folder}: 5 runs of 3 families, 0 converged)"
    run = study.runs[0]
    record = run.record
    scores = f"L0 {record['l0']:.1f}, CE increase {record['degradation']:.3f} nats, not converged"
    assert repr(run) == f"Run({run.run_id}: {scores})"
    assert repr(study.frontier()) == "Frontier(0 of 0 converged runs are best in L0 and CE increase)"
    one = with_records(study, {"converged": True})
    assert repr(one) == f"Results({study.folder}: 1 runs of one family, 1 converged)"
    assert repr(one.frontier("mse", "l1")) == "Frontier(1 of 1 converged runs are best in MSE and L1)"
    assert len(repr([*study.verdicts(), *study.runs])) < 5000


def test_a_config_says_what_differs_and_can_be_typed_in_again(study):
    for config in (*RUNS, RunConfig(), replace(BASE, init_from=str(study.runs[0].folder))):
        assert eval(repr(config)) == config
    assert repr(RunConfig()) == "RunConfig()"
    assert repr(BASE) == "RunConfig(coeff=0.02, d_sae=24, n_tokens=1920, lr=0.003)"
    text = check_safe(BASE._repr_html_())
    assert text.startswith(f"RunConfig of prolu_ste + l1, with {len(fields(RunConfig)) - 4} defaults")
    assert "warmup_fraction" in text


def test_tables_of_a_notebook(study):
    text = check_safe(study._repr_html_())
    assert text.startswith(f"Results: {study.folder}: 5 runs of 3 families")
    for record in study.records:
        for shown in (family(record), f"{record['l0']:.1f}", f"{record['degradation']:.3f}", f"{record['mse']:.3f}"):
            assert shown in text
    assert text.count("not converged") == 5
    assert study.records[0]["run_id"] in check_safe(study.runs[0]._repr_html_())
    frontier = with_records(study, *[{"converged": True, "l0": 9.0 - i} for i in range(5)]).frontier()
    assert check_safe(frontier._repr_html_()).count("converged") == 1 + len(frontier.runs) > 1
    assert check_safe(study.frontier()._repr_html_()).startswith("Frontier: 0 of 0")
    assert check_safe(Results(study.folder, [])._repr_html_())


def test_failures_stand_below_the_table(study, tmp_path):
    failed = tmp_path / "relu-bad"
    failed.mkdir()
    (failed / "failure.json").write_text(json.dumps({"step": 3, "reason": "the loss is <b>not</b> finite"}))
    text = check_safe(Results(tmp_path, study.records)._repr_html_())
    assert text.endswith("relu-bad failed: the loss is <b>not</b> finite")


def test_text_of_strangers_is_escaped(study):
    stranger = Results(study.folder, [study.records[0] | {"nonlinearity": HOSTILE, "run_id": "a", "note": HOSTILE}])
    for shown in (stranger, stranger.runs[0], Frontier("l0", "degradation", stranger.runs, stranger.runs)):
        html = shown._repr_html_()
        assert "<script>" not in html
        assert "<script>alert(1)" in check_safe(html)
    sae = study.runs[0].load()
    sae.provenance |= {"hook": HOSTILE, "lm": HOSTILE}
    assert "<script>" not in sae._repr_html_()
    assert "<script>alert(1)" in check_safe(sae._repr_html_())


def test_an_sae_shows_what_it_is(study):
    sae = study.runs[0].load()
    text = check_safe(sae._repr_html_())
    for shown in ("relu", "16", "24", sae.hook, "per_token", "float32 on cpu"):
        assert shown in text


def test_results_without_a_language_model(tmp_path):
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(2000, 12)).astype(np.float32))
    stream = ActivationStream.from_rows(rows, batch_size=64, window_tokens=640)
    study = run_sweep([RUNS[0]], stream, tmp_path / "rows", eval_tokens=200, progress=False)
    text = check_safe(study._repr_html_())
    assert "fraction of variance unexplained" in text
    assert "CE" not in text
    assert "recovered" not in text
    assert "FVU" in repr(study.runs[0])
    assert study.plot().axes[0].get_ylabel() == "fraction of variance unexplained"


def test_a_run_knows_its_family_config_l0_and_curve(study):
    assert study.families == ["relu + l1", "prolu_ste + l1", "topk"]
    for run, config in zip(study.runs, RUNS, strict=True):
        assert run.run_id == config.run_id
        assert run.family == config.family
        assert run.l0 == run.record["l0"]
        # The penalty is recorded by its name.
        assert run.config == replace(config, penalty=config.resolved_penalty)
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert run.curve == lines
        assert isinstance(run.load(), SAE)


def test_an_sae_that_was_trained_elsewhere_has_no_config(study, tmp_path):
    study.runs[0].load().save(tmp_path / "a")
    run = Run(tmp_path / "a", study.records[0])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["provenance"].pop("run")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was not trained by prolu, so its RunConfig is not known"):
        _ = run.config
    assert run.curve == []


def test_a_data_frame_has_a_row_per_run(study):
    frame = study.to_pandas()
    assert frame["family"].tolist() == [run.family for run in study.runs]
    assert frame.columns[0] == "family"
    for name in ("run_id", "l0", "mse", "degradation", "converged"):
        assert frame[name].tolist() == [record[name] for record in study.records]
    assert frame.groupby("family")["mse"].mean()["relu + l1"] == pytest.approx(
        sum(record["mse"] for record in study.records[:2]) / 2
    )
    some = with_records(study, *[{"converged": True}] * 5).frontier()
    assert some.to_pandas()["run_id"].tolist() == [run.run_id for run in some.runs]
    assert isinstance(study.frontier().to_pandas(), pandas.DataFrame)


class Made(Results):
    """Results of records that nothing on the disk goes with."""

    @property
    def config(self):
        return {"stream": {}}

    @property
    def failures(self):
        return {}


def test_verdicts_and_standings_are_tables(tmp_path):
    records = [*bent("relu + l1", 1.0, seeds=(0, 1, 2)), *bent("prolu_ste + l1", 0.8, seeds=(0, 1, 2))]
    study = Made(tmp_path, records)
    verdicts = study.verdicts([12.0, 30.0])
    assert isinstance(verdicts, ShownRows)
    assert len(verdicts) == 2
    frame = verdicts.to_pandas()
    assert frame["l0"].tolist() == [12.0, 30.0]
    assert frame["change"].tolist() == [v.change for v in verdicts]
    assert repr(verdicts[0]).startswith("Verdict(prolu_ste + l1 against relu + l1 at L0 12: change of CE increase -20")
    text = check_safe(verdicts._repr_html_())
    assert text.startswith("2 of Verdict")
    assert text.count("lower") == 2
    assert "3 seeds" in text
    assert "against" in check_safe(verdicts[0]._repr_html_())
    standings = study.standings(["degradation"], [12.0])
    assert {s.family for s in standings} == {"relu + l1", "prolu_ste + l1"}
    assert "probability of being best" in check_safe(standings._repr_html_())
    assert math.isfinite(standings.to_pandas()["value"].sum())


def test_plots_are_figures_that_a_notebook_shows_once(study, tmp_path):
    figure = study.plot()
    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.axes[0].get_xlabel() == "L0 (active latents per token)"
    written = study.frontier("l0", "mse").plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert written.axes[0].get_ylabel().startswith("MSE")
    with pytest.raises(ValueError, match="result 'beauty': choose one of"):
        study.plot(y="beauty")


def test_plots_go_into_axes_that_are_given(study):
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    assert study.plot(left) is figure
    assert study.frontier("l0", "mse").plot(ax=right) is figure
    assert len(figure.axes) == 2
    assert left.get_legend() is not None
    parts = Figure(layout="constrained").subfigures(1, 2)
    assert study.plot(parts[0].subplots()) is parts[0].figure
