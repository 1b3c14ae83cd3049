"""The one interpolation: a monotone curve through a family's runs, read near its runs only."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from prolu.evaluation.comparison.curves import curve_of, drawn, interpolated, slopes
from prolu.evaluation.comparison.metric_catalog import METRICS

KNOTS = st.lists(st.floats(0.05, 2), min_size=1, max_size=7)
VALUES = st.lists(st.one_of(st.floats(-3, 3), st.just(0.5)), min_size=8, max_size=8)


@settings(deadline=None)
@given(KNOTS, VALUES)
def test_it_is_the_monotone_curve_of_scipy(steps, values):
    x = np.concatenate([[0.3], 0.3 + np.cumsum(steps)])
    y = np.array(values[: len(x)])
    theirs = PchipInterpolator(x, y)
    assert slopes(x, y) == pytest.approx(theirs.derivative()(x), abs=1e-9)
    for at in np.linspace(x[0], x[-1], 13):
        assert interpolated(x, y, at) == pytest.approx(theirs(at), abs=1e-9)
    many = np.stack([y, 2 * y, -y])
    inside = x[0] + steps[0] / 3
    assert interpolated(x, many, inside) == pytest.approx(PchipInterpolator(x, many.T)(inside), abs=1e-9)


@given(KNOTS, VALUES, st.floats(0, 1))
def test_it_stays_between_its_neighbours(steps, values, part):
    x = np.concatenate([[0], np.cumsum(steps)])
    y = np.array(values[: len(x)])
    i = min(int(part * (len(x) - 1)), len(x) - 2)
    read = float(interpolated(x, y, x[i] + part * (x[i + 1] - x[i])))
    assert min(y[i : i + 2]) - 1e-9 <= read <= max(y[i : i + 2]) + 1e-9


def through(*points):
    return curve_of([(l0, y, row) for row, (l0, y) in enumerate(points)], (0, 0), None, ())


def test_it_goes_through_every_run_whatever_their_order():
    points = [(40.0, 0.1), (10.0, 0.5), (23.0, 0.4), (25.0, 0.45)]
    curve = through(*points)
    for l0, y in points:
        assert math.exp(curve.read(l0)) == pytest.approx(y)
    assert [row for (row,) in curve.rows] == [1, 2, 3, 0]


def test_runs_of_equal_l0_are_one_knot_at_their_geometric_mean():
    curve = through((16.0, 0.2), (16.0, 0.8), (32.0, 0.1))
    assert math.exp(curve.read(16)) == pytest.approx(0.4)
    assert curve.rows == ((0, 1), (2,))


@pytest.mark.parametrize(("l0", "reached"), [
    (10, True), (15, True), (15.01, False), (20, False), (26.6, False), (26.7, True), (40, True),
    (9.6, True), (9.5, False), (41.9, True), (42.1, False),
])  # fmt: skip
def test_a_gap_is_read_up_to_a_factor_of_one_and_a_half_from_a_run(l0, reached):
    assert through((10.0, 0.5), (40.0, 0.1)).reaches(l0) is reached


def test_a_single_run_is_read_within_two_percent():
    curve = through((20.0, 0.5))
    assert [curve.reaches(l0) for l0 in (19.5, 19.7, 20, 20.3, 20.5)] == [False, True, True, True, False]
    assert math.exp(curve.read(20.3)) == pytest.approx(0.5)


def test_the_tolerance_is_nothing_at_a_run_and_largest_halfway():
    curve = through((10.0, 0.5), (20.0, 0.3), (40.0, 0.1))
    at = [curve.tolerance(l0) for l0 in (10, 12, 10 * 2**0.5, 17, 20, 40)]
    assert at[0] == at[4] == at[5] == 0
    assert max(at) == at[2] == pytest.approx(METRICS["degradation"].tolerance * (math.log(2) / 2) ** 2)


@given(st.floats(-0.3, 0.3), st.floats(-2.5, -0.3))
def test_documents_that_move_all_runs_along_their_power_law_change_nothing(move, slope):
    """A resample whose runs lie on the same line as before is read as before."""
    curve = through(*((l0, l0**slope) for l0 in (8.0, 16.0, 30.0, 64.0)))
    log_l0 = curve.log_l0 + move * np.array([1, 0.5, -1, 0.2])
    read = curve.read_resamples(20, (log_l0[None], slope * log_l0[None]))
    assert read == pytest.approx(curve.read(20))


def test_documents_that_move_all_runs_up_move_the_reading_up():
    curve = through((8.0, 0.6), (16.0, 0.35), (30.0, 0.2))
    read = curve.read_resamples(20, (np.tile(curve.log_l0, (3, 1)), curve.heights + np.array([[0.0], [0.1], [-0.2]])))
    assert read == pytest.approx(curve.read(20) + np.array([0, 0.1, -0.2]))


def test_figures_draw_the_curve_that_is_read():
    points = [(8.0, 0.6), (16.0, 0.35), (30.0, 0.1), (64.0, 0.09)]
    curve = through(*points)
    line = drawn(points)
    assert len(line) == 3 * 12 + 1
    assert all(math.exp(curve.read(l0)) == pytest.approx(y) for l0, y in line)
    assert line[::12] == [pytest.approx(point) for point in points]
    assert drawn(points[:1]) == [pytest.approx(points[0])]
    assert drawn([(8.0, 0.6), (8.0, 0.6)]) == [pytest.approx((8.0, 0.6))]
    without_log = [(8.0, 0.6), (16.0, -0.01)]
    assert drawn(without_log) == without_log
