"""Lists of runs: all combinations of some values, and every run at several seeds."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from prolu.training.config import RunConfig


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
    return [replace(base, **dict(zip(values, point, strict=True))) for point in itertools.product(*values.values())]


def with_seeds(runs: Iterable[RunConfig], seeds: Sequence[int]) -> list[RunConfig]:
    """Return every run once at each of these init seeds, whatever its own seed was.

    Raises:
        ValueError: there is no seed, or one is listed twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"init_seeds {' '.join(map(str, seeds)) or 'none'}: name one or more, each once")
    return list(dict.fromkeys(replace(run, init_seed=seed) for run in runs for seed in seeds))
