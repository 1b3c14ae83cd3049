"""Named studies: functions from the width of the activations to runs and the batch they train on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from prolu.training.config import RunConfig


class Recipe(NamedTuple):
    """What a sweep trains."""

    runs: list[RunConfig]
    batch_size: int
    source: Mapping[str, str | int]
    """Where its activations come from, unless one says otherwise: lm, hook, data and what goes with them."""

    def scaled(self, factor: float) -> "Recipe":
        """The same study on `factor` times the tokens: schedule, resampling and its candidates shrink with it."""
        if not 0 < factor < float("inf"):
            raise ValueError(f"scale {factor}: must be more than 0, and finite")
        runs = [
            replace(
                run,
                n_tokens=round(factor * run.n_tokens),
                resample_candidates=max(1, round(factor * run.resample_candidates)),
            )
            for run in self.runs
        ]
        return self._replace(runs=runs) if factor != 1 else self

    def at_targets(self, target_l0s: Sequence[float]) -> "Recipe":
        """Each family once at each L0, in place of its grid of coefficients, whose middle is where steering starts."""
        families: dict[str, list[RunConfig]] = {}
        for run in self.runs:
            families.setdefault(run.family, []).append(run)
        middle = [sorted(runs, key=lambda run: run.coeff)[len(runs) // 2] for runs in families.values()]
        return self._replace(runs=[replace(run, target_l0=float(l0)) for run in middle for l0 in target_l0s])


BUILTIN: Mapping[str, str | int] = {"lm": "builtin", "hook": "blocks.2.hook_resid_pre", "data": "builtin"}

PAPER_SOURCE: Mapping[str, str | int] = {
    "lm": "gpt2",
    "hook": "blocks.6.hook_resid_pre",
    "data": "alancooney/sae-monology-pile-uncopyrighted-tokenizer-gpt2",
    "text_column": "input_ids",
    "split": "train[0:40%]",
    "eval_split": "train[90:95%]",
    "eval_tokens": 819_200,
}
"""Sections 3 and 4 of the method."""

DEMO_COEFFS = {
    "relu + l1": (1.0e-3, 1.6e-3, 2.7e-3),
    "prolu_relu + l1": (6.7e-4, 1.2e-3, 2.1e-3),
    "prolu_ste + l1": (6.7e-4, 1.2e-3, 2.1e-3),
    "relu + sqrt_l1": (4.2e-4, 7.5e-4, 1.3e-3),
    "prolu_relu + sqrt_l1": (5.0e-4, 9.2e-4, 1.7e-3),
    "prolu_ste + sqrt_l1": (5.8e-4, 9.2e-4, 1.4e-3),
}
"""Per family, so that the families' ranges of L0 overlap: they respond very differently to one coefficient."""


def demo(d_in: int) -> Recipe:
    """Six families (three nonlinearities, two penalties), minutes on two cores.

    Coefficients are those of width 768, times 768 / d_in: the MSE is a mean over d_in, the penalty a sum.
    """
    base = RunConfig(d_sae=512, n_tokens=5000 * 512, lr=5e-3, warmup_fraction=0.02, lr_floor=0.05)
    runs = []
    for family, coeffs in DEMO_COEFFS.items():
        nonlinearity, penalty = family.split(" + ")
        for coeff in coeffs:
            scaled = float(f"{coeff * 768 / d_in:.3g}")
            runs.append(replace(base, nonlinearity=nonlinearity, penalty=penalty, coeff=scaled))
    return Recipe(runs, batch_size=512, source=BUILTIN)


COMPARISON_FAMILIES = [
    ("relu", "l1"),
    ("relu", "sqrt_l1"),
    ("prolu_relu", "l1"),
    ("prolu_relu", "sqrt_l1"),
    ("prolu_ste", "l1"),
    ("prolu_ste", "sqrt_l1"),
    ("gated", "l1"),
    ("jumprelu(1)", "l0"),
    ("topk", "none"),
    ("batchtopk", "none"),
]

COMPARISON_L0S = (8.0, 16.0, 32.0, 64.0)

COMPARISON_SEEDS = (0, 1, 2)


def comparison(d_in: int) -> Recipe:
    """ReLU and both ProLUs under both penalties, Gated, JumpReLU, TopK and BatchTopK, at four L0s, three seeds each.

    The learning rate falls over the second half, so that little of it is left once coefficients are frozen.
    """
    base = RunConfig(
        d_sae=8 * d_in, n_tokens=2**22, lr=4e-3, warmup_fraction=0.05, coeff_warmup_fraction=0.05,
        decay_start_fraction=0.5, lr_floor=0.02, aux_dead_tokens=200_000,
    )  # fmt: skip
    runs = [
        replace(
            base, nonlinearity=nonlinearity, penalty=penalty, target_l0=l0, init_seed=seed,
            coeff=(0.7 if penalty == "l0" else 2.0) / d_in,
        )
        for nonlinearity, penalty in COMPARISON_FAMILIES
        for l0 in COMPARISON_L0S
        for seed in COMPARISON_SEEDS
    ]  # fmt: skip
    return Recipe(runs, batch_size=512, source=BUILTIN)


PAPER_STEPS = 97_656
"""400M tokens in batches of 4,096."""

PAPER_FAMILIES = [(n, p) for p in ("l1", "sqrt_l1") for n in ("relu", "prolu_relu", "prolu_ste")]

GPT2_WIDTH = 768
"""Where coefficients and the cut of raw norms were chosen; elsewhere coefficients go with 1 / width, no norm is cut."""

EXPERIMENT3_MULTIPLIERS = {
    ("prolu_ste", "l1"): 0.3,
    ("prolu_relu", "l1"): 3.0,
    ("relu", "l1"): 3.0,  # medium-high confidence
    ("relu", "sqrt_l1"): 2.0,
    ("prolu_relu", "sqrt_l1"): 2.0,
    ("prolu_ste", "sqrt_l1"): 2.0,
}


def experiment1(d_in: int) -> Recipe:
    """The paper's first sweep, 30 runs: section 3 of the method."""
    return _paper(d_in, [3e-4 * 2**i for i in range(5)], lr=1e-3, encoder_norm=0.02)


def experiment2(d_in: int) -> Recipe:
    """The paper's second sweep, 48 runs, at a lower learning rate."""
    return _paper(d_in, [3e-4 * 1.58**i for i in range(8)], lr=3e-4, encoder_norm=0.02)


def experiment3(d_in: int) -> Recipe:
    """The paper's third sweep, 30 runs: coefficients by family, larger encoder norms at resampling."""
    return _paper(
        d_in, [4e-4 * 1.5**i for i in range(5)], lr=1e-3, encoder_norm=0.2, multipliers=EXPERIMENT3_MULTIPLIERS
    )


def _paper(
    d_in: int,
    coeffs: list[float],
    *,
    lr: float,
    encoder_norm: float,
    multipliers: dict[tuple[str, str], float] | None = None,
) -> Recipe:
    """The paper's protocol over six families. Shares of its 97,656 steps, so that another length keeps the shape."""
    base = RunConfig(
        d_sae=16 * d_in,
        n_tokens=400_000_000,
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
    return Recipe(runs, batch_size=4096, source=PAPER_SOURCE)


RECIPES: dict[str, Callable[[int], Recipe]] = {
    "demo": demo,
    "comparison": comparison,
    "experiment1": experiment1,
    "experiment2": experiment2,
    "experiment3": experiment3,
}
"""By the name that `prolu sweep` takes."""


def recipe_named(name: str) -> Callable[[int], Recipe]:
    """The recipe of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
