"""The tables of the page: which rows they have and what stands in their cells. `tables.html` makes HTML of them."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from prolu.evaluation.comparison.claims import Claim
from prolu.evaluation.comparison.frontiers import Record, family
from prolu.evaluation.comparison.points import FamilySummary, summaries
from prolu.evaluation.comparison.wording import (
    HIGHER,
    LOWER,
    Verdict,
    rows_for_tables,
    shown_change,
    shown_ground,
    shown_interval,
    shown_l0,
    shown_verdict,
)

COLUMNS = {
    "family": "family",
    "setting": "coeff / target L0",
    "init_seed": "seed",
    "l0": "L0",
    "degradation": "CE increase",
    "recovered": "recovered",
    "mse": "MSE",
    "fvu": "FVU",
    "l1": "L1",
    "sqrt_l1": "sqrt-L1",
    "dead_fraction": "dead",
    "converged": "converged",
}
"""The columns of the table of runs, after the run's name, with their titles."""

N_TEXT_COLUMNS = 2
"""The first columns of the table of runs, name and family, are text; the others are aligned as numbers."""

HALF_WIDTH = 90
"""The width of the drawing of an interval from 0 to either end, in units of its SVG."""

Kind = Literal["good", "bad", "open"]
"""How a verdict or a claim is coloured: the names are classes of the style sheet."""

VERDICT_KINDS: dict[str, Kind] = {LOWER: "good", HIGHER: "bad"}
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
    """What all rows rest on, said once; empty if it differs between them."""


class VerdictTable(NamedTuple):
    """All comparisons, and the percentage at which their drawings end."""

    groups: list[VerdictGroup]
    end: str


def table_of_verdicts(verdicts: Sequence[Verdict]) -> VerdictTable:
    """Return a row per comparison at one L0, grouped by family and baseline."""
    reach = _reach(verdicts)
    # `verdicts` has the comparisons of a pair one after the other, as groupby needs.
    groups: list[VerdictGroup] = []
    for (challenger, baseline), same in groupby(rows_for_tables(verdicts), key=lambda v: (v.challenger, v.baseline)):
        rows = [_verdict_row(v, reach) for v in same]
        grounds = {row.ground for row in rows}
        groups.append(VerdictGroup(challenger, baseline, rows, grounds.pop() if len(grounds) == 1 else ""))
    return VerdictTable(groups, f"{reach:.0%}")


def _reach(verdicts: Sequence[Verdict]) -> float:
    """Return the change at which the drawings end: the least multiple of 10% that holds all intervals, at most 100%.

    A challenger can be many times worse than a baseline but never better by more than 100%, so without this limit one
    bad family would squeeze all other intervals into the middle.
    """
    ends = [abs(e) for v in verdicts for e in (v.low, v.high, v.change) if math.isfinite(e)]
    tens = math.ceil(10 * max(ends, default=0.5))
    return min(1.0, tens / 10) or 0.1  # 0.1 if every change is exactly 0


def _verdict_row(v: Verdict, reach: float) -> VerdictRow:
    return VerdictRow(
        l0=shown_l0(v.l0) if math.isfinite(v.l0) else "",
        change=shown_change(v),
        interval=shown_interval(v),
        drawing=_drawing(v, reach) if math.isfinite(v.change) else None,
        verdict=shown_verdict(v),
        kind=VERDICT_KINDS.get(v.verdict, "open"),
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
    """Return the rows of the table that holds claims against the results of a study."""
    return [ClaimRow(c.statement, c.verdict, CLAIM_KINDS.get(c.verdict, "open"), c.evidence) for c in claims]


class RunRow(NamedTuple):
    """One run in the table of all runs."""

    place: int
    """The run's place in the results, by which the page's script sorts and filters rows."""
    run_id: str
    page: str | None
    """The address of the pages of its latents; None if it has none."""
    converged: bool
    cells: list[str]
    """The cells of `COLUMNS`."""


def rows_of_runs(records: Sequence[Record], pages: Mapping[str, str]) -> list[RunRow]:
    """Return a row per run, by family and L0."""
    order = sorted(range(len(records)), key=lambda i: (family(records[i]), records[i]["l0"]))
    return [_run_row(i, records[i], pages.get(records[i]["run_id"])) for i in order]


def _run_row(place: int, r: Record, page: str | None) -> RunRow:
    target = r.get("target_l0")
    # With a target L0 the coefficient was adjusted in training, so the target is what tells settings apart.
    shown = dict(r) | {
        "family": family(r),
        "setting": r["coeff"] if target is None else target,
        "converged": "not known" if r["converged"] is None else r["converged"],
    }
    cells = [_cell(shown.get(column)) for column in COLUMNS]
    return RunRow(place, r["run_id"], page, bool(r["converged"]), cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):  # before numbers: True is an int
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
