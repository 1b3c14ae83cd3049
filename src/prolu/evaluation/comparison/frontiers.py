"""The runs of a study, sorted: Pareto-best ones, groups that differ in their seed only, families, hooks, studies."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from prolu.evaluation.comparison.metric_catalog import METRICS
from prolu.training.config import RunConfig
from prolu.training.naming import family_of

Record = Mapping[str, Any]
"""One finished run: a line of results.jsonl."""

AnyRecord = TypeVar("AnyRecord", bound=Record)
Item = TypeVar("Item")

CONVERGENCE_TOLERANCE = 0.05
"""The largest relative change of held-out L0 and MSE, over the last fifth of training at full learning rate, with
which a run counts as converged."""

FEWEST_STEPS = 1000
"""The number of steps at full learning rate below which no run counts as converged.

The last fifth of a run of 20 steps has 4 steps, over which no figure changes by 5%, although training has hardly begun.
The more steps a run that meets the rule has, the less its figures would still change; docs, What the error bars mean,
has the measurement.
"""

SETTING_FIELDS = tuple(f.name for f in fields(RunConfig) if f.name not in ("init_seed", "nonlinearity", "penalty"))
"""The fields of a run's config that tell the settings of one family apart."""

SAME_VARIANT = (
    "coeff", "target_l0", "l0_integration_steps", "l0_braking", "n_tokens", "step", "precision", "init_from", "named"
)  # fmt: skip
VARIANT_FIELDS = tuple(name for name in SETTING_FIELDS if name not in SAME_VARIANT)
"""The fields of a run's config in which all runs on one curve of a family agree. Left out are the coefficient, the
target L0 and how it is reached, which move a run along the curve; how a step is computed, which changes only the
rounding; the path of the SAE that a run started from, whose digest is compared instead; and which fields its name
holds."""


def is_converged(before: Mapping[str, float], after: Mapping[str, float], n_steps: int) -> bool:
    """Return whether held-out L0 and MSE changed by less than `CONVERGENCE_TOLERANCE` between two probes.

    Where the L0 cannot move, as that of topk, the MSE decides alone. An SAE without an active latent has not converged,
    although it does not move.

    Args:
        before: the figures of the first probe.
        after: the figures of the second.
        n_steps: the number of steps made until the second; with fewer than `FEWEST_STEPS` nothing can be said, and the
            run does not count as converged.
    """
    is_alive = before["l0"] > 0 and after["l0"] > 0
    return (
        is_alive
        and n_steps >= FEWEST_STEPS
        and all(
            # The floor makes an MSE that is 0 at both probes count as unchanged.
            abs(after[name] - before[name]) < CONVERGENCE_TOLERANCE * max(abs(before[name]), 1e-12)
            for name in ("l0", "mse")
        )
    )


def pareto_best(records: Iterable[AnyRecord], x: str = "l0", y: str = "degradation") -> list[AnyRecord]:
    """Return the runs that no other of these runs at the same hook beats, in the order given.

    One run beats another if it is at least as good in both x and y, and better in one of them. Lower is better, but for
    those metrics of the catalogue of which more is better.
    """
    signs = [-1 if name in METRICS and METRICS[name].better == "higher" else 1 for name in (x, y)]
    runs = list(records)
    best: set[int] = set()
    for (_,), places in grouped(range(len(runs)), lambda place: hook_of(runs[place])).items():
        mask = pareto_mask(*([s * runs[i][name] for i in places] for s, name in zip(signs, (x, y), strict=True)))
        best.update(place for place, is_best in zip(places, mask, strict=True) if is_best)
    return [run for place, run in enumerate(runs) if place in best]


def pareto_mask(x: Sequence[float], y: Sequence[float]) -> list[bool]:
    """Return, for each point (x, y), whether no other point beats it, as in `pareto_best`."""
    points = list(zip(x, y, strict=True))
    # Of points that are equal none beats another, so all of them are kept.
    return [not any(a <= p and b <= q and (a, b) != (p, q) for a, b in points) for p, q in points]


def family(record: Record) -> str:
    """Return a run's family, such as `prolu_ste + l1`.

    A run that was fine-tuned from a saved SAE is of a family of its own, and so is one with a frozen matrix or a nested
    loss, and a skip transcoder.

    Where studies at several hooks are shown together, a family is named with its hook: SAEs at two hooks reconstruct
    different activations, so their CE increases say nothing about each other.
    """
    name = family_of(record)
    hook = hook_of(record)
    return at_hook(hook, name) if hook else name


def hook_of(record: Record) -> str:
    """Return the hook of a run where studies at several hooks are shown together; empty otherwise."""
    return str(record.get("hook", ""))


def at_hook(hook: str, name: str) -> str:
    """Return a name or sentence with the hook that it is about in front, for studies at several hooks."""
    return f"{hook}: {name}"


def study_of(record: Record) -> str:
    """Return the name of the study that a run of several pooled studies is from; empty for a single study."""
    return str(record.get("study", ""))


def study_names(records: Sequence[Record]) -> list[str]:
    """Return the names of the studies that the runs are from, in order of appearance."""
    return list(dict.fromkeys(map(study_of, records)))


def replicate(record: Record) -> tuple[Any, int | None]:
    """Return the stream seed and the init seed of a run; the first is 0 where runs of a single study do not say it."""
    return record.get("stream_seed", 0), init_seed(record)


def init_seed(record: Record) -> int | None:
    """Return the seed of a run's starting weights; None where it is not known, as for an imported SAE."""
    return record.get("init_seed", 0)


def setting(record: Record) -> tuple[str, ...]:
    """Return everything that was asked of a run but its family and its seed.

    Runs of one family that agree in this differ in their seed only.
    """
    study = study_of(record)
    if init_seed(record) is None:
        # Whether two imported SAEs differ in their seed only is not known, so each is a setting of its own.
        return (study, str(record["run_id"]))
    target_l0 = record.get("target_l0")
    # With a target L0 the coefficient is a result of training, which differs between seeds.
    names = [name for name in SETTING_FIELDS if target_l0 is None or name != "coeff"]
    return (study, str(target_l0), *(str(record.get(name)) for name in names))


def setting_value(record: Record) -> float | None:
    """Return the target L0 of a run if there was one, otherwise its coefficient; None where that is not known."""
    target_l0 = record.get("target_l0")
    return record["coeff"] if target_l0 is None else target_l0


def budget(record: Record) -> int | None:
    """Return the number of tokens that a run was trained on; None where it is not recorded."""
    return record.get("n_tokens")


def variant(record: Record) -> tuple[str, ...]:
    """Return the hyperparameters of a run but for its budget, its seed and what moves it along its family's curve."""
    return tuple(str(record.get(name)) for name in VARIANT_FIELDS)


def grouped(items: Iterable[Item], *keys: Callable[[Item], Hashable]) -> dict[tuple[Any, ...], list[Item]]:
    """Return the items that agree in all keys together; groups, and the items in each, in order of appearance."""
    found: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        found.setdefault(tuple(key(item) for key in keys), []).append(item)
    return found
