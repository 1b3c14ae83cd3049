"""Families compared by any metric of the catalogue, as ratios and as differences."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from prolu import matched, verdict_table
from prolu.evaluation.comparison import replicates
from prolu.evaluation.comparison.intervals import t_quantile
from prolu.evaluation.document_sums import DocumentSums
from support.made_studies import Made, bent, power_law

file = Path(__file__).parents[2] / "benchmarks" / "intervals.py"
spec = importlib.util.spec_from_file_location("coverage_benchmark", file)
benchmark = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = benchmark
spec.loader.exec_module(benchmark)

STE, RELU = "prolu_ste + l1", "relu + l1"


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(replicates, "N_RESAMPLES", 300)


def with_metric(runs, name, value):
    """The runs with a metric that is a function of L0 and seed."""
    return [r | {name: value(r["l0"], r["init_seed"])} for r in runs]


def study(tmp_path, name, challenger, baseline, seeds=(0, 1, 2)):
    l0s = (9, 16, 23, 40)
    return Made(
        [
            *with_metric(bent(STE, 1.0, seeds, l0s), name, challenger),
            *with_metric(bent(RELU, 1.0, seeds, l0s), name, baseline),
        ],
        tmp_path,
    )


def test_a_positive_metric_is_compared_as_a_ratio_in_the_log(tmp_path):
    made = study(tmp_path, "fvu", lambda l0, seed: 0.7 / l0, lambda l0, seed: 1 / l0)
    found = matched(made, STE, RELU, 20, y="fvu")
    assert found.change == pytest.approx(-0.3)
    assert (found.verdict, found.is_better, found.metric) == ("lower", True, "fvu")
    assert str(found).startswith(f"{STE} against {RELU} at L0 20: change of FVU -30.0% (95% interval -30.0% to -30.0%")


def test_a_bounded_metric_is_compared_as_a_difference_with_welchs_interval(tmp_path):
    noise = np.array([-0.01, 0.0, 0.013])
    made = study(
        tmp_path,
        "recovered",
        lambda l0, seed: 0.55 + 0.1 * math.log(l0) + noise[seed],
        lambda l0, seed: 0.5 + 0.1 * math.log(l0),
    )
    found = matched(made, STE, RELU, 20, y="recovered")
    assert found.change == pytest.approx(0.05 + noise.mean())
    half = t_quantile(2) * noise.std(ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(found.change - half), pytest.approx(found.change + half))
    assert (found.verdict, found.is_better) == ("higher", True)
    assert str(found).endswith(
        "change of loss recovered +0.051 (95% interval +0.0224 to +0.0796, 3 seeds, held-out text not covered)"
    )
    assert matched(made, RELU, STE, 20, y="recovered").is_better is False


def test_a_difference_may_be_of_zeros_and_of_negative_numbers(tmp_path):
    made = study(tmp_path, "dead_fraction", lambda l0, seed: 0.0, lambda l0, seed: 0.0)
    found = matched(made, STE, RELU, 20, y="dead_fraction")
    assert (found.change, found.low, found.high, found.verdict) == (0, 0, 0, "not distinguishable")
    made = study(tmp_path, "encoder_decoder_cosine", lambda l0, seed: -0.25, lambda l0, seed: 0.5)
    found = matched(made, STE, RELU, 20, y="encoder_decoder_cosine")
    assert (found.change, found.verdict, found.is_better) == (-0.75, "lower", None)


def test_the_unit_of_a_difference_is_said(tmp_path):
    made = study(tmp_path, "ce_recon", lambda l0, seed: 3.0 + 0.01 * seed, lambda l0, seed: 3.5)
    assert "change of CE with the SAE -0.49 nats (95% interval -0.515 to -0.465" in str(
        matched(made, STE, RELU, 16, y="ce_recon")
    )


def test_runs_without_the_metric_are_left_out_and_counted(tmp_path):
    runs = power_law(STE, 0.7, (0, 1)) + power_law(RELU, 1.0, (0, 1))
    some = [r | {"recovered": None if r["l0"] == 40 else 0.9} for r in runs]
    found = matched(Made(some, tmp_path), STE, RELU, 14, y="recovered")
    assert found.change == 0
    assert f"2 runs of {STE} left out: no L0 above 0 with a value of loss recovered" in found.notes
    for y, words in (
        ("kl", "L0 and KL divergence above 0"),
        ("dense_fraction", "L0 above 0 with a value of dense latents"),
    ):
        assert matched(Made(runs, tmp_path), STE, RELU, 20, y=y).reason == f"no run of {STE} has {words}"


def test_the_table_takes_any_metric(tmp_path):
    made = study(tmp_path, "mse", lambda l0, seed: 0.9 / l0, lambda l0, seed: 1 / l0)
    table = verdict_table(made, [12, 20], y="mse")
    assert [(v.l0, v.metric) for v in table] == [(12, "mse"), (20, "mse")]
    assert all(v.change == pytest.approx(-0.1) for v in table)
    assert [v.l0 for v in verdict_table(made, y="mse")] == [v.l0 for v in verdict_table(made)]


@pytest.mark.parametrize(("y", "words"), [
    ("l0", "metric 'l0': families are compared at an equal L0"),
    ("l0_no_bos", "metric 'l0_no_bos': families are compared at an equal L0"),
    ("coeff", "metric 'coeff': choose one of l0, l1, "),
])  # fmt: skip
def test_what_is_no_metric_is_refused(tmp_path, y, words):
    made = Made(power_law(STE, 0.7, (0, 1)) + power_law(RELU, 1.0, (0, 1)), tmp_path)
    for compare in (lambda: matched(made, STE, RELU, 20, y=y), lambda: verdict_table(made, y=y)):
        with pytest.raises(ValueError, match=words):
            compare()


def test_of_several_settings_the_better_one_is_read(tmp_path):
    for name, better in (("recovered", 0.9), ("dead_fraction", 0.1)):
        two = [
            r | {"run_id": f"{r['run_id']}-{lr}", "lr": lr, name: value}
            for lr, value in ((1e-3, 0.9), (2e-3, 0.1))
            for r in power_law(STE, 0.7, (0, 1))
        ]
        runs = two + with_metric(power_law(RELU, 1.0, (0, 1)), name, lambda l0, seed: 0.5)
        assert matched(Made(runs, tmp_path), STE, RELU, 20, y=name).change == pytest.approx(better - 0.5)


def test_metrics_with_sums_by_document_have_intervals_over_documents_and_others_say_that_they_have_none():
    """A metric that is the CE increase times a constant, document by document, has the same ratio and interval."""
    made = benchmark.simulated(benchmark.Case(n_documents=30), np.random.default_rng(0))
    for r in made.records:
        sums = made.documents[r["run_id"]]
        increase = sums.ce_recon - sums.ce_clean
        made.documents[r["run_id"]] = DocumentSums(
            **{**sums.__dict__, "kl": 3 * increase, "squared_error": 7 * increase}
        )
        r |= {"kl": 3 * r["degradation"], "mse": 7 * r["degradation"] / 16, "fvu": 2 * r["degradation"]}
        r["fvu_raw"] = r["fvu"]
    ours = benchmark.verdict_of(made)
    for y in ("kl", "mse", "fvu"):
        found = benchmark.verdict_of(made, y=y)
        assert found[3:6] == pytest.approx(ours[3:6], rel=1e-9)
        assert (found.n_documents, found.covers) == (30, "init seeds and held-out documents")
    found = benchmark.verdict_of(made, y="fvu_raw")
    assert found.change == pytest.approx(ours.change)
    assert (found.n_documents, found.covers) == (0, "init seeds")
    assert "held-out text not covered" in str(found)
    assert found.high - found.low < ours.high - ours.low


def test_a_difference_read_between_runs_says_how_wrong_that_may_be(tmp_path):
    slope = {STE: 0.2, RELU: 0.199}
    made = study(tmp_path, "recovered", lambda l0, seed: slope[STE] * l0 / 40, lambda l0, seed: slope[RELU] * l0 / 40)
    found = matched(made, STE, RELU, 30, y="recovered")
    product = math.log(30 / 23) * math.log(40 / 30)
    assert found.tolerance == pytest.approx(math.sqrt(2) * 0.0103 * product)
    assert f"smaller than the error of {found.tolerance:.3g} that reading between runs may have" in str(found)
    made = study(tmp_path, "negative_bias_fraction", lambda l0, seed: 0.2, lambda l0, seed: 0.3)
    assert math.isnan(matched(made, STE, RELU, 30, y="negative_bias_fraction").tolerance)
    assert "an error that has not been measured" in str(matched(made, STE, RELU, 30, y="negative_bias_fraction"))
    assert "not known" not in str(matched(made, STE, RELU, 23, y="negative_bias_fraction"))


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says():
    found = benchmark.coverage(benchmark.CASES["3 seeds, CE as a difference"], 250)["ours"]["coverage"]
    assert 0.91 <= found <= 0.985
