"""The equations of a dense step on whole matrices, for a stack of SAEs of one shape and family at once.

The weights of a stack have one dimension more than those of an SAE, in front: the encoder is [n_saes, d_sae, d_in], and
every matmul multiplies n_saes pairs of matrices. All SAEs see the same batch of activations. An SAE alone is a stack of
one. The equations are those of `dense`; here they are written so that `torch.compile` can fuse what lies between two
matmuls. So no size depends on the data, and numbers that change from step to step (the coefficient of the penalty, the
learning rate) come in tensors.

Weights and moments stay in fp32, and every matmul accumulates in fp32. m comes out of its matmul in fp32 too: whether a
latent is active is decided there, and storing m in bf16 would flip gates. A CPU gives the same numbers up to the order
of sums, because a product of two bf16 numbers is exact in fp32.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.nonlinearities import Auxiliary, Nonlinearity, Parameters, distance
from prolu.sae.weights import Weights
from prolu.training.moments import Moments
from prolu.training.steps.adam import AdamConfig, project_
from prolu.training.steps.objective import Objective, StepStats


def stack_of_one(weights: Weights) -> Weights:
    """Return the weights of one SAE as those of a stack; the memory is shared."""
    return weights.map(lambda t: t.unsqueeze(0))


def member(stack: Weights, i: int) -> Weights:
    """Return the weights of one SAE of a stack; the memory is shared."""
    return stack.map(lambda t: t[i])


def encode(
    weights: Weights, acts: Float[Tensor, "batch d_in"], precision: str
) -> tuple[Float[Tensor, "n_saes batch d_in"], Float[Tensor, "n_saes batch d_sae"]]:
    """Return x - b_dec and the pre-activations m = (x - b_dec) W_enc."""
    centred = acts - weights.b_dec.unsqueeze(-2)
    return centred, matmul(centred, weights.encoder.mT, precision)


def gradients_of_stack(
    weights: Weights,
    acts: Float[Tensor, "batch d_in"],
    centred: Float[Tensor, "n_saes batch d_in"],
    m: Float[Tensor, "n_saes batch d_sae"],
    bounds: tuple[Tensor | None, Tensor | None],
    objective: Objective,
    precision: str,
    mesh: Mesh = ALONE,
    target: Float[Tensor, "batch d_out"] | None = None,
) -> tuple[Weights, StepStats]:
    """Return the gradients of the loss and the statistics of the batch, for each SAE of the stack.

    Args:
        weights: of the stack.
        acts: the batch x.
        centred: x - b_dec, from `encode`.
        m: the pre-activations, from `encode`.
        bounds: how far above its threshold an entry must lie to be selected, by the objective's selection and by that
            of its auxiliary term; None where there is no selection.
        objective: the loss; its coefficient may be a tensor [n_saes, 1, 1].
        precision: that of the inputs of matmuls.
        mesh: the ranks that share the SAEs.
        target: the targets y of transcoders; None for SAEs.
    """
    code = activate(weights, m, bounds[0], objective)
    blocks = objective.blocks(weights.d_sae)
    decoded = decode_and_send_back(weights, acts, code.latents, blocks, precision, mesh, target)
    return pull_back(weights, acts, centred, m, bounds[1], code, decoded, objective, precision, mesh, target)


class Code(NamedTuple):
    """The latents of a stack on a batch."""

    active: Tensor
    """The mask of active entries, [n_saes, batch, d_sae]."""
    latents: Float[Tensor, "n_saes batch d_sae"]


class Decoded(NamedTuple):
    """What the decoder gives: the error of the reconstruction, and gradients of the squared error."""

    mse: Float[Tensor, " n_saes"]
    error: Float[Tensor, "n_saes batch d_out"]
    """That of all latents: x_hat - x."""
    to_output: Float[Tensor, "n_saes batch d_out"]
    """The gradient with respect to the reconstruction, of all prefixes together."""
    to_latents: Float[Tensor, "n_saes batch d_sae"]
    to_decoder: Float[Tensor, "n_saes d_sae d_out"]


def activate(weights: Weights, m: Tensor, bound: Tensor | None, objective: Objective) -> Code:
    """Return the latents; the arguments are those of `gradients_of_stack`, `bound` that of the selection."""
    own = _per_token(weights.own)
    active = _active(objective.nonlinearity, m, own, bound)
    return Code(active, torch.where(active, objective.nonlinearity.value(m, own), 0))


def decode_and_send_back(
    weights: Weights,
    acts: Tensor,
    latents: Tensor,
    blocks: Sequence[slice],
    precision: str,
    mesh: Mesh,
    target: Tensor | None,
) -> Decoded:
    """Return the error, and the gradients of the squared error: the only part that sees the blocks of a nested loss."""
    batch = len(acts) * mesh.n_data
    scale = 2 / (batch * weights.d_out)
    output_bias = weights.output_bias.unsqueeze(-2)
    wanted = weights.for_decoder(acts, target)
    errors = [recon + output_bias - wanted for recon in _decoded_up_to(latents, weights, blocks, precision, mesh)]
    # A block of latents sees the errors of all prefixes that contain it, summed from the back.
    seen = list(itertools.accumulate(e * (scale / len(blocks)) for e in reversed(errors)))[::-1]
    of_blocks = list(zip(blocks, seen, strict=True))
    to_latents = _joined([matmul(e, weights.decoder[:, b].mT, precision) for b, e in of_blocks], -1)
    to_decoder = _joined([matmul(latents[..., b].mT, e, precision) for b, e in of_blocks], -2)
    return Decoded(_mean_square(errors[-1], batch), errors[-1], seen[0], to_latents, to_decoder)


def pull_back(
    weights: Weights,
    acts: Tensor,
    centred: Tensor,
    m: Tensor,
    auxiliary_bound: Tensor | None,
    code: Code,
    decoded: Decoded,
    objective: Objective,
    precision: str,
    mesh: Mesh,
    target: Tensor | None,
) -> tuple[Weights, StepStats]:
    """Return what `gradients_of_stack` does, from the latents and from the decoder's gradients."""
    batch = len(acts) * mesh.n_data
    nonlinearity = objective.nonlinearity
    own = _per_token(weights.own)
    active, latents = code
    objective, of_means = objective.at_entries(latents, m, own, batch, mesh)
    back, penalty = objective.pull_back(decoded.to_latents, latents, m, own, batch)
    # Selected, not multiplied by the mask: 0 * inf would be NaN.
    nothing = torch.zeros_like(m)
    to_m = torch.where(active, back.m, 0)
    to_own = {name: torch.where(active, back.parameters.get(name, nothing), 0).sum(-2) for name in own}
    to_decoder = decoded.to_decoder
    auxiliary = torch.zeros_like(decoded.mse)
    if (term := objective.auxiliary) is not None:
        wanted = weights.for_decoder(acts, target) - weights.output_bias.unsqueeze(-2)
        of_term = -decoded.error if term.target == "residual" else wanted
        theirs = _auxiliary(term, weights, m, own, auxiliary_bound, of_term, batch, precision, mesh)
        auxiliary = theirs.value
        to_m = to_m + theirs.to_m
        to_own |= {name: to_own[name] + gradient for name, gradient in theirs.to_own.items()}
        if theirs.to_decoder is not None:
            to_decoder = to_decoder + theirs.to_decoder
    # b_dec is subtracted at the input, and in an SAE added at the output too. Summing dm over tokens first makes this
    # part a product with a vector, where autograd would pay a sixth matmul.
    through_encoder = (to_m.sum(-2).unsqueeze(-2) @ weights.encoder).squeeze(-2)
    from_encoder = mesh.sum_over_latents_(through_encoder, "b_dec")
    shared = weights.bias_gradients(decoded.to_output.sum(-2), from_encoder)
    if weights.skip is not None:
        shared["skip"] = acts.T @ decoded.to_output
    gradients = Weights(matmul(to_m.mT, centred, precision), to_decoder, own=to_own, **shared)
    fired = (latents > 0).sum(-2, dtype=acts.dtype)
    smallest = _smallest_active(latents) if nonlinearity.selection is not None else torch.zeros_like(m[:, 0, 0])
    penalty = penalty / batch if of_means is None else of_means
    return gradients, StepStats(decoded.mse, penalty, auxiliary, fired, smallest)


class _AuxiliaryGradients(NamedTuple):
    """An auxiliary term and its gradients, for each SAE of a stack."""

    value: Float[Tensor, " n_saes"]
    """The term, its coefficient included."""
    to_m: Float[Tensor, "n_saes batch d_sae"]
    to_own: dict[str, Tensor]
    to_decoder: Tensor | None
    """None if the term does not train the decoder."""


def _auxiliary(
    term: Auxiliary,
    weights: Weights,
    m: Tensor,
    own: Parameters,
    bound: Tensor | None,
    target: Tensor,
    batch: int,
    precision: str,
    mesh: Mesh,
) -> _AuxiliaryGradients:
    """Return an auxiliary term and its gradients; `target` is what its latents reconstruct."""
    scale = 2 / (batch * weights.d_out)
    active = _active(term.nonlinearity, m, own, bound)
    # Where no latent takes part, the weight is 0, because an empty reconstruction would have a value above 0.
    weight = torch.full_like(m[:, 0, 0], term.coeff)
    if term.among is not None:
        active = active & term.among.unsqueeze(-2)
        weight = weight * term.among.any(-1)
    latents = torch.where(active, term.nonlinearity.value(m, own), 0)
    to_decoder = None
    if term.target is None:
        to_latents = (scale / 2 * weight[:, None, None]).expand_as(m)
        of_latents = latents.sum((-2, -1), dtype=torch.float64) * (scale / 2)
        value = mesh.sum_over_latents_(of_latents, "scalars") * weight
    else:
        error = _decoded(latents, weights, precision, mesh) - target
        value = _mean_square(error, batch) * weight
        error = error * (scale * weight[:, None, None])
        if term.trains_decoder:
            to_decoder = matmul(latents.mT, error, precision)
        to_latents = matmul(error, weights.decoder.mT, precision)
    back = term.nonlinearity.pullback(to_latents, m, own)
    to_own = {name: torch.where(active, gradient, 0).sum(-2) for name, gradient in back.parameters.items()}
    return _AuxiliaryGradients(value, torch.where(active, back.m, 0), to_own, to_decoder)


def update_stack_(
    weights: Weights,
    gradients: Weights,
    moments: Moments,
    rates: Float[Tensor, "2 n_saes"],
    clip: Float[Tensor, " n_saes"] | None,
    adam: AdamConfig,
) -> None:
    """Project (unless a clip has done it already), apply Adam and renormalise decoder rows, in place.

    Args:
        weights: what is updated.
        gradients: the gradient of each weight.
        moments: Adam's moments, updated too.
        rates: `Update.step_size` and `Update.second_moment_scale` of each SAE.
        clip: the factor by which a clip scales all gradients of an SAE; None without a clip.
        adam: Adam's constants.
    """
    if clip is None:
        project_(gradients.decoder, weights.decoder)
    tensors = (w.tensors() for w in (weights, gradients, moments.first, moments.second))
    for p, gradient, first, second in zip(*tensors, strict=True):
        per_sae = (-1, *[1] * (p.ndim - 1))
        g = gradient if clip is None else gradient * clip.view(per_sae)
        first.lerp_(g, 1 - adam.beta1)
        second.lerp_(g * g, 1 - adam.beta2)
        root = second.sqrt() * rates[1].view(per_sae)
        p.sub_(rates[0].view(per_sae) * first / (root + adam.eps))
    weights.decoder.div_(torch.linalg.vector_norm(weights.decoder, dim=-1, keepdim=True))


def compared_by(nonlinearity: Nonlinearity, own: Parameters) -> Float[Tensor, "n_saes d_sae"]:
    """Return the threshold of each latent, by the distance from which a selection compares entries."""
    threshold = nonlinearity.threshold(own)
    assert threshold is not None, "a selection needs a threshold"
    return threshold


def among_only(threshold: Float[Tensor, "n_saes d_sae"], term: Auxiliary) -> Float[Tensor, "n_saes d_sae"]:
    """Return the thresholds with infinity for the latents that take no part in the term, so that none is selected."""
    return threshold if term.among is None else threshold.masked_fill(~term.among, torch.inf)


def matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Return a @ b of two stacks of matrices, accumulated and returned in fp32 (or in fp64, of fp64)."""
    if precision != "bf16":
        return a @ b
    a = a.bfloat16()
    b = b.bfloat16()
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _per_token(own: Parameters) -> Parameters:
    """Return the nonlinearity's own parameters [n_saes, d_sae] so that they broadcast against m."""
    return {name: p.unsqueeze(-2) for name, p in own.items()}


def _active(nonlinearity: Nonlinearity, m: Tensor, own: Parameters, bound: Tensor | None) -> Tensor:
    support = nonlinearity.support(m, own)
    # The bound is 0 where too few entries are above 0, and >= would then let through m = threshold: hence the support.
    return support if bound is None else support & (distance(nonlinearity, m, own) >= bound)


def _decoded(latents: Tensor, weights: Weights, precision: str, mesh: Mesh) -> Tensor:
    """Return f W_dec, without b_dec; on a mesh, of the latents of all ranks."""
    return mesh.sum_over_latents_(matmul(latents, weights.decoder, precision), "reconstruction")


def _decoded_up_to(
    latents: Tensor, weights: Weights, blocks: Sequence[slice], precision: str, mesh: Mesh
) -> list[Tensor]:
    """Return f W_dec, without b_dec, from all latents up to the end of each block."""
    parts = [matmul(latents[..., block], weights.decoder[:, block], precision) for block in blocks]
    # On a mesh there is one block only (`check_mesh`).
    return list(itertools.accumulate(mesh.sum_over_latents_(part, "reconstruction") for part in parts))


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return the parts as one tensor; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _mean_square(error: Tensor, batch: int) -> Tensor:
    """Return the mean of the squared entries for each SAE. Summed in fp64: a long fp32 sum would lose digits."""
    return error.square().sum((-2, -1), dtype=torch.float64) / (batch * error.shape[-1])


def _smallest_active(latents: Tensor) -> Tensor:
    """Return the smallest active latent of each SAE; 0 where none is active."""
    smallest = torch.where(latents > 0, latents, torch.inf).amin((-2, -1))
    return torch.where(smallest.isfinite(), smallest, 0)
