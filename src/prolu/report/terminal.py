"""What the commands print of a study: its runs, how its families compare, and where the files are."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console

from prolu.evaluation.comparison.claims import Claim, FamilyComparison
from prolu.evaluation.comparison.frontiers import Record, family, pareto_best, study_names
from prolu.evaluation.comparison.points import summaries
from prolu.evaluation.comparison.wording import (
    ONE_SEED,
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
from prolu.report.console import INDENT, Column, fits, print_place, print_sentence, print_table
from prolu.report.headline import CONVERGED, headline
from prolu.report.writer import DrawnReport
from prolu.sae.saved_sae import WEIGHTS_FILE
from prolu.studies.results import Results

NARROW = 80
"""The columns of a terminal below which the table of runs has the figures only that every comparison needs."""

LEFT_OUT = ("MSE", "dead", "coeff")
"""The columns of the table of runs that a narrow terminal does not have."""

COLOURS = {"holds": "green", "does not hold": "red"}
"""The verdicts on claims that have a colour."""


def print_summary(drawn: DrawnReport, *, all_verdicts: bool = False, console: Console | None = None) -> None:
    """Print a summary of one study, or of several together, that fits the terminal.

    Args:
        drawn: the report, from whose numbers the summary is made.
        all_verdicts: whether every comparison is printed with its interval and grounds. Without it, they are where
            there are intervals over seeds, and else a line per family.
        console: where to print; by default the terminal.
    """
    console = console or Console()
    if len(drawn.runs) == 1:
        _print_one_sae(console, drawn)
    else:
        _print_heading(console, drawn)
        console.print()
        _print_runs(console, drawn.records)
        _print_comparison(console, drawn.comparison, drawn.records, all_verdicts=all_verdicts)
    console.print()
    _print_places(console, drawn)


def _print_one_sae(console: Console, drawn: DrawnReport) -> None:
    run = drawn.runs[0]
    facts = [f"one SAE, {family(run.record)}", *_trained_on(drawn), CONVERGED[run.record["converged"]]]
    print_sentence(console, f"{_title(drawn)}: {', '.join(facts)}", indent="", style="bold")
    console.print()
    figures = headline(run)
    names, values, meanings = zip(*figures, strict=True)
    columns = [Column("", names, is_text=True), Column("", values), Column("", meanings, is_text=True)]
    print_table(console, columns, has_head=False)


def _print_heading(console: Console, drawn: DrawnReport) -> None:
    n_converged = sum(r["converged"] is True for r in drawn.records)
    facts = [f"{len(drawn.records)} SAEs", *_trained_on(drawn), f"{n_converged} converged"]
    print_sentence(console, f"{_title(drawn)}: {', '.join(facts)}", indent="", style="bold")
    verdicts = drawn.comparison.verdicts
    if any(v.reason == ONE_SEED for v in verdicts) and not any(v.is_tested for v in verdicts):
        print_sentence(
            console,
            "One seed: differences are not findings. For intervals: sweep --init-seeds 0 1 2",
            indent="",
        )


def _title(drawn: DrawnReport) -> str:
    return " + ".join(map(str, drawn.folders))


def _trained_on(drawn: DrawnReport) -> list[str]:
    """Return the language model with its hook, and the numbers of training tokens, as far as they are known."""
    stream = drawn.studies[0].config["stream"]
    model = Path(str(stream.get("lm", ""))).name
    place = f"{model} {stream.get('hook', '')}".strip()
    budgets = sorted({r["n_tokens"] for r in drawn.records if r.get("n_tokens")})
    tokens = " to ".join(dict.fromkeys(_millions(n) for n in (budgets[0], budgets[-1]))) if budgets else ""
    return [fact for fact in (place, f"{tokens} tokens" if tokens else "") if fact]


def _millions(n: int) -> str:
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n:,}"


def _print_runs(console: Console, records: Sequence[Record]) -> None:
    """Print a table with a line per run, by family and L0, and what its marks mean."""
    moving, best = _marks(console)
    order = list(dict.fromkeys(family(r) for r in records))
    # Families in the order of their first run, which is the order in which they were asked for.
    rows = sorted(records, key=lambda r: (order.index(family(r)), r["l0"]))
    names = [family(r) for r in rows]
    firsts = [name if i == 0 or names[i - 1] != name else "" for i, name in enumerate(names)]
    frontier = {r["run_id"] for r in pareto_best([r for r in records if r["converged"]])}
    columns = [
        Column("family", firsts, is_text=True),
        Column("L0", _marked([f"{r['l0']:.1f}" for r in rows], [r["converged"] is False for r in rows], moving)),
        Column(
            "CE increase",
            _marked([f"{r['degradation']:.3f}" for r in rows], [r["run_id"] in frontier for r in rows], best),
        ),
        Column(
            "recovered",
            ["-" if r["recovered"] is None else f"{r['recovered']:.1%}" for r in rows],
            is_optional=True,
        ),
        Column("MSE", [f"{r['mse']:.4f}" for r in rows], is_optional=True),
        Column("dead", [f"{r['dead_fraction']:.1%}" for r in rows], is_optional=True),
        Column("coeff", ["-" if r["coeff"] is None else f"{r['coeff']:.3g}" for r in rows], is_optional=True),
    ]
    if len(study_names(records)) > 1:
        columns.insert(1, Column("study", [r["study"] for r in rows], is_text=True))
    if console.width < NARROW:
        columns = [column for column in columns if column.title not in LEFT_OUT]
    print_table(console, columns)
    meanings = {best: (bool(frontier), "no converged run is better in both")}
    meanings[moving] = (any(r["converged"] is False for r in records), "still moving when training ended")
    if any(r["converged"] is None for r in records):
        meanings["no mark:"] = (True, "converged, or not known")
    said = [f"{mark} {meaning}" for mark, (is_used, meaning) in meanings.items() if is_used]
    if said:
        print_sentence(console, "; ".join(said))


def _marks(console: Console) -> tuple[str, str]:
    """Return the marks of runs that were still moving, and of the frontier."""
    # Not every terminal, and not every file that output is sent to, has a circle.
    return ("\u25cb" if console.encoding.lower().startswith("utf") else "o"), "*"


def _marked(cells: Sequence[str], is_marked: Sequence[bool], mark: str) -> list[str]:
    """Return cells with a mark behind some; the numbers stay aligned."""
    if not any(is_marked):
        return list(cells)
    return [f"{cell} {mark if one else ' '}" for cell, one in zip(cells, is_marked, strict=True)]


def _print_comparison(
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
    if all_verdicts:
        console.print()
        _print_families(console, records)
    claims = [*found.against_relu, *found.paper] if has_intervals or all_verdicts else found.paper
    # The claims are about ProLU; a study without it has nothing to say about them.
    if any(family(r).startswith("prolu") for r in records):
        _print_claims(console, claims, with_evidence=all_verdicts)


def _print_changes(console: Console, verdicts: Sequence[Verdict]) -> None:
    """Print a line per family, with its change of CE increase against each baseline over all L0s compared."""
    moving, _ = _marks(console)
    with_number = [v for v in verdicts if math.isfinite(v.change)]
    print_sentence(console, "CE increase against ReLU at equal L0", indent="", style="bold")
    baselines = list(dict.fromkeys(v.baseline for v in with_number))
    together = _changes(with_number, baselines, moving)
    if together and fits(console, together):
        print_table(console, together)
    else:
        for baseline in baselines:
            print_table(console, _changes(with_number, [baseline], moving))
    if any(v.n_unconverged for v in with_number):
        print_sentence(console, f"{moving} with runs that were still moving when training ended")
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
            Column(f"against {baseline}", _marked(cells, [any(v.n_unconverged for v in p) for p in pairs], moving))
        )
    columns.append(Column("at L0", [_range([v.l0 for v in some], shown_l0) for some in rows.values()]))
    return columns


def _range(values: Sequence[float], written: Callable[[float], str]) -> str:
    """Return the least and the greatest of some values, as they are written; a dash if there are none."""
    ends = dict.fromkeys(written(end) for end in (min(values), max(values))) if values else ["-"]
    return " to ".join(ends)


def _print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """Print all comparisons by pair of families, a line for each L0, and below them what they rest on."""
    print_sentence(console, "CE increase at equal L0", indent="", style="bold")
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


def _print_families(console: Console, records: Sequence[Record]) -> None:
    """Print a line per family: its runs and its hypervolume, with the 95% interval over init seeds."""
    (reference_l0, reference_ce_increase), found = summaries(records)
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
        f"hypervolume of all runs in log L0 and nats, up to {reference_l0:.3g} and {reference_ce_increase:.3g}",
    )


def _print_claims(console: Console, claims: Sequence[Claim], *, with_evidence: bool) -> None:
    """Print claims with their verdicts; in one line if none of them was tested and no evidence is asked for."""
    verdicts = {claim.verdict for claim in claims}
    if not claims:
        return
    if len(verdicts) == 1 and not with_evidence:
        print_sentence(console, f"paper's claims: {verdicts.pop()} (see the report)")
        return
    console.print()
    print_sentence(console, "ProLU against ReLU, and the paper's claims", indent="", style="bold")
    for claim in claims:
        evidence = f"; {claim.evidence}" if with_evidence else ""
        print_sentence(console, f"{claim.verdict}: {claim.statement}{evidence}", style=COLOURS.get(claim.verdict, ""))


def _print_places(console: Console, drawn: DrawnReport) -> None:
    """Print where the report and the pages of latents are, and how an SAE is loaded."""
    print_place(console, "report", str(drawn.page))
    if drawn.latent_pages:
        first, *others = drawn.latent_pages
        print_place(console, "latents", f"{first}{f' (+{len(others)})' if others else ''}")
    if len(drawn.runs) == 1:
        run = drawn.runs[0]
        print_place(console, "weights", str(run.folder / WEIGHTS_FILE))
        print_place(console, "python", f"prolu.SAE.load({_quoted(run.folder)})")
    else:
        print_place(console, "python", _how_to_load(drawn.studies[0]))


def _how_to_load(results: Results) -> str:
    """Return the Python that loads the best SAE of a study in the middle of the range of L0."""
    of_study = f"prolu.Results.load({_quoted(results.folder)})"
    alive = [r for r in results.records if r["l0"] > 0]
    converged = [r for r in alive if r["converged"] is not False]
    if not alive:
        return f"{of_study}.runs[0].load()"
    l0s = sorted(r["l0"] for r in converged or alive)
    which = "" if converged else ", unconverged=True"
    return f"{of_study}.best(l0={l0s[len(l0s) // 2]:.2g}{which}).load()"


def _quoted(folder: Path) -> str:
    return json.dumps(str(folder), ensure_ascii=False)
