"""Families by metrics: what each family reaches in several metrics at one L0, and how probably it is the best.

Values come from the same curves as verdicts, and probabilities from the same variances as their intervals: with two
families, one is the best with more than 97.5% exactly where the interval of their verdict does not contain 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from prolu.evaluation.comparison.comparisons import Comparisons
from prolu.evaluation.comparison.curves import Curve, check_l0
from prolu.evaluation.comparison.frontiers import Record
from prolu.evaluation.comparison.intervals import (
    degrees_of_freedom,
    half_width_of_mean,
    variance_of_disagreement,
    variance_of_mean,
)
from prolu.evaluation.comparison.metric_catalog import METRICS, Metric, check_compared
from prolu.evaluation.comparison.replicates import DocumentResamples, FinishedStudy
from prolu.evaluation.comparison.wording import ONE_SEED, shown_l0
from prolu.runtime.notebooks import ShownRows
from prolu.runtime.rng import keyed_generator

USUAL = ("degradation", "kl", "fvu", "dead_fraction")
"""The metrics of the table unless others are asked for, as far as any run has them."""

N_DRAWS = 20_000
"""The number of draws from which a probability of being best is counted: its error is below half a percentage point."""


class Standing(NamedTuple):
    """What one family reaches in one metric at one L0, and its place among the families."""

    family: str
    metric: str
    """The metric, by its name in results.jsonl."""
    l0: float
    value: float
    """The metric's value at this L0, a mean over replicates; a geometric one of a metric that is compared as a ratio.
    nan where the family cannot be read."""
    low: float
    high: float
    """The ends of its 95% interval; nan if there is none. It covers the choice of text too, which moves all families
    alike, so overlapping intervals do not say that two families are equal: `p_best` and verdicts do."""
    p_best: float
    """The probability that no family is better; nan with one seed, and for a metric of which neither direction is
    better."""
    best_rank: int
    worst_rank: int
    """The ends of the 95% interval of its rank, from 1; 0 where `p_best` is nan."""
    n_seeds: int
    """The number of replicates."""
    n_documents: int
    """The number of held-out documents that the interval of the value covers."""
    unit: str
    """What `n_documents` counts: documents, or token blocks where documents are not known."""
    n_unconverged: int
    """The number of runs of its curve that had not converged when their training ended."""
    n_runs: int
    """The number of runs of its curve."""
    is_best: bool = False
    """Whether no family has a better value, however uncertain that is. False for all, as without any rank, where a
    family has a run at this L0 whose value is not above 0 and so cannot be read in the log."""
    reason: str = ""
    """Why there is no value, or no probability."""

    def cells(self) -> dict[str, str]:
        """Return the texts of its row in a table, by the titles of the columns."""
        has_rank = not math.isnan(self.p_best)
        return {
            "metric": METRICS[self.metric].words,
            "L0": shown_l0(self.l0),
            "family": self.family,
            "value": "" if math.isnan(self.value) else f"{self.value:.4g}",
            "95% interval": f"{self.low:.4g} to {self.high:.4g}" if math.isfinite(self.low) else "",
            "probability of being best": f"{self.p_best:.0%}" if has_rank else "",
            "rank": f"{self.best_rank} to {self.worst_rank}" if has_rank else "",
            "why not": self.reason,
        }


def standings(
    studies: FinishedStudy | Sequence[FinishedStudy],
    metrics: Sequence[str] | None = None,
    l0s: Sequence[float] | None = None,
    *,
    unconverged: bool = True,
) -> ShownRows[Standing]:
    """Return every family's value of several metrics at some L0s, with its interval and its probability of being best.

    The list is shown as a table in a notebook, and its `to_pandas()` is a table with a row per standing.

    Families are read at the largest training budget that most of them have, each from the same SAEs for all metrics:
    of several settings, those that are best in the first metric.

    With m_k the mean height of family k over its n_k replicates (`matched` says what a height is), the true heights
    are taken to be distributed around the m_k as a multivariate t with covariance

        Sigma = diag(a) + C,    a_k = s_k^2 / n_k,    C = cov_b(m_b) m / (m - 1) - diag(v_k / n_k),

    where m_b are the means in resample b of the documents, m is the effective number of documents, and v_k / n_k is
    what the replicates' own disagreement about documents contributes, which s_k^2 contains already. C is 0 where a
    metric has no sums by document, and its negative eigenvalues are taken as 0. The degrees of freedom are Welch's and
    Satterthwaite's of the variance around the mean over the K families, whose parts are a_k (1 - 1 / K) and the trace
    of C after centring. For two families this is the distribution of their verdict. `p_best` is the fraction of 20,000
    draws in which a family is best, and the interval of its rank has 95% of the draws.

    Args:
        studies: one study, or several with the same language model, hook and held-out tokens.
        metrics: the metrics, by their names in results.jsonl; by default `USUAL`.
        l0s: the L0s; by default the runs' target L0s, or without these three that most families reach.
        unconverged: whether runs that have not converged are used too.

    Raises:
        ValueError: several studies were scored with different models, at different hooks or on different tokens; one
            of `l0s` is not above 0; or one of `metrics` is no metric.
    """
    for l0 in l0s or ():
        check_l0(l0)
    for name in metrics or ():
        check_compared(name)
    return ShownRows(standings_of(Comparisons(studies, unconverged=unconverged), metrics, l0s))


def standings_of(
    comparisons: Comparisons, metrics: Sequence[str] | None = None, l0s: Sequence[float] | None = None
) -> list[Standing]:
    """Return the standings of families that are prepared already."""
    names = list(metrics or usual_metrics(comparisons.records))
    if not names:
        return []
    places = comparisons.l0s_of_most(names[0]) if l0s is None else l0s
    return [one for l0 in places for name in names for one in _of_metric(comparisons, name, l0, like=names[0])]


def usual_metrics(records: Sequence[Record]) -> list[str]:
    """Return those of the usual metrics that any run has."""
    return [name for name in USUAL if any(METRICS[name].has_place(r) for r in records)]


class _Read(NamedTuple):
    """A family that is read at an L0."""

    heights: np.ndarray
    """The height of each replicate, [n_replicates]."""
    resampled: np.ndarray | None
    """The same in every resample of the documents, [n_resamples, n_replicates]."""


def _of_metric(comparisons: Comparisons, name: str, l0: float, like: str) -> list[Standing]:
    """Return the standings of all families in one metric at one L0."""
    metric = METRICS[name]
    resamples = comparisons.resamples(name)
    curves = comparisons.reading(comparisons.families, l0, name, like)
    read = {family: _read(some, l0, resamples) for family, some in curves.items() if some}
    found = [
        _standing(comparisons, family, some, metric, l0, read.get(family), resamples) for family, some in curves.items()
    ]
    # A family below 0 is lower than all that are read in the log, so none of these is the best, or has a rank.
    if any(comparisons.is_below_all(family, l0, name) for family in comparisons.families if family not in read):
        return found
    return _ranked(found, metric, read, resamples)


def _read(curves: Sequence[Curve], l0: float, resamples: DocumentResamples | None) -> _Read:
    heights = np.array([curve.read(l0) for curve in curves])
    if resamples is None:
        return _Read(heights, None)
    return _Read(heights, np.stack([curve.read_resamples(l0, resamples.places) for curve in curves], axis=1))


def _standing(
    comparisons: Comparisons,
    family: str,
    curves: Sequence[Curve],
    metric: Metric,
    l0: float,
    read: _Read | None,
    resamples: DocumentResamples | None,
) -> Standing:
    """Return the standing of one family, without its rank."""
    runs = comparisons.runs_of(curves, metric.name)
    of_values = resamples if metric.by_document and metric.by_document.gives_values else None
    found = Standing(
        family=family,
        metric=metric.name,
        l0=l0,
        value=math.nan,
        low=math.nan,
        high=math.nan,
        p_best=math.nan,
        best_rank=0,
        worst_rank=0,
        n_seeds=len(curves),
        n_documents=of_values.n_documents if of_values else 0,
        unit=of_values.unit if of_values else "document",
        n_unconverged=sum(r["converged"] is False for r in runs),
        n_runs=len(runs),
    )
    if read is None:
        return found._replace(reason=comparisons.why_not_read(family, l0, metric.name))
    height = float(read.heights.mean())
    resampled = read.resampled if of_values else None
    half = half_width_of_mean(read.heights, resampled, of_values.n_effective if of_values else math.inf)
    return found._replace(
        value=metric.value(height),
        low=metric.value(height - half),
        high=metric.value(height + half),
        reason=ONE_SEED if len(curves) < 2 else "",
    )


def _ranked(
    found: Sequence[Standing], metric: Metric, read: dict[str, _Read], resamples: DocumentResamples | None
) -> list[Standing]:
    """Return standings with the best marked, and with ranks where there are several families of several seeds."""
    if metric.better == "neither":
        return list(found)
    sign = -1.0 if metric.better == "higher" else 1.0
    values = [sign * s.value for s in found if not math.isnan(s.value)]
    marked = [s._replace(is_best=sign * s.value == min(values)) if values else s for s in found]
    several = {name: one for name, one in read.items() if len(one.heights) > 1}
    is_finite = all(one.resampled is None or np.isfinite(one.resampled).all() for one in several.values())
    if len(several) < 2 or not is_finite:
        return marked
    p_best, best, worst = ranks(list(several.values()), sign, resamples.n_effective if resamples else math.inf)
    place = {name: i for i, name in enumerate(several)}
    return [
        s._replace(p_best=float(p_best[i]), best_rank=int(best[i]), worst_rank=int(worst[i]))
        if (i := place.get(s.family)) is not None
        else s
        for s in marked
    ]


def ranks(families: Sequence[_Read], sign: float, n_documents: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each family's probability of being best, and the ends of the 95% interval of its rank, [n_families] each.

    Args:
        families: families of two or more replicates each.
        sign: 1 if lower is better, -1 if higher is.
        n_documents: the effective number of documents.
    """
    k = len(families)
    means = np.array([one.heights.mean() for one in families])
    seeds = np.array([variance_of_mean(one.heights) for one in families])
    parts = [(a * (1 - 1 / k), len(one.heights) - 1.0) for a, one in zip(seeds, families, strict=True)]
    root = np.diag(np.sqrt(seeds))
    if all(one.resampled is not None for one in families):
        documents = _of_documents([one.resampled for one in families if one.resampled is not None], n_documents)
        values, vectors = np.linalg.eigh(documents)
        root = np.hstack([root, vectors * np.sqrt(values.clip(min=0))])
        documents = (vectors * values.clip(min=0)) @ vectors.T
        parts.append((float(np.trace(documents - documents.mean(0))), n_documents - 1))
    draws = means + _student(root, parts) if sum(part for part, _ in parts) > 0 else means[None]
    better = sign * draws[:, :, None] < sign * draws[:, None, :]
    # Rank 1 has none that is better. Families of equal height share the first place.
    rank = 1 + better.sum(1)
    is_first = rank == 1
    p_best = (is_first / is_first.sum(1, keepdims=True)).mean(0)
    ends = np.quantile(rank, [0.025, 0.975], axis=0, method="inverted_cdf")
    return p_best, ends[0], ends[1]


def _of_documents(resampled: Sequence[np.ndarray], n_documents: float) -> np.ndarray:
    """Return the covariance that the choice of documents gives the means of families, beyond what seeds contain."""
    whole = np.atleast_2d(np.cov(np.stack([x.mean(1) for x in resampled]))) * n_documents / (n_documents - 1)
    return whole - np.diag([variance_of_disagreement(x) for x in resampled])


def _student(root: np.ndarray, parts: Sequence[tuple[float, float]]) -> np.ndarray:
    """Draw from a multivariate t with scale matrix root root^T and the degrees of freedom of some parts of variance."""
    from scipy.special import gammaincinv

    freedom = degrees_of_freedom(parts)
    generator = keyed_generator("ranks", *root.shape)
    normal = torch.randn(N_DRAWS, root.shape[1], generator=generator, dtype=torch.float64).numpy()
    uniform = torch.rand(N_DRAWS, generator=generator, dtype=torch.float64).numpy()
    chi_squared = 2 * gammaincinv(freedom / 2, uniform)
    return (normal @ root.T) / np.sqrt(chi_squared / freedom)[:, None]
