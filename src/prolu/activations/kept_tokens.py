"""Which tokens of token blocks a mask keeps, and the norm above which it leaves activations out."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prolu.activations.language_model import LanguageModel
from prolu.activations.rows import ActivationRows
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

    def __init__(self, mask: TokenMask, tokenizer: Any, blocks: TokenBlocks, side: Literal["training", "held-out"]):
        """Prepare to look at token blocks.

        Args:
            mask: The mask.
            tokenizer: The tokenizer of the text.
            blocks: The text.
            side: Which of its blocks are meant.

        Raises:
            ValueError: A field of the mask is wrong, or the text does not have the roles that are kept.
        """
        mask.check()
        self._mask = mask
        self._side = side
        self._tokens = blocks.train if side == "training" else blocks.held_out
        self._roles = blocks.train_roles if side == "training" else blocks.held_out_roles
        self._kept_roles = _numbers_of_roles(mask, blocks)
        self._special = special_token_ids(tokenizer) if mask.exclude_special_tokens else np.empty(0, np.int64)
        self.first = mask.exclude_positions
        """The first position of a block that is kept, where only positions decide what is kept."""
        self.differ = mask.exclude_special_tokens or bool(mask.keep_roles)
        """Whether different positions are kept in different blocks, because token ids or roles decide too."""

    def of(self, chosen: np.ndarray | slice) -> Bool[np.ndarray, "n ctx"]:
        """Return which tokens of some blocks are kept."""
        tokens = self._tokens[chosen]
        kept = np.ones(tokens.shape, bool)
        kept[:, : self.first] = False
        if self._mask.exclude_special_tokens:
            kept &= ~np.isin(tokens, self._special)
        if self._mask.keep_roles and self._roles is not None:
            kept &= np.isin(self._roles[chosen], self._kept_roles)
        return kept

    @cached_property
    def per_block(self) -> int | np.ndarray:
        """The number of tokens that are kept in every block or, if blocks differ, in each block, [n_blocks].

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


def _numbers_of_roles(mask: TokenMask, blocks: TokenBlocks) -> list[int]:
    """Return the numbers of the roles that a mask keeps."""
    for role in mask.keep_roles:
        if blocks.train_roles is None:
            raise ValueError(
                f"keep_roles {role}: the text {blocks.source!r} is no chats; name the column of their messages with "
                "--text-column"
            )
        if not blocks.roles:
            raise ValueError(
                f"keep_roles {role}: no token of {blocks.source!r} has a known role, since the chat template changes "
                "what the messages say"
            )
        if role not in blocks.roles:
            raise ValueError(f"keep_roles {role}: the text has the roles {', '.join(blocks.roles)}")
    return [blocks.roles.index(role) + 1 for role in mask.keep_roles]


def kept_for_training(
    mask: TokenMask, lm: LanguageModel | None, blocks: TokenBlocks | ActivationRows, *, train_on_bos: bool
) -> KeptTokens | None:
    """Return which tokens of a text are trained on; None if all are.

    Raises:
        ValueError: A field of the mask is wrong, or it is a mask for rows, which are no tokens.
    """
    mask.check()
    if lm is None or isinstance(blocks, ActivationRows):
        if mask != NO_MASK:
            raise ValueError(f"the mask leaves out {mask}, but rows that come from no language model are no tokens")
        return None
    first = max(mask.exclude_positions, 0 if train_on_bos else 1)
    kept = KeptTokens(replace(mask, exclude_positions=first), lm.tokenizer, blocks, "training")
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
    kept = torch.from_numpy(KeptTokens(mask, lm.tokenizer, blocks, "held-out").of(chosen)).to(acts.device)
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
    # Rounded to four digits, so that a processor on which the activations differ in rounding finds the same threshold.
    return float(f"{multiple * norms.median().item():.4g}")
