"""What a latent's decoder row does: the tokens it promotes through the unembedding, and the rows that it resembles."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.language_model import LanguageModel
from prolu.sae.autoencoder import SAE

PROBE = 1024.0
"""Size of the vectors that measure a norm's gain: large against its epsilon, and without rounding."""


class Unembedding(NamedTuple):
    """From the residual stream to logits, as far as it is linear."""

    matrix: Float[Tensor, "d_model vocab"]
    """W_U with the final norm's gain folded in."""
    removes_mean: bool
    """Whether the final norm is a LayerNorm, which takes the mean over d_model away first."""

    def logits(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """What directions add to the logits, up to the norm's division: W_dec[i] (less its mean) @ W_U."""
        if self.removes_mean:
            directions = directions - directions.mean(-1, keepdim=True)
        return directions @ self.matrix


@torch.no_grad()
def unembedding(lm: LanguageModel) -> Unembedding | None:
    """The model's unembedding with its final norm; None where the hook is not as wide as the residual stream.

    The final norm is the module whose output the unembedding takes. Its gain is measured, not read, because some
    models keep gain - 1: on x with entries of one size, both signs equally often, norm(x) = gain x / |x| + offset.
    """
    head: Any = lm.model.get_output_embeddings()
    if head is None or head.weight.shape[1] != lm.d_in:
        return None
    norm, signs = _final_norm(lm, head), torch.ones(lm.d_in)
    signs[1::2] = -1
    matrix = head.weight.float().cpu().T[:, : len(lm.tokenizer)]
    if norm is None:
        return Unembedding(matrix, removes_mean=False)
    norm = copy.deepcopy(norm).float()
    probes = PROBE * torch.stack([signs, -signs, torch.ones(lm.d_in)])
    up, down, constant = norm(probes.to(next(norm.parameters(), head.weight).device)).cpu()
    offset = (up + down) / 2
    removes_mean = bool(torch.allclose(constant, offset, atol=1e-3))
    spread = signs - signs.mean() if removes_mean else signs
    gain = (up - offset) / (spread / spread.square().mean().sqrt())
    return Unembedding(gain[:, None] * matrix, removes_mean)


def _final_norm(lm: LanguageModel, head: torch.nn.Module) -> torch.nn.Module | None:
    """The module whose output the unembedding takes; None if that is no module's without parts."""
    seen: list[tuple[torch.nn.Module, Tensor]] = []
    taken: list[Tensor] = []
    leaves = [m for m in lm.model.modules() if m is not head and not any(m.children())]
    handles = [m.register_forward_hook(lambda m, args, out: seen.append((m, out))) for m in leaves]
    handles.append(head.register_forward_pre_hook(lambda m, args: taken.append(args[0])))
    try:
        lm.model(input_ids=torch.tensor([[lm.bos, lm.bos]], device=lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    same = [m for m, out in seen if isinstance(out, Tensor) and out.shape == taken[0].shape and out.equal(taken[0])]
    return same[-1] if same else None


class Effect(NamedTuple):
    """Tokens that a latent makes likeliest and unlikeliest: ids and what it adds to their logits."""

    promoted: list[tuple[int, float]]
    suppressed: list[tuple[int, float]]


@torch.no_grad()
def effects(rows: Float[Tensor, "n d_model"], through: Unembedding, n_tokens: int) -> list[Effect]:
    """Of some decoder rows, the tokens at either end of their logits."""
    logits = through.logits(rows.float().cpu())
    ends = [logits.topk(min(n_tokens, logits.shape[1]), largest=largest) for largest in (True, False)]
    return [Effect(*both) for both in zip(*(_pairs(e.indices, e.values) for e in ends), strict=True)]


@torch.no_grad()
def neighbours(sae: SAE, ids: Sequence[int], n: int) -> list[list[tuple[int, float]]]:
    """Of some latents, the others whose decoder rows have the largest cosine with theirs."""
    rows = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    cosines = rows[list(ids)] @ rows.T
    cosines[torch.arange(len(ids)), list(ids)] = -2
    values, others = cosines.topk(min(n, len(rows) - 1))
    return _pairs(others, values)


def _pairs(ids: Tensor, values: Tensor) -> list[list[tuple[int, float]]]:
    """Rows of ids and rows of values as rows of pairs."""
    return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
