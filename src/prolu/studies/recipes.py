"""Recipes: the studies that have a name, among them the three sweeps of the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prolu.runtime.checks import one_of
from prolu.studies.paper_sweeps import EXPERIMENT3_MULTIPLIERS, GPT2_WIDTH, paper_sweep
from prolu.studies.recipe import Recipe
from prolu.training.config import RunConfig

BUILTIN: Mapping[str, Any] = {"lm": "builtin", "hook": "blocks.2.hook_resid_pre", "data": ("builtin",)}

DEMO_TOKENS = 5000 * 512

DEMO_COEFFS = {
    "relu + l1": (1.0e-3, 1.6e-3, 2.7e-3),
    "prolu_relu + l1": (6.7e-4, 1.2e-3, 2.1e-3),
    "prolu_ste + l1": (6.7e-4, 1.2e-3, 2.1e-3),
    "relu + sqrt_l1": (4.2e-4, 7.5e-4, 1.3e-3),
    "prolu_relu + sqrt_l1": (5.0e-4, 9.2e-4, 1.7e-3),
    "prolu_ste + sqrt_l1": (5.8e-4, 9.2e-4, 1.4e-3),
}
"""The demo's coefficients for width 768. Each family has its own, because families reach very different L0s at one
coefficient, and a comparison needs ranges of L0 that overlap."""


def _demo_runs(d_in: int) -> list[RunConfig]:
    base = RunConfig(d_sae=4 * d_in, n_tokens=DEMO_TOKENS, lr=5e-3, warmup_fraction=0.02, lr_floor=0.05)
    runs = []
    for family, coeffs in DEMO_COEFFS.items():
        nonlinearity, penalty = family.split(" + ")
        for coeff in coeffs:
            # The MSE is a mean over d_in and the penalty is a sum over latents, so at a larger width the same
            # coefficient weighs more against the MSE.
            scaled = float(f"{coeff * GPT2_WIDTH / d_in:.3g}")
            runs.append(replace(base, nonlinearity=nonlinearity, penalty=penalty, coeff=scaled))
    return runs


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
"""The families of the comparison, as nonlinearity and penalty."""

START_COEFFS = {"l0": 0.7, "tanh": 0.7, "quadratic_l0": 10.0}
"""The coefficients, times d_in, at which the L0 controller starts with these penalties; 2 with all others. That of the
quadratic penalty, which has the target itself, is not adjusted."""

COMPARISON_TOKENS = 2**22

COMPARISON_L0S = (8.0, 16.0, 32.0, 64.0)

COMPARISON_SEEDS = (0, 1, 2)


NESTED = "nested"
"""The word for a nested loss in `COMPARISON2026_FAMILIES`."""

NESTED_FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""The prefixes of nested losses in the study `comparison2026`, as fractions of d_sae. All latents are the fifth."""

COMPARISON2026_FAMILIES = [
    ("relu", "l1", ""),
    ("prolu_relu", "sqrt_l1", ""),
    ("jumprelu(1)", "l0", ""),
    ("jumprelu_plain(1)", "quadratic_l0", ""),
    ("jumprelu_ste", "tanh", ""),
    ("batchtopk", "none", ""),
    ("batchtopk", "none", NESTED),
    ("jumprelu(1)", "l0", NESTED),
    ("prolu_relu", "sqrt_l1", NESTED),
    ("batchtopk", "none", "decoder"),
    ("batchtopk", "none", "soft_decoder"),
    ("batchtopk", "none", "encoder"),
]
"""The families of the study `comparison2026`: nonlinearity, penalty, and third nothing, `NESTED`, or the matrix that is
frozen in a random baseline."""


CAUSES_FAMILIES = [
    ("relu", 0),
    ("relu", 2**18),
    ("prolu_relu", 0),
    ("prolu_ste", 0),
    ("jumprelu(1)", 0),
]
"""The nonlinearities of the study of causes, and the number of tokens to which decoders are refitted after training.

A refitted ReLU has no suppression left, but still the ReLU's forward pass and gradients. ProLU_ReLU changes the forward
pass and keeps the form of the gradients. ProLU_STE has the same forward pass with another gradient, and so has a
JumpReLU, whose threshold theta is ProLU's -b."""


def _causes_runs(d_in: int) -> list[RunConfig]:
    families = [
        {"nonlinearity": nonlinearity, "penalty": penalty, "refit_tokens": refit_tokens}
        for penalty in ("l1", "sqrt_l1")
        for nonlinearity, refit_tokens in CAUSES_FAMILIES
    ]
    return _at_targets(d_in, families)


def _comparison_runs(d_in: int) -> list[RunConfig]:
    return _at_targets(d_in, [{"nonlinearity": n, "penalty": p} for n, p in COMPARISON_FAMILIES])


def _comparison2026_runs(d_in: int) -> list[RunConfig]:
    nested = tuple(round(fraction * 8 * d_in) for fraction in NESTED_FRACTIONS)
    families = []
    for nonlinearity, penalty, special in COMPARISON2026_FAMILIES:
        option = {"matryoshka": nested} if special == NESTED else {"freeze": special} if special else {}
        families.append({"nonlinearity": nonlinearity, "penalty": penalty, **option})
    return _at_targets(d_in, families)


SYNTHETIC_FAMILIES = [
    ("relu", "l1", ""),
    ("prolu_relu", "sqrt_l1", ""),
    ("prolu_ste", "sqrt_l1", ""),
    ("jumprelu(1)", "l0", ""),
    ("batchtopk", "none", ""),
    ("batchtopk", "none", "decoder"),
    ("batchtopk", "none", "encoder"),
]
"""The families that are compared with known features: nonlinearity, penalty, and the matrix that is frozen in a random
baseline."""

SYNTHETIC_TOKENS = 2**19

SYNTHETIC_L0S = (3.0, 6.0, 12.0)
"""Half the true L0 of the features `hard`, that L0 itself, and twice as much."""


def _synthetic_runs(d_in: int) -> list[RunConfig]:
    families = [
        {"nonlinearity": nonlinearity, "penalty": penalty, **({"freeze": frozen} if frozen else {})}
        for nonlinearity, penalty, frozen in SYNTHETIC_FAMILIES
    ]
    # Rows as they are: scaled to one norm, the magnitude of a feature would depend on the others in its row.
    changes = {"n_tokens": SYNTHETIC_TOKENS, "lr": 1e-2, "normalisation": "none", "aux_dead_tokens": 50_000}
    return _at_targets(d_in, families, SYNTHETIC_L0S, **changes)


def _at_targets(
    d_in: int, families: Sequence[Mapping[str, Any]], l0s: Sequence[float] = COMPARISON_L0S, **changes: Any
) -> list[RunConfig]:
    """Return the runs of some families at some target L0s, with three seeds each.

    Args:
        d_in: the width of the activations.
        families: the fields that make each family.
        l0s: the target L0s.
        changes: fields that differ from those of the comparisons on a language model.
    """
    base = RunConfig(
        d_sae=8 * d_in,
        n_tokens=COMPARISON_TOKENS,
        lr=4e-3,
        warmup_fraction=0.05,
        coeff_warmup_fraction=0.05,
        # The learning rate falls over the second half, so that little of it is left once coefficients are frozen.
        decay_start_fraction=0.5,
        lr_floor=0.02,
        aux_dead_tokens=200_000,
    )
    base = replace(base, **changes)
    runs = []
    for family in families:
        # Only where the L0 controller starts, which then finds the coefficient of each target.
        coeff = START_COEFFS.get(family["penalty"], 2.0) / d_in
        for l0 in l0s:
            runs += [replace(base, **family, coeff=coeff, target_l0=l0, init_seed=seed) for seed in COMPARISON_SEEDS]
    return runs


RECIPES: dict[str, Recipe] = {
    "demo": Recipe(_demo_runs, batch_size=512, n_tokens=DEMO_TOKENS, source=BUILTIN),
    "comparison": Recipe(_comparison_runs, batch_size=512, n_tokens=COMPARISON_TOKENS, source=BUILTIN),
    "comparison2026": Recipe(_comparison2026_runs, batch_size=512, n_tokens=COMPARISON_TOKENS, source=BUILTIN),
    "causes": Recipe(_causes_runs, batch_size=512, n_tokens=COMPARISON_TOKENS, source=BUILTIN),
    "synthetic": Recipe(
        _synthetic_runs,
        batch_size=256,
        n_tokens=SYNTHETIC_TOKENS,
        source={**BUILTIN, "activations": "synthetic:hard"},
    ),
    "experiment1": paper_sweep([3e-4 * 2**i for i in range(5)], lr=1e-3, encoder_norm=0.02),
    "experiment2": paper_sweep([3e-4 * 1.58**i for i in range(8)], lr=3e-4, encoder_norm=0.02),
    "experiment3": paper_sweep(
        [4e-4 * 1.5**i for i in range(5)], lr=1e-3, encoder_norm=0.2, multipliers=EXPERIMENT3_MULTIPLIERS
    ),
}
"""The studies that have a name, by the name that `prolu sweep` takes."""

DESCRIPTIONS = {
    "demo": "Six families (three nonlinearities, two penalties) at three coefficients each: minutes on two cores.",
    "comparison": "ReLU and both ProLUs under both penalties, Gated, JumpReLU, TopK and BatchTopK, at four target L0s "
    "with three seeds each.",
    "comparison2026": "Methods in use in 2026: three JumpReLUs, BatchTopK, nested losses and random baselines beside "
    "ReLU and ProLU, at four target L0s with three seeds each.",
    "causes": "Why ProLU reconstructs better than ReLU: less suppression, another forward pass, or other gradients, at "
    "four target L0s with three seeds each.",
    "synthetic": "Families compared with features that are known by construction, without a language model, at half, "
    "once and twice the true L0 with three seeds each, and random baselines: minutes on two cores.",
    "experiment1": "The paper's first sweep: 30 SAEs.",
    "experiment2": "The paper's second sweep: 48 SAEs at a lower learning rate.",
    "experiment3": "The paper's third sweep: 30 SAEs with a range of coefficients for each family and larger encoder "
    "norms at resampling.",
}
"""The description of each study in `prolu sweep --help`."""


def recipe_named(name: str) -> Recipe:
    """Return what a named study trains, such as "demo" or "experiment1".

    Raises:
        ValueError: There is no recipe of that name.
    """
    return RECIPES[one_of("recipe", name, RECIPES)]
