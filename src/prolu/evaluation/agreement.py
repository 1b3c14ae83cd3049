"""How far two SAEs agree: whether the directions of one are found again in the other.

Two SAEs that differ in their seed only should find the same latents, if latents are facts about the language model.
All figures are cosines of directions, so no text and no language model is needed.

With d_i and e_j the directions of the live latents of the two SAEs, n_a and n_b of them, c_ij = cos(d_i, e_j):

- mean max cosine = (sum_i max_j c_ij + sum_j max_i c_ij) / (n_a + n_b);
- found again above t = (#{i: max_j c_ij >= t} + #{j: max_i c_ij >= t}) / (n_a + n_b);
- matched cosine = 2 sum over pairs of c_ij / (n_a + n_b), where the pairs are the one-to-one assignment of the largest
  sum (the Hungarian method). A latent without a partner counts as 0, and no pair has a cosine below 0.

The last is PW-MCC of Song et al. 2025, "Position: Mechanistic Interpretability Should Prioritize Feature Consistency in
SAEs" (arXiv 2505.20254), but for the sign: it takes |c_ij|, and here opposite directions do not agree, since latents
are never below 0. The threshold 0.7 is that of Paulo and Belrose 2025 (arXiv 2501.16615).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prolu.sae.autoencoder import SAE

ROWS_PER_PASS = 1024
"""The number of latents of one SAE whose cosines with all of the other are computed at once."""

MOST_EXACT = 1024
"""The largest number of live latents for which the best of all assignments is computed. Its time grows as their third
power, and it needs all cosines at once; with more latents, only pairs of near ones are considered."""

N_NEAREST = 16
"""The number of nearest latents of the other SAE, of every latent, that are considered beyond `MOST_EXACT`."""


class Agreement(NamedTuple):
    """How far the directions of two SAEs agree. All figures are nan if one of them has no live latent."""

    mean_max_cosine: float
    """The mean over the latents of both of the largest cosine with a latent of the other, from -1 to 1."""
    matched_cosine: float
    """The mean over the latents of both of the cosine with the partner in the best one-to-one assignment, from 0 to 1.
    Where an SAE has more than 1,024 live latents, only pairs are considered of which one is among the 16 nearest of the
    other. It is then a lower bound, which was too low by 0.0001 where half of 2,048 latents had no true partner."""
    found_again_07: float
    """The fraction of the latents of both whose largest cosine is at least 0.7, from 0 to 1."""
    found_again_09: float
    """The fraction of the latents of both whose largest cosine is at least 0.9, from 0 to 1."""


class SAEAgreement(NamedTuple):
    """How far two SAEs agree in their decoder rows and in their encoder columns."""

    decoder: Agreement
    encoder: Agreement


def agreement_of(
    a: SAE,
    b: SAE,
    live_a: Bool[Tensor, " d_sae_a"] | None = None,
    live_b: Bool[Tensor, " d_sae_b"] | None = None,
) -> SAEAgreement:
    """Return how far two SAEs agree.

    Dead latents should not count: they point wherever their starting weights did, and how many there are is a figure of
    its own (`dead_fraction`). So the masks say which latents are live; without them all count.

    Args:
        a: an SAE.
        b: an SAE of the same widths; its number of latents may differ.
        live_a: which latents of `a` count, for example those with a density above 0; None for all.
        live_b: the same of `b`.

    Raises:
        ValueError: the SAEs are of activations of different widths.
    """
    if (a.d_in, a.d_out) != (b.d_in, b.d_out):
        raise ValueError(f"the SAEs have widths {(a.d_in, a.d_out)} and {(b.d_in, b.d_out)}, but must have the same")
    pairs = ((_rows(m, live_a), _rows(n, live_b)) for m, n in ((a.W_dec, b.W_dec), (a.W_enc.T, b.W_enc.T)))
    return SAEAgreement(*(direction_agreement(*pair) for pair in pairs))


def _rows(matrix: Tensor, live: Tensor | None) -> Tensor:
    matrix = matrix.detach().cpu()
    return matrix if live is None else matrix[live.cpu()]


@torch.no_grad()
def direction_agreement(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> Agreement:
    """Return how far two sets of rows agree in direction. Lengths do not matter; a row of zeros agrees with none."""
    if not len(a) or not len(b):
        return Agreement(*[math.nan] * len(Agreement._fields))
    a = torch.nn.functional.normalize(a.float(), dim=1)
    b = torch.nn.functional.normalize(b.float(), dim=1)
    of_a = _nearest(a, b)
    of_b = _nearest(b, a)
    largest = torch.cat([of_a.values[:, 0], of_b.values[:, 0]]).double()
    best_sum = _best_sum(a @ b.T) if max(len(a), len(b)) <= MOST_EXACT else _best_sum_of_near(of_a, of_b)
    return Agreement(
        mean_max_cosine=largest.mean().item(),
        matched_cosine=2 * best_sum / (len(a) + len(b)),
        found_again_07=(largest >= 0.7).double().mean().item(),
        found_again_09=(largest >= 0.9).double().mean().item(),
    )


class _Nearest(NamedTuple):
    """The nearest rows of another matrix, of each row of one, in descending order of their cosines."""

    values: Float[Tensor, "n k"]
    """The cosines."""
    indices: Int[Tensor, "n k"]
    """The numbers of the other matrix's rows."""


def _nearest(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"]) -> _Nearest:
    # Some rows at a time, so that a matrix of all cosines is never made.
    parts = [(some @ b.T).topk(min(N_NEAREST, len(b)), dim=1) for some in a.split(ROWS_PER_PASS)]
    return _Nearest(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))


def _best_sum(cosines: Float[Tensor, "n_a n_b"]) -> float:
    """Return the largest sum of cosines of pairs in which no row and no column is used twice."""
    # scipy takes long to import, and only this needs it.
    from scipy.optimize import linear_sum_assignment

    # A pair with a cosine below 0 counts as 0, like a latent without a partner.
    values = cosines.double().clamp(min=0).numpy()
    return float(values[linear_sum_assignment(values, maximize=True)].sum())


def _best_sum_of_near(of_a: _Nearest, of_b: _Nearest) -> float:
    """Return the largest sum of cosines of these pairs in which no row of a and no row of b is used twice."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_a, k_a = of_a.indices.shape
    n_b, k_b = of_b.indices.shape
    cosines = torch.cat([of_a.values.flatten(), of_b.values.flatten()]).double().numpy()
    rows = torch.cat([torch.arange(n_a).repeat_interleave(k_a), of_b.indices.flatten()]).numpy()
    columns = torch.cat([of_a.indices.flatten(), torch.arange(n_b).repeat_interleave(k_b)]).numpy()
    _, once = np.unique(rows * n_b + columns, return_index=True)
    once = once[cosines[once] > 0]
    # Every row may also stay alone, which is a column of its own at the cosine 0. A cost of 0 would be no pair at all,
    # so costs are 2 - cosine.
    costs = np.concatenate([2 - cosines[once], np.full(n_a, 2.0)])
    rows = np.concatenate([rows[once], np.arange(n_a)])
    columns = np.concatenate([columns[once], n_b + np.arange(n_a)])
    allowed = csr_array((costs, (rows, columns)), shape=(n_a, n_b + n_a))
    return float(2 * n_a - allowed[min_weight_full_bipartite_matching(allowed)].sum())
