"""Comparisons with error bars: families of SAEs at matched L0, over init seeds and held-out documents."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from prolu.evaluation.comparison.frontiers import family
from prolu.evaluation.comparison.points import _t
from prolu.evaluation.comparison.replicates import Replicate, Resampled, Study, replicates

LESS, MORE, UNDECIDED = "loses less", "loses more", "not distinguishable"

BASELINES = "relu + l1", "relu + sqrt_l1"
"""What the paper compares with; every other family is compared with both, and the second with the first."""


class Verdict(NamedTuple):
    """How much more or less a challenger loses than a baseline at one L0."""

    challenger: str
    baseline: str
    l0: float
    change: float
    """Relative: challenger / baseline - 1; nan if there is none to be had."""
    low: float
    high: float
    """Its 95% interval; nan with fewer than two seeds of either."""
    verdict: Literal["loses less", "loses more", "not distinguishable"]
    n_seeds: int
    """Replicates of the family that has fewer."""
    n_documents: int
    """0 where the runs have no records by document: then the interval covers seeds only."""
    covers: str
    """Which variation the interval covers."""
    unit: str = "document"
    """What `n_documents` counts: documents, or blocks where documents are not known."""
    reason: str = ""
    """Why nothing could be told, where there is no interval."""
    n_unconverged: int = 0
    """Runs that have not converged, and entered all the same because they were asked to."""

    def __str__(self) -> str:
        head = f"{self.challenger} against {self.baseline} at L0 {self.l0:.3g}: "
        tail = f"; {self.n_unconverged} unconverged runs included" if self.n_unconverged else ""
        if math.isnan(self.change):
            return f"{head}{self.verdict}: {self.reason}{tail}"
        if math.isnan(self.low):
            return f"{head}{self.change:+.0%} degradation, {self.verdict}: {self.reason}{tail}"
        interval = f"[{100 * self.low:+.0f}, {100 * self.high:+.0f}]"
        counted = f"{self.n_seeds} seeds, {self.n_documents} {self.unit}s" if self.n_documents else (
            f"{self.n_seeds} seeds, documents not known"
        )  # fmt: skip
        decided = f", {self.verdict}" if self.verdict == UNDECIDED else ""
        return f"{head}{self.change:+.0%} degradation {interval}, {counted}{decided}{tail}"


def matched(
    studies: Study | Sequence[Study], challenger: str, baseline: str, l0: float, *, unconverged: bool = False
) -> Verdict:
    """Degradation of a challenger relative to a baseline at one L0, with a 95% interval.

    A replicate is a (stream seed, init seed). In each, a family's curve goes through those of its runs that no
    other of its runs there beats, linear in (log L0, log degradation), and is read at `l0`. With d the log of what was
    read, change = exp(mean d_challenger - mean d_baseline) - 1, means over replicates.

    The interval covers init seeds and held-out documents together. Stream seeds (the order of training
    tokens) it covers only where studies at several are pooled; the choice of language model, hook, training text and
    hyperparameters never. With a = s^2 / n, the variance of a family's mean over its n replicates,

        variance = a_challenger + a_baseline + D,
        df = variance^2 / (a_challenger^2 / (n_c - 1) + a_baseline^2 / (n_b - 1) + D^2 / (m - 1)),

    a t interval with Welch's and Satterthwaite's degrees of freedom. D is the variance over documents that all
    replicates share: that of the whole estimate over 2,000 resamples of the documents, the same for every
    run, less what the replicates' own disagreement over documents puts into it, since s^2 has that already.
    m is the effective number of documents, (sum w)^2 / sum w^2 with w their tokens.

    Args:
        studies: one study, or several with the same held-out tokens.
        challenger: a family, as in `prolu_ste + l1`.
        baseline: another.
        l0: where to compare.
        unconverged: whether runs that have not converged enter too.
    """
    return _Comparisons(studies, unconverged=unconverged).verdict(challenger, baseline, l0)


def verdict_table(
    studies: Study | Sequence[Study], l0s: Sequence[float] | None = None, *, unconverged: bool = False
) -> list[Verdict]:
    """Every family against `relu + l1` and `relu + sqrt_l1`.

    Each interval is for its own comparison: of twenty at 95%, one misses on average.

    Args:
        studies: one study, or several with the same held-out tokens.
        l0s: by default those that runs were asked for (`target_l0`), else three inside the range that both
            families reach.
        unconverged: whether runs that have not converged enter too.
    """
    comparisons = _Comparisons(studies, unconverged=unconverged)
    return [
        comparisons.verdict(challenger, baseline, l0)
        for challenger, baseline in _pairs(comparisons.families)
        for l0 in (comparisons.l0s(challenger, baseline) if l0s is None else l0s)
    ]


def told(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """For tables: a pair of which nothing is known at any L0 takes one row, with L0 nan and one reason."""
    rows: list[Verdict] = []
    for _, group in groupby(verdicts, key=lambda v: (v.challenger, v.baseline)):
        same = list(group)
        if all(math.isnan(v.change) for v in same):
            reasons = {v.reason for v in same}
            reason = reasons.pop() if len(reasons) == 1 else "no L0 here is inside the range of both"
            same = [same[0]._replace(l0=math.nan, reason=reason)]
        rows += same
    return rows


def _pairs(families: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Challengers and their baselines, each pair once."""
    for name in families:
        for baseline in BASELINES:
            if baseline in families and name not in BASELINES[: BASELINES.index(baseline) + 1]:
                yield name, baseline


class _Comparisons:
    """Families of some studies, made ready once for any number of comparisons."""

    def __init__(self, studies: Study | Sequence[Study], *, unconverged: bool):
        found = list(studies) if isinstance(studies, Sequence) else [studies]
        records = [r for study in found for r in study.records]
        self.families = list(dict.fromkeys(map(family, records)))
        self._replicates, self._held_out = replicates(found, unconverged=unconverged)
        self._unconverged = [family(r) for r in records if not r["converged"]] if unconverged else []
        self._targets = sorted({r["target_l0"] for r in records if r.get("target_l0") is not None})

    def l0s(self, challenger: str, baseline: str) -> list[float]:
        """Where two families are compared if nothing is said: nan stands for nowhere."""
        if self._targets:
            return self._targets
        ranges = [r.l0_range for name in (challenger, baseline) for r in self._replicates.get(name, [])]
        low, high = max((a for a, _ in ranges), default=1), min((b for _, b in ranges), default=0)
        if low >= high or not all(name in self._replicates for name in (challenger, baseline)):
            return [math.nan]
        return [float(f"{x:.3g}") for x in np.geomspace(low, high, 5)[1:4]]

    def verdict(self, challenger: str, baseline: str, l0: float) -> Verdict:
        """One comparison."""
        names = (challenger, baseline)
        reaching = [[r for r in self._replicates.get(name, []) if r.reaches(l0)] for name in names]
        held_out = self._held_out
        blank = Verdict(
            challenger, baseline, l0, math.nan, math.nan, math.nan, UNDECIDED, min(map(len, reaching)),
            held_out.n_documents if held_out else 0, _covers(reaching, held_out),
            held_out.unit if held_out else "document", n_unconverged=sum(map(self._unconverged.count, names)),
        )  # fmt: skip
        if reason := self._why_not(names, reaching, l0):
            return blank._replace(reason=reason)
        logs = [np.array([float(r.read(l0, r.log_l0, r.log_lost)) for r in there]) for there in reaching]
        log_change = float(logs[0].mean() - logs[1].mean())
        blank = blank._replace(change=math.expm1(log_change))
        if blank.n_seeds < 2:
            return blank._replace(reason="one seed, so no interval")
        resampled = [_read_resampled(there, l0, held_out) for there in reaching] if held_out else None
        half = half_width(logs, resampled, held_out.n_effective if held_out else math.inf)
        if not math.isfinite(half):
            return blank._replace(reason="a degradation is not above 0 in every resample of the documents")
        low, high = math.expm1(log_change - half), math.expm1(log_change + half)
        return blank._replace(low=low, high=high, verdict=LESS if high < 0 else MORE if low > 0 else UNDECIDED)

    def _why_not(self, names: tuple[str, str], reaching: Sequence[Sequence[Replicate]], l0: float) -> str:
        for name, there in zip(names, reaching, strict=True):
            if name not in self._replicates:
                return f"no run of {name} that has converged and loses something"
            if not there and not math.isnan(l0):
                return f"L0 {l0:.3g} is outside the range of {name}"
        return "they share no range of L0" if math.isnan(l0) else ""


def _covers(reaching: Sequence[Sequence[Replicate]], held_out: Resampled | None) -> str:
    parts = ["init seeds"]
    if len({r.stream_seed for there in reaching for r in there}) > 1:
        parts.append("stream seeds")
    if held_out is None:
        return " and ".join(parts)
    return ", ".join(parts) + f" and held-out {held_out.unit}s"


def _read_resampled(there: Sequence[Replicate], l0: float, held_out: Resampled) -> np.ndarray:
    """Log degradation at an L0 in each resample, [n_resamples, n_replicates]."""
    log_l0, log_lost = held_out.logs
    return np.stack([r.read(l0, log_l0[:, r.rows], log_lost[:, r.rows]) for r in there], axis=1)


def half_width(logs: Sequence[np.ndarray], resampled: Sequence[np.ndarray] | None, n_documents: float) -> float:
    """Half the interval around mean logs[0] - mean logs[1], by the equations of `matched`.

    Args:
        logs: of each family, [n_replicates]; two or more.
        resampled: of each family, the same in each resample of the documents, [n_resamples, n_replicates].
        n_documents: their effective number.
    """
    parts = [(float(x.var(ddof=1)) / len(x), len(x) - 1.0) for x in logs]
    if resampled is not None:
        if not all(np.isfinite(x).all() for x in resampled):
            return math.nan
        whole = (resampled[0].mean(1) - resampled[1].mean(1)).var(ddof=1) * n_documents / (n_documents - 1)
        shared = max(0.0, float(whole) - sum(_own_share(x) for x in resampled))
        parts.append((shared, n_documents - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    df = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    return _t(df) * math.sqrt(variance)


def _own_share(resampled: np.ndarray) -> float:
    """What replicates' own disagreement over documents adds to the variance of their mean."""
    n = resampled.shape[1]
    own = resampled - resampled.mean(1, keepdims=True)
    return float(own.var(0, ddof=1).sum()) / (n - 1) / n
