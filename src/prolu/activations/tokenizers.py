"""Token ids: a tokenizer's BOS, range and digest, the strings of ids, and ids in any form as a tensor."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def bos_token_id(tokenizer: Any) -> int:
    """Return the token that begins every block: BOS, or EOS for a tokenizer that has no BOS."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a BOS nor an EOS token to begin a block with")


def n_token_ids(tokenizer: Any) -> int:
    """Return the number of token ids of a tokenizer, from 0 to its largest, added tokens included.

    It is not the number of the tokenizer's entries, because some numbers in between may belong to no token.
    """
    return max(tokenizer.get_vocab().values()) + 1


def token_dtype(tokenizer: Any) -> np.dtype:
    """Return the number format of the blocks of a tokenizer."""
    # Two bytes per token where they are enough: 400M tokens of GPT-2 are then 0.8 GB.
    return np.dtype(np.uint16 if n_token_ids(tokenizer) <= 2**16 else np.uint32)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 digest, in hexadecimal, of the vocabulary and rules of a fast tokenizer (its tokenizer.json).

    Tokenizers with the same digest give the same tokens.
    """
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the string of each token of a text.

    Where a character is spread over several tokens, the last of them has it and the others are empty.
    """
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=False)
    return [decoder.step(tokenizer.backend_tokenizer, token) or "" for token in ids]


def as_token_ids(tokens: Any) -> Tensor:
    """Return token ids as a tensor of one or two dimensions.

    Raises:
        ValueError: they are no such ids.
    """
    try:
        ids = tokens if isinstance(tokens, Tensor) else torch.from_numpy(np.asarray(tokens))
        if ids.ndim in (1, 2) and ids.numel() and not (ids.is_floating_point() or ids.dtype == torch.bool):
            return ids.long()
    except (ValueError, TypeError):  # lists of several lengths, or of something else than numbers
        pass
    shape = f" of shape {tuple(tokens.shape)}" if hasattr(tokens, "shape") else ""
    raise ValueError(
        f"tokens: a {type(tokens).__name__}{shape}; must be a text, a list of texts, or token ids [ctx] or [n, ctx]"
    )
