"""Random generators named by a key, so that every draw is a pure function of what it is for."""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key, as in `keyed_generator(seed, "rows", window)`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
