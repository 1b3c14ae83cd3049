"""What the commands print of a study: its runs, how its families compare, and where the files are."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from prolu.activations.token_mask import NO_MASK, TokenMask
from prolu.evaluation.comparison.frontiers import Record, family, pareto_best, study_names
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS, main_metric
from prolu.evaluation.comparison.wording import ONE_SEED
from prolu.report.agreement import print_agreement
from prolu.report.console import print_place, print_sentence, print_table
from prolu.report.headline import CONVERGED, headline
from prolu.report.terminal_comparison import marked, marks, print_comparison
from prolu.report.writer import DrawnReport
from prolu.runtime.tables import Column
from prolu.sae.saved_sae import WEIGHTS_FILE
from prolu.studies.results import Results

NARROW = 80
"""The width of a terminal, in columns, below which the table of runs has only the figures that every comparison
needs."""

LEFT_OUT = ("MSE", "dead", "coeff")
"""The columns of the table of runs that a narrow terminal does not have."""


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
        print_comparison(console, drawn.comparison, drawn.records, all_verdicts=all_verdicts)
        print_agreement(console, drawn.agreement, in_full=all_verdicts)
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
    to_hook = f" to {stream['hook_out']}" if stream.get("hook_out") else ""
    place = f"{model} {stream.get('hook', '')}{to_hook}".strip() or str(stream.get("data", ""))
    budgets = sorted({r["n_tokens"] for r in drawn.records if r.get("n_tokens")})
    tokens = " to ".join(dict.fromkeys(_millions(n) for n in (budgets[0], budgets[-1]))) if budgets else ""
    unit = "rows" if "rows" in stream else "tokens"
    mask = TokenMask.recorded(stream)
    without = f"without {mask}" if mask != NO_MASK else ""
    return [fact for fact in (place, f"{tokens} {unit}" if tokens else "", without) if fact]


def _millions(n: int) -> str:
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n:,}"


def _print_runs(console: Console, records: Sequence[Record]) -> None:
    """Print a table with a line per run, by family and L0, and what its marks mean."""
    moving, best = marks(console)
    order = list(dict.fromkeys(family(r) for r in records))
    # Families in the order of their first run, which is the order in which they were asked for.
    rows = sorted(records, key=lambda r: (order.index(family(r)), r["l0"]))
    names = [family(r) for r in rows]
    firsts = [name if i == 0 or names[i - 1] != name else "" for i, name in enumerate(names)]
    metric = METRICS[main_metric(records)]
    frontier = {r["run_id"] for r in pareto_best([r for r in records if r["converged"]], y=metric.name)}
    columns = [
        Column("family", firsts, is_text=True),
        Column("L0", marked([f"{r['l0']:.1f}" for r in rows], [r["converged"] is False for r in rows], moving)),
        Column(
            metric.words,
            marked([f"{r[metric.name]:.3f}" for r in rows], [r["run_id"] in frontier for r in rows], best),
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
    if metric.name != CE_INCREASE:
        columns = [column for column in columns if column.title != "recovered"]
    if len(study_names(records)) > 1:
        columns.insert(1, Column("study", [r["study"] for r in rows], is_text=True))
    if console.width < NARROW:
        columns = [column for column in columns if column.title not in LEFT_OUT]
    print_table(console, columns)
    meanings = {best: (bool(frontier), "no converged run is better in both")}
    meanings[moving] = (any(r["converged"] is False for r in records), "not converged when training ended")
    if any(r["converged"] is None for r in records):
        meanings["no mark:"] = (True, "converged, or not known")
    said = [f"{mark} {meaning}" for mark, (is_used, meaning) in meanings.items() if is_used]
    if said:
        print_sentence(console, "; ".join(said))


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
