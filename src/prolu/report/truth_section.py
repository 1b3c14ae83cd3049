"""The section of a report on rows of known features: how latents compare with the true features and magnitudes."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from prolu.evaluation.comparison.figures import ResponseLine
from prolu.evaluation.comparison.frontiers import Record, family, grouped, setting
from prolu.evaluation.comparison.intervals import mean_over_seeds
from prolu.evaluation.truth import FEWEST, TruthFigures

COLUMNS = {
    "l0": "L0",
    "truth_found": "found",
    "truth_cosine": "cosine",
    "truth_precision": "precision",
    "truth_recall": "recall",
    "truth_f1": "F1",
    "truth_slope": "slope",
    "truth_suppression": "suppression",
}
"""The columns of the table, after family and setting, with their titles."""


class TruthSection(NamedTuple):
    """What a page shows of the true features."""

    true_l0: float
    """The mean number of features that are active on a row."""
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    """The cells of the table: means over seeds, with half the width of their 95% intervals."""
    lines: list[ResponseLine]
    """How the latents of each family respond to the magnitudes of their features."""


def truth_section(records: Sequence[Record], truths: Mapping[str, TruthFigures]) -> TruthSection | None:
    """Return the section for runs of one study or of several.

    Args:
        records: the runs.
        truths: by run_id, how each stands to the true features.

    Returns:
        None if that is known of no run.
    """
    known = [r for r in records if r["run_id"] in truths]
    if not known:
        return None
    groups = grouped(known, family, setting)
    order = sorted(groups.values(), key=lambda runs: (family(runs[0]), _mean(runs, "l0")))
    true_l0 = known[0]["truth_l0"]
    heads = ("family", "target L0 / coeff", *COLUMNS.values(), "seeds")
    rows = []
    for runs in order:
        scores = [_cell(runs, name) for name in COLUMNS]
        rows.append((family(runs[0]), _setting(runs[0]), *scores, str(len(runs))))
    lines = []
    for (_,), runs in grouped(known, family).items():
        settings = list(grouped([r for r in runs if r["l0"] > 0], setting).values())
        if settings:
            # Families are compared at the setting whose L0 is nearest to the true one.
            nearest = min(settings, key=lambda some: abs(math.log(_mean(some, "l0") / true_l0)))
            lines += _line(nearest, [truths[r["run_id"]] for r in nearest])
    return TruthSection(true_l0, heads, rows, lines)


def _mean(runs: Sequence[Record], name: str) -> float:
    return mean_over_seeds([r[name] for r in runs]).mean


def _setting(record: Record) -> str:
    target = record.get("target_l0")
    return f"{record['coeff'] if target is None else target:.4g}"


def _cell(runs: Sequence[Record], name: str) -> str:
    """Return a mean over seeds with half the width of its interval, of the runs of which the score is known."""
    values = [r[name] for r in runs if r.get(name) is not None]
    if not values:
        return ""
    found = mean_over_seeds(values)
    digits = 2 if name == "l0" else 3
    spread = f" \u00b1{found.half_width:.{digits}f}" if math.isfinite(found.half_width) else ""
    return f"{found.mean:.{digits}f}{spread}"


def _line(runs: Sequence[Record], truths: Sequence[TruthFigures]) -> list[ResponseLine]:
    """Return the line of some runs that differ in their seed only; none if they found no feature."""
    # Sum, then divide: a seed that found more features counts for more.
    total = torch.stack([truth.response for truth in truths]).sum(0)
    n, _, true, read = total[total[:, 0] >= FEWEST].T
    if not len(n):
        return []
    return [ResponseLine(runs[0], _mean(runs, "l0"), (true / n).tolist(), (read / n).tolist())]
