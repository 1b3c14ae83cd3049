"""A family's runs as one curve of a metric over log L0, read between its runs and nowhere else.

The height of the curve is the log of a metric that is compared as a ratio, such as the CE increase, and otherwise the
metric itself (`Metric.height`).

This is the only interpolation of the project: `matched`, the tables, the sentences, the claims, the page and the
terminal all take their numbers from curves like these.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS, Metric

FURTHEST = 1.5
"""The ratio of an L0 to that of the nearest run, up to which a curve is read between two runs."""

BEYOND_THE_ENDS = math.log(1.05)
"""The distance in log L0 up to which a curve is read beyond its ends, since runs with a target L0 end near it only."""

SINGLE_RUN_TOLERANCE = math.log(1.02)
"""The distance in log L0 up to which the value of a single run is used unchanged: it has no slope."""


def check_l0(l0: float) -> None:
    """Raise ValueError unless an L0 is a number above 0, which it needs to be to have a logarithm."""
    if not 0 < l0 < math.inf:
        raise ValueError(f"l0 {l0}: must be a number above 0")


def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the slopes at the knots of the monotone curve of Fritsch and Carlson, as scipy's PCHIP has them.

    Args:
        x: the knots in ascending order, [n_knots]; two or more.
        y: the values there, [..., n_knots]; several curves may share their knots.
    """
    h = np.diff(x)
    chord = np.diff(y) / h
    if len(x) == 2:
        return np.repeat(chord, 2, axis=-1)
    left = chord[..., :-1]
    right = chord[..., 1:]
    before = 2 * h[1:] + h[:-1]
    after = h[1:] + 2 * h[:-1]
    # A chord of 0, or one so small that its inverse is infinite, is a level piece: the slope is 0 there.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        harmonic = (before + after) / (before / left + after / right)
    # A knot above or below both its neighbours is an extremum of the curve too, so that the curve goes no further.
    inner = np.where(left * right > 0, harmonic, 0.0)
    first = _end_slope(h[0], h[1], chord[..., 0], chord[..., 1])
    last = _end_slope(h[-1], h[-2], chord[..., -1], chord[..., -2])
    return np.concatenate([first[..., None], inner, last[..., None]], axis=-1)


def _end_slope(h: float, next_h: float, chord: np.ndarray, next_chord: np.ndarray) -> np.ndarray:
    """Return the slope at an end: that of the parabola through three knots, cut so that the curve stays monotone."""
    slope = ((2 * h + next_h) * chord - h * next_chord) / (h + next_h)
    slope = np.where(np.sign(slope) != np.sign(chord), 0.0, slope)
    too_steep = (np.sign(chord) != np.sign(next_chord)) & (np.abs(slope) > 3 * np.abs(chord))
    return np.where(too_steep, 3 * chord, slope)


def interpolated(x: np.ndarray, y: np.ndarray, at: float) -> np.ndarray:
    """Return the monotone curve through (x, y) at one place between its first knot and its last, as [...].

    It is a cubic between two knots and stays between their values, so a gap adds no bump of its own.
    """
    i = min(int(np.searchsorted(x, at, "right")) - 1, len(x) - 2)
    h = x[i + 1] - x[i]
    t = (at - x[i]) / h
    d = slopes(x, y)
    # Hermite's cubic, as the chord and what the slopes at both ends add to it. Its ends are then exactly the knots.
    chord = (y[..., i + 1] - y[..., i]) / h
    bend = (1 - t) * (d[..., i] - chord) - t * (d[..., i + 1] - chord)
    on_chord = (1 - t) * y[..., i] + t * y[..., i + 1]
    return np.asarray(on_chord + h * t * (1 - t) * bend)


def reaches(log_l0: np.ndarray, l0: float) -> bool:
    """Return whether a curve may be read at an L0.

    Args:
        log_l0: its knots in ascending order, [n_knots].
        l0: the L0.
    """
    at = math.log(l0)
    if len(log_l0) == 1:
        return bool(abs(at - log_l0[0]) <= SINGLE_RUN_TOLERANCE)
    if not log_l0[0] <= at <= log_l0[-1]:
        return bool(log_l0[0] - BEYOND_THE_ENDS <= at <= log_l0[-1] + BEYOND_THE_ENDS)
    # The last digits of a logarithm must not decide about a distance of exactly 1.5.
    return bool(np.abs(log_l0 - at).min() <= math.log(FURTHEST) * (1 + 1e-9))


class Curve(NamedTuple):
    """The runs of one family, replicate, training budget and choice of other hyperparameters, in order of L0."""

    replicate: tuple[int, int | None]
    """The stream seed and the init seed."""
    n_tokens: int | None
    """The number of training tokens; None where it is not recorded."""
    variant: tuple[str, ...]
    """The hyperparameters but for those that move a run along the curve: coefficient, target L0 and k."""
    log_l0: np.ndarray
    """The knots, [n_knots]. Runs of equal L0 are one knot."""
    heights: np.ndarray
    """The metric's heights at the knots."""
    rows: tuple[tuple[int, ...], ...]
    """The runs of each knot, as columns of `DocumentResamples.places`."""
    metric: Metric = METRICS[CE_INCREASE]

    @property
    def l0_range(self) -> tuple[float, float]:
        """The least and the greatest L0 of its runs."""
        return math.exp(self.log_l0[0]), math.exp(self.log_l0[-1])

    def nearest(self, l0: float) -> float:
        """Return the L0 of the run that is nearest to an L0."""
        return math.exp(self.log_l0[np.abs(self.log_l0 - math.log(l0)).argmin()])

    def reaches(self, l0: float) -> bool:
        """Return whether the curve may be read at an L0."""
        return reaches(self.log_l0, l0)

    def read(self, l0: float) -> float:
        """Return the height at an L0 that the curve reaches."""
        return float(self._read(l0, self.heights))

    def read_resamples(self, l0: float, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Return the height of the curve (the metric, or its log) at an L0 in every resample of the documents.

        The result is [n_resamples].

        A resample moves a run in L0 too. Only its distance from the curve matters. So its change in log L0, times the
        slope of the curve, is subtracted from its change in height. To first order that is the curve through the moved
        runs, and it is defined even where two runs close to each other change their order.

        Args:
            l0: where to read.
            places: the log of L0 and the height of all runs in every resample, [n_resamples, n_runs] each.
        """
        log_l0, heights = (np.stack([some[:, row].mean(1) for row in map(list, self.rows)], axis=1) for some in places)
        slope = slopes(self.log_l0, self.heights) if len(self.log_l0) > 1 else np.zeros(1)
        return self._read(l0, heights - slope * (log_l0 - self.log_l0))

    def _read(self, l0: float, heights: np.ndarray) -> np.ndarray:
        at = math.log(l0)
        x = self.log_l0
        if len(x) == 1:
            return np.asarray(heights[..., 0])
        if x[0] <= at <= x[-1]:
            return interpolated(x, heights, at)
        # The whole curve's slope: two neighbours may lie so close that theirs is mostly noise.
        end = 0 if at < x[0] else -1
        return np.asarray(heights[..., end] + (heights[..., -1] - heights[..., 0]) / (x[-1] - x[0]) * (at - x[end]))

    def tolerance(self, l0: float) -> float:
        """Return the error in height that reading at this L0 may add, by `Metric.tolerance`; 0 at a run.

        Where nobody has measured that, it is nan further than 5% from a run.
        """
        distance = np.sort(np.abs(self.log_l0 - math.log(l0)))
        rate = self.metric.tolerance
        if len(distance) == 1:
            # A CE increase is about inversely proportional to L0, and no log of a metric is steeper.
            return float(distance[0]) if self.metric.compared_as == "ratio" else 0.0
        if rate is None:
            return math.nan if distance[0] > BEYOND_THE_ENDS else 0.0
        before = self.log_l0[self.log_l0 <= math.log(l0)]
        after = self.log_l0[self.log_l0 > math.log(l0)]
        if len(before) and len(after):
            return float(rate * (math.log(l0) - before[-1]) * (after[0] - math.log(l0)))
        return float(rate * distance[0] * distance[1])


def curve_of(
    points: Sequence[tuple[float, float, int]],
    replicate: tuple[int, int | None],
    n_tokens: int | None,
    variant: tuple[str, ...],
    metric: Metric = METRICS[CE_INCREASE],
) -> Curve:
    """Return the curve through points (L0, y, row), with runs of equal L0 as one knot at the mean of their heights."""
    knots: dict[float, list[tuple[float, int]]] = {}
    for l0, y, row in sorted(points):
        knots.setdefault(l0, []).append((metric.height(y), row))
    heights = [sum(y for y, _ in same) / len(same) for same in knots.values()]
    rows = tuple(tuple(row for _, row in same) for same in knots.values())
    return Curve(replicate, n_tokens, variant, np.log(list(knots)), np.array(heights), rows, metric)


def drawn(
    points: Sequence[tuple[float, float]], metric: Metric = METRICS[CE_INCREASE], n_steps: int = 12
) -> list[tuple[float, float]]:
    """Return the curve through points (L0, y) as a fine line for figures, so that figures show what comparisons use.

    Points of which one has no place on a curve are returned as they are.
    """
    if not all(metric.has_place({"l0": x, metric.name: y}) for x, y in points):
        return list(points)
    curve = curve_of([(x, y, row) for row, (x, y) in enumerate(points)], (0, 0), None, (), metric)
    places = [np.linspace(a, b, n_steps, endpoint=False) for a, b in pairwise(curve.log_l0)]
    x = np.concatenate([*places, curve.log_l0[-1:]])
    heights = [interpolated(curve.log_l0, curve.heights, at) for at in x] if len(curve.log_l0) > 1 else curve.heights
    return [(math.exp(a), metric.value(float(b))) for a, b in zip(x, heights, strict=True)]
