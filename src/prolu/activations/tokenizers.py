"""Facts about a tokenizer: its BOS, the range of its ids, and a digest of its rules."""

import hashlib
from typing import Any

import numpy as np


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
