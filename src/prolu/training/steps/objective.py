"""The loss that a step minimises, and the statistics that it reports."""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import Mesh
from prolu.sae.nonlinearities import Auxiliary, Nonlinearity, Parameters, Pullback
from prolu.sae.penalties import Penalty
from prolu.sae.weights import Weights


class WeightTerm(ABC):
    """A term of the loss that depends on the weights alone, such as how far decoder rows are from orthogonal.

    It is the place for a loss that is no sum over entries (token, latent), as penalties are. A step that has such terms
    makes its gradients whole, and adds theirs before the update.
    """

    @abstractmethod
    def add_gradients_(self, weights: Weights, gradients: Weights) -> None:
        """Add the gradient of the term, its coefficient included, to the gradients, in place.

        In a stack of SAEs all tensors have one dimension more, in front. On a mesh, `weights` are those of a rank's
        latents.
        """


@dataclass(frozen=True)
class Objective:
    """loss = mean over batch and d_in of (x - x_hat)^2 + coeff * mean over batch of P + auxiliary term.

    A penalty of means (`Penalty.is_of_means`) has coeff * P instead, with P of the whole batch.

    The squared error is a mean over dimensions and P a sum over latents. Both are in normalised space.

    A nested (Matryoshka) loss has in place of the first term its mean over several reconstructions, each from the first
    latents only: x_hat_g = sum over i < g of f_i W_dec[i] + b_dec, for every g of `prefixes` and for d_sae. It costs a
    step little: a latent i of block j, of those that are in the same prefixes, sees in place of the error
    e = x_hat - x the sum of e_g over the prefixes that contain it, divided by their number. So the latents are decoded
    block by block, each block's error is kept, and the errors are summed from the last block to the first.
    """

    nonlinearity: Nonlinearity
    penalty: Penalty
    coeff: float | Tensor
    """The coefficient of the penalty. It is a tensor where a GPU computes it, where a stack of SAEs has several, or
    where it differs between latents."""
    auxiliary: Auxiliary | None = None
    prefixes: tuple[int, ...] = ()
    """The numbers of latents of the shorter SAEs of a nested loss, from the smallest on; empty for a plain loss."""
    prefixes_are_drawn: bool = False
    """Whether each batch has other prefixes, so that nothing can be compiled for them."""
    weight_terms: tuple[WeightTerm, ...] = ()
    """Terms of the loss that depend on the weights alone. Their values are in no statistics."""

    def blocks(self, d_sae: int) -> list[slice]:
        """Return the blocks of latents between two prefixes, from the first latent on; all latents without prefixes."""
        bounds = (0, *self.prefixes, d_sae)
        return [slice(start, end) for start, end in itertools.pairwise(bounds)]

    def add_weight_terms_(self, weights: Weights, gradients: Weights) -> None:
        """Add the gradients of all terms of the weights, in place."""
        for term in self.weight_terms:
            term.add_gradients_(weights, gradients)

    def pull_back(
        self,
        upstream: Float[Tensor, "..."],
        latents: Float[Tensor, "..."],
        m: Float[Tensor, "..."],
        own: Parameters,
        batch: int,
    ) -> tuple[Pullback, Float[Tensor, "*stack"]]:
        """Return the loss's gradient with respect to m and the own parameters, and the sum of the penalty.

        The sum is over tokens and latents, the last two dimensions; for a stack of SAEs there is one sum for each.

        Every entry is one (token, latent) pair on the support: of a whole matrix, or of a list of pairs.

        Args:
            upstream: the gradient of the reconstruction error with respect to the latents.
            latents: the latents f.
            m: their pre-activations.
            own: the nonlinearity's own parameters, broadcast against m.
            batch: the number of tokens of the whole batch, over which the penalty is a mean.
        """
        per_token = self.coeff / batch
        nonlinearity = self.nonlinearity
        penalised = nonlinearity.penalised(latents, m, own)
        if penalised is latents:
            # The penalty's slope joins the gradient on the latent, and one pullback takes both back.
            back = nonlinearity.pullback(upstream + per_token * self.penalty.slope(latents), m, own)
        else:
            # Another quantity is penalised (Gated's gate): it has a pullback of its own.
            slope = torch.zeros_like(penalised) + self.penalty.slope(penalised)
            of_penalty = nonlinearity.penalised_pullback(slope, m, own)
            back = nonlinearity.pullback(upstream, m, own).plus(of_penalty, per_token)
        # The L0 penalty has no slope in the latent; its gradient is that of the gate.
        if (direct := self.penalty.pullback(nonlinearity, m, own)) is not None:
            back = back.plus(direct, per_token)
        # Summed over a row first, then over rows in fp64: long fp32 sums would lose digits.
        return back, self.penalty.value(penalised).sum(-1).sum(-1, dtype=torch.float64)

    def of_batch(
        self, sums: Float[Tensor, "*stack d_sae"], batch: int, mesh: Mesh
    ) -> tuple[Float[Tensor, "*stack d_sae"], Float[Tensor, "*stack"]]:
        """Return, for a penalty of means, the factor on each latent's coefficient, and this rank's part of P.

        Args:
            sums: the sum of p over this rank's tokens, for each of its latents.
            batch: the number of tokens of the whole batch.
            mesh: the ranks that share the SAE.
        """
        means = mesh.sum_over_data_(sums, "penalty") / batch
        of_all = mesh.gathered_over_latents(means, -1, "penalty")
        factors = self.penalty.weights(of_all)[..., mesh.latents(of_all.shape[-1])]
        # Every rank has the whole of P, and statistics are added up over ranks.
        return factors, self.penalty.total(of_all).double() / mesh.n_ranks

    def at_entries(
        self, latents: Tensor, m: Tensor, own: Parameters, batch: int, mesh: Mesh
    ) -> tuple["Objective", Tensor | None]:
        """Return the objective for whole matrices [..., batch, d_sae], and P if it is one of means.

        The arguments are as in `pull_back`, and the ranks that share the SAE.
        """
        if not self.penalty.is_of_means:
            return self, None
        counts = self.penalty.value(self.nonlinearity.penalised(latents, m, own)).sum(-2)
        factors, total = self.of_batch(counts, batch, mesh)
        # Not `replace`, which torch.compile does not take.
        coeff = self.coeff * factors.unsqueeze(-2)
        return Objective(self.nonlinearity, self.penalty, coeff, self.auxiliary, self.prefixes), total

    def at_pairs(
        self, values: Tensor, m: Tensor, own: Parameters, latents: Tensor, d_sae: int, batch: int, mesh: Mesh
    ) -> tuple["Objective", Tensor | None]:
        """Return the objective for a batch's pairs, and P if it is one of means.

        Args:
            values: f of each pair.
            m: the pre-activation of each pair.
            own: the nonlinearity's own parameters, pair by pair.
            latents: the latent of each pair.
            d_sae: the number of latents.
            batch: the number of tokens of the whole batch.
            mesh: the ranks that share the SAE.
        """
        if not self.penalty.is_of_means:
            return self, None
        counts = self.penalty.value(self.nonlinearity.penalised(values, m, own))
        factors, total = self.of_batch(counts.new_zeros(d_sae).index_add_(0, latents, counts), batch, mesh)
        return replace(self, coeff=self.coeff * factors[latents]), total


class StepStats(NamedTuple):
    """Statistics of one step's batch, from before the update. They are tensors, so that nothing waits for a device.

    Those of a stack of SAEs have one dimension more, in front.
    """

    mse: Float[Tensor, "*stack"]
    """The mean over batch and d_in of (x - x_hat)^2, in normalised space."""
    penalty: Float[Tensor, "*stack"]
    """The mean over the batch of P, or the P of the whole batch, without the coefficient."""
    auxiliary: Float[Tensor, "*stack"]
    """The auxiliary term with its coefficient; 0 without such a term."""
    fired: Float[Tensor, "*stack d_sae"]
    """The number of tokens of the batch on which each latent was active (greater than 0)."""
    smallest: Float[Tensor, "*stack"]
    """The smallest active latent where the nonlinearity selects latents, else 0."""

    def of_member(self, i: int) -> "StepStats":
        """Return the statistics of one SAE of a stack."""
        return StepStats(*(t[i] for t in self))


def smallest_active(nonlinearity: Nonlinearity, latents: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Return the smallest active latent of the batch; 0 if none is active, or the nonlinearity selects no latents."""
    if nonlinearity.selection is None:
        return latents.new_zeros(())
    active = latents[latents > 0]
    return active.min() if len(active) else latents.new_zeros(())
