"""Verdicts: which of two families has the lower CE increase at an equal L0, with a 95% interval."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from prolu.evaluation.comparison.frontiers import family
from prolu.evaluation.comparison.intervals import half_width_of_difference
from prolu.evaluation.comparison.replicates import DocumentResamples, FinishedStudy, Replicate, replicates

LOWER = "lower CE increase"
HIGHER = "higher CE increase"
UNDECIDED = "undecided"

BASELINES = ("relu + l1", "relu + sqrt_l1")
"""The paper's baselines. Every other family is compared with both, and the second with the first."""


class Verdict(NamedTuple):
    """How the CE increase of a challenger compares with that of a baseline at one L0."""

    challenger: str
    baseline: str
    l0: float
    change: float
    """The relative change of CE increase, challenger / baseline - 1; nan if it cannot be computed."""
    low: float
    high: float
    """The ends of its 95% interval; nan with fewer than two seeds of either family."""
    verdict: Literal["lower CE increase", "higher CE increase", "undecided"]
    """Which CE increase the challenger has; undecided where the interval contains 0 or is missing."""
    n_seeds: int
    """The number of replicates of the family that has fewer."""
    n_documents: int
    """The number of held-out documents; 0 where runs have no sums by document: the interval then covers seeds only."""
    covers: str
    """The kinds of variation that the interval covers, in words."""
    unit: str = "document"
    """What `n_documents` counts: documents, or token blocks where documents are not known."""
    reason: str = ""
    """Why there is no interval, where there is none."""
    n_unconverged: int = 0
    """The number of runs used although they have not converged, because that was asked for."""

    def __str__(self) -> str:
        head = f"{self.challenger} against {self.baseline} at L0 {self.l0:.3g}: "
        if math.isfinite(self.low):
            return f"{head}change of CE increase {self.in_numbers()}"
        change = "" if math.isnan(self.change) else f"change of CE increase {self.change:+.0%}, "
        tail = f"; {self._unconverged()}" if self.n_unconverged else ""
        return f"{head}{change}{self.verdict}: {self.reason}{tail}"

    def in_numbers(self) -> str:
        """Return the change with its interval, as in `-31% (95% interval -35% to -27%, 3 seeds, 214 documents)`."""
        documents = f"{self.n_documents} {self.unit}s" if self.n_documents else "documents not recorded"
        parts = [f"95% interval {self.low:+.0%} to {self.high:+.0%}", f"{self.n_seeds} seeds", documents]
        if self.n_unconverged:
            parts.append(self._unconverged())
        undecided = f", {UNDECIDED}" if self.verdict == UNDECIDED else ""
        return f"{self.change:+.0%} ({', '.join(parts)}){undecided}"

    def _unconverged(self) -> str:
        return f"{self.n_unconverged} unconverged runs included"


def matched(
    studies: FinishedStudy | Sequence[FinishedStudy],
    challenger: str,
    baseline: str,
    l0: float,
    *,
    unconverged: bool = False,
) -> Verdict:
    """Return the change of CE increase from a baseline to a challenger at one L0, with a 95% interval.

    A replicate is a (stream seed, init seed). In each, a family's curve goes through those of its runs that no
    other of its runs there beats, linear in (log L0, log CE increase), and is read at `l0`. With d the log CE increase
    that was read, change = exp(mean d_challenger - mean d_baseline) - 1, where the means are over replicates.

    The interval covers init seeds and held-out documents together. It covers stream seeds (the order of training
    tokens) only where studies at several of them are pooled, and never the choice of language model, hook, training
    text and hyperparameters. With a = s^2 / n, the variance of a family's mean over its n replicates,

        variance = a_challenger + a_baseline + D,
        df = variance^2 / (a_challenger^2 / (n_c - 1) + a_baseline^2 / (n_b - 1) + D^2 / (m - 1)),

    and the interval is a t interval with these degrees of freedom, Welch's and Satterthwaite's. D is the variance over
    documents that all replicates share: the variance of the whole estimate over 2,000 resamples of the documents, the
    same for every run, less what the replicates' own disagreement about documents contributes to it, since s^2 contains
    that already. m is the effective number of documents, (sum w)^2 / sum w^2 with w their numbers of tokens.

    Args:
        studies: one study, or several with the same language model, hook and held-out tokens.
        challenger: a family, for example `prolu_ste + l1`.
        baseline: another family.
        l0: the L0 at which the two are compared.
        unconverged: whether runs that have not converged are used too.

    Raises:
        ValueError: several studies were scored with different models, at different hooks or on different tokens.
    """
    return _Comparisons(studies, unconverged=unconverged).verdict(challenger, baseline, l0)


def verdict_table(
    studies: FinishedStudy | Sequence[FinishedStudy], l0s: Sequence[float] | None = None, *, unconverged: bool = False
) -> list[Verdict]:
    """Return the verdicts of every family against `relu + l1` and `relu + sqrt_l1`.

    Each interval is for its own comparison: of twenty 95% intervals, one misses the true value on average.

    Args:
        studies: one study, or several with the same language model, hook and held-out tokens.
        l0s: the L0s at which families are compared; by default the runs' target L0s, or without these three values
            inside the range that both families reach.
        unconverged: whether runs that have not converged are used too.

    Raises:
        ValueError: several studies were scored with different models, at different hooks or on different tokens.
    """
    comparisons = _Comparisons(studies, unconverged=unconverged)
    return [
        comparisons.verdict(challenger, baseline, l0)
        for challenger, baseline in _pairs(comparisons.families)
        for l0 in (comparisons.l0s(challenger, baseline) if l0s is None else l0s)
    ]


def rows_for_tables(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts, with a pair of families that has no number at any L0 cut to one row with L0 nan."""
    rows: list[Verdict] = []
    for _, group in groupby(verdicts, key=lambda v: (v.challenger, v.baseline)):
        same = list(group)
        if all(math.isnan(v.change) for v in same):
            reasons = {v.reason for v in same}
            reason = reasons.pop() if len(reasons) == 1 else "none of the L0s compared is in the range of both"
            same = [same[0]._replace(l0=math.nan, reason=reason)]
        rows += same
    return rows


def _pairs(families: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each challenger with each of its baselines."""
    for name in families:
        for i, baseline in enumerate(BASELINES):
            # A baseline is a challenger of the baselines before it only, so that no pair comes twice.
            if baseline in families and name not in BASELINES[: i + 1]:
                yield name, baseline


class _Comparisons:
    """The families of some studies, prepared once for any number of comparisons."""

    def __init__(self, studies: FinishedStudy | Sequence[FinishedStudy], *, unconverged: bool):
        found = list(studies) if isinstance(studies, Sequence) else [studies]
        records = [r for study in found for r in study.records]
        self.families = list(dict.fromkeys(map(family, records)))
        self._replicates, self._resamples = replicates(found, unconverged=unconverged)
        self._kind_of_run = "run" if unconverged else "converged run"
        self._families_of_unconverged = [family(r) for r in records if not r["converged"]] if unconverged else []
        self._targets = sorted({r["target_l0"] for r in records if r.get("target_l0") is not None})

    def l0s(self, challenger: str, baseline: str) -> list[float]:
        """Return the L0s at which two families are compared by default; one nan if they have no L0 in common."""
        if self._targets:
            return self._targets
        if challenger not in self._replicates or baseline not in self._replicates:
            return [math.nan]
        ranges = [r.l0_range for name in (challenger, baseline) for r in self._replicates[name]]
        low = max(a for a, _ in ranges)
        high = min(b for _, b in ranges)
        if low >= high:
            return [math.nan]
        return [float(f"{x:.3g}") for x in np.geomspace(low, high, 5)[1:4]]

    def verdict(self, challenger: str, baseline: str, l0: float) -> Verdict:
        """Return the verdict on two families at one L0."""
        pair = (challenger, baseline)
        reaching = [[r for r in self._replicates.get(name, []) if r.reaches(l0)] for name in pair]
        found = self._undecided(pair, l0, reaching)
        if reason := self._why_no_number(pair, l0, reaching):
            return found._replace(reason=reason)
        logs = [np.array([float(r.read(l0, r.log_l0, r.log_ce_increase)) for r in some]) for some in reaching]
        log_change = float(logs[0].mean() - logs[1].mean())
        found = found._replace(change=math.expm1(log_change))
        if found.n_seeds < 2:
            return found._replace(reason="one seed, so no interval")
        if self._resamples is None:
            half = half_width_of_difference(logs, None, math.inf)
        else:
            resampled = [_read_resamples(some, l0, self._resamples) for some in reaching]
            half = half_width_of_difference(logs, resampled, self._resamples.n_effective)
        if not math.isfinite(half):
            return found._replace(reason="in some resample of the documents a CE increase is not above 0")
        # The interval is symmetric in the log, where the error of a ratio is additive.
        low = math.expm1(log_change - half)
        high = math.expm1(log_change + half)
        return found._replace(low=low, high=high, verdict=LOWER if high < 0 else HIGHER if low > 0 else UNDECIDED)

    def _undecided(self, pair: tuple[str, str], l0: float, reaching: Sequence[Sequence[Replicate]]) -> Verdict:
        """Return a verdict without numbers."""
        return Verdict(
            challenger=pair[0],
            baseline=pair[1],
            l0=l0,
            change=math.nan,
            low=math.nan,
            high=math.nan,
            verdict=UNDECIDED,
            n_seeds=min(map(len, reaching)),
            n_documents=self._resamples.n_documents if self._resamples else 0,
            covers=_covers(reaching, self._resamples),
            unit=self._resamples.unit if self._resamples else "document",
            n_unconverged=sum(map(self._families_of_unconverged.count, pair)),
        )

    def _why_no_number(self, pair: tuple[str, str], l0: float, reaching: Sequence[Sequence[Replicate]]) -> str:
        """Return the reason why the families cannot be compared at this L0; empty if they can."""
        for name, some in zip(pair, reaching, strict=True):
            if name not in self._replicates:
                return f"no {self._kind_of_run} of {name} has a CE increase above 0"
            if not some and not math.isnan(l0):
                return f"L0 {l0:.3g} is outside the range of {name}"
        return "their ranges of L0 do not overlap" if math.isnan(l0) else ""


def _covers(reaching: Sequence[Sequence[Replicate]], resamples: DocumentResamples | None) -> str:
    parts = ["init seeds"]
    if len({r.stream_seed for some in reaching for r in some}) > 1:
        parts.append("stream seeds")
    if resamples is None:
        return " and ".join(parts)
    return ", ".join(parts) + f" and held-out {resamples.unit}s"


def _read_resamples(some: Sequence[Replicate], l0: float, resamples: DocumentResamples) -> np.ndarray:
    """Return the log CE increase of some replicates at an L0 in every resample, [n_resamples, n_replicates]."""
    log_l0, log_ce_increase = resamples.logs
    return np.stack([r.read(l0, log_l0[:, r.rows], log_ce_increase[:, r.rows]) for r in some], axis=1)
