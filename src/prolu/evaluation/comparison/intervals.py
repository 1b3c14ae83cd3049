"""95% intervals: of a mean over seeds, and of the difference between two families over seeds and held-out documents.

All are t intervals: with three seeds a percentile bootstrap would be too narrow, as `benchmarks/intervals.py` shows. An
interval holds for its own quantity alone, not for all quantities of a table at once.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
"""The probability with which an interval is to contain the true value."""


class Mean(NamedTuple):
    """A mean over init seeds."""

    mean: float
    half_width: float
    """Half the width of its 95% interval; nan where there is none, as with one seed."""
    n_seeds: int


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Return the mean of one value per seed with the half width t(n - 1) s / sqrt(n) of its interval."""
    n = len(values)
    array = np.asarray(values, float)
    half = t_quantile(n - 1) * array.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Mean(float(array.mean()), float(half), n)


def mean_over_pairs(values: np.ndarray) -> Mean:
    """Return the mean over all pairs of n seeds, with a jackknife interval over the seeds.

    Pairs are not independent: n - 1 of them share each seed. With U the mean over all pairs and U_i that over the pairs
    without seed i, the half width is

        t(n - 1) sqrt((n - 1) / n sum_i (U_i - mean U)^2).

    It is about right where a seed moves all its pairs alike, and too wide where every pair varies by itself
    (`benchmarks/agreement_intervals.py`). With two seeds there is one pair, so nothing is known of how pairs vary.

    Args:
        values: the figure of each pair, [n, n]; only the part above the diagonal is read.

    Returns:
        The mean, with a half width of nan for fewer than 3 seeds.
    """
    n = len(values)
    above = np.triu(np.asarray(values, float), 1)
    mean = float(above.sum() / (n * (n - 1) / 2))
    if n < 3:
        return Mean(mean, math.nan, n)
    of_seed = above.sum(0) + above.sum(1)
    without = (above.sum() - of_seed) / ((n - 1) * (n - 2) / 2)
    variance = (n - 1) / n * np.square(without - without.mean()).sum()
    return Mean(mean, t_quantile(n - 1) * math.sqrt(variance), n)


@cache
def t_quantile(df: float) -> float:
    """Return the half width of Student's t interval with `df` degrees of freedom, in standard errors."""
    # scipy.stats.t.ppf gives the same, but importing scipy.stats takes half a second.
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.5 + LEVEL / 2))


def half_width_of_difference(
    heights: Sequence[np.ndarray], resampled: Sequence[np.ndarray] | None, n_documents: float
) -> float:
    """Return half the width of the interval of mean(heights[0]) - mean(heights[1]), by the equations of `matched`.

    With one replicate of either family there is no spread over seeds: the interval then covers documents only.

    Args:
        heights: for each of the two families, one value per replicate, [n_replicates].
        resampled: for each family, the same values in every resample of the documents, [n_resamples, n_replicates];
            None where the runs have no sums by document. The interval then covers seeds only.
        n_documents: the effective number of documents.

    Returns:
        Half the width; nan where nothing is covered, or where a value in some resample is not finite.
    """
    together = None if resampled is None else resampled[0].mean(1) - resampled[1].mean(1)
    return _half_width(heights, resampled, together, n_documents)


def half_width_of_mean(heights: np.ndarray, resampled: np.ndarray | None, n_documents: float) -> float:
    """Return half the width of the interval of one family's mean(heights), as `half_width_of_difference` does it.

    It includes the variation between documents that is common to all families, which cancels in a difference.
    """
    if resampled is None:
        return _half_width([heights], None, None, n_documents)
    return _half_width([heights], [resampled], resampled.mean(1), n_documents)


def _half_width(
    heights: Sequence[np.ndarray],
    resampled: Sequence[np.ndarray] | None,
    together: np.ndarray | None,
    n_documents: float,
) -> float:
    """Return half the width of an interval; `together` is the whole estimate in every resample of the documents."""
    has_seeds = min(map(len, heights)) > 1
    # Every part of the variance comes with its degrees of freedom: the families' seeds, then the documents.
    parts = [(variance_of_mean(x), len(x) - 1.0) for x in heights] if has_seeds else []
    if resampled is not None and together is not None:
        if not all(np.isfinite(x).all() for x in resampled):
            return math.nan
        # Resampling m documents with replacement underestimates a variance by the factor (m - 1) / m.
        whole = together.var(ddof=1) * n_documents / (n_documents - 1)
        # The variance over seeds already contains the replicates' different responses to documents, so these are
        # subtracted.
        contained = sum(variance_of_disagreement(x) for x in resampled) if has_seeds else 0.0
        parts.append((max(0.0, float(whole) - contained), n_documents - 1))
    if not parts:
        return math.nan
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    return t_quantile(degrees_of_freedom(parts)) * math.sqrt(variance)


def degrees_of_freedom(parts: Sequence[tuple[float, float]]) -> float:
    """Return Welch's and Satterthwaite's degrees of freedom of a variance above 0, from its parts and theirs."""
    variance = sum(part for part, _ in parts)
    return variance**2 / sum(part**2 / freedom for part, freedom in parts)


def variance_of_mean(heights: np.ndarray) -> float:
    """Return s^2 / n, the variance of the mean over a family's replicates."""
    return float(heights.var(ddof=1)) / len(heights)


def variance_of_disagreement(resampled: np.ndarray) -> float:
    """Return what the replicates' own responses to documents add to the variance of their mean.

    If a replicate's own response varies by v over the resamples, its departure from the mean over replicates varies by
    (1 - 1 / n) v. The sum over n replicates is thus (n - 1) v, and their mean varies by v / n.
    """
    n = resampled.shape[1]
    departures = resampled - resampled.mean(1, keepdims=True)
    return float(departures.var(0, ddof=1).sum()) / (n - 1) / n
