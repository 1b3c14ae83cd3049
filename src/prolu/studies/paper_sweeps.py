"""The three sweeps of the paper, as recipes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prolu.studies.recipe import Recipe
from prolu.training.config import RunConfig

GPT2_WIDTH = 768
"""The width of GPT-2 small, for which the paper chose its coefficients and the largest raw norm of a candidate for
resampling. At another width coefficients are scaled by 768 / width, and raw norms are not limited."""

PAPER_SOURCE: Mapping[str, Any] = {
    "lm": "gpt2",
    "hook": "blocks.6.hook_resid_pre",
    "data": ("alancooney/sae-monology-pile-uncopyrighted-tokenizer-gpt2",),
    "text_column": "input_ids",
    "split": "train[0:40%]",
    "eval_split": "train[90:95%]",
    "eval_tokens": 819_200,
}
"""The paper's model, hook and text: sections 3 and 4 of the method."""

PAPER_TOKENS = 400_000_000

PAPER_STEPS = 97_656
"""The number of steps of the paper's runs: 400M tokens in batches of 4,096."""

PAPER_FAMILIES = [(n, p) for p in ("l1", "sqrt_l1") for n in ("relu", "prolu_relu", "prolu_ste")]
"""The six families of the paper, as nonlinearity and penalty."""

EXPERIMENT3_MULTIPLIERS = {
    ("prolu_ste", "l1"): 0.3,
    ("prolu_relu", "l1"): 3.0,
    ("relu", "l1"): 3.0,  # the method marks this one as of medium-high confidence
    ("relu", "sqrt_l1"): 2.0,
    ("prolu_relu", "sqrt_l1"): 2.0,
    ("prolu_ste", "sqrt_l1"): 2.0,
}
"""The factor on the third sweep's coefficients for each family."""


def paper_sweep(
    coeffs: list[float],
    *,
    lr: float,
    encoder_norm: float,
    multipliers: dict[tuple[str, str], float] | None = None,
) -> Recipe:
    """Return one of the paper's sweeps: its protocol over six families, at these coefficients for width 768."""

    def runs_at(d_in: int) -> list[RunConfig]:
        # Fractions of the paper's 97,656 steps, so that a run of another length keeps the shape of the schedule.
        base = RunConfig(
            d_sae=16 * d_in,
            n_tokens=PAPER_TOKENS,
            lr=lr,
            warmup_fraction=2_000 / PAPER_STEPS,
            decay_start_fraction=75_000 / PAPER_STEPS,
            decay_end_fraction=95_000 / PAPER_STEPS,
            resample_fractions=(25_000 / PAPER_STEPS, 50_000 / PAPER_STEPS),
            resample_count_fraction=12_500 / PAPER_STEPS,
            resample_encoder_norm=encoder_norm,
            resample_max_raw_norm=2500.0 if d_in == GPT2_WIDTH else None,
        )
        runs = []
        for nonlinearity, penalty in PAPER_FAMILIES:
            factor = (multipliers or {}).get((nonlinearity, penalty), 1.0) * GPT2_WIDTH / d_in
            runs += [replace(base, nonlinearity=nonlinearity, penalty=penalty, coeff=c * factor) for c in coeffs]
        return runs

    return Recipe(runs_at, batch_size=4096, n_tokens=PAPER_TOKENS, source=PAPER_SOURCE)
