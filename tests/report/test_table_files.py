"""Results as tables."""

import json

import pyarrow.csv
from pyarrow import parquet

from prolu import RunConfig, with_seeds
from prolu.report.table_files import write_tables


def records():
    one = {
        "run_id": "a", "nonlinearity": "relu", "penalty": "l1", "coeff": 0.1, "converged": True, "l0": 9.0, "l1": 3.0,
        "mse": 0.1, "degradation": 0.2, "recovered": 0.9, "dead_fraction": 0.0, "unit": None,
        "resampled": [{"step": 3}],
    }  # fmt: skip
    return [one, one | {"run_id": "b", "negative_bias_fraction": float("nan"), "n_tokens": 7, "unit": "document"}]


def test_all_results_are_one_table_in_two_formats(tmp_path):
    write_tables(records(), tmp_path)
    for table in (parquet.read_table(tmp_path / "results.parquet"), pyarrow.csv.read_csv(tmp_path / "results.csv")):
        assert table.column_names == ["family", *records()[1]][: len(table.column_names)]
        assert table["family"].to_pylist() == ["relu + l1"] * 2
        assert table["n_tokens"].to_pylist() == [None, 7]
        assert json.loads(table["resampled"][0].as_py()) == [{"step": 3}]
        assert table["converged"].to_pylist() == [True, True]


def test_seeds_multiply_runs():
    runs = with_seeds([RunConfig(coeff=0.1), RunConfig(coeff=0.2)], [0, 5])
    assert [(r.coeff, r.init_seed) for r in runs] == [(0.1, 0), (0.1, 5), (0.2, 0), (0.2, 5)]
