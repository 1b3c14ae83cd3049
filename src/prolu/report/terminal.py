"""What the commands print: the summary of a study, and the estimate of what a study will cost."""

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prolu.evaluation.comparison.claims import Claim, FamilyComparison
from prolu.evaluation.comparison.frontiers import Record, family, pareto_best, study_names
from prolu.evaluation.comparison.points import summaries
from prolu.evaluation.comparison.wording import (
    Verdict,
    covered,
    rows_for_tables,
    shown_change,
    shown_ground,
    shown_interval,
    shown_l0,
    shown_verdict,
)
from prolu.runtime.names import shown
from prolu.studies.cost import DENSE_FRACTION, Estimate
from prolu.studies.rates import TYPICAL_L0
from prolu.training.config import RunConfig

MIN_WIDTH = 116
"""The columns that the tables need; a narrower terminal wraps their lines instead of losing digits."""

MARKS = {"holds": "[green]holds[/green]", "does not hold": "[red]does not hold[/red]"}
"""The verdicts on claims that have a colour."""

CONVERGED = {True: "yes", False: "no", None: "?"}
"""Whether a run has converged; None if that is not known, as of an SAE that another library trained."""


def print_summary(
    records: Sequence[Record], title: str, found: FamilyComparison, console: Console | None = None
) -> None:
    """Print the runs of one study, or of several pooled, then families, verdicts and claims.

    Args:
        records: the results of the runs.
        title: what the table of runs is headed with: the study's name.
        found: how the families compare, as `compare_families` gives it.
        console: where to print; by default the terminal.
    """
    pooled = study_names(records)
    longest_name = max(map(len, pooled)) if len(pooled) > 1 else 0
    # A table of pooled studies has a column more, as wide as the longest name.
    console = console or Console(width=max(MIN_WIDTH + longest_name, Console().width))
    console.print(runs_table(records, title))
    console.print(families_table(records))
    if found.verdicts:
        console.print(verdicts_table(found.verdicts))
    for heading, claims in (("ProLU against ReLU", found.against_relu), ("The paper's claims", found.paper)):
        if claims:
            console.print(heading, style="bold")
            _print_claims(console, claims)


def runs_table(records: Sequence[Record], title: str) -> Table:
    """Return a table with a line per run, by family and L0."""
    is_pooled = len(study_names(records)) > 1
    table = _table(
        f"{_plain(title)}: {len(records)} SAEs",
        "CE increase in nats per token; * no other converged run is better in both L0 and it",
        left=["family", "study"] if is_pooled else ["family"],
        right=["coeff", "L0", "CE increase", "recovered", "MSE", "L1", "dead", "converged"],
    )
    frontier = {r["run_id"] for r in pareto_best([r for r in records if r["converged"]])}
    order = list(dict.fromkeys(family(r) for r in records))
    last = ""
    # Families in the order of their first run, which is the order in which they were asked for.
    for r in sorted(records, key=lambda r: (order.index(family(r)), r["l0"])):
        name = family(r)
        if last and name != last:
            table.add_section()
        star = " *" if r["run_id"] in frontier else ""
        study = [_plain(r["study"])] if is_pooled else []
        table.add_row(
            "" if name == last else _plain(name),
            *study,
            "-" if r["coeff"] is None else f"{r['coeff']:.3g}",
            f"{r['l0']:.1f}",
            f"{r['degradation']:.3f}{star}",
            f"{r['recovered']:.1%}",
            f"{r['mse']:.4f}",
            f"{r['l1']:.1f}",
            f"{r['dead_fraction']:.1%}",
            CONVERGED[r["converged"]],
        )
        last = name
    return table


def families_table(records: Sequence[Record]) -> Table:
    """Return a table with a line per family: its runs and its hypervolume, with the 95% interval over init seeds."""
    (reference_l0, reference_ce_increase), found = summaries(records)
    table = _table(
        "Families",
        f"hypervolume of all runs in log L0 and nats, up to {reference_l0:.3g} and {reference_ce_increase:.3g}",
        left=["family"],
        right=["runs", "converged", "L0", "hypervolume"],
    )
    for f in found:
        volume = "-"
        if f.hypervolume is not None:
            half = f.hypervolume.half_width
            volume = f"{f.hypervolume.mean:.3f}" + (f" \u00b1 {half:.3f}" if math.isfinite(half) else "")
        low, high = f.l0_range
        table.add_row(_plain(f.family), str(f.n_runs), str(f.n_converged), f"{low:.1f} to {high:.1f}", volume)
    return table


def verdicts_table(found: Sequence[Verdict]) -> Table:
    """Return a table with a line per comparison of a family with a baseline at one L0."""
    table = _table(
        "CE increase at equal L0",
        covered(found),
        left=["family", "baseline"],
        right=["L0", "CE increase\nvs. baseline", "95% interval"],
    )
    table.add_column("verdict")
    table.add_column("seeds, documents, and what qualifies it")
    for v in rows_for_tables(found):
        table.add_row(
            _plain(v.challenger),
            _plain(v.baseline),
            shown_l0(v.l0),
            shown_change(v) or "-",
            shown_interval(v) or "-",
            shown_verdict(v),
            _plain(shown_ground(v)),
        )
    return table


def _table(title: str, caption: str | None, left: Sequence[str], right: Sequence[str]) -> Table:
    """Return an empty table with columns of text, aligned on the left, before columns of numbers."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _plain(text: str) -> str:
    """Return text as it is shown, in which nothing is taken for markup of rich or for a command of the terminal."""
    return escape(shown(text))


def _print_claims(console: Console, claims: list[Claim]) -> None:
    for claim in claims:
        # Soft wrap: the terminal breaks the line, so that a sentence is copied as one.
        verdict = MARKS.get(claim.verdict, claim.verdict)
        sentence = f"  {_plain(claim.statement)}: {verdict}; {_plain(claim.evidence)}"
        console.print(sentence, highlight=False, soft_wrap=True)


def print_estimate(runs: Sequence[RunConfig], cost: Estimate, console: Console | None = None) -> None:
    """Print what would be trained, a line per family and learning rate, and what it would cost."""
    console = console or Console(width=max(MIN_WIDTH + 20, Console().width))
    at_hooks = f" at each of {cost.n_hooks} hooks" if cost.n_hooks > 1 else ""
    table = _table(
        f"{len(runs)} runs{at_hooks}", None, left=["family"], right=["coefficients", "lr", "d_sae", "new norm"]
    )
    coefficients: dict[tuple[str, str, str, str], list[str]] = {}
    # Runs that differ only in coefficient (or seed) share a line.
    for run in runs:
        norm = f"{run.resample_encoder_norm:g}" if run.resample_fractions else "-"
        line = (run.family, f"{run.lr:g}", f"{run.d_sae:,}", norm)
        coefficients.setdefault(line, []).append(f"{run.coeff:.3g}")
    for (name, *others), coeffs in coefficients.items():
        table.add_row(name, "  ".join(coeffs), *others)
    console.print(table)
    console.print(
        "  new norm: the norm of a resampled latent's encoder column, as a fraction of the mean over living latents\n",
        highlight=False,
    )
    for name, text in _cost_lines(cost):
        console.print(f"  {name:16} {text}", highlight=False)


def _cost_lines(cost: Estimate) -> list[tuple[str, str]]:
    rates = cost.rates
    memory = cost.memory / 1e9
    state = cost.checkpoint / 1e9
    steps = f"dense step {rates.dense_step:.3g} s, sparse step {rates.sparse_step:.3g} s at L0 {TYPICAL_L0}"
    return [
        ("steps", f"{cost.steps_per_run:,} per run, on {cost.tokens:,} tokens ({cost.sae_tokens:,} SAE-tokens)"),
        ("FLOPs", f"{cost.flops_training:.2g} for the SAEs, {cost.flops_language_model:.2g} for the language model"),
        ("memory", f"{memory:.3g} GB, of which {state:.3g} GB are the weights and Adam moments of the runs"),
        ("disk", f"{cost.disk / 1e9:.3g} GB for the SAEs; a checkpoint of the whole study takes {state:.3g} GB"),
        ("time", f"{_duration(cost.seconds)} on this CPU for all runs, if {DENSE_FRACTION:.0%} of the steps are dense"),
        ("measured here", f"{steps}, {rates.flops / 1e9:.3g} GFLOP/s"),
    ]


def _duration(seconds: float) -> str:
    # A unit is used from twice its size on, because "1.2 hours" says less than "72.0 minutes".
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
