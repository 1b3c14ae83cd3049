"""Frontiers, and the rule of convergence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prolu.evaluation.comparison.frontiers import is_converged, pareto_best, pareto_mask

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


@pytest.mark.parametrize(("before", "after", "expected"), [
    ({"l0": 10.0, "mse": 0.1}, {"l0": 10.4, "mse": 0.098}, True),
    ({"l0": 10.0, "mse": 0.1}, {"l0": 9.4, "mse": 0.1}, False),
    ({"l0": 10.0, "mse": 0.1}, {"l0": 10.0, "mse": 0.107}, False),
])  # fmt: skip
def test_convergence_rule(before, after, expected):
    assert is_converged(before, after, 1000) is expected


@pytest.mark.parametrize("n_steps", [0, 1, 15, 999])
def test_after_few_steps_nothing_has_converged(n_steps):
    probe = {"l0": 10.0, "mse": 0.1}
    assert not is_converged(probe, probe, n_steps)
    assert is_converged(probe, probe, 1000)


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (0.02, 0.0), (0.0, 0.02)])
def test_an_sae_without_active_latents_has_not_converged(before, after):
    assert not is_converged({"l0": before, "mse": 1.0}, {"l0": after, "mse": 1.0}, 100_000)


def test_of_a_metric_of_which_more_is_better_the_highest_are_best():
    runs = [
        {"run_id": "a", "l0": 8.0, "recovered": 0.8},
        {"run_id": "b", "l0": 16.0, "recovered": 0.9},
        {"run_id": "c", "l0": 16.0, "recovered": 0.7},
        {"run_id": "d", "l0": 32.0, "recovered": 0.85},
    ]
    assert [run["run_id"] for run in pareto_best(runs, "l0", "recovered")] == ["a", "b"]
