"""What an interval covers, why two families cannot be compared at an L0, and how they could be, in words."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from prolu.evaluation.comparison.curves import FURTHEST, Curve
from prolu.evaluation.comparison.frontiers import VARIANT_FIELDS, Record
from prolu.evaluation.comparison.metric_catalog import Metric, is_finite
from prolu.evaluation.comparison.wording import NOT_OVER_SEEDS, listed


def no_run(kind: str, name: str, metric: Metric, *, has_runs: bool) -> str:
    """Return the words that say that a family has no run at all, or none with a place on a curve.

    Args:
        kind: what kind of run is looked for: `run`, or `converged run`.
        name: the family.
        metric: the metric on the curve's vertical axis.
        has_runs: whether it has runs of which none has a place.
    """
    return f"no {kind} of {name}" + (f" has {_place(metric)}" if has_runs else "")


def left_out(n_runs: int, name: str, metric: Metric) -> str:
    """Return the words that say that some runs of a family have no place on a curve of a metric."""
    runs = "1 run" if n_runs == 1 else f"{n_runs} runs"
    return f"{runs} of {name} left out: no {_place(metric)}"


def _place(metric: Metric) -> str:
    """Return what a run needs for a place on a curve of a metric."""
    if metric.compared_as == "ratio":
        return f"L0 and {metric.words} above 0"
    return f"L0 above 0 with a value of {metric.words}"


def no_common_budget(kind: str, curves: Mapping[str, Sequence[Curve]], n_tokens: int | None) -> str:
    """Say that two families were not trained on equal numbers of tokens, or not on the number that was asked for."""
    budgets = {name: sorted({c.n_tokens for c in some if c.n_tokens is not None}) for name, some in curves.items()}
    if n_tokens is not None:
        without = [name for name, some in budgets.items() if n_tokens not in some]
        return f"no {kind} of {listed(without)} on {n_tokens:,} tokens"
    trained = [f"{name} on {listed([f'{n:,}' for n in some])}" for name, some in budgets.items()]
    return f"trained on different numbers of tokens, {' and '.join(trained)}; train both on as many"


def no_common_l0(kind: str, curves: Mapping[str, Sequence[Curve]]) -> str:
    """Return the words that say that two families have no L0 at which both can be read."""
    ranges = [f"{name} (L0 {_range(some)})" for name, some in curves.items()]
    return (
        f"the {kind}s of {' and '.join(ranges)} have no L0 in common; train either with a target_l0 in the range of "
        "the other"
    )


def without_place(name: str, records: Sequence[Record], l0: float, metric: Metric) -> str:
    """Return the words that say that a family has runs at an L0, whose values have no place on a curve of a metric.

    Args:
        name: the family.
        records: the runs, all of which have an L0 above 0.
        l0: the L0.
        metric: the metric on the curve's vertical axis.
    """
    nearest = min(records, key=lambda r: abs(math.log(r["l0"] / l0)))
    run = f"the run of {name} at L0 {nearest['l0']:.3g} has"
    if not is_finite(nearest.get(metric.name)):
        return f"{run} no value of {metric.words}"
    unit = f" {metric.unit}" if metric.unit else ""
    value = f"a {metric.words} of {nearest[metric.name]:.3g}{unit}; a change in percent needs values above 0"
    return f"{run} {value}" + (f", so compare by {metric.in_nats}, in nats" if metric.in_nats else "")


def out_of_reach(kind: str, name: str, curves: Sequence[Curve], l0: float, *, missed: bool) -> str:
    """Return the words that say why a family has no value at an L0: it lies in a gap between its runs, or beyond them.

    Args:
        kind: what kind of run is looked for: `run`, or `converged run`.
        name: the family.
        curves: its curves, none of which reaches the L0.
        l0: the L0.
        missed: whether the family has runs with this target L0, which did not get there.
    """
    nearest = min((c.nearest(l0) for c in curves), key=lambda x: abs(math.log(x / l0)))
    if max(nearest / l0, l0 / nearest) > FURTHEST:
        where = f"no {kind} of {name} within a factor of {FURTHEST} of L0 {l0:.3g}: the nearest is at L0 {nearest:.3g}"
    else:
        where = f"L0 {l0:.3g} is outside the range of {name}, L0 {_range(curves)}"
    if missed:
        return f"{where}, although it was a target; train longer, or start from another coefficient"
    return f"{where}; train one with target_l0={l0:.3g}"


def command_to_train(name: str, l0: float, config: Mapping[str, Any], like: Record) -> str:
    """Return the command that trains a run of a family at an L0, on the same activations and as long as another run.

    Args:
        name: a family that is a nonlinearity with a penalty.
        l0: the target L0.
        config: the study's config.json.
        like: the other run.

    Returns:
        The command; empty where the study does not say what it was trained on, or that is no text.
    """
    stream = config.get("stream") or {}
    settings = {option: like.get(option) for option in ("d_sae", "n_tokens", "lr")}
    settings |= {option: stream.get(option) for option in ("batch_size", "lm", "hook", "data", "ctx")}
    settings["eval_tokens"] = config.get("eval_tokens")
    if None in settings.values():
        return ""
    nonlinearity, _, penalty = name.partition(" + ")
    settings = {"nonlinearity": nonlinearity, "penalty": penalty, "target_l0": f"{l0:g}"} | settings
    parts = ["prolu", "train"]
    for option, value in settings.items():
        values = value if isinstance(value, list) else [value]
        parts += [f"--{option.replace('_', '-')}", *(shlex.quote(str(one)) for one in values)]
    return " ".join([*parts, "--out", "NEW"])


def about_variants(name: str, curves: Sequence[Curve]) -> str:
    """Return what must be said of a family whose runs differ in more than their coefficient; empty if they do not."""
    variants = {c.variant for c in curves}
    if len(variants) < 2:
        return ""
    differing = [field for i, field in enumerate(VARIANT_FIELDS) if len({v[i] for v in variants}) > 1]
    return f"of {name}, the best of {len(variants)} settings of {listed(differing)} at this L0"


def covers(reaching: Sequence[Sequence[Curve]], unit: str) -> str:
    """Return what an interval covers.

    Args:
        reaching: the curves of both families, one per replicate.
        unit: what a document is; empty where no sums by document are known.
    """
    if min(map(len, reaching)) < 2:
        return f"held-out {unit}s only, {NOT_OVER_SEEDS}" if unit else f"nothing, {NOT_OVER_SEEDS}"
    parts = ["init seeds"]
    if len({c.replicate[0] for some in reaching for c in some}) > 1:
        parts.append("stream seeds")
    return f"{', '.join(parts)} and held-out {unit}s" if unit else " and ".join(parts)


def outer(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the range that contains all of some ranges."""
    return min(a for a, _ in ranges), max(b for _, b in ranges)


def _range(curves: Sequence[Curve]) -> str:
    low, high = outer([c.l0_range for c in curves])
    return f"{low:.3g} to {high:.3g}" if low < high else f"{low:.3g}"
