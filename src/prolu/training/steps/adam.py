"""The update: decoder gradient projected, optionally clipped, Adam, decoder rows renormalised."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.weights import Weights, normalise_rows_

ENTRIES_PER_SLAB = 2**18
"""Entries of each matrix updated at a time: they stay in the cache, so memory is passed over once."""


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam's constants (section 3 of the method), and an optional clip, which the paper does not have."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = None
    """Largest norm of all gradients together, after the projection; longer ones are scaled down to it. None: never."""

    def constants(self, n_updates: int, lr: float, dtype: np.dtype) -> np.ndarray:
        """Of update number `n_updates` (from 0): beta1, 1 - beta1, beta2, 1 - beta2, step, 1 / sqrt(bias), eps."""
        bias1, bias2 = 1 - self.beta1 ** (n_updates + 1), 1 - self.beta2 ** (n_updates + 1)
        values = (self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, lr / bias1, bias2**-0.5, self.eps)
        return np.array(values, dtype)


def adam_update_(
    weights: Weights,
    gradients: Weights,
    first: Weights,
    second: Weights,
    *,
    n_updates: int,
    lr: float,
    config: AdamConfig = AdamConfig(),
    mesh: Mesh = ALONE,
) -> None:
    """One projected Adam update, in place; `gradients` are spent.

    The decoder gradient loses its component along each row before the step, and rows return to unit
    norm after it: w.r.t. a unit row w, g <- g - (g . w) w. One pass over memory, two with a clip.

    Args:
        n_updates: updates made before this one.
        lr: learning rate of this update.
        first: Adam's first moments.
        second: Adam's second moments.
        mesh: of whose latents these are a part; a clip looks at all of them.
    """
    slabs = _slabs(weights)
    scale = None
    if config.max_grad_norm is not None:
        for rows in slabs:
            project_(gradients.decoder[rows], weights.decoder[rows])
        scale = clip_scale(gradients, config.max_grad_norm, mesh)
    for rows in slabs:
        params, grads, ms, vs = (_rows(w, rows) for w in (weights, gradients, first, second))
        decoder = weights.decoder[rows]
        if scale is None:
            project_(gradients.decoder[rows], decoder)
        else:
            for g in grads:
                g.div_(scale)
        steps = [torch.tensor(float(n_updates), device=p.device) for p in params]
        adam(
            params, grads, ms, vs, [], steps,
            fused=True, amsgrad=False, beta1=config.beta1, beta2=config.beta2, lr=lr, weight_decay=0.0,
            eps=config.eps, maximize=False,
        )  # fmt: skip
        normalise_rows_(decoder)


def _slabs(weights: Weights) -> list[slice]:
    """Runs of latents of about `ENTRIES_PER_SLAB` entries; all of them where launches cost more than memory."""
    if weights.encoder.device.type != "cpu":
        return [slice(0, weights.d_sae)]
    n = max(1, ENTRIES_PER_SLAB // weights.d_in)
    return [slice(start, min(start + n, weights.d_sae)) for start in range(0, weights.d_sae, n)]


def _rows(weights: Weights, rows: slice) -> list[Tensor]:
    """These rows of both matrices; the first run takes the vectors along."""
    vectors = [weights.b_dec, *weights.own.values()] if rows.start == 0 else []
    return [weights.encoder[rows], weights.decoder[rows], *vectors]


def clip_scale(gradients: Weights, max_grad_norm: float, mesh: Mesh = ALONE) -> Float[Tensor, ""]:
    """What to divide all gradients by, so that their norm together is at most `max_grad_norm`."""
    norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients.tensors()])
    if mesh.n_latent > 1:
        b_dec = torch.linalg.vector_norm(gradients.b_dec)  # on every rank, and counted once
        squares = norms.square().sum() - b_dec.square() * (mesh.latent_rank > 0)
        norms = mesh.sum_over_latents_(squares, "scalars").sqrt()
    return (torch.linalg.vector_norm(norms) / max_grad_norm).clamp_(min=1)


def project_(gradient: Float[Tensor, "rows d"], unit_rows: Float[Tensor, "rows d"]) -> None:
    """Removes each row's component along the unit row beside it, in place."""
    along = (gradient * unit_rows).sum(1, keepdim=True)
    gradient.addcmul_(along, unit_rows, value=-1)
