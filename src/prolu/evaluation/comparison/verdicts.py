"""Verdicts: which of two families has the lower CE increase at an equal L0, with a 95% interval.

Every number of a comparison comes from `Comparisons`, whoever asks: `matched`, tables, sentences and claims.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from prolu.evaluation.comparison import reasons
from prolu.evaluation.comparison.curves import Curve
from prolu.evaluation.comparison.frontiers import family
from prolu.evaluation.comparison.intervals import half_width_of_difference
from prolu.evaluation.comparison.replicates import Curves, DocumentResamples, FinishedStudy, curves_of
from prolu.evaluation.comparison.wording import (
    HIGHER,
    LOWER,
    NOT_DISTINGUISHABLE,
    NOT_TESTED,
    ONE_SEED,
    Verdict,
    listed,
    rows_for_tables,
)
from prolu.training.config import FROZEN

__all__ = ["HIGHER", "LOWER", "Comparisons", "Verdict", "matched", "rows_for_tables", "verdict_table"]

BASELINES = ("relu + l1", "relu + sqrt_l1")
"""The paper's baselines. Every other family is compared with both, and the second with the first."""

N_PLACES = 65
"""The number of places in the range of two families at which it is looked whether both can be read."""


def matched(
    studies: FinishedStudy | Sequence[FinishedStudy],
    challenger: str,
    baseline: str,
    l0: float,
    *,
    unconverged: bool = True,
    n_tokens: int | None = None,
) -> Verdict:
    """Return the change of CE increase from a baseline to a challenger at one L0, with a 95% interval.

    A replicate is a (stream seed, init seed). In each, a family's curve goes through all its runs of one training
    budget, monotone between neighbours in (log L0, log CE increase) (Fritsch and Carlson's, scipy's PCHIP), and is read
    at `l0`, if a run lies within a factor of 1.5. With d the log CE increase that was read, change = exp(mean
    d_challenger - mean d_baseline) - 1, where the means are over replicates.

    The interval covers init seeds and held-out documents together. It covers stream seeds (the order of training
    tokens) only where studies at several of them are pooled, and never the choice of language model, hook, training
    text and hyperparameters. With a = s^2 / n, the variance of a family's mean over its n replicates,

        variance = a_challenger + a_baseline + D,
        df = variance^2 / (a_challenger^2 / (n_c - 1) + a_baseline^2 / (n_b - 1) + D^2 / (m - 1)),

    and the interval is a t interval with these degrees of freedom, Welch's and Satterthwaite's. D is the variance over
    documents that all replicates share: the variance of the whole estimate over 2,000 resamples of the documents, the
    same for every run, less what the replicates' own disagreement about documents contributes to it, since s^2 contains
    that already. m is the effective number of documents, (sum w)^2 / sum w^2 with w their numbers of tokens.

    With one seed of either family, the interval covers held-out documents only, and the verdict is "not tested".

    Args:
        studies: one study, or several with the same language model, hook and held-out tokens.
        challenger: a family, for example `prolu_ste + l1`.
        baseline: another family.
        l0: the L0 at which the two are compared.
        unconverged: whether runs that have not converged are used too. The verdict counts them.
        n_tokens: the number of training tokens of the runs that are compared; by default the largest that both
            families have.

    Raises:
        ValueError: several studies were scored with different models, at different hooks or on different tokens; or
            `l0` is not above 0.
    """
    check_l0(l0)
    return Comparisons(studies, unconverged=unconverged).verdict(challenger, baseline, l0, n_tokens=n_tokens)


def verdict_table(
    studies: FinishedStudy | Sequence[FinishedStudy], l0s: Sequence[float] | None = None, *, unconverged: bool = True
) -> list[Verdict]:
    """Return the verdicts of every family against `relu + l1`, `relu + sqrt_l1` and its own random baselines.

    Each interval is for its own comparison: of twenty 95% intervals, one misses the true value on average.

    Args:
        studies: one study, or several with the same language model, hook and held-out tokens.
        l0s: the L0s at which families are compared; by default the runs' target L0s, or without these three values
            that both families reach.
        unconverged: whether runs that have not converged are used too. Verdicts count them.

    Raises:
        ValueError: several studies were scored with different models, at different hooks or on different tokens; or
            one of `l0s` is not above 0.
    """
    for l0 in l0s or ():
        check_l0(l0)
    return Comparisons(studies, unconverged=unconverged).table(l0s)


def check_l0(l0: float) -> None:
    """Raise ValueError unless an L0 is a number above 0, which it needs to be to have a logarithm."""
    if not 0 < l0 < math.inf:
        raise ValueError(f"l0 {l0}: must be a number above 0")


class Comparisons:
    """The families of some studies, prepared once for any number of comparisons."""

    def __init__(self, studies: FinishedStudy | Sequence[FinishedStudy], *, unconverged: bool = True):
        self.studies = list(studies) if isinstance(studies, Sequence) else [studies]
        self.records = [r for study in self.studies for r in study.records]
        self.families = list(dict.fromkeys(map(family, self.records)))
        self._unconverged = unconverged
        self._families_of_kind = {family(r) for r in self.records if unconverged or r["converged"]}
        self._targets = sorted({r["target_l0"] for r in self.records if r.get("target_l0") is not None})
        self._curves = cache(self._curves_of)

    def _curves_of(self, y: str) -> Curves:
        return curves_of(self.studies, y, unconverged=self._unconverged)

    def table(self, l0s: Sequence[float] | None = None) -> list[Verdict]:
        """Return the verdicts of every family against its baselines, as `verdict_table` does."""
        return [
            self.verdict(challenger, baseline, l0)
            for challenger, baseline in _pairs(self.families)
            for l0 in (self.l0s(challenger, baseline) or [math.nan] if l0s is None else l0s)
        ]

    def l0s(self, challenger: str, baseline: str, low: float = 0, high: float = math.inf) -> list[float]:
        """Return the L0s between two bounds at which two families are compared by default.

        These are the target L0s of the runs, or else three that both families reach, a quarter, a half and three
        quarters of the way through what they reach together; none if they have no L0 in common.
        """
        if self._targets:
            return [target for target in self._targets if low < target < high]
        both, _ = self._at_budget((challenger, baseline), "degradation", None)
        if not all(both):
            return []
        by_family = [[curve.l0_range for curve in some] for some in both]
        common = _inner([ends for ranges in by_family for ends in ranges])
        reached = _inner([reasons.outer(ranges) for ranges in by_family])
        # Where every replicate takes part, or else where one of each family does.
        for ends, enough in ((common, all), (reached, any)):
            start = max(ends[0], low)
            end = min(ends[1], high)
            if start < end:
                # Rounded before it is asked whether they can be read, so that what is shown is what was read.
                places = [float(f"{x:.3g}") for x in np.geomspace(start, end, N_PLACES)]
                read = [x for x in places if all(enough(c.reaches(x) for c in some) for some in both)]
                if read:
                    last = len(read) - 1
                    return list(dict.fromkeys(read[round(part * last / 4)] for part in (1, 2, 3)))
        return []

    def verdict(
        self, challenger: str, baseline: str, l0: float, y: str = "degradation", n_tokens: int | None = None
    ) -> Verdict:
        """Return the verdict on two families at one L0, about their CE increase or another figure."""
        pair = (challenger, baseline)
        resamples = self._curves(y).resamples
        unit = resamples.unit if resamples else "document"
        curves, notes = self._at_budget(pair, y, n_tokens)
        reaching = [_reaching(some, l0) for some in curves]
        runs = [self._curves(y).runs[i] for some in curves for curve in some for row in curve.rows for i in row]
        found = Verdict(
            challenger=challenger,
            baseline=baseline,
            l0=l0,
            change=math.nan,
            low=math.nan,
            high=math.nan,
            verdict=NOT_TESTED,
            n_seeds=min(map(len, reaching)),
            n_documents=resamples.n_documents if resamples else 0,
            covers=reasons.covers(reaching, unit if resamples else ""),
            unit=unit,
            n_unconverged=sum(r["converged"] is False for r in runs),
            n_runs=len(runs),
            notes=notes,
        )
        if not all(reaching):
            return found._replace(reason=self._why_no_number(pair, l0, y, curves, n_tokens))
        return _measured(found, reaching, resamples)

    def _at_budget(
        self, pair: tuple[str, str], y: str, n_tokens: int | None
    ) -> tuple[list[list[Curve]], tuple[str, ...]]:
        """Return the curves of two families at one training budget, and what must be said about what is left out."""
        by_family = self._curves(y).by_family
        both = [by_family.get(name, []) for name in pair]
        budgets = [{c.n_tokens for c in some if c.n_tokens is not None} for some in both]
        common = budgets[0] & budgets[1]
        notes = [note for name in dict.fromkeys(pair) for note in self._about_runs(name, y)]
        if n_tokens is not None:
            taken = [n_tokens, n_tokens]
        elif common:
            taken = [max(common)] * 2
        elif any(c.n_tokens is None for some in both for c in some):
            # An SAE of another library does not say how long it was trained; that is no reason to compare nothing.
            taken = [max(some, default=None) for some in budgets]
            if taken[0] != taken[1]:
                notes.append("how long some were trained is not known")
        else:
            return [[], []], tuple(notes)
        kept = [[c for c in some if c.n_tokens == n] for some, n in zip(both, taken, strict=True)]
        others = sorted((budgets[0] | budgets[1]) - set(taken))
        if others:
            notes.append(f"runs on {listed([f'{n:,}' for n in others])} tokens are other curves")
        notes += [note for name, some in zip(pair, kept, strict=True) if (note := reasons.about_variants(name, some))]
        return kept, tuple(notes)

    def _about_runs(self, name: str, y: str) -> Iterator[str]:
        """Yield what must be said of a family's runs that have no place on a curve."""
        without = [r for r in self._curves(y).left_out if family(r) == name]
        if without:
            runs = "1 run" if len(without) == 1 else f"{len(without)} runs"
            yield f"{runs} of {name} left out: no L0 and CE increase above 0"
        unknown = sum(r["converged"] is None for r in self._curves(y).runs if family(r) == name)
        if unknown:
            yield f"whether {unknown} of {name} converged is not known"

    def _why_no_number(
        self, pair: tuple[str, str], l0: float, y: str, curves: Sequence[Sequence[Curve]], n_tokens: int | None
    ) -> str:
        """Return why two families cannot be compared at this L0, and how they could be."""
        kind = "run" if self._unconverged else "converged run"
        by_family = self._curves(y).by_family
        for name in pair:
            if name not in by_family:
                return reasons.no_run(kind, name, has_runs=name in self._families_of_kind)
        if not all(curves):
            return reasons.no_common_budget(kind, {name: by_family[name] for name in pair}, n_tokens)
        by_name = dict(zip(pair, curves, strict=True))
        if math.isnan(l0):
            return reasons.no_common_l0(kind, by_name)
        missed = {family(r) for r in self.records if r.get("target_l0") == l0}
        out = [name for name, some in by_name.items() if not _reaching(some, l0)]
        return "; ".join(reasons.out_of_reach(kind, name, by_name[name], l0, missed=name in missed) for name in out)


def _pairs(families: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each challenger with its baselines: the paper's, and the random ones (`RunConfig.freeze`) of its family."""
    frozen = [suffix for suffix in FROZEN.values() if suffix]
    for name in (name for name in families if not name.endswith(tuple(frozen))):
        for i, baseline in enumerate(BASELINES):
            # A baseline is a challenger of the baselines before it only, so that no pair comes twice.
            if baseline in families and name not in BASELINES[: i + 1]:
                yield name, baseline
        yield from ((name, name + suffix) for suffix in frozen if name + suffix in families)


def _measured(found: Verdict, reaching: Sequence[Sequence[Curve]], resamples: DocumentResamples | None) -> Verdict:
    """Return a verdict with its numbers, from curves that all reach its L0."""
    l0 = found.l0
    logs = [np.array([curve.read(l0) for curve in some]) for some in reaching]
    log_change = float(logs[0].mean() - logs[1].mean())
    tolerance = math.hypot(*(float(np.mean([curve.tolerance(l0) for curve in some])) for some in reaching))
    found = found._replace(change=math.expm1(log_change), tolerance=math.expm1(tolerance))
    if resamples is None:
        half = half_width_of_difference(logs, None, math.inf)
    else:
        resampled = [np.stack([c.read_resamples(l0, resamples.logs) for c in some], axis=1) for some in reaching]
        half = half_width_of_difference(logs, resampled, resamples.n_effective)
    if not math.isfinite(half):
        reason = ONE_SEED if found.n_seeds < 2 else "in some resample of the documents a CE increase is not above 0"
        return found._replace(reason=reason)
    # The interval is symmetric in the log, where the error of a ratio is additive.
    low = math.expm1(log_change - half)
    high = math.expm1(log_change + half)
    if found.n_seeds < 2:
        return found._replace(low=low, high=high, reason=ONE_SEED)
    return found._replace(low=low, high=high, verdict=LOWER if high < 0 else HIGHER if low > 0 else NOT_DISTINGUISHABLE)


def _reaching(curves: Sequence[Curve], l0: float) -> list[Curve]:
    """Return a family's curves at an L0: one per replicate, of the variant that is read there.

    That is the variant with the most replicates there, and of several the one with the lowest value.
    """
    if math.isnan(l0):
        return []
    by_variant: dict[tuple[str, ...], list[Curve]] = {}
    for curve in curves:
        if curve.reaches(l0):
            by_variant.setdefault(curve.variant, []).append(curve)
    return min(by_variant.values(), key=lambda some: (-len(some), np.mean([c.read(l0) for c in some])), default=[])


def _inner(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the range that lies in all of some ranges; its end is below its start if none does."""
    return max(a for a, _ in ranges), min(b for _, b in ranges)
