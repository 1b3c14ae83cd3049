"""How much text a study asks for and how much there is: both are recorded, and a study that lacks far too much is
refused.
"""

import logging
from collections.abc import Sequence
from typing import Any

from prolu.activations.rows import ActivationRows
from prolu.activations.stream import ActivationStream
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.token_mask import NO_MASK
from prolu.evaluation.held_out import choose_blocks
from prolu.studies.settings import SweepSettings
from prolu.training.config import RunConfig

logger = logging.getLogger(__name__)

WORTH_SAYING = 0.01
"""The fraction of the tokens above which a message says that they are dropped. A few at the ends always are."""


def text_amounts(blocks: TokenBlocks | ActivationRows, eval_tokens: int) -> dict[str, Any]:
    """Return what was read of a text, and what of it is scored when `eval_tokens` tokens are asked for.

    Keys:
        documents, rows_left_out: the documents that were read, and the rows that had no text.
        tokens_dropped: tokens that were read and do not fill a block.
        train_tokens, held_out_tokens: the tokens in blocks on each side.
        eval_tokens: the held-out tokens that SAEs are scored on.
    """
    return {
        "documents": blocks.n_documents,
        "rows_left_out": blocks.n_rows_left_out,
        "tokens_dropped": blocks.n_tokens_dropped,
        "train_tokens": blocks.n_train_tokens,
        "held_out_tokens": blocks.n_held_out_tokens,
        "eval_tokens": n_scored(blocks, eval_tokens),
    }


def study_amounts(runs: Sequence[RunConfig], stream: ActivationStream, eval_tokens: int) -> dict[str, Any]:
    """Return the amounts of text in a study, `amounts` in its config.json. They follow from the other fields of it.

    Keys beside those of `text_amounts`:
        tokens_dropped_per_epoch: training tokens at the ends of windows, which do not fill a batch.
        epochs: how many times the longest run sees its text.
        tokens_left_out: training tokens that the stream's mask leaves out by id, position or role, if it has one.
    """
    longest = max((run.n_tokens for run in runs), default=0)
    n_left_out = stream.blocks.n_train_tokens - stream.n_train_tokens
    return text_amounts(stream.blocks, eval_tokens) | {
        **({"tokens_left_out": n_left_out} if stream.mask != NO_MASK else {}),
        "tokens_dropped_per_epoch": stream.dropped_tokens_per_epoch,
        "epochs": stream.epochs(longest),
    }


def n_scored(blocks: TokenBlocks | ActivationRows, asked: int) -> int:
    """Return how many held-out tokens are scored when `asked` are asked for."""
    return len(choose_blocks(blocks, asked)) * blocks.ctx


def check_epochs(runs: Sequence[RunConfig], stream: ActivationStream, most: float) -> None:
    """Raise ValueError if the longest run would see its text more often than `most` times."""
    longest = max(run.n_tokens for run in runs)
    epochs = stream.epochs(longest)
    blocks = stream.blocks
    if epochs > most:
        raise ValueError(
            f"n_tokens {longest}: the {blocks.kind} has {stream.n_train_tokens:,} training {blocks.unit}s, which would "
            f"be seen {epochs:.1f} times, more than max_epochs {most:g}; use more {blocks.kind} or fewer "
            f"{blocks.unit}s, or allow it with --max-epochs (max_epochs in Python)"
        )


def check_eval_tokens(blocks: TokenBlocks | ActivationRows, asked: int, least_fraction: float) -> None:
    """Raise ValueError if the text has less than this fraction of the evaluation tokens asked for."""
    found = n_scored(blocks, asked)
    if found < least_fraction * asked:
        raise ValueError(
            f"eval_tokens {asked}: the {blocks.kind} has only {found:,} held-out {blocks.unit}s to score on, less than "
            f"min_eval_fraction {least_fraction:g} of them; use more {blocks.kind} or ask for fewer, or allow it with "
            "--min-eval-fraction (min_eval_fraction in Python)"
        )


def tell_eval_tokens(blocks: TokenBlocks | ActivationRows, asked: int) -> None:
    """Say if fewer tokens will be scored than were asked for."""
    found = n_scored(blocks, asked)
    if found < asked:
        logger.warning(
            "SAEs are scored on %s held-out %ss, not on %s: the %s has no more",
            f"{found:,}", blocks.unit, f"{asked:,}", blocks.kind,
        )  # fmt: skip


def tell_amounts(runs: Sequence[RunConfig], stream: ActivationStream, settings: SweepSettings) -> None:
    """Say where the text of a study that begins is shorter than what is asked of it, or is not used in full."""
    longest = max(run.n_tokens for run in runs)
    blocks = stream.blocks
    n_train = stream.n_train_tokens
    if stream.epochs(longest) > 1:
        logger.warning(
            "the %s has %s training %ss, so runs of %s %ss see it %.1f times",
            blocks.kind, f"{n_train:,}", blocks.unit, f"{longest:,}", blocks.unit, stream.epochs(longest),
        )  # fmt: skip
    n_read = blocks.n_train_tokens + blocks.n_held_out_tokens + blocks.n_tokens_dropped
    if blocks.n_tokens_dropped > WORTH_SAYING * n_read:
        logger.warning(
            "%s of the %s tokens of the text are dropped, because they do not fill a block of %s at the end of the "
            "training text or of the held-out text",
            f"{blocks.n_tokens_dropped:,}", f"{n_read:,}", blocks.ctx,
        )  # fmt: skip
    dropped = stream.dropped_tokens_per_epoch
    if dropped > WORTH_SAYING * n_train:
        logger.warning(
            "%s of %s training %ss are left out of every epoch, because they do not fill a batch of %s at the end "
            "of a window", f"{dropped:,}", f"{n_train:,}", blocks.unit, f"{stream.batch_size:,}",
        )  # fmt: skip
    tell_eval_tokens(blocks, settings.eval_tokens)
