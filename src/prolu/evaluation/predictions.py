"""KL divergence from clean next-token predictions, without keeping their logits."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prolu.activations.language_model import LanguageModel, next_token_loss

ENTRIES_AT_ONCE = 2**24
"""Probabilities held at once: 64 MB in fp32."""


class CleanPredictions(NamedTuple):
    """What of the clean predictions decides the KL divergence of others from them.

    With logits W h, p = softmax(W h) and A = logsumexp, KL(p || q) = A(W h_q) - A(W h_p) - (p W) (h_q - h_p): one
    vector a token, of the width of h, stands for a distribution over the whole vocabulary.
    """

    ce: Float[Tensor, "n t"]
    """Cross-entropy of each next token, nats."""
    log_partition: Float[Tensor, "n t"]
    """A(W h_p)."""
    mean_row: Float[Tensor, "n t d_model"] | None
    """p W; None where logits are not linear in h (soft-capped, say), and have to be computed anew."""
    own: Float[Tensor, "n t"]
    """(p W) h_p, float64."""


def mean_rows(logits: Float[Tensor, "n vocab"], weight: Float[Tensor, "vocab d_model"]) -> Float[Tensor, "n d_model"]:
    """P W with p = softmax(logits), some rows at a time."""
    n = max(1, ENTRIES_AT_ONCE // logits.shape[1])
    return torch.cat([part.softmax(1) @ weight.float() for part in logits.split(n)])


def kl_from_means(
    clean: CleanPredictions, log_partition: Float[Tensor, "n t"], hidden: Float[Tensor, "n t d_model"]
) -> Float[Tensor, "n t"]:
    """KL(clean || other) per token in nats, by the equation of `CleanPredictions`, in float64."""
    assert clean.mean_row is not None
    moved = (clean.mean_row.double() * hidden.double()).sum(-1) - clean.own
    return log_partition.double() - clean.log_partition.double() - moved


def kl_of_logits(p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
    """KL(softmax p || softmax q) per row in nats, by the definition, some rows at a time."""
    n = max(1, ENTRIES_AT_ONCE // p.shape[1])
    parts = []
    for clean, other in zip(p.split(n), q.split(n), strict=True):
        log_p = clean.double().log_softmax(1)
        parts.append((log_p.exp() * (log_p - other.double().log_softmax(1))).sum(1))
    return torch.cat(parts)


def clean_predictions(lm: LanguageModel, tokens: np.ndarray | Int[Tensor, "n ctx"]) -> CleanPredictions:
    """What `spliced_losses` compares with."""
    head = lm.model.get_output_embeddings()
    found = []
    for clean in lm.predictions(tokens):
        logits = clean.logits.float()
        ce, log_partition = next_token_loss(logits, clean.tokens)
        rows, own = None, torch.zeros_like(ce, dtype=torch.float64)
        if clean.last_hidden is not None:
            rows = mean_rows(logits[:, :-1].flatten(0, 1), head.weight).view(*ce.shape, -1)
            own = (rows.double() * clean.last_hidden.double()).sum(-1)
        found.append(CleanPredictions(ce, log_partition, rows, own))
    ce, log_partition, rows, own = zip(*found, strict=True)
    linear = all(r is not None for r in rows)
    return CleanPredictions(
        torch.cat(ce), torch.cat(log_partition), torch.cat(rows) if linear else None, torch.cat(own)
    )


def spliced_losses(
    lm: LanguageModel,
    tokens: np.ndarray | Int[Tensor, "n ctx"],
    splice: Float[Tensor, "n ctx d_in"],
    restart_points: Tensor | None,
    clean: CleanPredictions,
) -> tuple[Float[Tensor, "n ctx_minus_1"], Float[Tensor, "n ctx_minus_1"]]:
    """Cross-entropy, as `LanguageModel.cross_entropy` gives it, and KL(clean || spliced), nats, in one pass.

    Where logits are not linear in what the last layer gives, the clean pass is repeated for the KL.
    """
    losses, divergences = [], []
    for spliced in lm.predictions(tokens, splice, restart_points):
        logits = spliced.logits.float()
        ce, log_partition = next_token_loss(logits, spliced.tokens)
        here = CleanPredictions(*(None if t is None else t[spliced.rows] for t in clean))  # pyright: ignore[reportArgumentType]
        if spliced.last_hidden is not None and here.mean_row is not None:
            kl = kl_from_means(here, log_partition, spliced.last_hidden)
        else:
            unperturbed = next(lm.predictions(spliced.tokens)).logits
            kl = kl_of_logits(unperturbed[:, :-1].float().flatten(0, 1), logits[:, :-1].flatten(0, 1)).view(ce.shape)
        losses.append(ce)
        divergences.append(kl)
    return torch.cat(losses), torch.cat(divergences)
