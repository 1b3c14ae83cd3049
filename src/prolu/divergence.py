"""KL divergence from clean next-token predictions, without keeping their logits."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

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
