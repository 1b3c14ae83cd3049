"""Families by metrics at one L0: values, and the probability that each family is the best."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from prolu import matched, standings
from prolu.evaluation.comparison import replicates
from prolu.evaluation.comparison.points import mean_over_seeds
from support.made_studies import Made, power_law, record

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ranks = loaded("ranks")
STE, RELU, GATED = "prolu_ste + l1", "relu + l1", "gated + l1"


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(replicates, "N_RESAMPLES", 300)


def at_20(name, values, **metrics):
    """A run per seed at L0 20, with a CE increase, and other metrics that are functions of it."""
    return [
        record(name, 0.1, 20.0, y, seed, **{metric: of(y) for metric, of in metrics.items()})
        for seed, y in enumerate(values)
    ]


def by_family(found):
    return {s.family: s for s in found}


def test_two_families_stand_as_their_verdict_and_welchs_test_say(tmp_path):
    values = {STE: (0.19, 0.22, 0.2), RELU: (0.23, 0.225, 0.26, 0.22)}
    study = Made([r for name, some in values.items() for r in at_20(name, some)], tmp_path)
    found = by_family(standings(study, ["degradation"], [20]))
    logs = [np.log(some) for some in values.values()]
    one_sided = stats.ttest_ind(*logs, equal_var=False, alternative="less").pvalue
    assert found[STE].p_best == pytest.approx(1 - one_sided, abs=0.006)
    assert found[STE].p_best + found[RELU].p_best == pytest.approx(1)
    assert (found[STE].is_best, found[RELU].is_best) == (True, False)
    for name, some in values.items():
        log = mean_over_seeds(list(np.log(some)))
        assert found[name].value == pytest.approx(math.exp(log.mean))
        assert found[name].low == pytest.approx(math.exp(log.mean - log.half_width))
        assert found[name].high == pytest.approx(math.exp(log.mean + log.half_width))
    for factor in (0.9, 0.85, 0.8):
        study = Made(at_20(STE, np.array(values[RELU]) * factor) + at_20(RELU, values[RELU]), tmp_path)
        is_lower = matched(study, STE, RELU, 20).verdict == "lower"
        assert (by_family(standings(study, ["degradation"], [20]))[STE].p_best > 0.975) == is_lower


def test_with_documents_two_families_stand_as_their_verdict(tmp_path):
    case = ranks.Case(0.04, n_families=2, n_documents=60)
    n_lower = 0
    for seed in range(12):
        study = ranks.simulated(case, np.random.default_rng(seed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replicates, "read_documents_of", lambda folder, s=study: s.documents[folder.name])
            verdict = matched(study, "relu + l1", "prolu_relu + l1", 20)
            found = by_family(standings(study, ["degradation"], [20]))["relu + l1"]
        # At the edge of the interval, the draws decide.
        if abs(found.p_best - 0.5) < 0.47 or abs(found.p_best - 0.5) > 0.48:
            assert (found.p_best > 0.975, found.p_best < 0.025) == (
                verdict.verdict == "lower",
                verdict.verdict == "higher",
            )
        n_lower += verdict.is_tested and verdict.verdict != "not distinguishable"
        assert found.n_documents == 60
    assert 0 < n_lower < 12


def test_higher_is_better_where_the_catalogue_says_so(tmp_path):
    runs = [
        r for name, some in {STE: (0.2, 0.21), RELU: (0.4, 0.41), GATED: (0.3, 0.31)}.items()
        for r in at_20(name, some, recovered=lambda y: 1 - y, norm_ratio=lambda y: y)
    ]  # fmt: skip
    found = standings(Made(runs, tmp_path), ["degradation", "recovered", "norm_ratio"], [20])
    assert [s.metric for s in found[::3]] == ["degradation", "recovered", "norm_ratio"]
    for part in (found[:3], found[3:6]):
        assert [(s.best_rank, s.worst_rank) for s in part] == [(1, 1), (3, 3), (2, 2)]
        assert [s.is_best for s in part] == [True, False, False]
    assert all(math.isnan(s.p_best) and not s.is_best and s.worst_rank == 0 for s in found[6:])
    assert found[6].value == pytest.approx(math.sqrt(0.2 * 0.21))


def test_equal_families_share_the_first_place(tmp_path):
    runs = [r for name in (STE, RELU, GATED) for r in at_20(name, (0.2, 0.2), dead_fraction=lambda y: 0.0)]
    for s in standings(Made(runs, tmp_path), ["degradation", "dead_fraction"], [20]):
        assert (s.p_best, s.best_rank, s.worst_rank, s.is_best) == (pytest.approx(1 / 3), 1, 1, True)


def test_order_and_scale_change_no_probability(tmp_path):
    values = {STE: (0.2, 0.23, 0.24), RELU: (0.21, 0.25, 0.22), GATED: (0.24, 0.22, 0.26)}
    runs = {name: at_20(name, some, fvu=lambda y: 7 * y) for name, some in values.items()}
    first = by_family(standings(Made(runs[STE] + runs[RELU] + runs[GATED], tmp_path), ["degradation", "fvu"][:1], [20]))
    scaled = by_family(standings(Made(runs[STE] + runs[RELU] + runs[GATED], tmp_path), ["fvu"], [20]))
    turned = by_family(standings(Made(runs[GATED] + runs[STE] + runs[RELU], tmp_path), ["degradation"], [20]))
    for name in first:
        assert scaled[name].p_best == pytest.approx(first[name].p_best, abs=1e-3)
        assert turned[name].p_best == pytest.approx(first[name].p_best, abs=0.015)
    assert sum(s.p_best for s in first.values()) == pytest.approx(1)


def test_a_family_of_one_seed_has_a_value_and_no_probability(tmp_path):
    runs = at_20(STE, (0.1,)) + at_20(RELU, (0.2, 0.21)) + at_20(GATED, (0.3, 0.31))
    found = by_family(standings(Made(runs, tmp_path), l0s=[20]))
    assert found[STE].value == pytest.approx(0.1)
    assert (found[STE].reason, found[STE].n_seeds, found[STE].is_best) == ("one seed", 1, True)
    assert math.isnan(found[STE].p_best)
    assert math.isnan(found[STE].low)
    assert found[RELU].p_best > 0.97 > 0.03 > found[GATED].p_best


def test_what_cannot_be_read_has_its_reason(tmp_path):
    runs = power_law(STE, 0.7, (0, 1), (10, 20)) + power_law(RELU, 1.0, (0, 1), (10, 20, 40))
    found = by_family(standings(Made(runs, tmp_path), ["degradation"], [40]))
    assert math.isnan(found[STE].value)
    assert "no run of prolu_ste + l1 within a factor of 1.5 of L0 40" in found[STE].reason
    found = by_family(standings(Made(runs, tmp_path), ["kl"], [20]))
    assert found[RELU].reason == "no run of relu + l1 has L0 and KL divergence above 0"
    moving = [r | {"converged": r["l0"] < 40} for r in runs]
    found = by_family(standings(Made(moving, tmp_path), ["degradation"], [15]))
    assert [(found[name].n_unconverged, found[name].n_runs) for name in (STE, RELU)] == [(0, 4), (2, 6)]


def test_all_metrics_are_read_from_the_same_saes(tmp_path):
    """Of two settings, the one with the lower CE increase is shown in every metric."""
    runs = [
        r | {"run_id": f"{r['run_id']}-{lr}", "lr": lr, "dead_fraction": dead}
        for lr, level, dead in ((1e-3, 1.0, 0.4), (2e-3, 2.0, 0.0))
        for r in power_law(RELU, level, (0, 1))
    ]
    ce, dead = standings(Made(runs, tmp_path), ["degradation", "dead_fraction"], [20])
    assert ce.value == pytest.approx(20**-1.3)
    assert dead.value == pytest.approx(0.4)
    dead, ce = standings(Made(runs, tmp_path), ["dead_fraction", "degradation"], [20])
    assert (dead.value, ce.value) == (0, pytest.approx(2 * 20**-1.3))


def test_families_are_read_at_the_budget_that_most_have(tmp_path):
    runs = power_law(STE, 0.7, (0, 1), n_tokens=100) + power_law(RELU, 1.0, (0, 1), n_tokens=100)
    longer = [r | {"run_id": f"{r['run_id']}-long", "n_tokens": 200, "degradation": 0.01} for r in runs[:6]]
    found = by_family(standings(Made(runs + longer, tmp_path), ["degradation"], [20]))
    assert found[STE].value == pytest.approx(0.7 * 20**-1.3)
    alone = by_family(standings(Made(longer + runs[6:], tmp_path), ["degradation"], [20]))
    assert "number of training tokens that are compared" in alone[RELU].reason


def test_the_usual_metrics_and_l0s(tmp_path):
    runs = power_law(STE, 0.7, (0, 1)) + power_law(RELU, 1.0, (0, 1))
    found = standings(Made(runs, tmp_path))
    assert [(s.l0, s.metric) for s in found[::2]] == [
        (14.1, "degradation"),
        (20.0, "degradation"),
        (28.3, "degradation"),
    ]
    asked = [r | {"target_l0": r["l0"], "fvu": 0.1} for r in runs]
    found = standings(Made(asked, tmp_path))
    assert [(s.l0, s.metric) for s in found[::2]] == [(l0, m) for l0 in (10, 20, 40) for m in ("degradation", "fvu")]


@pytest.mark.parametrize(("asked", "words"), [
    ({"metrics": ["fuv"]}, "metric 'fuv': choose one of"),
    ({"metrics": ["l0"]}, "families are compared at an equal L0"),
    ({"l0s": [0]}, "l0 0: must be a number above 0"),
])  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(tmp_path, asked, words):
    with pytest.raises(ValueError, match=words):
        standings(Made(power_law(RELU, 1.0), tmp_path), **asked)


def test_families_are_the_best_as_often_as_it_is_said():
    found = ranks.calibration(ranks.CASES["6 families, wide apart"], 120)
    assert ranks.expected_score(found) < 0.03
    assert found[-1]["n"] > 20
    assert found[-1]["right"] > 0.95
    assert found[0]["right"] < 0.02
    equal = ranks.calibration(ranks.CASES["2 equal families"], 150)
    assert equal[-1]["n"] / 150 < 0.1  # about 5% of studies, as of intervals


def test_the_interval_of_an_fvu_covers_seeds_only_and_its_probability_documents_too():
    study = ranks.simulated(ranks.Case(0.05, n_families=2), np.random.default_rng(3))
    for r in study.records:
        sums = study.documents[r["run_id"]]
        study.documents[r["run_id"]] = type(sums)(**{**sums.__dict__, "squared_error": sums.ce_recon})
        r |= {"mse": r["degradation"], "fvu": 3 * r["degradation"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicates, "read_documents_of", lambda folder: study.documents[folder.name])
        found = standings(study, ["mse", "fvu"], [20])
    for mse, fvu in zip(found[:2], found[2:], strict=True):
        assert fvu.value == pytest.approx(3 * mse.value)
        assert fvu.p_best == mse.p_best
        assert (mse.n_documents, fvu.n_documents) == (120, 0)
        logs = [math.log(r["fvu"]) for r in study.records if r["nonlinearity"] == fvu.family.split(" + ")[0]]
        assert math.log(fvu.high / fvu.value) == pytest.approx(mean_over_seeds(logs).half_width)
