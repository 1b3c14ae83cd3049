"""Where a run's weights begin: a random draw, or a saved SAE."""

import math

import torch
from torch import Tensor

from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE, SAEConfig, weights_digest
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.weights import Weights, normalise_rows_
from prolu.training.config import RunConfig

ROUNDINGS = 16
"""A decoder row is of unit norm if off 1 by no more than so many eps of the coarser format, the file's or the run's."""


def starting_weights(config: RunConfig, d_in: int, dtype: torch.dtype = torch.float32) -> Weights:
    """Weights before the first update: drawn by `init_seed`, or those of the SAE in `init_from`.

    Trained decoder rows have unit norm. Where the SAE's have not, row i's norm n moves into the encoder and the
    nonlinearity's own parameters: W_dec / n, W_enc n, b n, at which the latent is n times as large and the
    reconstruction the same.

    Raises:
        ValueError: no SAE there, or another than `init_digest` says, or it does not fit the run.
    """
    wanted = config.sae_config(d_in)
    if config.init_from is None:
        return initial_weights(wanted, config.init_seed, dtype, config.initial_bias)
    sae = SAE.load(config.init_from)
    _check_fit(config, wanted, sae.config)
    weights = sae.weights
    norms = torch.linalg.vector_norm(weights.decoder, dim=1, dtype=torch.float64)
    eps = max(torch.finfo(weights.decoder.dtype).eps, torch.finfo(dtype).eps)  # fp32 weights may be kept as fp64
    off_unit = (norms - 1).abs() > ROUNDINGS * eps
    weights = weights.map(lambda t: t.to(dtype, copy=True))
    return _with_unit_rows(config, weights, norms) if off_unit.any() else weights


def _check_fit(config: RunConfig, wanted: SAEConfig, found: SAEConfig) -> None:
    assert config.init_from is not None
    place = f"init_from {config.init_from!r}"
    if (digest := weights_digest(config.init_from)) != config.init_digest:
        raise ValueError(f"{place}: its weights' SHA-256 is {digest}, init_digest says {config.init_digest}")
    if found.d_in != wanted.d_in:
        raise ValueError(f"{place}: that SAE takes activations of width {found.d_in}, these have {wanted.d_in}")
    for name in ("d_sae", "normalisation"):
        if getattr(found, name) != getattr(wanted, name):
            raise ValueError(
                f"{name} {getattr(wanted, name)!r}: the SAE in {config.init_from!r} has {getattr(found, name)!r}, and "
                "the run that starts from it must have that too"
            )
    if type(nonlinearity_named(found.nonlinearity)) is not type(nonlinearity_named(wanted.nonlinearity)):
        raise ValueError(
            f"nonlinearity {wanted.nonlinearity!r}: the SAE in {config.init_from!r} has {found.nonlinearity!r}; only "
            "its arguments, or its synthetic gradient, can be another"
        )


def _with_unit_rows(config: RunConfig, weights: Weights, norms: Tensor) -> Weights:
    nonlinearity = nonlinearity_named(config.resolved_nonlinearity)
    if nonlinearity.in_training.selection is not None:
        raise ValueError(
            f"init_from {config.init_from!r}: its decoder rows have norms from {norms.min():.4g} to {norms.max():.4g}; "
            f"{config.nonlinearity} selects among latents by their size, so they cannot be scaled to rows of unit norm"
        )
    if not norms.all():
        raise ValueError(
            f"init_from {config.init_from!r}: decoder row {int(norms.argmin())} is 0, and has no direction"
        )
    factor = norms.to(weights.decoder.dtype)
    own = nonlinearity.rescaled(weights.own, factor)
    return Weights(weights.encoder * factor[:, None], weights.decoder / factor[:, None], weights.b_dec, own)


def initial_weights(
    config: SAEConfig, init_seed: int, dtype: torch.dtype = torch.float32, initial_bias: float = 0.0
) -> Weights:
    """W_enc Kaiming-uniform over the latents (bound sqrt(6 / d_sae)), W_dec = W_enc^T with unit rows, b_dec = 0."""
    nonlinearity = nonlinearity_named(config.nonlinearity)
    bound = math.sqrt(6 / config.d_sae)
    draws = torch.rand(config.d_sae, config.d_in, generator=keyed_generator(init_seed, "init"))
    encoder = ((2 * draws - 1) * bound).to(dtype)
    decoder = encoder.clone()
    normalise_rows_(decoder)
    own = {
        name: torch.full((config.d_sae,), nonlinearity.initial(name), dtype=dtype)
        for name in nonlinearity.parameter_names
    }
    if "b_enc" in own:
        own["b_enc"].fill_(initial_bias)
    return Weights(encoder, decoder, torch.zeros(config.d_in, dtype=dtype), own)
