"""Random baselines: an SAE one of whose matrices stays as it started, at random, or nearly so.

An SAE whose directions are learned should beat them. They are those of "Sanity Checks for Sparse Autoencoders: Do SAEs
Beat Random Baselines?" (Korznikov et al. 2026, arXiv 2602.14111).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.sae.weights import Weights
from prolu.training.choices import Freeze

LEAST_COSINE = 0.8
"""The least cosine of a decoder row of a soft-frozen decoder with the row as it started; the paper's value."""

PARTS = {"none": None, "decoder": "decoder", "encoder": "encoder", "soft_decoder": "decoder"}
"""The matrix that each choice of `RunConfig.freeze` holds."""


class FrozenParts:
    """Holds the matrix of an SAE that a run does not train, or trains within bounds, where it started.

        freeze          after every update and every resampling, with s a row at the start of training
        decoder         W_dec row <- s
        encoder         W_enc column <- s
        soft_decoder    W_dec row w <- the unit vector nearest to w among those with cos(w, s) >= 0.8

    So the kinds of steps need not know of it: what a step has changed in a frozen matrix is undone before the next
    step. With c = w . s of two unit vectors and t the unit vector along w - c s, the nearest one is w itself
    where c >= 0.8, else

        0.8 s + sqrt(1 - 0.8^2) t

    The paper says that the cosine is kept at 0.8 or more throughout training, not how; this is a projection, after
    every step. Biases and thresholds are trained, so that latents of random directions can be active on suitable
    inputs. The paper does not say how W_enc starts beside a frozen decoder; here it starts along W_dec, as in every
    run.

    Resampling gives a dead latent a new direction in the matrix that is trained, and a new bias. A soft-frozen row goes
    as near to the new direction as it may.
    """

    def __init__(self, freeze: Freeze, start: Weights):
        """Keep a copy of the frozen matrix.

        Args:
            freeze: what is held.
            start: the weights at the start of training; on a mesh, those of a rank's latents.
        """
        self._part = PARTS[freeze]
        self._is_soft = freeze == "soft_decoder"
        self._start = None if self._part is None else getattr(start, self._part).clone()

    @property
    def untrained(self) -> str | None:
        """The matrix that does not move at all, `encoder` or `decoder`; None if there is none."""
        return None if self._is_soft else self._part

    def hold_(self, weights: Weights) -> None:
        """Bring the frozen matrix of these weights back, in place."""
        if self._part is None or self._start is None:
            return
        matrix = getattr(weights, self._part)
        matrix.copy_(_within_cone(matrix, self._start) if self._is_soft else self._start)


def _within_cone(rows: Float[Tensor, "d_sae d_in"], start: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae d_in"]:
    """Return the unit row nearest to each unit row whose cosine with that of `start` is `LEAST_COSINE` or more."""
    cosine = (rows * start).sum(-1, keepdim=True)
    across = rows - cosine * start
    length = torch.linalg.vector_norm(across, dim=-1, keepdim=True)
    edge = LEAST_COSINE * start + (1 - LEAST_COSINE**2) ** 0.5 / length * across
    # For a row exactly opposite to its start, no direction is the nearest one, so it is set to its start.
    return torch.where(cosine >= LEAST_COSINE, rows, torch.where(length > 0, edge, start))
