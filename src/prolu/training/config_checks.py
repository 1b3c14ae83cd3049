"""What a `RunConfig` must fulfil; each refusal is one sentence that names the field and the valid values."""

import itertools
import math
from dataclasses import fields
from typing import TYPE_CHECKING

from prolu.runtime.checks import at_least_1, check_types

# The command line makes its help from the config, so what needs PyTorch is imported where it is used.
if TYPE_CHECKING:
    from prolu.training.config import RunConfig


def check_run(config: "RunConfig") -> None:
    """Raise ValueError unless the settings of a run are valid, each by itself and all together."""
    check_types(config)
    unknown = set(config.named) - {f.name for f in fields(config)}
    _require(config, "named", not unknown, "names of fields")
    _check_sparsity(config)
    _check_start(config)
    _check_ranges(config)
    _check_schedule(config)
    _check_resampling(config)
    if config.precision == "tf32" and config.step not in ("auto", "dense", "stacked"):
        raise ValueError(
            f"precision {config.precision!r}: the {config.step} step computes in fp32 or bf16; "
            "choose step auto, dense or stacked"
        )


def check_precision(config: "RunConfig", device_type: str) -> None:
    """Raise ValueError if the run's kind of step does not compute in its precision on a device, "cpu" or "cuda"."""
    if device_type != "cpu" and config.precision != "fp32" and config.step in ("sparse", "sparse_torch"):
        raise ValueError(
            f"precision {config.precision!r}: on a GPU the {config.step} step computes in fp32; "
            "choose step auto, dense or stacked"
        )


def _require(config: "RunConfig", name: str, fulfilled: bool, words: str) -> None:
    if not fulfilled:
        raise ValueError(f"{name} {getattr(config, name)}: must be {words}")


def _check_ranges(config: "RunConfig") -> None:
    norm = config.max_grad_norm
    _require(config, "coeff", 0 <= config.coeff < math.inf, "0 or more, and finite")
    _require(config, "l0_integration_steps", 1 <= config.l0_integration_steps < math.inf, "1 or more, and finite")
    _require(config, "lr", 0 < config.lr < math.inf, "more than 0, and finite")
    _require(config, "initial_bias", math.isfinite(config.initial_bias), "finite")
    _require(config, "beta1", 0 <= config.beta1 < 1, "0 or more, and less than 1")
    _require(config, "max_grad_norm", norm is None or norm > 0, "more than 0, or None for no clip")
    for name in ("d_sae", "n_tokens", "aux_dead_tokens", "resample_candidates"):
        at_least_1(name, getattr(config, name))
    bounds = (0, *config.matryoshka, config.d_sae)
    are_ascending = all(before < after for before, after in itertools.pairwise(bounds))
    _require(config, "matryoshka", are_ascending, "ascending numbers of latents, above 0 and below d_sae")
    from prolu.training.refitting import MOST_LATENTS

    is_possible = config.refit_tokens == 0 or (config.refit_tokens > 0 and config.d_sae <= MOST_LATENTS)
    _require(config, "refit_tokens", is_possible, f"0, or more with a d_sae of at most {MOST_LATENTS:,}")
    n_drawn = config.matryoshka_drawn
    _require(config, "matryoshka_drawn", 0 <= n_drawn < config.d_sae, "0 or more, and less than d_sae")
    _require(config, "matryoshka_drawn", not (n_drawn and config.matryoshka), "0 where matryoshka has prefixes")
    is_possible = not n_drawn or config.step != "stacked"
    _require(config, "matryoshka_drawn", is_possible, "0 with step 'stacked'")
    for name in ("lr_floor", "coeff_warmup_fraction"):
        _require(config, name, 0 <= getattr(config, name) <= 1, "between 0 and 1")


def _check_sparsity(config: "RunConfig") -> None:
    from prolu.sae.nonlinearities import nonlinearity_named
    from prolu.sae.penalties import penalty_named

    target = config.target_l0
    is_possible = target is None or 0 < target < config.d_sae
    _require(config, "target_l0", is_possible, "more than 0 and less than d_sae, or None")
    nonlinearity = nonlinearity_named(config.resolved_nonlinearity)
    nonlinearity.check_width(config.d_sae)
    penalty = penalty_named(config.trained_penalty)
    if (reason := penalty.check(nonlinearity)) is not None:
        raise ValueError(f"penalty {config.resolved_penalty!r}: {reason}; nonlinearity is {config.nonlinearity!r}")
    if config.has_target_l0 and (config.resolved_penalty == "none" or not config.coeff > 0):
        raise ValueError(
            f"target_l0 {target}: needs a penalty whose coefficient can be adjusted, and a coeff above 0 "
            f"to start from; penalty is {config.resolved_penalty!r}, coeff {config.coeff}"
        )


def _check_start(config: "RunConfig") -> None:
    if config.init_from is None:
        _require(config, "init_digest", config.init_digest is None, "None where init_from is None")
    else:
        _require(config, "initial_bias", config.initial_bias == 0, "0 with init_from, whose biases are kept")


def _check_schedule(config: "RunConfig") -> None:
    warmed_up = config.warmup_fraction
    start = config.decay_start_fraction
    end = config.decay_end_fraction
    if not 0 <= warmed_up <= start < end < math.inf:
        raise ValueError(
            f"schedule: needs 0 <= warmup_fraction {warmed_up} <= decay_start_fraction {start} < "
            f"decay_end_fraction {end}"
        )


def _check_resampling(config: "RunConfig") -> None:
    for name in ("resample_dead_below", "resample_exponent", "resample_encoder_norm"):
        _require(config, name, 0 <= getattr(config, name) < math.inf, "0 or more, and finite")
    limit = config.resample_max_raw_norm
    _require(config, "resample_max_raw_norm", limit is None or limit > 0, "more than 0, or None")
    if any(not 0 < fraction < 1 for fraction in (*config.resample_fractions, config.resample_count_fraction)):
        raise ValueError(
            f"resample_fractions {config.resample_fractions}, resample_count_fraction "
            f"{config.resample_count_fraction}: must be more than 0 and less than 1"
        )
