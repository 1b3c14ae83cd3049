"""Figures that are added to finished runs: they stand in the results like any other, and nothing else changes."""

import json

import pytest

from prolu import Results, RunConfig, run_sweep
from prolu.runtime.files import FolderBusyError, locked
from prolu.studies.added_figures import Measure, add_figures, measure_runs


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study, reduced to its results."""
    folder = tmp_path_factory.mktemp("added") / "study"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"stream": {"lm": "tiny"}, "runs": []}))
    lines = [
        {"run_id": name, "nonlinearity": "relu", "penalty": "l1", "coeff": 0.1, "converged": True, "l0": l0, "l1": 1.0,
         "mse": 0.1, "degradation": 0.2, "recovered": 0.9}
        for name, l0 in (("a", 4.0), ("b", 8.0))
    ]  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_figures_stand_beside_the_others_and_are_replaced_by_newer_ones(study):
    before = Results.load(study).records
    add_figures(study, {"a": {"probe_mean_1": 0.5, "probe_text": "one"}})
    add_figures(study, {"a": {"probe_mean_1": 0.75}, "b": {"probe_mean_1": float("nan")}})
    first, second = Results.load(study).records
    assert first == before[0] | {"probe_mean_1": 0.75, "probe_text": "one"}
    assert second == before[1] | {"probe_mean_1": None}


def test_what_results_cannot_hold_is_refused_and_nothing_written(study):
    before = (study / "results.jsonl").read_bytes()
    with pytest.raises(ValueError, match="has no finished run named c"):
        add_figures(study, {"c": {"probe_mean_1": 0.5}})
    with pytest.raises(ValueError, match="probe_mean_1 is 'high', but must be a number"):
        add_figures(study, {"a": {"probe_mean_1": "high"}})
    with locked(study), pytest.raises(FolderBusyError):
        add_figures(study, {"a": {"probe_mean_1": 0.5}})
    assert (study / "results.jsonl").read_bytes() == before


def test_only_what_is_missing_is_measured(tiny_stream, tmp_path):
    runs = [RunConfig(d_sae=24, n_tokens=1280, coeff=coeff) for coeff in (0.01, 0.02)]
    results = run_sweep(runs, tiny_stream, tmp_path / "study", eval_tokens=640, progress=False)
    seen = []

    def width(sae):
        seen.append(sae.d_sae)
        return {"width": float(sae.d_sae)}

    done = []
    add_figures(results.folder, {results.records[0]["run_id"]: {"on": "x"}})
    measure_runs(Results.load(results.folder).runs, [Measure("on", "x", width)], done.append)
    assert (seen, done) == ([24], [1, 1])
    measure_runs(Results.load(results.folder).runs, [Measure("on", "x", width)], done.append)
    assert seen == [24]
    measure_runs(Results.load(results.folder).runs, [Measure("on", "y", width)], done.append)
    assert seen == [24] * 3
    assert [record["width"] for record in Results.load(results.folder).records] == [24.0, 24.0]
