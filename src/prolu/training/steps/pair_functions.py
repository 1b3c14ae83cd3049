"""What the nonlinearity and the penalty compute on arrays of pairs with a fixed number of places, fused on a GPU."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from prolu.training.steps.cuda import _compiling
from prolu.training.steps.objective import Objective


def latents_of_pairs(
    m: Tensor, latents: Tensor, own: dict[str, Tensor], objective: Objective, d_sae: int, format_of_rows: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return f, in the format of gathered rows, and the penalty of each pair; 0 at places without a pair."""
    held = latents < d_sae
    own = _at(own, latents, d_sae)
    values = torch.where(held, objective.nonlinearity.value(m, own), 0)
    penalties = objective.penalty.value(objective.nonlinearity.penalised(values, m, own))
    return values.to(format_of_rows), torch.where(held, penalties, 0)


def pulled_back(
    m: Tensor,
    upstreams: tuple[Tensor, ...],
    tokens: Tensor,
    order: Tensor,
    latents: Tensor,
    own: dict[str, Tensor],
    objective: Objective,
    batch: int,
    d_sae: int,
    format_of_rows: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what the gradients need of the pairs, in order of latent.

    Args:
        m: the pre-activation of each pair, in order of token.
        upstreams: the gradient of the error with respect to f, in the same order; with an auxiliary term also that of
            the term with respect to its own latents.
        tokens: the token of each pair, in the same order.
        order: where each pair in order of latent lies in order of token.
        latents: the latent of each pair in order of latent; d_sae at places without a pair.
        own: the nonlinearity's own parameters.
        objective: the loss.
        batch: the number of tokens.
        d_sae: the number of latents.
        format_of_rows: the number format of rows that are gathered.

    Returns:
        Of each pair the token; the gradient on m and f, both in the format of gathered rows; in one tensor what is
        summed over each latent's pairs: the gradient on m, whether the latent is active, and the gradient on each own
        parameter. Places without a pair have 0. Last, the smallest active latent of a selection.
    """
    held = latents < d_sae
    own = _at(own, latents, d_sae)
    m = m[order]
    values = torch.where(held, objective.nonlinearity.value(m, own), 0)
    back, _ = objective.pull_back(upstreams[0][order], values, m, own, batch)
    if (term := objective.auxiliary) is not None:
        # Both gradients on m are multiplied by the same input, so they are added.
        back = back.plus(term.nonlinearity.pullback(upstreams[1][order], m, own), 1.0)
    nothing = torch.zeros_like(values)
    columns = [back.m, (values > 0).to(values.dtype), *(back.parameters.get(name, nothing) for name in own)]
    # Selected, not multiplied by the mask: 0 * inf would be NaN.
    summed = torch.stack([torch.where(held, column, 0) for column in columns])
    smallest = torch.zeros_like(values[0])
    if objective.nonlinearity.selection is not None:
        smallest = torch.where(values > 0, values, torch.inf).min()
        smallest = torch.where(smallest.isfinite(), smallest, 0)
    return tokens[order], summed[0].to(format_of_rows), values.to(format_of_rows), summed, smallest


def _at(own: dict[str, Tensor], latents: Tensor, d_sae: int) -> dict[str, Tensor]:
    """Return own parameters pair by pair; places without a pair have those of the last latent."""
    at = latents.clamp(max=d_sae - 1)
    return {name: p[at] for name, p in own.items()}


def fused(function: Callable) -> Callable:
    """Return a function of arrays of pairs, compiled; one compilation serves all lengths and coefficients."""
    compiled = torch.compile(function, dynamic=True)
    seen = set()

    def call(m: Tensor, *others):
        # A Python number would be compiled into the function as a constant, but coefficients change at every step of a
        # warm-up.
        arguments = [m, *(_with_coefficient_on_device(a, m.device) for a in others)]
        families = [(a.nonlinearity, a.penalty, a.auxiliary) for a in arguments if isinstance(a, Objective)]
        variant = (len(m), *families)
        if variant in seen:
            return compiled(*arguments)
        seen.add(variant)
        with _compiling():
            return compiled(*arguments)

    return call


def _with_coefficient_on_device(argument, device: torch.device):
    if not isinstance(argument, Objective):
        return argument
    coeff = argument.coeff
    on_device = coeff.to(device).reshape(()) if isinstance(coeff, Tensor) else torch.full((), coeff, device=device)
    return replace(argument, coeff=on_device)
