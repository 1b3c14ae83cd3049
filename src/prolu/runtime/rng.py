"""Random generators named by a key, so that every draw is a pure function of what it is for."""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a key, as in `keyed_generator(seed, "rows", window)`."""
    # A hash, so that keys that differ in one number give unrelated seeds. Python's own `hash` of a text differs from
    # process to process.
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
