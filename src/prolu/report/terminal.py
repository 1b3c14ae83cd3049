"""The table and the verdicts, in the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from prolu.claims import Claim, paper_claims, verdicts
from prolu.frontiers import family, pareto_mask
from prolu.results import Results

MIN_WIDTH = 116
"""Columns that the table needs; a narrower terminal wraps it rather than cutting figures."""

MARKS = {
    "holds": "[green]holds[/green]",
    "does not hold": "[red]does not hold[/red]",
    "cannot be said": "cannot be said",
}


def print_summary(results: Results, console: Console | None = None) -> None:
    """All runs by family and L0, then one sentence a claim."""
    console = console or Console(width=max(MIN_WIDTH, Console().width))
    table = Table(
        title=f"{results.folder}: {len(results.records)} SAEs",
        caption="* Pareto-best in L0 and degradation (nats per token) among converged runs",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("family", no_wrap=True)
    for name in ("coeff", "L0", "degradation", "recovered", "MSE", "L1", "dead", "converged"):
        table.add_column(name, justify="right", no_wrap=True)
    converged = [r for r in results.records if r["converged"]]
    mask = pareto_mask([r["l0"] for r in converged], [r["degradation"] for r in converged])
    best = {r["run_id"] for r, on in zip(converged, mask, strict=True) if on}
    last = ""
    for r in sorted(results.records, key=lambda r: (results.families().index(family(r)), r["l0"])):
        name = family(r)
        if last and name != last:
            table.add_section()
        star = " *" if r["run_id"] in best else ""
        table.add_row(
            "" if name == last else name, f"{r['coeff']:.3g}", f"{r['l0']:.1f}", f"{r['degradation']:.3f}{star}",
            f"{r['recovered']:.1%}", f"{r['mse']:.4f}", f"{r['l1']:.1f}",
            f"{r['dead_fraction']:.1%}", "yes" if r["converged"] else "no",
        )  # fmt: skip
        last = name
    console.print(table)
    console.print("ProLU against ReLU", style="bold")
    _print_claims(console, verdicts(results.records))
    console.print("The paper's claims", style="bold")
    _print_claims(console, paper_claims(results.records))


def _print_claims(console: Console, claims: list[Claim]) -> None:
    for claim in claims:
        console.print(f"  {claim.statement}: {MARKS[claim.verdict]}; {claim.evidence}", highlight=False, soft_wrap=True)
