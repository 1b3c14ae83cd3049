"""The table and the verdicts, in the terminal; and what a study will cost."""

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prolu.evaluation.comparison.claims import Claim, paper_claims, verdicts
from prolu.evaluation.comparison.frontiers import Record, family, pareto_best, studies
from prolu.evaluation.comparison.points import summaries
from prolu.evaluation.comparison.verdicts import Verdict, told
from prolu.studies.cost import DENSE_SHARE, TYPICAL_L0, Estimate
from prolu.training.config import RunConfig

MIN_WIDTH = 116
"""Columns that the table needs; a narrower terminal wraps it rather than cutting figures."""

MARKS = {
    "holds": "[green]holds[/green]",
    "does not hold": "[red]does not hold[/red]",
    "cannot be said": "cannot be said",
}


IN_WORDS = {True: "yes", False: "no", None: "?"}
"""Whether a run has converged; None: not known, as of an import."""


def print_summary(
    records: Sequence[Record], title: str, found: Sequence[Verdict] = (), console: Console | None = None
) -> None:
    """All runs of one study, or of several pooled, by family and L0; then verdicts, then one sentence a claim."""
    pooled = len(studies(records)) > 1
    longest = max(map(len, studies(records))) if pooled else 0
    console = console or Console(width=max(MIN_WIDTH + longest, Console().width))
    table = Table(
        title=f"{title}: {len(records)} SAEs",
        caption="* Pareto-best in L0 and degradation (nats per token) among converged runs",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("family", no_wrap=True)
    if pooled:
        table.add_column("study", no_wrap=True)
    for name in ("coeff", "L0", "degradation", "recovered", "MSE", "L1", "dead", "converged"):
        table.add_column(name, justify="right", no_wrap=True)
    best = {r["run_id"] for r in pareto_best(r for r in records if r["converged"])}
    last, order = "", list(dict.fromkeys(family(r) for r in records))
    for r in sorted(records, key=lambda r: (order.index(family(r)), r["l0"])):
        name = family(r)
        if last and name != last:
            table.add_section()
        star = " *" if r["run_id"] in best else ""
        coeff = "-" if r["coeff"] is None else f"{r['coeff']:.3g}"
        cells = [coeff, f"{r['l0']:.1f}", f"{r['degradation']:.3f}{star}", f"{r['recovered']:.1%}"]
        cells += [f"{r['mse']:.4f}", f"{r['l1']:.1f}", f"{r['dead_fraction']:.1%}", IN_WORDS[r["converged"]]]
        table.add_row("" if name == last else name, *([r["study"]] if pooled else []), *cells)
        last = name
    console.print(table)
    console.print(families_table(records))
    if found:
        console.print(verdicts_table(found))
    console.print("ProLU against ReLU", style="bold")
    _print_claims(console, verdicts(records, found))
    console.print("The paper's claims", style="bold")
    _print_claims(console, paper_claims(records))


def families_table(records: Sequence[Record]) -> Table:
    """A line a family: its runs, and the area that they beat."""
    reference, found = summaries(records)
    table = Table(
        title="Families",
        caption=f"hypervolume: of converged runs, in log L0 and nats, up to {reference[0]:.3g} and {reference[1]:.3g}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("family", no_wrap=True)
    for name in ("runs", "converged", "L0", "hypervolume"):
        table.add_column(name, justify="right", no_wrap=True)
    for f in found:
        volume = "-"
        if f.hypervolume is not None:
            half = f.hypervolume.half_width
            volume = f"{f.hypervolume.mean:.3f}" + (f" \u00b1 {half:.3f}" if math.isfinite(half) else "")
        low, high = f.l0_range
        table.add_row(f.family, str(f.n_runs), str(f.n_converged), f"{low:.1f} to {high:.1f}", volume)
    return table


def verdicts_table(found: Sequence[Verdict]) -> Table:
    """A line a comparison at matched L0."""
    covers = "; ".join(dict.fromkeys(v.covers for v in found))
    table = Table(
        title="Degradation at matched L0",
        caption=f"95% intervals over {covers}, each alone: of twenty, one misses on average",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("family", "against"):
        table.add_column(name, no_wrap=True)
    for name in ("L0", "change", "95% interval", "seeds", f"{found[0].unit}s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for v in told(found):
        l0 = "-" if math.isnan(v.l0) else f"{v.l0:.3g}"
        change = "-" if math.isnan(v.change) else f"{v.change:+.1%}"
        interval = "-" if math.isnan(v.low) else f"[{v.low:+.1%}, {v.high:+.1%}]"
        verdict = f"{v.verdict}: {v.reason}" if v.reason else v.verdict
        counts = (str(v.n_seeds), str(v.n_documents) if v.n_documents else "-")
        table.add_row(v.challenger, v.baseline, l0, change, escape(interval), *counts, verdict)
    return table


def print_estimate(runs: Sequence[RunConfig], cost: Estimate, console: Console | None = None) -> None:
    """What would be trained, a line a family, and what it would cost."""
    console = console or Console(width=max(MIN_WIDTH + 20, Console().width))
    at_hooks = f" at each of {cost.n_hooks} hooks" if cost.n_hooks > 1 else ""
    table = Table(title=f"{len(runs)} runs{at_hooks}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("family", no_wrap=True)
    for name in ("coefficients", "lr", "d_sae", "new norm"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for run in runs:
        norm = f"{run.resample_encoder_norm:g}" if run.resample_fractions else "-"
        key = run.family, f"{run.lr:g}", f"{run.d_sae:,}", norm
        rows.setdefault(key, []).append(f"{run.coeff:.3g}")
    for (name, *rest), coeffs in rows.items():
        table.add_row(name, "  ".join(coeffs), *rest)
    console.print(table)
    console.print(
        "  new norm: of a resampled latent's encoder column, as a share of the living ones'\n", highlight=False
    )
    for name, text in _cost_lines(cost):
        console.print(f"  {name:16} {text}", highlight=False)


def _cost_lines(cost: Estimate) -> list[tuple[str, str]]:
    rates, memory, state = cost.rates, cost.memory / 1e9, cost.checkpoint / 1e9
    measured = f"dense step {rates.dense_step:.3g} s, sparse step {rates.sparse_step:.3g} s at L0 {TYPICAL_L0}, "
    return [
        ("steps", f"{cost.steps_per_run:,} a run, on {cost.tokens:,} tokens ({cost.sae_tokens:,} SAE-tokens)"),
        ("FLOPs", f"{cost.flops_training:.2g} SAEs, {cost.flops_language_model:.2g} language model"),
        ("memory", f"{memory:.3g} GB, of which {state:.3g} are the runs' weights and moments"),
        ("disk", f"{cost.disk / 1e9:.3g} GB of SAEs; a checkpoint of the whole study is {state:.3g} GB"),
        ("time", f"{_duration(cost.seconds)} on this CPU for all runs, if {DENSE_SHARE:.0%} of the steps are dense"),
        ("measured here", measured + f"{rates.flops / 1e9:.3g} GFLOP/s"),
    ]


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _print_claims(console: Console, claims: list[Claim]) -> None:
    for claim in claims:
        console.print(f"  {claim.statement}: {MARKS[claim.verdict]}; {claim.evidence}", highlight=False, soft_wrap=True)
