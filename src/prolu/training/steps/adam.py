"""The update: decoder gradient projected, optionally clipped, Adam, decoder rows renormalised."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.weights import Weights, normalise_rows_
from prolu.training.moments import Moments

ENTRIES_PER_SLAB = 2**18
"""The number of entries of each matrix that are updated at a time: 1 MB of fp32, so that they stay in the cache from
the projection to the renormalisation, and memory is passed over once."""


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam's constants (docs/guide/concepts.md), and an optional clip, which the paper does not have."""

    beta1: float = 0.9
    """The decay rate of the first moment."""
    beta2: float = 0.999
    """The decay rate of the second moment."""
    eps: float = 1e-8
    """What is added to the root of the second moment before it divides."""
    max_grad_norm: float | None = None
    """The largest norm of all gradients together, after the projection; a longer gradient is scaled down to it. None:
    no gradient is clipped."""
    frozen: str | None = None
    """The matrix that is not trained, `encoder` or `decoder`, whose gradient does not count in that norm."""


class Update(NamedTuple):
    """Which update is made, at which learning rate, with which constants."""

    n_updates: int
    """The number of updates that were made before this one."""
    lr: float
    """The learning rate of this update."""
    adam: AdamConfig = AdamConfig()
    """Adam's constants."""

    @property
    def step_size(self) -> float:
        """The learning rate, corrected for the bias of a first moment that started at 0."""
        return self.lr / (1 - self.adam.beta1 ** (self.n_updates + 1))

    @property
    def second_moment_scale(self) -> float:
        """The factor on the root of the second moment that corrects the bias from its start at 0."""
        return (1 - self.adam.beta2 ** (self.n_updates + 1)) ** -0.5

    def constants(self, dtype: np.dtype) -> np.ndarray:
        """Return what the numba kernels need: beta1, 1 - beta1, beta2, 1 - beta2, step_size, second_moment_scale, eps.

        They are computed in double precision and rounded once: 1 - beta2 in fp32 would be off in the fifth digit.
        """
        adam = self.adam
        decays = (adam.beta1, 1 - adam.beta1, adam.beta2, 1 - adam.beta2)
        return np.array((*decays, self.step_size, self.second_moment_scale, adam.eps), dtype)


def adam_update_(weights: Weights, gradients: Weights, moments: Moments, update: Update, mesh: Mesh = ALONE) -> None:
    """Make one projected Adam update of weights and moments, in place; `gradients` are used up.

    With w a decoder row and g its gradient:

        g <- g - (g . w) w        before Adam: only the direction of a row is trained
        w <- w / |w|              after Adam

    This is one pass over memory, or two with a clip, which needs the norm of all gradients first.

    Args:
        weights: those of all latents or, on a mesh, of this rank's.
        gradients: of the same latents.
        moments: Adam's moments of the same latents.
        update: which update it is.
        mesh: the ranks that hold the other latents; a clip looks at all of them.
    """
    slabs = _slabs(weights)
    scale = None
    if update.adam.max_grad_norm is not None:
        for rows in slabs:
            project_(gradients.decoder[rows], weights.decoder[rows])
        scale = clip_scale(gradients, update.adam, mesh)
    for rows in slabs:
        if scale is None:
            project_(gradients.decoder[rows], weights.decoder[rows])
        else:
            for gradient in _tensors_at(gradients, rows):
                gradient.div_(scale)
        _adam_(weights, gradients, moments, update, rows)
        normalise_rows_(weights.decoder[rows])


def _adam_(weights: Weights, gradients: Weights, moments: Moments, update: Update, rows: slice) -> None:
    """Apply torch's own fused Adam to some latents."""
    params = _tensors_at(weights, rows)
    adam(
        params,
        _tensors_at(gradients, rows),
        _tensors_at(moments.first, rows),
        _tensors_at(moments.second, rows),
        max_exp_avg_sqs=[],
        # torch counts a tensor's updates in a tensor, which it increases: new ones, since each slab is one call.
        state_steps=[torch.tensor(float(update.n_updates), device=p.device) for p in params],
        fused=True,
        amsgrad=False,
        beta1=update.adam.beta1,
        beta2=update.adam.beta2,
        lr=update.lr,
        weight_decay=0.0,
        eps=update.adam.eps,
        maximize=False,
    )


def _slabs(weights: Weights) -> list[slice]:
    """Return runs of latents with about `ENTRIES_PER_SLAB` entries each; on a GPU, one run of all latents."""
    if weights.encoder.device.type != "cpu":
        # On a GPU, starting more kernels costs more than a second pass over memory.
        return [slice(0, weights.d_sae)]
    n = max(1, ENTRIES_PER_SLAB // weights.d_in)
    return [slice(start, min(start + n, weights.d_sae)) for start in range(0, weights.d_sae, n)]


def _tensors_at(weights: Weights, rows: slice) -> list[Tensor]:
    """Return these rows of both matrices; with the first run of latents also all other tensors, whole."""
    others = weights.tensors()[2:] if rows.start == 0 else []
    return [weights.encoder[rows], weights.decoder[rows], *others]


def clip_scale(gradients: Weights, adam: AdamConfig, mesh: Mesh = ALONE) -> Float[Tensor, ""]:
    """Return the number by which to divide all gradients, so that their norm together is at most the largest allowed.

    Args:
        gradients: of the latents of this rank.
        adam: says what is allowed, in `max_grad_norm`.
        mesh: the ranks that hold the other latents.
    """
    assert adam.max_grad_norm is not None
    norms = torch.stack([torch.linalg.vector_norm(g) for name, g in gradients.named().items() if name != adam.frozen])
    if mesh.n_latent > 1:
        # The gradient of what has no row for each latent is on every rank, and is counted by the first only.
        shared = torch.stack([torch.linalg.vector_norm(g) for g in gradients.shared().values()])
        squares = norms.square().sum() - shared.square().sum() * (mesh.latent_rank > 0)
        norms = mesh.sum_over_latents_(squares, "scalars").sqrt()
    return (torch.linalg.vector_norm(norms) / adam.max_grad_norm).clamp_(min=1)


def project_(gradient: Float[Tensor, "*stack rows d"], unit_rows: Float[Tensor, "*stack rows d"]) -> None:
    """Remove each row's component along the unit row beside it, in place."""
    along = (gradient * unit_rows).sum(-1, keepdim=True)
    gradient.addcmul_(along, unit_rows, value=-1)
