"""What the commands print of a study that is not trained yet: its runs, and what they would cost."""

from collections.abc import Sequence

from rich.console import Console

from prolu.report.console import lines_of, print_sentence, print_table
from prolu.runtime.tables import Column
from prolu.studies.cost import DENSE_FRACTION, Estimate
from prolu.studies.rates import TYPICAL_L0
from prolu.training.config import RunConfig

WIDTH_OF_NAMES = 16
"""The columns before the costs, for their names."""


def print_estimate(runs: Sequence[RunConfig], cost: Estimate, console: Console | None = None) -> None:
    """Print what would be trained, a line per family and learning rate, and what it would cost.

    Of a single run all settings are printed.
    """
    console = console or Console()
    at_hooks = f" at each of {cost.n_hooks} hooks" if cost.n_hooks > 1 else ""
    print_sentence(console, f"{len(runs)} run{'s' * (len(runs) > 1)}{at_hooks}", indent="", style="bold")
    lines: dict[tuple[str, str, str, str], list[RunConfig]] = {}
    # Runs that differ only in coefficient, target L0 or seed share a line.
    for run in runs:
        norm = f"{run.resample_encoder_norm:g}" if run.resample_fractions else "-"
        lines.setdefault((run.family, f"{run.lr:g}", f"{run.d_sae:,}", norm), []).append(run)
    families, lrs, widths, norms = zip(*lines, strict=True)
    columns = [
        Column("family", families, is_text=True),
        Column("coefficients, target L0s", [_asked(some) for some in lines.values()], is_text=True),
        Column("seeds", [str(len({run.init_seed for run in some})) for some in lines.values()]),
        Column("lr", lrs),
        Column("d_sae", widths),
    ]
    resamples = any(run.resample_fractions for run in runs)
    if resamples:
        columns.append(Column("new norm", norms))
    print_table(console, columns)
    if resamples:
        meaning = "the norm of a resampled latent's encoder column, as a fraction of the mean over living latents"
        print_sentence(console, f"new norm: {meaning}")
    console.print()
    settings = [("settings", _settings(runs[0]))] if len(runs) == 1 else []
    for name, text in [*settings, *_cost_lines(cost)]:
        first, *rest = lines_of(text, console.width - WIDTH_OF_NAMES)
        for head, line in [(name, first), *(("", line) for line in rest)]:
            print_sentence(console, f"{line}", indent=f" {head:{WIDTH_OF_NAMES - 1}}")


def _asked(runs: Sequence[RunConfig]) -> str:
    """Return the coefficients of some runs, or their target L0s, each once."""
    asked = [f"{run.coeff:.3g}" if run.target_l0 is None else f"L0 {run.target_l0:g}" for run in runs]
    return ", ".join(dict.fromkeys(asked))


def _settings(run: RunConfig) -> str:
    settings = run.describe() | {"nonlinearity": run.resolved_nonlinearity}
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


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
    # A unit is used from twice its size on, because "72.0 minutes" is easier to grasp than "1.2 hours".
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
