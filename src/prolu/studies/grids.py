"""Lists of runs: all combinations of some values, and every run at several seeds."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any

from prolu.studies.recipe import Recipe, check_one_start
from prolu.studies.widths import n_latents
from prolu.training.config import RunConfig

MOST_RUNS = 10_000
"""The largest number of combinations of one grid. A larger one is probably a mistake, and would take minutes to
list."""


def grid(base: RunConfig, **values: Sequence[Any]) -> list[RunConfig]:
    """Return all combinations of the given values: `grid(RunConfig(), penalty=["l1", "sqrt_l1"], coeff=[1e-3, 2e-3])`.

    Args:
        base: the config whose other fields all runs have.
        values: for each field by name, the values to combine.

    Raises:
        ValueError: a name is not a field of RunConfig, or a value is not valid for its field.
    """
    known = asdict(base)
    for name in values:
        if name not in known:
            raise ValueError(f"{name!r}: not a field of RunConfig; fields: {', '.join(known)}")
    points = itertools.product(*values.values())
    return named_apart([replace(base, **dict(zip(values, point, strict=True))) for point in points])


def named_apart(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """Return the runs with further settings in their names, where these are needed to tell two of them apart.

    Names that differ already stay as they are. Runs that are equal in all settings keep one name.
    """
    seen: dict[str, dict[str, Any]] = {}
    differing: set[str] = set()
    for run in runs:
        # The digest of the SAE that a run starts from is in the name, so its path need not be.
        described = run.describe() | {"init_from": None}
        first = seen.setdefault(run.run_id, described)
        differing |= {name for name in described | first if described.get(name) != first.get(name)}
    if not differing:
        return list(runs)
    names = tuple(f.name for f in fields(RunConfig) if f.name in differing)
    return [replace(run, named=names) for run in runs]


def own_recipe(values: Mapping[str, Sequence[Any]], batch_size: int) -> Recipe:
    """Return all combinations of some settings as one study.

    A combination whose SAE has no penalty takes no coefficient, so that several coefficients make one run of it.

    Args:
        values: for each field of RunConfig its values; those of d_sae may be multiples of d_in.
        batch_size: the number of tokens per training step.

    Raises:
        ValueError: a field has no value or the same one twice, or there are too many combinations. When the runs are
            made: a combination is refused, or several coefficients are given to the L0 controller.
    """
    for name, some in values.items():
        if not some or len(set(some)) < len(some):
            raise ValueError(f"{name} {' '.join(map(str, some)) or 'none'}: name one or more, each once")
    n_runs = math.prod(len(some) for some in values.values())
    if n_runs > MOST_RUNS:
        raise ValueError(
            f"the grid has {n_runs:,} combinations, and one study at most {MOST_RUNS:,}: name fewer values"
        )

    @cache
    def runs_at(d_in: int) -> list[RunConfig]:
        at_width: dict[str, list[Any]] = {
            name: [n_latents(one, d_in) if name == "d_sae" else one for one in some] for name, some in values.items()
        }
        points = itertools.product(*at_width.values())
        runs = [RunConfig(**dict(zip(at_width, point, strict=True))) for point in points]
        if any(run.has_target_l0 for run in runs):
            check_one_start(values.get("coeff", ()))
        if len(values.get("coeff", ())) > 1:
            runs = [replace(run, coeff=RunConfig.coeff) if run.ignores_coeff else run for run in runs]
        return named_apart(list(dict.fromkeys(runs)))

    return Recipe(runs_at, batch_size, max(values["n_tokens"]), source={})


def with_seeds(runs: Iterable[RunConfig], seeds: Sequence[int]) -> list[RunConfig]:
    """Return every run once at each of these init seeds, whatever its own seed was.

    Raises:
        ValueError: there is no seed, or one is listed twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"init_seeds {' '.join(map(str, seeds)) or 'none'}: name one or more, each once")
    return list(dict.fromkeys(replace(run, init_seed=seed) for run in runs for seed in seeds))
