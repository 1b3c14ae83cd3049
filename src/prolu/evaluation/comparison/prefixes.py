"""The shorter SAEs of nested (Matryoshka) losses: the scores of a run's first latents in place of those of all."""

from collections.abc import Sequence

from prolu.evaluation.comparison.frontiers import Record
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS


def prefix_widths(records: Sequence[Record]) -> list[int]:
    """Return the numbers of latents, in ascending order, of the prefixes for which some run has scores."""
    return sorted({prefix["d_sae"] for record in records for prefix in record.get("prefixes") or ()})


def prefix_title(n_latents: int, metric: str = CE_INCREASE) -> str:
    """Return the title of the figure of a prefix, whose height is a metric."""
    return f"The first {n_latents:,} latents alone: {METRICS[metric].words} against sparsity"


def with_prefix(records: Sequence[Record], n_latents: int) -> list[Record]:
    """Return the runs that have scores of their first `n_latents` latents, with these in place of their own scores.

    `d_sae` stays that of the whole SAE, since it is one of the settings that tell the runs of a family apart.
    """
    found = []
    for record in records:
        for prefix in record.get("prefixes") or ():
            if prefix["d_sae"] == n_latents:
                found.append({**record, **prefix, "d_sae": record.get("d_sae")})
    return found
