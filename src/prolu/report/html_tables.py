"""The comparisons of the page as tables: their rows and what their cells say. `tables.html` makes HTML of them."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from prolu.evaluation.comparison.claims import Claim
from prolu.evaluation.comparison.frontiers import Record, grouped
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS
from prolu.evaluation.comparison.points import FamilySummary, summaries
from prolu.evaluation.comparison.standing_wording import (
    direction,
    shown_p_best,
    shown_rank,
    shown_value,
    shown_value_interval,
    tables_by_l0,
)
from prolu.evaluation.comparison.standings import Standing
from prolu.evaluation.comparison.wording import (
    ONE_SEED,
    Verdict,
    covered,
    rows_for_tables,
    shown_change,
    shown_ground,
    shown_interval,
    shown_l0,
    shown_verdict,
)

HALF_WIDTH = 90
"""The width of the drawing of an interval from 0 to either end, in units of its SVG."""

Kind = Literal["good", "bad", "open"]
"""The colours of verdicts and claims; the names are classes of the style sheet."""

BETTER_KINDS: dict[bool | None, Kind] = {True: "good", False: "bad", None: "open"}
CLAIM_KINDS: dict[str, Kind] = {"holds": "good", "does not hold": "bad"}


class Drawing(NamedTuple):
    """Where an interval is drawn: positions from 0 to 2 HALF_WIDTH, with 0% in the middle."""

    change: float
    low: float | None
    high: float | None
    """The ends of the interval; None if there is no interval."""
    is_cut_low: bool
    is_cut_high: bool
    """Whether the interval goes beyond the drawing, which an arrow shows."""


class VerdictRow(NamedTuple):
    """One comparison of a family with a baseline at one L0."""

    l0: str
    change: str
    interval: str
    drawing: Drawing | None
    verdict: str
    kind: Kind
    ground: str
    """What the verdict rests on, or why there is none."""
    sentence: str
    """The whole comparison as a sentence, shown when one points at the row."""


class VerdictGroup(NamedTuple):
    """The comparisons of one family with one baseline."""

    challenger: str
    baseline: str
    rows: list[VerdictRow]
    ground: str
    """What all rows rest on, if it is the same for all; otherwise empty."""


class VerdictTable(NamedTuple):
    """All comparisons in one metric, and the change at which their drawings end."""

    words: str
    """What the metric is called."""
    direction: str
    """Which direction of it is better; empty if neither is."""
    covered: str
    """What the intervals cover."""
    groups: list[VerdictGroup]
    end: str


def tables_of_verdicts(verdicts: Sequence[Verdict]) -> list[VerdictTable]:
    """Return a table for each metric that is compared."""
    return [table_of_verdicts(some) for some in grouped(verdicts, lambda v: v.metric).values()]


def table_of_verdicts(verdicts: Sequence[Verdict]) -> VerdictTable:
    """Return a row per comparison at one L0 in one metric, grouped by family and baseline."""
    reach = _reach(verdicts)
    metric = METRICS[verdicts[0].metric if verdicts else CE_INCREASE]
    end = f"{reach:.0%}" if metric.compared_as == "ratio" else f"{reach:g}"
    # `verdicts` has the comparisons of a pair one after the other, as groupby needs.
    groups: list[VerdictGroup] = []
    for (challenger, baseline), same in groupby(rows_for_tables(verdicts), key=lambda v: (v.challenger, v.baseline)):
        rows = [_verdict_row(v, reach) for v in same]
        grounds = {row.ground for row in rows}
        groups.append(VerdictGroup(challenger, baseline, rows, grounds.pop() if len(grounds) == 1 else ""))
    return VerdictTable(metric.words, direction(metric.name), covered(verdicts), groups, end)


def _reach(verdicts: Sequence[Verdict]) -> float:
    """Return the change at which the drawings end: the least multiple of 10% that holds all intervals, at most 100%.

    Of differences it is the least number of one digit that holds all intervals.

    A challenger can be many times worse than a baseline but never better by more than 100%, so without this limit one
    bad family would squeeze all other intervals into the middle.
    """
    ends = [abs(e) for v in verdicts for e in (v.low, v.high, v.change) if math.isfinite(e)]
    if verdicts and METRICS[verdicts[0].metric].compared_as == "difference":
        largest = max(ends, default=0) or 0.1  # 0.1 if every change is exactly 0
        digit = 10 ** math.floor(math.log10(largest))
        return math.ceil(largest / digit) * digit
    tens = math.ceil(10 * max(ends, default=0.5))
    return min(1.0, tens / 10) or 0.1  # 0.1 if every change is exactly 0


def _verdict_row(v: Verdict, reach: float) -> VerdictRow:
    return VerdictRow(
        l0=shown_l0(v.l0) if math.isfinite(v.l0) else "",
        change=shown_change(v),
        interval=shown_interval(v),
        drawing=_drawing(v, reach) if math.isfinite(v.change) else None,
        verdict=shown_verdict(v),
        kind=BETTER_KINDS[v.is_better],
        ground=shown_ground(v),
        sentence=str(v),
    )


def _drawing(v: Verdict, reach: float) -> Drawing:
    def at(value: float) -> float:
        within = max(-1.0, min(1.0, value / reach))
        return round(HALF_WIDTH * (1 + within), 1)

    if not math.isfinite(v.low):
        return Drawing(at(v.change), None, None, is_cut_low=False, is_cut_high=False)  # a dot without a bar
    return Drawing(at(v.change), at(v.low), at(v.high), is_cut_low=v.low < -reach, is_cut_high=v.high > reach)


class StandingCell(NamedTuple):
    """What one family reaches in one metric."""

    value: str
    interval: str
    p_best: str
    is_best: bool
    about: str
    """Its rank, seeds and documents, or why there is no value; shown when one points at the cell."""


class StandingTable(NamedTuple):
    """Families by metrics at one L0."""

    l0: str
    heads: list[tuple[str, str]]
    """Each metric, and which direction of it is better."""
    rows: list[tuple[str, list[StandingCell]]]
    """Each family with its cells, one for each metric."""


def tables_of_standings(standings: Sequence[Standing]) -> list[StandingTable]:
    """Return a table of families by metrics for each L0, without the families that have no value there."""
    tables = []
    for l0, by_metric in tables_by_l0(standings).items():
        heads = [(METRICS[name].words, direction(name)) for name in by_metric]
        families = list(dict.fromkeys(s.family for some in by_metric.values() for s in some if math.isfinite(s.value)))
        rows = [
            (name, [_standing_cell(s) for some in by_metric.values() for s in some if s.family == name])
            for name in families
        ]
        tables.append(StandingTable(shown_l0(l0), heads, rows))
    return tables


def _standing_cell(s: Standing) -> StandingCell:
    seeds = f"{s.n_seeds} seeds" if s.n_seeds > 1 else ONE_SEED
    documents = f"{s.n_documents:,} {s.unit}s" if s.n_documents else "held-out text not covered"
    about = s.reason if math.isnan(s.value) else ", ".join(filter(None, [shown_rank(s), seeds, documents]))
    return StandingCell(shown_value(s), shown_value_interval(s), shown_p_best(s), s.is_best, about)


class FamilyTable(NamedTuple):
    """A row of cells per family, and the point up to which hypervolumes are measured."""

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    reference_l0: str
    reference_y: str
    """The CE increase, or the FVU, of that point."""


def table_of_families(records: Sequence[Record]) -> FamilyTable:
    """Return a row per family: its runs, and its hypervolume with the 95% interval over init seeds."""
    (reference_l0, reference_y), found = summaries(records)
    heads = ("family", "runs", "converged", "L0", "hypervolume", "95%")
    return FamilyTable(heads, [_family_row(f) for f in found], f"{reference_l0:.3g}", f"{reference_y:.3g}")


def _family_row(f: FamilySummary) -> tuple[str, ...]:
    low, high = f.l0_range
    volume = ""
    spread = ""
    if f.hypervolume is not None:
        volume = f"{f.hypervolume.mean:.3f}"
        if math.isfinite(f.hypervolume.half_width):
            spread = f"\u00b1{f.hypervolume.half_width:.3f}"
    return (f.family, str(f.n_runs), str(f.n_converged), f"{low:.3g} to {high:.3g}", volume, spread)


class ClaimRow(NamedTuple):
    """A statement, and what this study says about it."""

    statement: str
    verdict: str
    kind: Kind
    evidence: str


def rows_of_claims(claims: Sequence[Claim]) -> list[ClaimRow]:
    """Return the rows of the table that compares claims with the results of a study."""
    return [ClaimRow(c.statement, c.verdict, CLAIM_KINDS.get(c.verdict, "open"), c.evidence) for c in claims]
