"""What a latent's decoder row does: the tokens that it promotes through the unembedding, and the rows like it."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.language_model import LanguageModel
from prolu.activations.tokenizers import n_token_ids
from prolu.sae.autoencoder import SAE

PROBE = 1024.0
"""The size of the entries of the vectors that measure a norm's gain: so large that the norm's epsilon is lost in
rounding, and a power of two, so that scaling by it does not round."""


class Unembedding(NamedTuple):
    """The way from the residual stream to the logits, as far as it is linear."""

    matrix: Float[Tensor, "d_model vocab"]
    """W_U with the final norm's gain folded in."""
    removes_mean: bool
    """Whether the final norm is a LayerNorm, which first subtracts the mean over d_model."""

    def logits(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """Return W_dec[i] (less its mean) @ W_U: what directions add to the logits, up to the norm's division."""
        if self.removes_mean:
            directions = directions - directions.mean(-1, keepdim=True)
        return directions @ self.matrix


@torch.no_grad()
def unembedding_of(lm: LanguageModel) -> Unembedding | None:
    """Return a model's unembedding with its final norm, or None if the hook is not as wide as the residual stream."""
    head: Any = lm.model.get_output_embeddings()
    if head is None or head.weight.shape[1] != lm.d_in:
        return None
    # Some models pad W_U beyond the tokenizer's vocabulary; no token has those logits.
    matrix = head.weight.float().cpu().T[:, : n_token_ids(lm.tokenizer)]
    norm = _final_norm(lm, head)
    if norm is None:
        return Unembedding(matrix, removes_mean=False)
    gain, removes_mean = _measured_gain(norm, lm.d_in, head.weight.device)
    return Unembedding(gain[:, None] * matrix, removes_mean)


def _measured_gain(norm: torch.nn.Module, d_in: int, head_device: torch.device) -> tuple[Tensor, bool]:
    """Return the gain of a norm, and whether it subtracts the mean of its input.

    The gain is measured and not read, because some models (Gemma) store gain - 1, or name it otherwise. On x with
    entries of one size, half of them negative, norm(x) = gain * x / rms(x) + offset.
    """
    norm = copy.deepcopy(norm).float()  # a copy, since the model's own must keep its dtype
    signs = torch.ones(d_in)
    signs[1::2] = -1
    probes = PROBE * torch.stack([signs, -signs, torch.ones(d_in)])
    device = next((p.device for p in norm.parameters()), head_device)
    up, down, constant = norm(probes.to(device)).cpu()
    offset = (up + down) / 2
    # A LayerNorm makes zeros of a constant vector, so that only its offset is left.
    removes_mean = bool(torch.allclose(constant, offset, atol=1e-3))
    centred = signs - signs.mean() if removes_mean else signs  # of odd width, the signs' mean is not 0
    return (up - offset) / (centred / centred.square().mean().sqrt()), removes_mean


def _final_norm(lm: LanguageModel, head: torch.nn.Module) -> torch.nn.Module | None:
    """Return the module whose output the unembedding takes, or None if it is no single module's output.

    It is found by running the model, because each architecture names it and places it otherwise.
    """
    outputs: list[tuple[torch.nn.Module, Tensor]] = []
    taken: list[Tensor] = []
    leaves = [m for m in lm.model.modules() if m is not head and not any(m.children())]
    handles = [m.register_forward_hook(lambda m, args, out: outputs.append((m, out))) for m in leaves]
    handles.append(head.register_forward_pre_hook(lambda m, args: taken.append(args[0])))
    try:
        lm.model(input_ids=torch.tensor([[lm.bos, lm.bos]], device=lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    same = [m for m, out in outputs if isinstance(out, Tensor) and out.shape == taken[0].shape and out.equal(taken[0])]
    return same[-1] if same else None


class LogitEffect(NamedTuple):
    """The tokens whose logits a latent raises most and lowers most: pairs of token id and what it adds."""

    promoted: list[tuple[int, float]]
    suppressed: list[tuple[int, float]]


@torch.no_grad()
def logit_effects(rows: Float[Tensor, "n d_model"], unembedding: Unembedding, n_tokens: int) -> list[LogitEffect]:
    """Return the `n_tokens` most promoted and most suppressed tokens of each of these decoder rows."""
    logits = unembedding.logits(rows.float().cpu())
    n = min(n_tokens, logits.shape[1])
    highest = logits.topk(n)
    lowest = logits.topk(n, largest=False)
    promoted = _pairs(highest.indices, highest.values)
    suppressed = _pairs(lowest.indices, lowest.values)
    return [LogitEffect(*both) for both in zip(promoted, suppressed, strict=True)]


@torch.no_grad()
def neighbours(sae: SAE, ids: Sequence[int], n: int) -> list[list[tuple[int, float]]]:
    """Return, for each of these latents, the `n` others of largest cosine between decoder rows, with that cosine."""
    rows = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    cosines = rows[list(ids)] @ rows.T
    cosines[torch.arange(len(ids)), list(ids)] = -2  # below every cosine: no latent is its own neighbour
    values, others = cosines.topk(min(n, len(rows) - 1))
    return _pairs(others, values)


def _pairs(ids: Tensor, values: Tensor) -> list[list[tuple[int, float]]]:
    """Return rows of (id, value) from rows of ids and rows of values."""
    return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
