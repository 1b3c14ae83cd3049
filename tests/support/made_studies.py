"""Studies that are only their records, as those whose runs finished before sums by document were kept."""

import math

SCORED_ON = {
    "stream": {"lm_digest": "model", "lm_dtype": "fp32", "hook": "blocks.1", "ctx": 64, "data_digest": "all tokens"},
    "eval_tokens": 640,
    "held_out_digest": "held-out tokens",
}
"""The parts of a study's config that say what its runs were scored on."""


class Made:
    """A study that is only its records."""

    def __init__(self, records, folder, stream_seed=0, config=SCORED_ON):
        self.records, self.folder, self.stream_seed, self.config = records, folder, stream_seed, config


def record(family, coeff, l0, degradation, seed=0, **others):
    nonlinearity, penalty = family.split(" + ")
    return {
        "run_id": f"{family}-{coeff}-{seed}", "nonlinearity": nonlinearity, "penalty": penalty, "coeff": coeff,
        "l0": l0, "degradation": degradation, "l1": l0 / 2, "mse": degradation / 4, "init_seed": seed,
        "converged": True,
    } | others  # fmt: skip


def power_law(family, level, seeds=(0,), l0s=(10, 20, 40), spread=0.0, **others):
    """Runs on a straight line in (log L0, log CE increase), whose level differs between seeds."""
    return [
        record(family, 1 / l0, l0, level * (1 + spread * (seed - 1)) * l0**-1.3, seed, **others)
        for seed in seeds
        for l0 in l0s
    ]


def bent(family, level, seeds=(0,), l0s=(9, 16, 23, 40), spread=0.01, **others):
    """Runs on a curve that falls the faster, the larger L0 is, as measured ones do."""
    found = []
    for seed in seeds:
        own = level * (1 + spread * (seed - 1))
        found += [record(family, 1 / l0, l0, own * math.exp(-0.25 * math.log(l0) ** 2), seed, **others) for l0 in l0s]
    return found
