"""What the commands print of how families compare: changes, verdicts, families in numbers, and claims."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby

from rich.console import Console

from prolu.evaluation.comparison.claims import Claim, FamilyComparison
from prolu.evaluation.comparison.frontiers import Record, family, grouped
from prolu.evaluation.comparison.metric_catalog import METRICS, main_metric
from prolu.evaluation.comparison.points import summaries
from prolu.evaluation.comparison.standing_wording import (
    EXPLAINED,
    shown_p_best,
    shown_value,
    shown_value_interval,
    tables_by_l0,
)
from prolu.evaluation.comparison.standings import Standing
from prolu.evaluation.comparison.wording import (
    Verdict,
    covered,
    percent,
    rows_for_tables,
    shown_change,
    shown_ground,
    shown_interval,
    shown_l0,
    shown_verdict,
)
from prolu.report.console import INDENT, fits, print_sentence, print_table
from prolu.runtime.tables import Column

COLOURS = {"holds": "green", "does not hold": "red"}
"""The verdicts on claims that have a colour."""

OVER_SEEDS = {"holds", "does not hold", "undecided"}
"""The verdicts on claims that rest on intervals over seeds."""


def marks(console: Console) -> tuple[str, str]:
    """Return the marks of runs that have not converged, and of the frontier."""
    # Not every encoding of a terminal or an output file has a circle.
    return ("\u25cb" if console.encoding.lower().startswith("utf") else "o"), "*"


def marked(cells: Sequence[str], is_marked: Sequence[bool], mark: str) -> list[str]:
    """Return cells with a mark behind some; the numbers stay aligned."""
    if not any(is_marked):
        return list(cells)
    return [f"{cell} {mark if one else ' '}" for cell, one in zip(cells, is_marked, strict=True)]


def print_comparison(
    console: Console, found: FamilyComparison, records: Sequence[Record], *, all_verdicts: bool
) -> None:
    """Print how families compare with their baselines, and what that says about claims."""
    has_intervals = any(v.is_tested for v in found.verdicts)
    if found.verdicts:
        console.print()
        if has_intervals or all_verdicts:
            _print_verdicts(console, found.verdicts)
        else:
            _print_changes(console, found.verdicts)
    for verdicts in grouped(found.others, lambda v: v.metric).values():
        console.print()
        _print_verdicts(console, verdicts)
    if all_verdicts or found.others:
        _print_standings(console, found.standings)
    if all_verdicts:
        console.print()
        _print_families(console, records)
    claims = [*found.against_relu, *found.paper] if has_intervals or all_verdicts else found.paper
    # The claims are about ProLU; a study without it has nothing to say about them.
    if any(family(r).startswith("prolu") for r in records):
        _print_claims(console, claims, with_evidence=all_verdicts)


def _print_changes(console: Console, verdicts: Sequence[Verdict]) -> None:
    """Print a line per family, with its change of CE increase against each baseline over all L0s compared."""
    moving, _ = marks(console)
    with_number = [v for v in verdicts if math.isfinite(v.change)]
    print_sentence(console, f"{METRICS[verdicts[0].metric].words} against ReLU at equal L0", indent="", style="bold")
    baselines = list(dict.fromkeys(v.baseline for v in with_number))
    together = _changes(with_number, baselines, moving)
    if together and fits(console, together):
        print_table(console, together)
    else:
        for baseline in baselines:
            print_table(console, _changes(with_number, [baseline], moving))
    if any(v.n_unconverged for v in with_number):
        print_sentence(console, f"{moving} with runs that had not converged when training ended")
    without = {}
    for v in rows_for_tables(verdicts):
        if math.isnan(v.change):
            without.setdefault(v.reason, []).append(f"{v.challenger} with {v.baseline}")
    for reason, pairs in without.items():
        print_sentence(console, f"not compared: {', '.join(dict.fromkeys(pairs))}: {reason}")


def _changes(verdicts: Sequence[Verdict], baselines: Sequence[str], moving: str) -> list[Column]:
    """Return the table of changes against some baselines; empty if there is nothing to show."""
    rows: dict[str, list[Verdict]] = {}
    for v in verdicts:
        if v.baseline in baselines:
            rows.setdefault(v.challenger, []).append(v)
    if not rows:
        return []
    columns = [Column("family", list(rows), is_text=True)]
    for baseline in baselines:
        pairs = [[v for v in some if v.baseline == baseline] for some in rows.values()]
        cells = [_range([v.change for v in pair], percent) for pair in pairs]
        columns.append(
            Column(f"against {baseline}", marked(cells, [any(v.n_unconverged for v in p) for p in pairs], moving))
        )
    columns.append(Column("at L0", [_range([v.l0 for v in some], shown_l0) for some in rows.values()]))
    return columns


def _range(values: Sequence[float], written: Callable[[float], str]) -> str:
    """Return the least and the greatest of some values, as they are written; a dash if there are none."""
    ends = dict.fromkeys(written(end) for end in (min(values), max(values))) if values else ["-"]
    return " to ".join(ends)


def _print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """Print all comparisons by pair of families, a line for each L0, and below them what they rest on."""
    metric = METRICS[verdicts[0].metric]
    title = f"{metric.words} at equal L0" + (", higher is better" if metric.better == "higher" else "")
    print_sentence(console, title, indent="", style="bold")
    print_sentence(console, f"{covered(verdicts)}.")
    rows = rows_for_tables(verdicts)
    for (challenger, baseline), group in groupby(rows, key=lambda v: (v.challenger, v.baseline)):
        pair = list(group)
        print_sentence(console, f"{challenger} against {baseline}")
        for ground, some in groupby(pair, key=shown_ground):
            measured = [v for v in some if math.isfinite(v.change)]
            for v in measured:
                parts = (f"L0 {shown_l0(v.l0):>5}", f"{shown_change(v):>7}", f"{shown_interval(v):18}")
                print_sentence(console, "  ".join([*parts, shown_verdict(v)]), indent=3 * INDENT)
            print_sentence(console, ground, indent=(5 if measured else 3) * INDENT)


def _print_standings(console: Console, standings: Sequence[Standing]) -> None:
    """Print families by metrics, in as many tables for each L0 as the terminal's width needs."""
    _, best = marks(console)
    for l0, by_metric in tables_by_l0(standings).items():
        names = list(dict.fromkeys(s.family for some in by_metric.values() for s in some if math.isfinite(s.value)))
        if not names:
            continue
        console.print()
        print_sentence(console, f"Families at L0 {shown_l0(l0)}", indent="", style="bold")
        families = Column("family", names, is_text=True)
        table = [families]
        for name, some in by_metric.items():
            rows = {s.family: s for s in some}
            columns = _of_metric(METRICS[name].words, [rows[family] for family in names], best)
            if len(table) > 1 and not fits(console, table + columns):
                print_table(console, table)
                table = [families]
            table += columns
        print_table(console, table)
        for reason in dict.fromkeys(s.reason for some in by_metric.values() for s in some if math.isnan(s.value)):
            print_sentence(console, f"not compared: {reason}")
    if standings:
        print_sentence(console, f"{best} has the best value. {EXPLAINED}")


def _of_metric(words: str, rows: Sequence[Standing], best: str) -> list[Column]:
    """Return the columns of one metric: values with the best marked, intervals, and probabilities if there are any."""
    columns = [Column(words, marked([shown_value(s) for s in rows], [s.is_best for s in rows], best))]
    others = {"95%": [shown_value_interval(s) for s in rows], "best": [shown_p_best(s) for s in rows]}
    return columns + [Column(title, cells) for title, cells in others.items() if any(cells)]


def _print_families(console: Console, records: Sequence[Record]) -> None:
    """Print a line per family: its runs and its hypervolume, with the 95% interval over init seeds."""
    (reference_l0, reference_y), found = summaries(records)
    metric = METRICS[main_metric(records)]
    volumes = []
    for f in found:
        half = f.hypervolume.half_width if f.hypervolume is not None else math.nan
        volume = "-" if f.hypervolume is None else f"{f.hypervolume.mean:.3f}"
        volumes.append(volume + (f" +- {half:.3f}" if math.isfinite(half) else ""))
    columns = [
        Column("family", [f.family for f in found], is_text=True),
        Column("runs", [str(f.n_runs) for f in found]),
        Column("converged", [str(f.n_converged) for f in found]),
        Column("L0", [f"{f.l0_range[0]:.1f} to {f.l0_range[1]:.1f}" for f in found], is_optional=True),
        Column("hypervolume", volumes),
    ]
    print_sentence(console, "Families", indent="", style="bold")
    print_table(console, columns)
    print_sentence(
        console,
        f"hypervolume of all runs in log L0 and {metric.unit or metric.words}, up to {reference_l0:.3g} and "
        f"{reference_y:.3g}",
    )


def _print_claims(console: Console, claims: Sequence[Claim], *, with_evidence: bool) -> None:
    """Print claims with their verdicts; in one line if none was tested over seeds and no evidence is asked for."""
    if not claims:
        return
    counts = Counter(claim.verdict for claim in claims)
    if not with_evidence and (len(counts) == 1 or not counts.keys() & OVER_SEEDS):
        said = next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        print_sentence(console, f"paper's claims: {said} (see the report)")
        return
    console.print()
    print_sentence(console, "ProLU against ReLU, and the paper's claims", indent="", style="bold")
    for claim in claims:
        evidence = f"; {claim.evidence}" if with_evidence else ""
        print_sentence(console, f"{claim.verdict}: {claim.statement}{evidence}", style=COLOURS.get(claim.verdict, ""))
