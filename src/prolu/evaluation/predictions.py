"""Cross-entropy with an SAE in place of the activations, and the KL divergence from the clean predictions.

KL(p || q) compares two distributions over the vocabulary, p of the clean pass and q of the pass with the SAE. Keeping p
for every held-out token would take n_vocabulary numbers per token, 50,257 for GPT-2. One vector of d_model numbers, 768
for GPT-2, is enough. The logits are linear in the unembedding's input h: z = W h + c. With A = log sum exp z,

    log p = z_p - A_p,    log q = z_q - A_q,
    KL(p || q) = sum_v p_v (log p_v - log q_v) = A_q - A_p - p . (z_q - z_p) = A_q - A_p - (p W) . (h_q - h_p),

where the bias c cancels. So the clean pass keeps A_p, the mean p W of the unembedding's rows, and its product with h_p.
The pass with the SAE gives A_q along with its cross-entropy, and one dot product with h_q gives the KL divergence.

Some models change their logits after the unembedding (Gemma 2 caps them with a tanh), so that they are not linear in h.
For these the clean pass is repeated beside the other one, and the definition is applied.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prolu.activations.language_model import LanguageModel, Predictions, next_token_loss

ENTRIES_AT_ONCE = 2**24
"""The number of probabilities held at once, 64 MB in float32."""


class CleanPredictions(NamedTuple):
    """What of the clean pass is needed to compute KL(clean || other) of any other pass over the same tokens.

    Its tensors have one entry for every token that is predicted, that is, every token of a block but the first.
    """

    ce: Float[Tensor, "n t"]
    """The cross-entropy, in nats."""
    log_partition: Float[Tensor, "n t"]
    """A_p = log sum exp of the clean logits."""
    mean_row: Float[Tensor, "n t d_model"] | None
    """p W, the mean row of the unembedding under the clean distribution; None where logits are not linear in h."""
    mean_logit: Float[Tensor, "n t"]
    """(p W) . h_p, in float64; 0 where logits are not linear in h."""

    def of_blocks(self, rows: slice) -> "CleanPredictions":
        """Return the predictions of some of the token blocks."""
        mean_row = None if self.mean_row is None else self.mean_row[rows]
        return CleanPredictions(self.ce[rows], self.log_partition[rows], mean_row, self.mean_logit[rows])


def clean_predictions(lm: LanguageModel, tokens: np.ndarray | Int[Tensor, "n ctx"]) -> CleanPredictions:
    """Run the language model on tokens, untouched, and return what `spliced_losses` compares with."""
    unembedding = lm.model.get_output_embeddings().weight
    parts = [_clean_part(predictions, unembedding) for predictions in lm.predictions(tokens)]
    mean_rows = [part.mean_row for part in parts if part.mean_row is not None]
    return CleanPredictions(
        ce=torch.cat([part.ce for part in parts]),
        log_partition=torch.cat([part.log_partition for part in parts]),
        mean_row=torch.cat(mean_rows) if len(mean_rows) == len(parts) else None,
        mean_logit=torch.cat([part.mean_logit for part in parts]),
    )


def _clean_part(clean: Predictions, unembedding: Float[Tensor, "vocab d_model"]) -> CleanPredictions:
    ce, log_partition = next_token_loss(clean.logits, clean.tokens)
    if clean.last_hidden is None:
        return CleanPredictions(ce, log_partition, None, torch.zeros_like(ce, dtype=torch.float64))
    rows = mean_rows(clean.logits[:, :-1].flatten(0, 1), unembedding).view(*ce.shape, -1)
    mean_logit = (rows.double() * clean.last_hidden.double()).sum(-1)
    return CleanPredictions(ce, log_partition, rows, mean_logit)


def mean_rows(logits: Float[Tensor, "n vocab"], weight: Float[Tensor, "vocab d_model"]) -> Float[Tensor, "n d_model"]:
    """Return p W with p = softmax(logits)."""
    # A few rows at a time: all probabilities of a pass at once would take as much memory again as its logits.
    n = max(1, ENTRIES_AT_ONCE // logits.shape[1])
    weight = weight.float()
    return torch.cat([part.float().softmax(1) @ weight for part in logits.split(n)])


def spliced_losses(
    lm: LanguageModel,
    tokens: np.ndarray | Int[Tensor, "n ctx"],
    splice: Float[Tensor, "n ctx d_in"],
    restart_points: Tensor | None,
    clean: CleanPredictions,
) -> tuple[Float[Tensor, "n ctx_minus_1"], Float[Tensor, "n ctx_minus_1"]]:
    """Return the cross-entropy and KL(clean || spliced) of every token after the first, in nats, from one pass.

    The cross-entropy is that of `LanguageModel.cross_entropy`, to the bit.

    Args:
        lm: the language model.
        tokens: the token ids.
        splice: what replaces the activations at the language model's hook.
        restart_points: what `LanguageModel.restart_points` returned for the same tokens.
        clean: what `clean_predictions` returned for the same tokens.
    """
    losses = []
    divergences = []
    for spliced in lm.predictions(tokens, splice, restart_points):
        ce, log_partition = next_token_loss(spliced.logits, spliced.tokens)
        beside = clean.of_blocks(spliced.rows)
        if spliced.last_hidden is not None and beside.mean_row is not None:
            kl = kl_from_means(beside, log_partition, spliced.last_hidden)
        else:
            unspliced = next(lm.predictions(spliced.tokens))
            both = (predicted.logits[:, :-1].float().flatten(0, 1) for predicted in (unspliced, spliced))
            kl = kl_of_logits(*both).view(ce.shape)
        losses.append(ce)
        divergences.append(kl)
    return torch.cat(losses), torch.cat(divergences)


def kl_from_means(
    clean: CleanPredictions, log_partition: Float[Tensor, "n t"], hidden: Float[Tensor, "n t d_model"]
) -> Float[Tensor, "n t"]:
    """Return KL(clean || other) of each token, in nats, by the module's equation.

    Args:
        clean: the clean predictions.
        log_partition: A_q of the other predictions.
        hidden: h_q, the input of the unembedding in the other pass.
    """
    assert clean.mean_row is not None
    # float64: the terms are as large as logits, while their sum may be 10^-4 nats.
    moved = (clean.mean_row.double() * hidden.double()).sum(-1) - clean.mean_logit
    return log_partition.double() - clean.log_partition.double() - moved


def kl_of_logits(p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
    """Return KL(softmax p || softmax q) of each row, in nats, by the definition."""
    n = max(1, ENTRIES_AT_ONCE // p.shape[1])
    parts = []
    for clean, other in zip(p.split(n), q.split(n), strict=True):
        log_p = clean.double().log_softmax(1)
        parts.append((log_p.exp() * (log_p - other.double().log_softmax(1))).sum(1))
    return torch.cat(parts)
