"""The update: decoder gradient projected, Adam, decoder rows renormalised."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.optim.adam import adam

from prolu.weights import Weights


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam's constants (section 3 of the method)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

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
) -> None:
    """One projected Adam update, in place; `gradients` are spent.

    The decoder gradient loses its component along each row before the step, and rows return to unit
    norm after it: w.r.t. a unit row w, g <- g - (g . w) w.

    Args:
        n_updates: updates made before this one.
        lr: learning rate of this update.
        first: Adam's first moments.
        second: Adam's second moments.
    """
    along = (gradients.decoder * weights.decoder).sum(1, keepdim=True)
    gradients.decoder.addcmul_(along, weights.decoder, value=-1)
    params = weights.tensors()
    steps = [torch.tensor(float(n_updates), device=params[0].device) for _ in params]
    adam(
        params, gradients.tensors(), first.tensors(), second.tensors(), [], steps,
        fused=True, amsgrad=False, beta1=config.beta1, beta2=config.beta2, lr=lr, weight_decay=0.0,
        eps=config.eps, maximize=False,
    )  # fmt: skip
    normalise_rows_(weights.decoder)


def normalise_rows_(matrix: torch.Tensor) -> None:
    """Rows to unit norm, in place."""
    matrix /= torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
