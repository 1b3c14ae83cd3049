"""A comparison in words: verdicts, and how tables, sentences, the page and the terminal write their numbers alike."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS
from prolu.runtime.notebooks import html_facts

LOWER = "lower"
HIGHER = "higher"
NOT_DISTINGUISHABLE = "not distinguishable"
NOT_TESTED = "not tested"

NOT_OVER_SEEDS = "not tested over seeds"

ONE_SEED = "one seed"
"""The reason for which nothing was tested where a family has one seed."""


class Verdict(NamedTuple):
    """How the CE increase of a challenger, or another metric, compares with that of a baseline at one L0."""

    challenger: str
    baseline: str
    l0: float
    change: float
    """The relative change of CE increase, challenger / baseline - 1; nan if it cannot be computed. Of a metric that is
    compared as a difference, challenger - baseline in its own unit."""
    low: float
    high: float
    """The ends of its 95% interval; nan if there is none. With one seed of either family, the interval covers held-out
    documents only, and decides nothing."""
    verdict: Literal["lower", "higher", "not distinguishable", "not tested"]
    """Which CE increase, or other metric, the challenger has, where there is an interval over seeds: not
    distinguishable if it contains 0. Not tested where there is none."""
    n_seeds: int
    """The number of replicates of the family that has fewer."""
    n_documents: int
    """The number of held-out documents; 0 where no interval covers them: runs have no sums by document, or the metric
    does not follow from these."""
    covers: str
    """The kinds of variation that the interval covers, in words."""
    unit: str = "document"
    """What `n_documents` counts: documents, or token blocks where documents are not known."""
    reason: str = ""
    """Why nothing was tested; empty if something was."""
    n_unconverged: int = 0
    """The number of runs of both families that had not converged when their training ended, by the convergence rule."""
    n_runs: int = 0
    """The number of runs in the curves of both families."""
    tolerance: float = 0.0
    """The error that reading the curves between their runs may add to `change`, in the same unit; 0 where both have
    runs at this L0, and nan where it is not known."""
    notes: tuple[str, ...] = ()
    """What else must be known, such as runs that were left out."""
    metric: str = CE_INCREASE
    """What is compared, by its name in results.jsonl."""

    @property
    def is_tested(self) -> bool:
        """Whether there is an interval over seeds, so that the verdict is about more than these runs."""
        return self.verdict != NOT_TESTED

    @property
    def is_better(self) -> bool | None:
        """Whether the challenger is better than the baseline; None where nothing is distinguishable or tested, and for
        a metric of which neither direction is better.
        """
        better = METRICS[self.metric].better
        return None if self.verdict not in (LOWER, HIGHER) or better == "neither" else self.verdict == better

    def __repr__(self) -> str:
        return f"Verdict({self})"

    def _repr_html_(self) -> str:
        return html_facts(str(self), self.cells())

    def cells(self) -> dict[str, str]:
        """Return the texts of its row in a table, by the titles of the columns."""
        return {
            "family": self.challenger,
            "against": self.baseline,
            "L0": shown_l0(self.l0),
            f"change of {METRICS[self.metric].words}": shown_change(self) + (_unit(self) if shown_change(self) else ""),
            "95% interval": shown_interval(self),
            "verdict": shown_verdict(self),
            "from": shown_ground(self),
        }

    def __str__(self) -> str:
        head = f"{self.challenger} against {self.baseline} at L0 {shown_l0(self.l0)}: "
        if math.isnan(self.change):
            return f"{head}{NOT_TESTED}: {self.reason}"
        return f"{head}change of {METRICS[self.metric].words} {self.in_numbers()}"

    def in_numbers(self, leave_out: Sequence[str] = ()) -> str:
        """Return the change with its interval, as in `-31.2% (95% interval -35.1% to -26.8%, 3 seeds, 214 documents)`.

        Qualifications follow in the brackets. After them stands whether the interval contains 0 or does not cover
        seeds.

        Args:
            leave_out: qualifiers that are said elsewhere.
        """
        seeds = f"{self.n_seeds} seeds" if self.n_seeds > 1 else ONE_SEED
        documents = f"{self.n_documents} {self.unit}s" if self.n_documents else _no_documents(self)
        parts = [seeds, documents]
        if math.isfinite(self.low):
            over = "" if self.is_tested else f" over held-out {self.unit}s"
            parts.insert(0, f"95% interval{over} {shown_interval(self)}")
        else:
            parts.insert(0, "no interval")
        ending = {NOT_DISTINGUISHABLE: NOT_DISTINGUISHABLE, NOT_TESTED: NOT_OVER_SEEDS}.get(self.verdict)
        if self.verdict == NOT_TESTED and self.reason not in ("", ONE_SEED):
            parts.append(self.reason)
        inside = "; ".join([", ".join(parts), *(q for q in qualifiers(self) if q not in leave_out)])
        return f"{amount(self, self.change)}{_unit(self)} ({inside})" + (
            "" if ending in (None, *leave_out) else f", {ending}"
        )


def percent(change: float) -> str:
    """Return a relative change as it is written everywhere, such as `-31.2%`."""
    rounded = round(100 * change, 1)
    return f"{rounded:+.1f}%" if rounded else "0.0%"


def amount(v: Verdict, change: float) -> str:
    """Return a change of a verdict's metric as it is written everywhere: `-31.2%`, or `-0.0123` for a difference."""
    if METRICS[v.metric].compared_as == "ratio":
        return percent(change)
    return f"{change:+.3g}" if change else "0"


def _unit(v: Verdict) -> str:
    """Return the unit of a difference, after a space; empty for a ratio, which has none."""
    metric = METRICS[v.metric]
    return f" {metric.unit}" if metric.compared_as == "difference" and metric.unit else ""


def _no_documents(v: Verdict) -> str:
    """Return why an interval does not cover held-out documents."""
    return "documents not recorded" if METRICS[v.metric].by_document else "held-out text not covered"


def shown_l0(l0: float) -> str:
    """Return an L0 as it is written everywhere; a dash where there is none."""
    return "-" if math.isnan(l0) else f"{l0:.3g}"


def shown_change(v: Verdict) -> str:
    """Return the change of a verdict; empty if it has none."""
    return "" if math.isnan(v.change) else amount(v, v.change)


def shown_interval(v: Verdict) -> str:
    """Return the interval of a verdict, as in `-35.1% to -26.8%`; empty if it has none."""
    return f"{amount(v, v.low)} to {amount(v, v.high)}" if math.isfinite(v.low) else ""


def shown_verdict(v: Verdict) -> str:
    """Return a verdict in a few words, such as `lower` or `not tested (one seed)`."""
    return f"{NOT_TESTED} ({ONE_SEED})" if v.reason == ONE_SEED else v.verdict


def shown_ground(v: Verdict) -> str:
    """Return what a verdict rests on: its seeds and documents, or why there is no number, and what qualifies it."""
    if math.isnan(v.change):
        return v.reason
    seeds = f"{v.n_seeds} seeds" if v.n_seeds > 1 else ONE_SEED
    documents = [f"{v.n_documents:,} {v.unit}s"] if v.n_documents else []
    if not METRICS[v.metric].by_document:
        documents = [_no_documents(v)]
    reason = [v.reason] if v.reason not in ("", ONE_SEED) else []
    return "; ".join([", ".join([seeds, *documents]), *reason, *qualifiers(v)])


def qualifiers(v: Verdict) -> list[str]:
    """Return what qualifies the number of a verdict: unconverged runs, the tolerance of the curves, runs left out."""
    found = [unconverged] if (unconverged := not_converged(v.n_unconverged, v.n_runs)) else []
    # Where the interval contains 0, the difference is no finding, so this need not be said. A tolerance that is too
    # small to be written means that a run lies at this L0.
    if math.isnan(v.tolerance):
        found.append("read between runs, with an error that has not been measured")
    elif abs(v.change) < v.tolerance and v.verdict != NOT_DISTINGUISHABLE and not _rounds_to_nothing(v):
        found.append(f"smaller than the error of {amount(v, v.tolerance)[1:]} that reading between runs may have")
    return [*found, *v.notes]


def _rounds_to_nothing(v: Verdict) -> bool:
    """Return whether a tolerance is too small to be written."""
    return METRICS[v.metric].compared_as == "ratio" and v.tolerance < 0.0005


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence, as in `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def not_converged(n_unconverged: int, n_runs: int) -> str:
    """Return how many runs had not converged, as in `7 of 12 runs had not converged`; empty if all had."""
    return f"{n_unconverged} of {n_runs} runs had not converged" if n_unconverged else ""


def rows_for_tables(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts, with a pair of families that has no number at any L0 cut to one row with L0 nan."""
    rows: list[Verdict] = []
    for _, group in groupby(verdicts, key=lambda v: (v.challenger, v.baseline)):
        same = list(group)
        if all(math.isnan(v.change) for v in same):
            reasons = list(dict.fromkeys(v.reason for v in same))
            same = [same[0]._replace(l0=math.nan, reason="; ".join(reasons))]
        rows += same
    return rows


def covered(verdicts: Sequence[Verdict]) -> str:
    """Return what the intervals of some verdicts cover, as a caption of their table."""
    kinds = list(dict.fromkeys(v.covers for v in verdicts if math.isfinite(v.low)))
    if not kinds:
        return f"no intervals, {NOT_OVER_SEEDS}"
    if not any(v.is_tested for v in verdicts):
        return f"95% intervals over {'; '.join(kinds)}"
    return f"95% intervals over {'; '.join(kinds)}; each is for its own comparison, so on average one in twenty misses"
