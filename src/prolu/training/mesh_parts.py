"""One SAE split over the ranks of a mesh: whether it can be, the part of each rank, and what all ranks have together.

In one process the only part is the whole SAE, and sums over ranks change nothing, to the bit.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import Mesh
from prolu.sae.nonlinearities import Nonlinearity, nonlinearity_named
from prolu.sae.weights import Weights
from prolu.training.config import RunConfig
from prolu.training.steps import StepStats


def check_mesh(config: RunConfig, batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError unless a run can be trained on a mesh."""
    mesh.check("d_sae", config.d_sae, "latent")
    mesh.check("batch_size", batch_size, "data")
    if (config.matryoshka or config.matryoshka_drawn) and mesh.n_latent > 1:
        raise ValueError(
            f"mesh: the latents of a nested loss (matryoshka {config.matryoshka or 'drawn'}) cannot be divided among "
            f"{mesh.n_latent} ranks; divide the batch only, data={mesh.n_ranks}"
        )
    if config.refit_tokens and mesh.n_ranks > 1:
        raise ValueError(f"refit_tokens {config.refit_tokens}: must be 0 on a mesh of {mesh.n_ranks} ranks")
    if config.step in ("sparse", "sparse_torch") and needs_dense(config, mesh):
        raise ValueError(
            f"step {config.step!r}: {config.nonlinearity} on several ranks needs the dense step; choose auto or dense"
        )


def needs_dense(config: RunConfig, mesh: Mesh) -> bool:
    """Return whether only the dense step can train a run on a mesh: it alone selects latents of several ranks."""
    selection = nonlinearity_named(config.resolved_nonlinearity).in_training.selection
    return selection is not None and (mesh.n_latent > 1 or (selection.over_batch and mesh.n_data > 1))


def part_of(weights: Weights, mesh: Mesh) -> Weights:
    """Return this rank's latents of whole weights."""
    if mesh.n_latent == 1:
        return weights
    here = mesh.latents(weights.d_sae)
    own = {name: t[here] for name, t in weights.own.items()}
    # Copied, so that the whole weights, of which these are views, can be freed.
    part = replace(weights, encoder=weights.encoder[here], decoder=weights.decoder[here], own=own)
    return part.map(torch.clone)


def whole_weights(weights: Weights, mesh: Mesh) -> Weights | None:
    """Return the weights of all latents. All ranks ask together; only the first gets them, the others get None."""
    if mesh.n_latent == 1:
        return weights if mesh.is_first else None
    parts = [mesh.whole(t) for t in (weights.encoder, weights.decoder, *weights.own.values())]
    if not mesh.is_first:
        return None
    encoder, decoder, *own = [part for part in parts if part is not None]
    whole = replace(weights, encoder=encoder, decoder=decoder, own=dict(zip(weights.own, own, strict=True)))
    return whole.map(lambda t: t.to(weights.b_dec))


def stats_of_batch(stats: StepStats, nonlinearity: Nonlinearity, mesh: Mesh) -> tuple[StepStats, Float[Tensor, ""]]:
    """Return the statistics of all rows of the batch, and the number of active pairs in it.

    `fired` stays that of this rank's latents, now over all rows.
    """
    n_active = stats.fired.sum()
    if mesh.n_ranks == 1:
        return stats, n_active
    # Every rank of a row of the mesh has these two already, and they are added up n_latent times.
    mse = stats.mse / mesh.n_latent
    auxiliary = stats.auxiliary / mesh.n_latent
    # One collective for four numbers.
    sums = torch.stack([mse.double(), stats.penalty.double(), auxiliary.double(), n_active.double()])
    mse, penalty, auxiliary, n_active = mesh.sum_over_all_(sums, "scalars")
    fired = mesh.sum_over_data_(stats.fired, "fired")
    smallest = stats.smallest
    if nonlinearity.selection is not None:
        # A rank on which no latent is active reports 0, which must not count as the smallest.
        smallest = mesh.least_of_all_(smallest.where(smallest > 0, torch.inf))
        smallest = smallest.where(smallest.isfinite(), 0)
    return StepStats(mse, penalty, auxiliary, fired, smallest), n_active
