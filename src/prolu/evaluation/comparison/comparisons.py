"""The engine of all comparisons: the families of some studies, prepared once, and the verdicts on any two of them."""

import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from prolu.evaluation.comparison import reasons
from prolu.evaluation.comparison.curves import Curve, reaches
from prolu.evaluation.comparison.frontiers import Record, budget, family, grouped, replicate, variant
from prolu.evaluation.comparison.intervals import half_width_of_difference
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS, is_finite, main_metric
from prolu.evaluation.comparison.replicates import Curves, DocumentResamples, FinishedStudy, curves_of
from prolu.evaluation.comparison.wording import (
    HIGHER,
    LOWER,
    NOT_DISTINGUISHABLE,
    NOT_TESTED,
    ONE_SEED,
    Verdict,
    listed,
)
from prolu.training.choices import FROZEN

BASELINES = ("relu + l1", "relu + sqrt_l1")
"""The paper's baselines. Every other family is compared with both, and the second with the first."""

N_PLACES = 65
"""The number of L0s in the common range of two families at which is checked whether both curves can be read."""


class Comparisons:
    """The families of some studies, prepared once for any number of comparisons."""

    def __init__(self, studies: FinishedStudy | Sequence[FinishedStudy], *, unconverged: bool = True):
        self.studies = list(studies) if isinstance(studies, Sequence) else [studies]
        self.records = [r for study in self.studies for r in study.records]
        self.families = list(dict.fromkeys(map(family, self.records)))
        self.main_metric = main_metric(self.records)
        """The metric that is compared unless another one is named."""
        self._unconverged = unconverged
        self._families_of_kind = {family(r) for r in self.records if unconverged or r["converged"]}
        self._targets = sorted({r["target_l0"] for r in self.records if r.get("target_l0") is not None})
        self._curves = cache(self._curves_of)

    def _curves_of(self, y: str) -> Curves:
        return curves_of(self.studies, METRICS[y], unconverged=self._unconverged)

    def table(self, l0s: Sequence[float] | None = None, y: str = "") -> list[Verdict]:
        """Return the verdicts of every family against its baselines, as `verdict_table` does."""
        return [
            self.verdict(challenger, baseline, l0, y)
            for challenger, baseline in _pairs(self.families)
            for l0 in (self.l0s(challenger, baseline, y=y) or [math.nan] if l0s is None else l0s)
        ]

    def l0s(self, challenger: str, baseline: str, low: float = 0, high: float = math.inf, y: str = "") -> list[float]:
        """Return the L0s between two bounds at which two families are compared by default.

        These are the target L0s of the runs, or else three that both families reach, a quarter, a half and three
        quarters of the way through what they reach together; none if they have no L0 in common.
        """
        if self._targets:
            return [target for target in self._targets if low < target < high]
        both, _ = self._at_budget((challenger, baseline), y or self.main_metric, None)
        if not all(both):
            return []
        by_family = [[curve.l0_range for curve in some] for some in both]
        common = _inner([ends for ranges in by_family for ends in ranges])
        reached = _inner([reasons.outer(ranges) for ranges in by_family])
        # The L0s that all replicates reach or, if there are none, those that one replicate of each family reaches.
        for ends, enough in ((common, all), (reached, any)):
            start = max(ends[0], low)
            end = min(ends[1], high)
            if start < end:
                # Rounded before the check whether they can be read, so that the L0 that is shown is the one that is
                # read.
                places = [float(f"{x:.3g}") for x in np.geomspace(start, end, N_PLACES)]
                read = [x for x in places if all(enough(c.reaches(x) for c in some) for some in both)]
                if read:
                    last = len(read) - 1
                    return list(dict.fromkeys(read[round(part * last / 4)] for part in (1, 2, 3)))
        return []

    def reading(self, names: Sequence[str], l0: float, y: str, like: str = "") -> dict[str, list[Curve]]:
        """Return the curves of some families that can be read at one L0, one per replicate, all of one training budget.

        The budget is the largest that most of them have. Curves of SAEs whose budget is not recorded take part too.

        Args:
            names: the families.
            l0: the L0.
            y: the metric, by its name in results.jsonl.
            like: a metric whose best variant of each family is read, so that several metrics are of the same SAEs; by
                default `y` itself. A variant that only lacks a place on a curve of this metric is read too.
        """
        longest = self._budget_of_most(names, like or y)
        variants: dict[str, tuple[str, ...]] = {}
        for name in names:
            curves = self._of_budget(name, like or y, longest)
            some = _reaching(curves, l0)
            if not some:
                others = {variant(r) for r in self._without_place(name, curves, l0, like or y)}
                some = _reaching([c for c in self._of_budget(name, y, longest) if c.variant in others], l0)
            if some:
                variants[name] = some[0].variant
        return {
            name: [c for c in self._of_budget(name, y, longest) if c.variant == variants.get(name) and c.reaches(l0)]
            for name in names
        }

    def l0s_of_most(self, y: str) -> list[float]:
        """Return the L0s at which tables compare all families, where the user names none.

        These are the target L0s of the runs. If the runs have none, they are three of the L0s at which the most
        families have a value: those at a quarter, a half and three quarters of that range. Without a run the list is
        empty.
        """
        if self._targets:
            return list(self._targets)
        longest = self._budget_of_most(self.families, y)
        curves = {name: self._of_budget(name, y, longest) for name in self.families}
        ranges = [c.l0_range for some in curves.values() for c in some]
        if not ranges:
            return []
        places = [float(f"{x:.3g}") for x in np.geomspace(*reasons.outer(ranges), N_PLACES)]
        counts = [sum(any(c.reaches(x) for c in some) for some in curves.values()) for x in places]
        read = [x for x, n in zip(places, counts, strict=True) if n == max(counts)]
        return list(dict.fromkeys(read[round(part * (len(read) - 1) / 4)] for part in (1, 2, 3)))

    def why_not_read(self, name: str, l0: float, y: str) -> str:
        """Return why a family cannot be read at an L0 at the budget of most families, and how it could be."""
        curves = self._of_budget(name, y, self._budget_of_most(self.families, y))
        kind = "run" if self._unconverged else "converged run"
        if curves and not any(c.reaches(l0) for c in curves):
            return self._why_out_of_reach(name, curves, l0, y)
        if name in self._curves(y).by_family:
            return f"no {kind} of {name} has the setting and the number of training tokens that are compared"
        return reasons.no_run(kind, name, METRICS[y], has_runs=name in self._families_of_kind)

    def is_below_all(self, name: str, l0: float, y: str) -> bool:
        """Return whether a family that cannot be read at an L0 has a run there that is not above 0, where others are.

        It has no place on a curve in the log, but is lower than every family that can be read.
        """
        curves = self._of_budget(name, y, self._budget_of_most(self.families, y))
        is_unread = METRICS[y].compared_as == "ratio" and not any(c.reaches(l0) for c in curves)
        return is_unread and any(is_finite(r.get(y)) for r in self._without_place(name, curves, l0, y))

    def _why_out_of_reach(self, name: str, curves: Sequence[Curve], l0: float, y: str) -> str:
        """Return why none of a family's curves of a metric reaches an L0."""
        if without_place := self._without_place(name, curves, l0, y):
            return reasons.without_place(name, without_place, l0, METRICS[y])
        kind = "run" if self._unconverged else "converged run"
        missed = any(family(r) == name and r.get("target_l0") == l0 for r in self.records)
        return reasons.out_of_reach(kind, name, curves, l0, missed=missed)

    def _without_place(self, name: str, curves: Sequence[Curve], l0: float, y: str) -> list[Record]:
        """Return those of a family's runs without a place on a curve with which a curve of a metric would reach an L0.

        Args:
            name: the family.
            curves: its curves of the metric at one training budget, none of which reaches the L0; if there are none,
                the budget is that of most families.
            l0: the L0.
            y: the metric.
        """
        log_l0s = {(c.replicate, c.n_tokens, c.variant): c.log_l0 for c in curves}
        budgets = {c.n_tokens for c in curves} or {self._budget_of_most(self.families, y), None}
        own = [r for r in self._curves(y).left_out if family(r) == name and budget(r) in budgets]
        with_l0 = [r for r in own if is_finite(r.get("l0")) and r["l0"] > 0]
        return [
            r
            for key, some in grouped(with_l0, replicate, budget, variant).items()
            if reaches(np.union1d(log_l0s.get(key, []), np.log([r["l0"] for r in some])), l0)
            for r in some
        ]

    def _budget_of_most(self, names: Sequence[str], y: str) -> int | None:
        by_family = self._curves(y).by_family
        budgets = [n for name in names for n in {c.n_tokens for c in by_family.get(name, [])} if n is not None]
        return max(budgets, key=lambda n: (budgets.count(n), n), default=None)

    def _of_budget(self, name: str, y: str, n_tokens: int | None) -> list[Curve]:
        return [c for c in self._curves(y).by_family.get(name, []) if c.n_tokens in (n_tokens, None)]

    def resamples(self, y: str) -> DocumentResamples | None:
        """Return the resampled documents of all runs that have a metric; None where there are none for it."""
        return self._curves(y).resamples

    def runs_of(self, curves: Sequence[Curve], y: str) -> list[Record]:
        """Return the runs of some curves of a metric."""
        return [self._curves(y).runs[i] for curve in curves for row in curve.rows for i in row]

    def verdict(self, challenger: str, baseline: str, l0: float, y: str = "", n_tokens: int | None = None) -> Verdict:
        """Return the verdict on two families at one L0, about their CE increase or another metric."""
        y = y or self.main_metric
        pair = (challenger, baseline)
        resamples = self._curves(y).resamples
        unit = resamples.unit if resamples else "document"
        curves, notes = self._at_budget(pair, y, n_tokens)
        reaching = [_reaching(some, l0) for some in curves]
        runs = self.runs_of([curve for some in curves for curve in some], y)
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
            metric=y,
        )
        if not all(reaching):
            return found._replace(reason=self._why_no_number(pair, l0, y, curves, n_tokens))
        return _measured(found, reaching, resamples)

    def in_nats(self, v: Verdict) -> Verdict:
        """Return a verdict on the CE increase as that on the cross-entropy with the SAE, where only the latter has an
        interval; any other verdict as it is.

        A change in percent has no interval if a CE increase is not above 0 in some resample of the documents, as where
        it is small. The change in nats has one, and it is the same for both: they differ by the clean cross-entropy.
        """
        if v.metric != CE_INCREASE or math.isfinite(v.low):
            return v
        other = self.verdict(v.challenger, v.baseline, v.l0, "ce_recon")
        return other if math.isfinite(other.low) else v

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
            # SAEs of other libraries do not record how long they were trained. They are compared all the same.
            taken = [max(some, default=None) for some in budgets]
            if taken[0] != taken[1]:
                notes.append("how long some were trained is not known")
        else:
            return [[], []], tuple(notes)
        kept = [[c for c in some if c.n_tokens == n] for some, n in zip(both, taken, strict=True)]
        others = sorted((budgets[0] | budgets[1]) - set(taken))
        if others:
            notes.append(f"runs on {listed([f'{n:,}' for n in others])} tokens are left out")
        notes += [note for name, some in zip(pair, kept, strict=True) if (note := reasons.about_variants(name, some))]
        return kept, tuple(notes)

    def _about_runs(self, name: str, y: str) -> Iterator[str]:
        """Yield what must be said of a family's runs that have no place on a curve."""
        without = [r for r in self._curves(y).left_out if family(r) == name]
        if without:
            yield reasons.left_out(len(without), name, METRICS[y])
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
                return reasons.no_run(kind, name, METRICS[y], has_runs=name in self._families_of_kind)
        if not all(curves):
            return reasons.no_common_budget(kind, {name: by_family[name] for name in pair}, n_tokens)
        by_name = dict(zip(pair, curves, strict=True))
        if math.isnan(l0):
            return reasons.no_common_l0(kind, by_name)
        out = [name for name, some in by_name.items() if not _reaching(some, l0)]
        return "; ".join(self._why_out_of_reach(name, by_name[name], l0, y) for name in out)


def _pairs(families: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each challenger with its baselines: the paper's, and the random ones (`RunConfig.freeze`) of its family."""
    frozen = [suffix for suffix in FROZEN.values() if suffix]
    for name in (name for name in families if not name.endswith(tuple(frozen))):
        for i, baseline in enumerate(BASELINES):
            # A baseline is compared only with the baselines before it, so that no pair comes twice.
            if baseline in families and name not in BASELINES[: i + 1]:
                yield name, baseline
        yield from ((name, name + suffix) for suffix in frozen if name + suffix in families)


def _measured(found: Verdict, reaching: Sequence[Sequence[Curve]], resamples: DocumentResamples | None) -> Verdict:
    """Return a verdict with its numbers, from curves that all reach its L0."""
    l0 = found.l0
    metric = METRICS[found.metric]
    heights = [np.array([curve.read(l0) for curve in some]) for some in reaching]
    difference = float(heights[0].mean() - heights[1].mean())
    tolerance = math.hypot(*(float(np.mean([curve.tolerance(l0) for curve in some])) for some in reaching))
    found = found._replace(change=metric.change(difference), tolerance=metric.change(tolerance))
    if resamples is None:
        half = half_width_of_difference(heights, None, math.inf)
    else:
        resampled = [np.stack([c.read_resamples(l0, resamples.places) for c in some], axis=1) for some in reaching]
        half = half_width_of_difference(heights, resampled, resamples.n_effective)
    if not math.isfinite(half):
        reason = ONE_SEED if resamples is None else f"in some resample of the documents a {metric.words} is not above 0"
        return found._replace(reason=reason)
    # The interval is symmetric in height: in the log, the error of a ratio is additive.
    low = metric.change(difference - half)
    high = metric.change(difference + half)
    if found.n_seeds < 2:
        return found._replace(low=low, high=high, reason=ONE_SEED)
    return found._replace(low=low, high=high, verdict=LOWER if high < 0 else HIGHER if low > 0 else NOT_DISTINGUISHABLE)


def _reaching(curves: Sequence[Curve], l0: float) -> list[Curve]:
    """Return a family's curves at an L0: one per replicate, of the variant that is read there.

    That is the variant with the most replicates there. Of several such variants it is the one with the best value, or
    the lowest value where neither direction of the metric is better.
    """
    if math.isnan(l0) or not curves:
        return []
    sign = -1 if curves[0].metric.better == "higher" else 1
    by_variant: dict[tuple[str, ...], list[Curve]] = {}
    for curve in curves:
        if curve.reaches(l0):
            by_variant.setdefault(curve.variant, []).append(curve)

    def order(some: Sequence[Curve]) -> tuple[float, float]:
        return -len(some), sign * float(np.mean([curve.read(l0) for curve in some]))

    return min(by_variant.values(), key=order, default=[])


def _inner(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the range that lies in all of some ranges; its end is below its start if none does."""
    return max(a for a, _ in ranges), min(b for _, b in ranges)
