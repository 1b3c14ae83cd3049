"""Comparisons with error bars, on studies whose truth is known."""

import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from prolu.evaluation.comparison import replicates
from prolu.evaluation.comparison.claims import compare_families
from prolu.evaluation.comparison.comparisons import Comparisons
from prolu.evaluation.comparison.intervals import half_width_of_difference
from prolu.evaluation.comparison.points import hypervolume, points, summaries
from prolu.evaluation.comparison.verdicts import Verdict, matched, rows_for_tables, verdict_table
from prolu.evaluation.document_sums import DocumentSums, read_documents_of
from support.made_studies import SCORED_ON, Made, power_law, record

file = Path(__file__).parents[2] / "benchmarks" / "intervals.py"
spec = importlib.util.spec_from_file_location("coverage_benchmark", file)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(replicates, "N_RESAMPLES", 300)


def test_points_are_means_over_seeds_with_t_intervals():
    runs = [record("relu + l1", 0.1, l0, 2.0, seed) for seed, l0 in enumerate((9.0, 10.0, 11.0))]
    runs.append(record("relu + l1", 0.2, 5.0, 3.0, 0) | {"converged": False})
    alone, three = points(runs)
    assert (three.x, three.y, three.n_seeds, three.setting) == (10.0, 2.0, 3, 0.1)
    assert three.x_half_width == pytest.approx(4.302653 / math.sqrt(3))
    assert three.y_half_width == 0
    assert three.run_ids == tuple(r["run_id"] for r in runs[:3])
    assert (alone.n_seeds, alone.converged, three.converged) == (1, False, True)
    assert math.isnan(alone.x_half_width)


def test_points_take_the_l0_asked_for_as_the_setting_and_keep_other_settings_apart():
    asked = [record("relu + l1", coeff, 20.0, 1.0, seed, target_l0=20.0) for seed, coeff in enumerate((0.1, 0.11))]
    (point,) = points(asked)
    assert (point.setting, point.n_seeds) == (20.0, 2)
    wider = [record("relu + l1", 0.1, 20.0, 1.0, seed, d_sae=256 * (1 + seed)) for seed in (0, 1)]
    assert [p.n_seeds for p in points(wider)] == [1, 1]
    pooled = [record("relu + l1", 0.1, 20.0, 1.0, seed, study=str(seed)) for seed in (0, 1)]
    assert [p.study for p in points(pooled)] == ["0", "1"]


def test_a_power_law_is_read_exactly(tmp_path):
    runs = power_law("relu + l1", 1.0, (0, 1, 2)) + power_law("prolu_ste + l1", 0.7, (0, 1, 2), (8, 17, 50))
    found = matched(Made(runs, tmp_path), "prolu_ste + l1", "relu + l1", 15)
    assert found.change == pytest.approx(-0.3)
    assert found.low == pytest.approx(found.high) == pytest.approx(-0.3)
    assert (found.verdict, found.n_documents, found.covers) == ("lower", 0, "init seeds")


def test_seeds_alone_give_welchs_interval(tmp_path):
    runs = power_law("relu + l1", 1.0, (0, 1, 2), spread=0.02) + power_law("prolu_ste + l1", 0.9, (0, 1, 2))
    found = matched(Made(runs, tmp_path), "prolu_ste + l1", "relu + l1", 20)
    logs = np.log([0.98, 1.0, 1.02])
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)  # the other family varies not at all: 2 degrees of freedom
    assert math.log1p(found.high) - math.log1p(found.change) == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize(("runs", "l0", "reason"), [
    (power_law("relu + l1", 1.0) + power_law("prolu_ste + l1", 0.7), 20, "one seed"),
    (power_law("relu + l1", 1.0, (0, 1)) + power_law("prolu_ste + l1", 0.7, (0, 1)), 90,
     "no run of prolu_ste + l1 within a factor of 1.5 of L0 90: the nearest is at L0 40; train one with target_l0=90"),
    (power_law("relu + l1", 1.0, (0, 1)) + power_law("prolu_ste + l1", 0.7, (0, 1)), 45,
     "L0 45 is outside the range of prolu_ste + l1, L0 10 to 40; train one with target_l0=45"),
    (power_law("relu + l1", 1.0, (0, 1)), 20, "no run of prolu_ste + l1"),
    ([r | {"degradation": -0.1} for r in power_law("relu + l1", 1.0, (0, 1))] + power_law("prolu_ste + l1", 0.7), 20,
     "no run of relu + l1 has L0 and CE increase above 0"),
])  # fmt: skip
def test_what_cannot_be_told_is_said_with_its_reason(tmp_path, runs, l0, reason):
    found = matched(Made(runs, tmp_path), "prolu_ste + l1", "relu + l1", l0)
    assert found.verdict == "not tested"
    assert math.isnan(found.low)
    assert reason in found.reason
    assert reason in str(found)
    assert math.isnan(found.change) is not (reason == "one seed")


def test_a_pair_of_which_nothing_is_known_takes_one_row(tmp_path):
    runs = power_law("relu + l1", 1.0, (0, 1)) + power_law("prolu_ste + l1", 0.7, (0, 1))
    for l0s, starts in (
        ((90,), ["no run of prolu_ste + l1 within a factor of 1.5 of L0 90"]),
        ((2, 90), ["no run of prolu_ste + l1 within a factor of 1.5 of L0 2"]),
        ((20, 90), ["", "no run of prolu_ste + l1 within a factor of 1.5 of L0 90"]),
    ):
        rows = rows_for_tables(verdict_table(Made(runs, tmp_path), l0s))
        assert len(rows) == len(starts)
        for row, start in zip(rows, starts, strict=True):
            assert row.reason.startswith(start)
            assert all(f"L0 {l0}" in row.reason for l0 in l0s if len(starts) == 1)
    assert [v.reason for v in rows_for_tables(verdict_table(Made(runs[:6], tmp_path), (20, 90)))] == []


def test_unconverged_runs_take_part_and_are_counted(tmp_path):
    runs = power_law("relu + l1", 1.0, (0, 1)) + power_law("prolu_ste + l1", 0.7, (0, 1))
    runs[0]["converged"] = runs[-1]["converged"] = False
    found = matched(Made(runs, tmp_path), "prolu_ste + l1", "relu + l1", 20)
    assert (found.n_unconverged, found.n_runs, found.n_seeds) == (2, 12, 2)
    assert "2 of 12 runs had not converged" in str(found)
    without = matched(Made(runs, tmp_path), "prolu_ste + l1", "relu + l1", 10, unconverged=False)
    assert (without.n_seeds, without.n_unconverged, without.n_runs) == (1, 0, 10)
    alone = [r | {"converged": r["nonlinearity"] != "relu"} for r in runs]
    asked = matched(Made(alone, tmp_path), "prolu_ste + l1", "relu + l1", 20, unconverged=False)
    assert asked.reason == "no converged run of relu + l1"


def test_stream_seeds_are_covered_where_studies_at_several_are_pooled(tmp_path):
    studies = [Made(power_law("relu + l1", 1.0, (0, 1)) + power_law("prolu_ste + l1", 0.7, (0, 1)), tmp_path, s)
               for s in (0, 1)]  # fmt: skip
    found = matched(studies, "prolu_ste + l1", "relu + l1", 20)
    assert found.n_seeds == 4
    assert found.covers == "init seeds and stream seeds"


def scored_on(**changes):
    """The config of a study that was scored on something else."""
    stream = SCORED_ON["stream"] | {k: v for k, v in changes.items() if k in SCORED_ON["stream"]}
    config = SCORED_ON | {k: v for k, v in changes.items() if k not in stream} | {"stream": stream}
    return {name: value for name, value in config.items() if value is not None}


OLD = {"held_out_digest": None}
"""Version 0.1.0 kept no digest of the held-out tokens."""


@pytest.mark.parametrize(("first", "second", "words"), [
    ({}, {"lm_digest": "another"}, "lm_digest is 'model' there and 'another' here"),
    ({}, {"lm_digest": None}, "lm_digest is 'model' there and not recorded here"),
    ({"lm_digest": None}, {"lm_digest": None}, "lm_digest is not recorded"),
    ({}, {"lm_dtype": "bf16"}, "lm_dtype is 'fp32' there and 'bf16' here"),
    ({}, {"hook": "blocks.2"}, "hook is 'blocks.1' there and 'blocks.2' here"),
    ({}, {"ctx": 128}, "ctx is 64 there and 128 here"),
    ({}, {"held_out_digest": "others"}, "held_out_digest is 'held-out tokens' there and 'others' here"),
    ({}, OLD | {"data_digest": "others"}, "nothing shows .* data_digest is 'all tokens' there and 'others' here"),
    (OLD, OLD | {"eval_tokens": 320}, "nothing shows .* eval_tokens is 640 there and 320 here"),
    (OLD | {"data_digest": None}, OLD | {"data_digest": None}, "nothing shows .* data_digest is not recorded"),
])  # fmt: skip
def test_studies_that_were_scored_on_different_things_are_not_compared(tmp_path, first, second, words):
    runs = power_law("relu + l1", 1.0, (0, 1)) + power_law("prolu_ste + l1", 0.7, (0, 1))
    studies = [
        Made(runs, tmp_path / name, config=scored_on(**changes)) for name, changes in (("a", first), ("b", second))
    ]
    for compare in (lambda s: matched(s, "prolu_ste + l1", "relu + l1", 20), verdict_table):
        with pytest.raises(ValueError, match=f"a and .*b cannot be compared: {words}"):
            compare(studies)
        assert compare(studies[:1])


@pytest.mark.parametrize(("first", "second"), [
    ({}, {"data_digest": "more training text"}),
    (OLD, OLD),
    ({}, OLD),
])  # fmt: skip
def test_studies_that_were_scored_on_the_same_tokens_are_compared(tmp_path, first, second):
    runs = [power_law("relu + l1", 1.0, (0, 1)), power_law("prolu_ste + l1", 0.7, (0, 1))]
    configs = [scored_on(**changes) for changes in (first, second)]
    studies = [Made(some, tmp_path, config=config) for some, config in zip(runs, configs, strict=True)]
    assert matched(studies, "prolu_ste + l1", "relu + l1", 20).change == pytest.approx(-0.3)


def test_the_curve_goes_through_all_runs_also_through_a_bad_one(tmp_path):
    runs = power_law("relu + l1", 1.0, (0, 1)) + power_law("prolu_ste + l1", 0.7, (0, 1))
    bad = [record("prolu_ste + l1", 9, 25.0, 0.5, seed) for seed in (0, 1)]
    found = matched(Made(runs + bad, tmp_path), "prolu_ste + l1", "relu + l1", 25)
    assert found.change == pytest.approx(0.5 / 25**-1.3 - 1)


def test_near_its_end_a_curve_is_read_along_its_chord_and_one_setting_as_it_stands(tmp_path):
    runs = power_law("relu + l1", 1.0, (0, 1)) + power_law("prolu_ste + l1", 0.7, (0, 1))
    assert matched(Made(runs, tmp_path), "prolu_ste + l1", "relu + l1", 41).change == pytest.approx(-0.3)
    single = power_law("relu + l1", 1.0, (0, 1), (20,)) + power_law("prolu_ste + l1", 0.7, (0, 1), (20,))
    assert matched(Made(single, tmp_path), "prolu_ste + l1", "relu + l1", 20.2).change == pytest.approx(-0.3)
    assert "outside" in matched(Made(single, tmp_path), "prolu_ste + l1", "relu + l1", 21).reason


def test_a_family_is_compared_with_its_own_random_baselines(tmp_path):
    runs = power_law("relu + l1", 1.0) + power_law("topk + none", 0.5)
    for freeze, level in (("decoder", 2.0), ("soft_decoder", 1.25)):
        frozen = power_law("relu + l1", level, freeze=freeze) + power_law("topk + none", level, freeze=freeze)
        runs += [r | {"run_id": f"{r['run_id']}-{freeze}"} for r in frozen]
    found = {(v.challenger, v.baseline): v.change for v in verdict_table(Made(runs, tmp_path), [20])}
    assert found == {
        ("relu + l1", "relu + l1, frozen decoder"): pytest.approx(-0.5),
        ("relu + l1", "relu + l1, soft-frozen decoder"): pytest.approx(-0.2),
        ("topk", "relu + l1"): pytest.approx(-0.5),
        ("topk", "topk, frozen decoder"): pytest.approx(-0.75),
        ("topk", "topk, soft-frozen decoder"): pytest.approx(-0.6),
    }


def test_the_table_compares_every_family_with_its_baselines_at_the_l0s_asked_for(tmp_path):
    runs = [r for name in ("relu + l1", "relu + sqrt_l1", "prolu_ste + sqrt_l1", "topk + none")
            for r in power_law(name, 1.0, (0, 1))]  # fmt: skip
    table = verdict_table(Made(runs, tmp_path))
    assert {(v.challenger, v.baseline) for v in table} == {
        ("relu + sqrt_l1", "relu + l1"), ("prolu_ste + sqrt_l1", "relu + l1"),
        ("prolu_ste + sqrt_l1", "relu + sqrt_l1"), ("topk", "relu + l1"), ("topk", "relu + sqrt_l1"),
    }  # fmt: skip
    assert [v.l0 for v in table[:3]] == [14.1, 20.0, 28.3]
    assert all(v.change == pytest.approx(0, abs=1e-12) for v in table)
    asked = [r | {"target_l0": r["l0"]} for r in runs]
    assert [v.l0 for v in verdict_table(Made(asked, tmp_path))[:3]] == [10, 20, 40]


def test_hypervolume_is_the_area_beaten():
    e = math.e
    runs = [record("relu + l1", 1, 1.0, 3.0), record("relu + l1", 2, e, 1.0), record("relu + l1", 3, e**9, 0.5)]
    (volume,) = hypervolume(runs, (e**2, 4.0)).values()
    assert volume.mean == pytest.approx(1 * 1 + 1 * 3)
    assert volume.n_seeds == 1
    beaten = record("relu + l1", 4, e**1.5, 2.0)
    assert hypervolume([*runs, beaten], (e**2, 4.0))["relu + l1"].mean == pytest.approx(volume.mean)
    again = [r | {"init_seed": 1} for r in runs]
    two = hypervolume(runs + again, (e**2, 4.0))["relu + l1"]
    assert (two.mean, two.half_width, two.n_seeds) == (pytest.approx(volume.mean), 0, 2)
    with pytest.raises(ValueError, match="reference L0 0"):
        hypervolume(runs, (0, 1.0))


def test_runs_on_other_documents_are_not_paired():
    study = benchmark.simulated(benchmark.Case(n_documents=30), np.random.default_rng(0))
    assert benchmark.verdict_of(study).n_documents == 30
    name, sums = next(iter(study.documents.items()))
    others = DocumentSums(**{**sums.__dict__, "n_tokens": sums.n_tokens + 1})
    study.documents[name] = others
    found = benchmark.verdict_of(study)
    assert (found.n_documents, found.covers) == (0, "init seeds")
    assert "documents not recorded" in str(found)


def test_documents_are_paired_and_the_same_every_time():
    """What moves all runs alike on a document cancels: a hundred times more of it widens nothing."""
    quiet = benchmark.Case(seed=0, run=0, document=0.01, document_family=0.01, document_run=0, length=0)
    found = benchmark.verdict_of(benchmark.simulated(quiet, np.random.default_rng(1)))
    loud = benchmark.verdict_of(benchmark.simulated(quiet._replace(document=1.0), np.random.default_rng(1)))
    assert loud.high - loud.low < 2 * (found.high - found.low)
    assert benchmark.verdict_of(benchmark.simulated(quiet, np.random.default_rng(1))) == found


def test_a_verdict_is_a_sentence():
    found = Verdict("prolu_ste + l1", "relu + l1", 20.0, -0.312, -0.351, -0.268, "lower", 3, 214, "init seeds")
    assert (
        str(found) == "prolu_ste + l1 against relu + l1 at L0 20: change of CE increase -31.2% "
        "(95% interval -35.1% to -26.8%, 3 seeds, 214 documents)"
    )
    open_ = found._replace(high=0.02, verdict="not distinguishable")
    assert str(open_).endswith("(95% interval -35.1% to +2.0%, 3 seeds, 214 documents), not distinguishable")
    one = found._replace(verdict="not tested", n_seeds=1, reason="one seed", n_unconverged=7, n_runs=12)
    assert str(one).endswith(
        "-31.2% (95% interval over held-out documents -35.1% to -26.8%, one seed, 214 documents; "
        "7 of 12 runs had not converged), not tested over seeds"
    )
    assert str(one._replace(low=math.nan, high=math.nan)).endswith(
        "-31.2% (no interval, one seed, 214 documents; 7 of 12 runs had not converged), not tested over seeds"
    )


def test_a_difference_smaller_than_the_tolerance_of_the_curves_says_so():
    small = Verdict("a", "b", 20.0, -0.012, -0.02, -0.004, "lower", 3, 214, "init seeds", tolerance=0.031)
    assert str(small).endswith("214 documents; smaller than the error of 3.1% that reading between runs may have)")
    assert "may be wrong" not in str(small._replace(change=-0.04))
    assert "may be wrong" not in str(small._replace(verdict="not distinguishable"))


class Bounds(NamedTuple):
    low: float
    high: float


@pytest.mark.parametrize(("case", "bounds"), [
    ("3 seeds, both", Bounds(0.92, 0.98)),
    ("3 seeds, seeds only", Bounds(0.92, 0.98)),
    ("3 seeds, documents only", Bounds(0.92, 0.98)),
])  # fmt: skip
def test_intervals_hold_the_truth_as_often_as_they_say(case, bounds):
    """400 studies: the standard error of a coverage of 95% is 1.1%."""
    found = benchmark.coverage(benchmark.CASES[case], 400, seed=5)
    assert bounds.low <= found["ours"]["coverage"] <= bounds.high
    if case == "3 seeds, seeds only":
        assert found["percentile bootstrap"]["coverage"] < 0.87  # why it is not what is used


def test_a_ce_increase_that_resamples_to_nothing_gives_no_interval():
    logs = [np.zeros(3), np.ones(3)]
    assert math.isnan(half_width_of_difference(logs, [np.full((10, 3), math.nan), np.zeros((10, 3))], 9.0))
    assert half_width_of_difference([np.zeros(2), np.zeros(2)], None, math.inf) == 0


def test_where_a_ce_increase_is_near_0_the_change_in_nats_has_an_interval(tmp_path):
    # Two families whose CE increases are 0.02 and 0.01 nats, while documents differ by 0.1: a ratio has no interval.
    rng = np.random.default_rng(0)
    common = 0.1 * rng.standard_normal(40)
    n = np.full(40, 100)
    runs = []
    for name, increase in (("relu + l1", 0.02), ("prolu_ste + l1", 0.01)):
        for l0 in (8.0, 16.0, 32.0):
            each = increase + common + 0.001 * rng.standard_normal(40)
            run = record(name, 1 / l0, l0, float(each.mean()), ce_recon=float(3 + each.mean()), target_l0=l0)
            DocumentSums(
                document=np.arange(40), n_tokens=n, n_predicted=n, l0=l0 * n, squared_error=1.0 * n, ce_clean=3.0 * n,
                ce_recon=(3 + each) * n, kl=np.abs(each) * n,
            ).save(tmp_path / run["run_id"])  # fmt: skip
            runs.append(run)
    study = Made(runs, tmp_path)
    comparisons = Comparisons(study)
    ratio = comparisons.verdict("prolu_ste + l1", "relu + l1", 16)
    assert math.isnan(ratio.low)
    assert ratio.reason == "in some resample of the documents a CE increase is not above 0"
    found = comparisons.in_nats(ratio)
    assert found.metric == "ce_recon"
    assert found.change == pytest.approx(runs[4]["degradation"] - runs[1]["degradation"])
    assert -0.012 < found.low < found.high < -0.008
    assert comparisons.in_nats(found) is found
    compared = compare_families([study])
    (claim,) = compared.against_relu
    assert claim.statement == "prolu_ste + l1 has a lower CE increase than relu + l1 at equal L0"
    assert claim.verdict == "holds (one seed)"
    assert " nats (95% interval" in claim.evidence
    assert {v.metric for v in compared.others} == {"ce_recon"}


def test_documents_are_saved_whole_or_refused(tmp_path):
    study = benchmark.simulated(benchmark.Case(n_documents=5), np.random.default_rng(0))
    sums = next(iter(study.documents.values()))
    assert read_documents_of(tmp_path) is None
    sums.save(tmp_path)
    for name, value in read_documents_of(tmp_path).__dict__.items():
        assert np.array_equal(value, getattr(sums, name))
    (tmp_path / "documents.safetensors").write_bytes(b"\0" * 7)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_documents_of(tmp_path)


def test_families_in_numbers():
    runs = [*power_law("relu + l1", 8.0, seeds=(0, 1)), record("topk + none", 0.0, 15.0, 0.1) | {"converged": False}]
    reference, (relu, topk) = summaries(runs)
    assert reference == (40, max(r["degradation"] for r in runs))
    assert (relu.family, relu.n_runs, relu.n_converged, relu.l0_range) == ("relu + l1", 6, 6, (10, 40))
    assert relu.hypervolume == hypervolume(runs, reference)["relu + l1"]
    assert summaries([record("relu + l1", 0.1, 10.0, 1.0)])[1][0].hypervolume.mean == 0  # it is the reference itself
    assert (topk.family, topk.n_converged) == ("topk", 0)
    assert topk.hypervolume.mean > 0  # convergence is counted beside it, and hides nothing
    assert hypervolume(runs, reference, unconverged=False).keys() == {"relu + l1"}
