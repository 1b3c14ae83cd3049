"""Which tokens of token blocks a mask keeps, and the norm above which it leaves activations out."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prolu.activations.language_model import LanguageModel
from prolu.activations.rows import Rows
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.token_mask import NO_MASK, TokenMask

NORM_TOKENS = 32_768
"""The number of training tokens from which the median norm is taken."""

TOKENS_AT_ONCE = 2**22
"""The number of tokens that are looked at at once while those that are kept are counted."""


def special_token_ids(tokenizer: Any) -> np.ndarray:
    """Return the ids of a tokenizer's special tokens: those that it names, such as BOS, and those it marks as special.

    The markers of a chat template, such as <|im_start|>, are among the latter.
    """
    marked = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    return np.unique([*tokenizer.all_special_ids, *marked])


class KeptTokens:
    """Says which of the tokens of some token blocks a mask keeps, by ids and positions. Norms are not looked at."""

    def __init__(self, mask: TokenMask, tokenizer: Any, tokens: np.ndarray, side: str):
        """Prepare to look at token blocks.

        Args:
            mask: The mask.
            tokenizer: The tokenizer of the text.
            tokens: The token ids, [n_blocks, ctx].
            side: What the tokens are for, training or held-out, for messages.

        Raises:
            ValueError: A field of the mask is wrong.
        """
        mask.check()
        self._mask = mask
        self._tokens = tokens
        self._side = side
        self._special = special_token_ids(tokenizer) if mask.exclude_special_tokens else np.empty(0, np.int64)
        self.first = mask.exclude_positions
        """The first position that is kept, unless something else than positions decides."""
        self.differ = mask.exclude_special_tokens
        """Whether blocks differ in what is kept, because more than positions decides."""

    def of(self, chosen: np.ndarray | slice) -> Bool[np.ndarray, "n ctx"]:
        """Return which tokens of some blocks are kept."""
        tokens = self._tokens[chosen]
        kept = np.ones(tokens.shape, bool)
        kept[:, : self.first] = False
        if self._mask.exclude_special_tokens:
            kept &= ~np.isin(tokens, self._special)
        return kept

    @cached_property
    def per_block(self) -> int | np.ndarray:
        """The number of tokens of every block that are kept, or where blocks differ of each, [n_blocks].

        Raises:
            ValueError: None is kept of the whole text.
        """
        n_blocks, ctx = self._tokens.shape
        if self.differ:
            n = max(1, TOKENS_AT_ONCE // ctx)
            found = np.concatenate([self.of(slice(i, i + n)).sum(1) for i in range(0, n_blocks, n)])
        else:
            found = max(0, ctx - self.first)
        if not np.sum(found):
            raise ValueError(f"the mask leaves out {self._mask}, and so all {self._side} tokens; leave less out")
        return found


def kept_for_training(
    mask: TokenMask, lm: LanguageModel | None, blocks: TokenBlocks | Rows, *, train_on_bos: bool
) -> KeptTokens | None:
    """Return which tokens of a text are trained on; None if all are.

    Raises:
        ValueError: A field of the mask is wrong, or it is a mask for rows, which are no tokens.
    """
    mask.check()
    if lm is None or isinstance(blocks, Rows):
        if mask != NO_MASK:
            raise ValueError(f"the mask leaves out {mask}, but rows that come from no language model are no tokens")
        return None
    first = max(mask.exclude_positions, 0 if train_on_bos else 1)
    kept = KeptTokens(replace(mask, exclude_positions=first), lm.tokenizer, blocks.train, "training")
    return kept if kept.differ or kept.first else None


def kept_of_scored(
    mask: TokenMask, lm: LanguageModel, blocks: TokenBlocks, chosen: np.ndarray, acts: Float[Tensor, "n ctx d_in"]
) -> Bool[Tensor, "n ctx"] | None:
    """Return which tokens of some held-out blocks are scored; None if all are.

    Args:
        mask: What is left out.
        lm: The language model.
        blocks: The text.
        chosen: The numbers of the held-out blocks.
        acts: Their activations as the language model has them.

    Raises:
        ValueError: No token is left, a field of the mask is wrong, or the norm above which activations are left out has
            not been measured.
    """
    kept = torch.from_numpy(KeptTokens(mask, lm.tokenizer, blocks.held_out, "held-out").of(chosen)).to(acts.device)
    if mask.max_norm is not None:
        kept &= torch.linalg.vector_norm(acts.float(), dim=-1) <= mask.max_norm
    elif mask.max_norm_multiple is not None:
        raise ValueError(
            f"max_norm_multiple {mask.max_norm_multiple:g}: the norm that it stands for is not known; pass the mask of "
            "a stream, or max_norm"
        )
    # The last position predicts no token of its block.
    if not kept[:, :-1].any():
        raise ValueError(f"the mask leaves out {mask}, and so all held-out tokens; leave less out")
    return None if kept.all() else kept


def norm_threshold(pieces: Iterable[Float[Tensor, "n d_in"]], multiple: float) -> float:
    """Return this multiple of the median norm of some rows.

    Args:
        pieces: The rows, [n, d_in] each, in the language model's units. A piece may overwrite the one before.
        multiple: The multiple.
    """
    norms = torch.cat([torch.linalg.vector_norm(rows.float(), dim=-1).cpu() for rows in pieces])
    # Four digits, so that a processor that rounds the activations otherwise finds the same threshold.
    return float(f"{multiple * norms.median().item():.4g}")
