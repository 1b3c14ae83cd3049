"""The page's own tables: verdicts with their intervals drawn, the paper's claims, all runs."""

import html
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from prolu.evaluation.comparison.claims import Claim
from prolu.evaluation.comparison.frontiers import Record, family
from prolu.evaluation.comparison.points import summaries
from prolu.evaluation.comparison.verdicts import LESS, MORE, Verdict, told

COLUMNS = {
    "family": "family",
    "setting": "setting",
    "init_seed": "seed",
    "l0": "L0",
    "degradation": "nats lost",
    "recovered": "recovered",
    "mse": "MSE",
    "fvu": "FVU",
    "l1": "L1",
    "sqrt_l1": "sqrt-L1",
    "dead_fraction": "dead",
    "converged": "converged",
}
"""Of the table of runs, with their titles; behind the run's name."""

HALF_WIDTH = 90
"""Of the drawing of an interval, from 0 to its end."""

KINDS = {LESS: "less", MORE: "more"}


def verdicts_table(verdicts: Sequence[Verdict]) -> str:
    """A row a comparison at one L0, those of a pair together."""
    if not verdicts:
        return '<p class="quiet">There is nothing to compare: no family beside relu + l1.</p>'
    reach, rows = _reach(verdicts), []
    for pair, group in groupby(told(verdicts), key=lambda v: (v.challenger, v.baseline)):
        same = list(group)
        challenger, baseline = map(html.escape, pair)
        name = f'<th scope="rowgroup" rowspan="{len(same)}">{challenger}<span> against {baseline}</span></th>'
        rows += [f"<tr>{name if v is same[0] else ''}{_verdict_cells(v, reach)}</tr>" for v in same]
    end = f"{reach:.0%}"
    head = (
        '<th scope="col">challenger</th><th scope="col" class="n">at L0</th><th scope="col" class="n">loses</th>'
        '<th scope="col" class="n">95% interval</th><th scope="col" class="drawing">'
        f'<span class="scale"><span>-{end}</span><span>0</span><span>+{end}</span></span></th>'
        '<th scope="col">verdict</th><th scope="col">from</th>'
    )
    return f'<table class="verdicts"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _reach(verdicts: Sequence[Verdict]) -> float:
    """Where the drawings end: what holds all intervals, in tens of percent, but at most 100%."""
    ends = [abs(e) for v in verdicts for e in (v.low, v.high, v.change) if math.isfinite(e)]
    return min(1.0, math.ceil(10 * max(ends, default=0.5)) / 10) or 0.1


def _verdict_cells(v: Verdict, reach: float) -> str:
    known, kind = math.isfinite(v.change), KINDS.get(v.verdict, "open")
    interval = f"{v.low:+.0%} to {v.high:+.0%}" if math.isfinite(v.low) else ""
    change = f"{v.change:+.0%}" if known else ""
    l0 = f"{v.l0:.3g}" if math.isfinite(v.l0) else ""
    seen = f"{v.n_seeds} seeds" + (f", {v.n_documents:,} {v.unit}s" if v.n_documents else "")
    why = html.escape(v.reason or seen)
    return (
        f'<td class="n">{l0}</td><td class="n {kind}">{change}</td><td class="n">{interval}</td>'
        f'<td class="drawing">{_drawing(v, reach) if known else ""}</td>'
        f'<td class="verdict {kind}">{v.verdict}</td>'
        f'<td class="quiet" title="{html.escape(str(v))}">{why}</td>'
    )


def _drawing(v: Verdict, reach: float) -> str:
    """An interval as a bar around 0; an arrow where it goes beyond the drawing."""

    def at(value: float) -> float:
        return HALF_WIDTH * (1 + max(-1.0, min(1.0, value / reach)))

    parts = [f'<line class="zero" x1="{HALF_WIDTH}" x2="{HALF_WIDTH}" y1="0" y2="18"/>']
    if math.isfinite(v.low):
        parts.append(f'<line class="bar" x1="{at(v.low):.1f}" x2="{at(v.high):.1f}" y1="9" y2="9"/>')
        if v.high > reach:
            parts.append(f'<path d="M{2 * HALF_WIDTH - 5} 5l5 4l-5 4z"/>')
        if v.low < -reach:
            parts.append('<path d="M5 5l-5 4l5 4z"/>')
    parts.append(f'<circle cx="{at(v.change):.1f}" cy="9" r="3.5"/>')
    kind = KINDS.get(v.verdict, "open")
    return f'<svg class="{kind}" viewBox="-4 0 {2 * HALF_WIDTH + 8} 18" aria-hidden="true">{"".join(parts)}</svg>'


def families_table(records: Sequence[Record]) -> str:
    """A row a family: its runs, and the area that they beat."""
    reference, found = summaries(records)
    rows = []
    for f in found:
        volume, spread = "", ""
        if f.hypervolume is not None:
            volume = f"{f.hypervolume.mean:.3f}"
            spread = f"\u00b1{f.hypervolume.half_width:.3f}" if math.isfinite(f.hypervolume.half_width) else ""
        cells = (f.n_runs, f.n_converged, f"{f.l0_range[0]:.3g} to {f.l0_range[1]:.3g}", volume, spread)
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows.append(f'<tr><th scope="row">{html.escape(f.family)}</th>{numbers}</tr>')
    heads = ("runs", "converged", "L0", "hypervolume", "95%")
    head = '<th scope="col">family</th>' + "".join(f'<th scope="col" class="n">{name}</th>' for name in heads)
    note = (
        "Hypervolume: the area in the plane of log L0 and nats lost that a family's converged runs beat and "
        f"L0 {reference[0]:.3g}, {reference[1]:.3g} nats does not; mean over init seeds. Larger is better."
    )
    table = f'<table class="families"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll">{table}</div><p class="note">{note}</p>'


def claims_table(claims: Sequence[Claim]) -> str:
    """A statement, what becomes of it, and why."""
    kinds = {"holds": "less", "does not hold": "more", "cannot be said": "open"}
    rows = "".join(
        f'<tr><th scope="row">{html.escape(c.statement)}</th><td class="verdict {kinds[c.verdict]}">{c.verdict}</td>'
        f"<td>{html.escape(c.evidence)}</td></tr>"
        for c in claims
    )
    return f'<table class="claims"><tbody>{rows}</tbody></table>'


def runs_table(records: Sequence[Record], pages: Mapping[str, str]) -> str:
    """All runs; the page's script sorts and filters its rows by `data-run`, their places in `records`."""
    heads = ["run", *COLUMNS.values()]
    head = "".join(
        f'<th scope="col"{"" if i < 3 else " class=n"}><button type="button">{name}</button></th>'
        for i, name in enumerate(heads)
    )
    ordered = sorted(range(len(records)), key=lambda i: (family(records[i]), records[i]["l0"]))
    rows = "".join(_run_row(i, records[i], pages.get(records[i]["run_id"])) for i in ordered)
    return f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _run_row(place: int, r: Record, page: str | None) -> str:
    asked = r.get("target_l0")
    shown = dict(r) | {"family": family(r), "setting": r["coeff"] if asked is None else asked}
    shown["converged"] = "not known" if r["converged"] is None else r["converged"]
    name = html.escape(r["run_id"])
    cells = [f'<a href="{html.escape(page)}">{name}</a>' if page else name]
    cells += [_cell(shown.get(column)) for column in COLUMNS]
    kinds = ["", "", *["n"] * (len(cells) - 2)]
    row = "".join(f"<td{f' class={k}' if k else ''}>{c}</td>" for k, c in zip(kinds, cells, strict=True))
    return f'<tr data-run="{place}"{"" if r["converged"] else " class=hollow"}>{row}</tr>'


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
