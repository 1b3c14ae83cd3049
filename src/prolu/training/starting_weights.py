"""The weights before the first update: drawn at random, or those of a saved SAE."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.saved_sae import SAEConfig, weights_digest
from prolu.sae.weights import Weights, normalise_rows_
from prolu.training.config import RunConfig

UNIT_NORM_TOLERANCE = 16
"""A decoder row counts as of unit norm if its norm differs from 1 by at most this many eps of the coarser number
format, the file's or the run's."""


def starting_weights(
    config: RunConfig, d_in: int, dtype: torch.dtype = torch.float32, d_out: int | None = None
) -> Weights:
    """Return the weights that a run starts from; `d_out` is the width of a transcoder's target, None for an SAE.

    Raises:
        ValueError: there is no SAE in `init_from`, or it is not the one of `init_digest`, or it does not fit the run.
    """
    sae_config = config.sae_config(d_in, d_out)
    if config.init_from is None:
        return initial_weights(sae_config, config.init_seed, dtype, config.initial_bias)
    return _saved_weights(config, sae_config, dtype)


def initial_weights(
    config: SAEConfig, init_seed: int, dtype: torch.dtype = torch.float32, initial_bias: float = 0.0
) -> Weights:
    """Return weights drawn at random (docs/guide/concepts.md).

    W_enc is Kaiming-uniform over the latents, with the bound sqrt(6 / d_sae); W_dec is W_enc^T with rows of unit norm;
    b_dec is 0; encoder biases are `initial_bias`, other own parameters what their nonlinearity starts them at.

    A transcoder writes into another space than it reads from, so the rows of its W_dec are drawn by themselves, in
    directions that are uniform over the cube, and have unit norm too; b_out and W_skip are 0.
    """
    nonlinearity = nonlinearity_named(config.nonlinearity)
    bound = math.sqrt(6 / config.d_sae)
    # Drawn in fp32 whatever the dtype, so that a seed gives one SAE.
    draws = torch.rand(config.d_sae, config.d_in, generator=keyed_generator(init_seed, "init"))
    encoder = ((2 * draws - 1) * bound).to(dtype)
    decoder = encoder.clone()
    if config.is_transcoder:
        draws = torch.rand(config.d_sae, config.width_out, generator=keyed_generator(init_seed, "init decoder"))
        decoder = (2 * draws - 1).to(dtype)
    normalise_rows_(decoder)
    own = {
        name: torch.full((config.d_sae,), nonlinearity.initial(name), dtype=dtype)
        for name in nonlinearity.parameter_names
    }
    if "b_enc" in own:
        own["b_enc"].fill_(initial_bias)
    zeros = encoder.new_zeros
    return Weights(
        encoder,
        decoder,
        zeros(config.d_in),
        own,
        b_out=zeros(config.width_out) if config.is_transcoder else None,
        skip=zeros(config.d_in, config.width_out) if config.skip else None,
    )


def _saved_weights(config: RunConfig, sae_config: SAEConfig, dtype: torch.dtype) -> Weights:
    """Return the weights of the SAE in `init_from`, with decoder rows of unit norm, as training keeps them."""
    assert config.init_from is not None
    sae = SAE.load(config.init_from)
    _check_fit(config, sae_config, sae.config)
    norms = torch.linalg.vector_norm(sae.weights.decoder, dim=1, dtype=torch.float64)
    # The coarser of the two formats: fp32 weights may be kept in a file of fp64.
    eps = max(torch.finfo(sae.weights.decoder.dtype).eps, torch.finfo(dtype).eps)
    off_unit = (norms - 1).abs() > UNIT_NORM_TOLERANCE * eps
    weights = sae.weights.map(lambda t: t.to(dtype, copy=True))
    # Rows that have unit norm already are left alone: dividing again would change their last bits.
    return _with_unit_rows(config, weights, norms) if off_unit.any() else weights


def _check_fit(config: RunConfig, wanted: SAEConfig, found: SAEConfig) -> None:
    """Raise ValueError unless a saved SAE is the one that was asked for, and has the run's shape and kind."""
    assert config.init_from is not None
    place = f"init_from {config.init_from!r}"
    if (digest := weights_digest(config.init_from)) != config.init_digest:
        raise ValueError(f"{place}: the SHA-256 of its weights is {digest}, but init_digest is {config.init_digest}")
    if found.d_in != wanted.d_in:
        raise ValueError(f"{place}: that SAE takes activations of width {found.d_in}, these have {wanted.d_in}")
    if (found.d_out, found.skip) != (wanted.d_out, wanted.skip):
        raise ValueError(f"{place}: it is {_kind(found)}, and the run trains {_kind(wanted)}")
    for name in ("d_sae", "normalisation"):
        if getattr(found, name) != getattr(wanted, name):
            raise ValueError(
                f"{name} {getattr(wanted, name)!r}: the SAE in {config.init_from!r} has {getattr(found, name)!r}; a "
                "run that starts from it must have the same"
            )
    theirs, ours = (nonlinearity_named(each.nonlinearity) for each in (found, wanted))
    # JumpReLUs may have another parameter for their threshold.
    if type(theirs) is not type(ours) or theirs.parameter_names != ours.parameter_names:
        raise ValueError(
            f"nonlinearity {wanted.nonlinearity!r}: the SAE in {config.init_from!r} has {found.nonlinearity!r}; only "
            "its arguments or its synthetic gradient may differ"
        )


def _kind(config: SAEConfig) -> str:
    if not config.is_transcoder:
        return "an SAE"
    return f"a {'skip ' if config.skip else ''}transcoder into activations of width {config.d_out}"


def _with_unit_rows(config: RunConfig, weights: Weights, norms: Tensor) -> Weights:
    """Move the norm n of each decoder row into the encoder and the own parameters.

    With W_dec / n, W_enc n and b n a latent is n times as large, and the reconstruction is the same.
    """
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
    return replace(
        weights, encoder=weights.encoder * factor[:, None], decoder=weights.decoder / factor[:, None], own=own
    )
