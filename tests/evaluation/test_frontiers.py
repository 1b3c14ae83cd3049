"""Frontiers, curves read at equal L0, claims."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prolu.evaluation.comparison.claims import paper_claims, prolu_against_relu
from prolu.evaluation.comparison.frontiers import compare, curve, curves, is_converged, pareto_best, pareto_mask
from prolu.evaluation.comparison.verdicts import Verdict

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=25)


@given(POINTS)
def test_pareto_best_are_the_runs_of_the_mask(points):
    runs = [{"run_id": i, "l1": x, "mse": y} for i, (x, y) in enumerate(points)]
    mask = pareto_mask([p[0] for p in points], [p[1] for p in points])
    assert [r["run_id"] for r in pareto_best(runs, "l1", "mse")] == [i for i, best in enumerate(mask) if best]


@given(POINTS)
def test_pareto_mask_is_its_definition(points):
    mask = pareto_mask([p[0] for p in points], [p[1] for p in points])
    for (x, y), on in zip(points, mask, strict=True):
        beaten = any((a <= x and b < y) or (a < x and b <= y) for a, b in points)
        assert on is not beaten
    assert any(mask) or not points


def record(nonlinearity, penalty, l0, degradation, l1=None, mse=None, converged=True):
    return {
        "run_id": f"{nonlinearity}-{penalty}-{l0}", "nonlinearity": nonlinearity, "penalty": penalty, "l0": l0,
        "degradation": degradation, "l1": l0 if l1 is None else l1, "mse": degradation if mse is None else mse,
        "converged": converged,
    }  # fmt: skip


def family_of(nonlinearity, penalty, factor, l1_factor=1.0):
    return [
        record(nonlinearity, penalty, l0, factor * (1 - math.log(l0) / 6), l1_factor * l0) for l0 in (5, 10, 20, 40)
    ]


def test_curves_are_linear_in_log_l0():
    c = curve([record("relu", "l1", 10, 0.4), record("relu", "l1", 40, 0.2)])
    assert c.at(20) == pytest.approx(0.3)


def test_comparison_at_matched_l0():
    found = compare(curve(family_of("prolu_ste", "l1", 0.7)), curve(family_of("relu", "l1", 1.0)))
    assert found is not None
    assert found.change == pytest.approx(-0.3)
    assert (found.low, found.high) == (5, 40)
    apart = [record("relu", "l1", 100, 0.1), record("relu", "l1", 200, 0.05)]
    assert compare(curve(family_of("prolu_ste", "l1", 0.7)), curve(apart)) is None


@pytest.mark.parametrize(("before", "after", "expected"), [
    ({"l0": 10.0, "mse": 0.1}, {"l0": 10.4, "mse": 0.098}, True),
    ({"l0": 10.0, "mse": 0.1}, {"l0": 9.4, "mse": 0.1}, False),
    ({"l0": 10.0, "mse": 0.1}, {"l0": 10.0, "mse": 0.107}, False),
])  # fmt: skip
def test_convergence_rule(before, after, expected):
    assert is_converged(before, after) is expected


def by_statement(claims):
    return {claim.statement: claim for claim in claims}


def test_verdicts_say_which_is_better_and_by_how_much():
    records = family_of("relu", "l1", 1.0) + family_of("prolu_ste", "l1", 0.7) + family_of("prolu_relu", "l1", 1.2)
    claims = by_statement(prolu_against_relu(records))
    ste = claims["prolu_ste + l1 has a lower CE increase than relu + l1 at equal L0"]
    assert ste.verdict == "holds"
    assert ste.evidence == "-30% on average over L0 5 to 40, where it lies between -30% and -30% (no interval)."
    assert claims["prolu_relu + l1 has a lower CE increase than relu + l1 at equal L0"].verdict == "does not hold"
    assert len(claims) == 2


def test_unconverged_runs_decide_nothing():
    records = [r | {"converged": False} for r in family_of("relu", "l1", 1.0)] + family_of("prolu_ste", "l1", 0.7)
    (claim,) = prolu_against_relu(records)
    assert claim.verdict == "undecided"
    assert "relu + l1 has fewer than two converged runs" in claim.evidence
    assert all(c.verdict == "undecided" for c in paper_claims([r | {"converged": False} for r in records]))


def test_the_papers_claims_hold_on_a_study_made_so_that_they_do():
    records = (
        family_of("relu", "l1", 1.0) + family_of("relu", "sqrt_l1", 0.9, 1.1)
        + family_of("prolu_ste", "l1", 0.6, 1.5)[:3] + family_of("prolu_relu", "sqrt_l1", 0.7, 1.3)
    )  # fmt: skip
    records += [record("relu", "sqrt_l1", 80, 0.24, 90), record("prolu_relu", "sqrt_l1", 80, 0.15, 99)]
    claims = paper_claims(records)
    assert [c.verdict for c in claims[:2]] == ["holds", "holds"]
    assert claims[3].verdict == "holds"


def test_the_papers_claims_fail_on_a_study_made_so_that_they_do():
    records = (
        family_of("relu", "l1", 0.5, 2.0) + family_of("prolu_ste", "l1", 0.6) + family_of("prolu_relu", "sqrt_l1", 0.7)
    )
    records += family_of("relu", "sqrt_l1", 0.4, 2.0)
    assert [c.verdict for c in paper_claims(records)] == ["does not hold"] * 4


def test_interpolation_stays_within_the_points():
    c = curve(family_of("relu", "l1", 1.0))
    grid = np.geomspace(5, 40, 50)
    assert (np.diff(c.at(grid)) < 0).all()


def test_pooled_studies_stand_for_their_familys_best_runs():
    first = [r | {"study": "a"} for r in family_of("relu", "l1", 1.0)]
    second = [r | {"study": "b"} for r in family_of("relu", "l1", 0.8)]
    alone, pooled = curves(second)["relu + l1"], curves(first + second)["relu + l1"]
    assert np.array_equal(alone.x, pooled.x)
    assert np.array_equal(alone.y, pooled.y)


def test_relu_is_beaten_in_l1_and_mse_only_by_other_families():
    relu = [record("relu", "l1", l0, 0.1, l1) | {"mse": mse} for l0, l1, mse in ((10, 5.0, 0.2), (9, 5.5, 0.3))]
    other = record("prolu_ste", "l1", 10, 0.1, 9.0) | {"mse": 0.4}
    assert paper_claims([*relu, other])[2].verdict == "holds"
    better = other | {"l1": 4.0, "mse": 0.25}
    (claim,) = [c for c in paper_claims([*relu, better]) if "MSE against L1" in c.statement]
    assert claim.verdict == "does not hold"
    assert claim.evidence == "1 of its 2 runs are beaten, by prolu_ste + l1."


def test_what_all_runs_would_say_is_added_where_too_few_converged():
    records = family_of("relu", "l1", 1.0) + family_of("prolu_ste", "l1", 0.7)
    claim = paper_claims([r | {"converged": False} for r in records])[0]
    assert claim.verdict == "undecided"
    assert (
        "All runs, converged or not: holds; at equal L0 it has a lower CE increase than each of relu + l1"
        in claim.evidence
    )


def test_seeds_of_one_setting_are_one_point_of_a_curve():
    one = [r | {"coeff": 1 / r["l0"], "init_seed": 0} for r in family_of("relu", "l1", 1.0)]
    two = [r | {"l0": r["l0"] * 1.1, "degradation": r["degradation"] + 0.2, "init_seed": 1} for r in one]
    found = curves(one + two)["relu + l1"]
    assert found.x == pytest.approx([1.05 * r["l0"] for r in one])
    assert found.y == pytest.approx([r["degradation"] + 0.1 for r in one])


def test_intervals_decide_where_there_are_some():
    records = family_of("relu", "l1", 1.0) + family_of("prolu_ste", "l1", 0.7)
    less = Verdict("prolu_ste + l1", "relu + l1", 20, -0.3, -0.4, -0.2, "lower CE increase", 3, 99, "init seeds")
    wide = less._replace(l0=30, low=-0.5, high=0.1, verdict="undecided")
    assert prolu_against_relu(records, [less])[0].verdict == "holds"
    (claim,) = prolu_against_relu(records, [less, wide])
    assert claim.verdict == "undecided"
    assert "at L0 20 -30% (95% interval -40% to -20%, 3 seeds, 99 documents); " in claim.evidence
    one_seed = less._replace(low=math.nan, high=math.nan, verdict="undecided", reason="one seed")
    assert "(no interval)" in prolu_against_relu(records, [one_seed])[0].evidence
