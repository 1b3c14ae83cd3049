"""What the commands print of a study that is not trained yet: its runs, and what they would cost."""

from collections.abc import Sequence

from rich.console import Console

from prolu.report.console import Column, lines_of, print_sentence, print_table
from prolu.studies.cost import DENSE_FRACTION, Estimate
from prolu.studies.rates import TYPICAL_L0
from prolu.training.config import RunConfig

WIDTH_OF_NAMES = 16
"""The columns before the costs, for their names."""


def print_estimate(runs: Sequence[RunConfig], cost: Estimate, console: Console | None = None) -> None:
    """Print what would be trained, a line per family and learning rate, and what it would cost."""
    console = console or Console()
    at_hooks = f" at each of {cost.n_hooks} hooks" if cost.n_hooks > 1 else ""
    print_sentence(console, f"{len(runs)} runs{at_hooks}", indent="", style="bold")
    coefficients: dict[tuple[str, str, str, str], list[str]] = {}
    # Runs that differ only in coefficient (or seed) share a line.
    for run in runs:
        norm = f"{run.resample_encoder_norm:g}" if run.resample_fractions else "-"
        line = (run.family, f"{run.lr:g}", f"{run.d_sae:,}", norm)
        coefficients.setdefault(line, []).append(f"{run.coeff:.3g}")
    families, *others = zip(*coefficients, strict=True)
    titles = ("lr", "d_sae", "new norm")
    columns = [
        Column("family", families, is_text=True),
        Column("coefficients", [" ".join(some) for some in coefficients.values()], is_text=True),
        *(Column(title, cells) for title, cells in zip(titles, others, strict=True)),
    ]
    print_table(console, columns)
    print_sentence(
        console,
        "new norm: the norm of a resampled latent's encoder column, as a fraction of the mean over living latents",
    )
    console.print()
    for name, text in _cost_lines(cost):
        first, *rest = lines_of(text, console.width - WIDTH_OF_NAMES)
        for head, line in [(name, first), *(("", line) for line in rest)]:
            print_sentence(console, f"{line}", indent=f" {head:{WIDTH_OF_NAMES - 1}}")


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
