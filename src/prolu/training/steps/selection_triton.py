"""The bound of a selection on a GPU: the k-th largest entry of each row, or of a whole matrix, without sorting.

The bit pattern of a positive fp32 number, read as an integer, grows with the number. So the k-th largest entry is found
eight bits at a time, from the top: count how many of the entries that share the bits found so far have each value of
the next eight, and keep the largest value that leaves at least k entries at or above it. Four passes over the data give
all 32 bits. Counts are integers, so that no order of additions can change them, and the result is exact.

Entries that are not above 0 count as 0: a selection never reaches below (`Selection.bound`).
"""

# The language of Triton's kernels looks like Python, but its types are not Python's.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK = 2048
"""The number of entries that a program reads at a time."""

WARPS = 4
"""The number of warps of a program. The counts of each are added up in shared memory once for each block."""

BLOCKS_PER_PROGRAM = 16
"""The number of such blocks that a program counts before it adds its counts to the common ones."""


def bound_of_rows(
    m: Float[Tensor, "n_saes batch d_sae"], threshold: Float[Tensor, "n_saes d_sae"], k: int
) -> Float[Tensor, "n_saes batch 1"]:
    """Return, for each token, the k-th largest m - threshold; 0 where fewer than k are above 0."""
    n_saes, batch, d_sae = m.shape
    bound = m.new_empty(n_saes, batch, 1)
    _kth_of_row[(n_saes * batch,)](m, threshold, bound, batch, d_sae, k, BLOCK=BLOCK, num_warps=WARPS)
    return bound


def bound_of_batch(
    m: Float[Tensor, "n_saes batch d_sae"], threshold: Float[Tensor, "n_saes d_sae"], n: int
) -> Float[Tensor, "n_saes 1 1"]:
    """Return, for each SAE, the n-th largest m - threshold of the batch; 0 where fewer than n are above 0."""
    n_saes, batch, d_sae = m.shape
    n_entries = batch * d_sae
    bits = torch.zeros(n_saes, dtype=torch.int32, device=m.device)
    wanted = torch.full_like(bits, n)
    counts = torch.zeros(n_saes, 256, dtype=torch.int32, device=m.device)
    n_programs = triton.cdiv(n_entries, BLOCK * BLOCKS_PER_PROGRAM)
    for shift in (24, 16, 8, 0):
        _count_digits[(n_programs, n_saes)](
            m,
            threshold,
            bits,
            counts,
            n_entries,
            d_sae,
            SHIFT=shift,
            BLOCK=BLOCK,
            N_BLOCKS=BLOCKS_PER_PROGRAM,
            num_warps=WARPS,
        )  # fmt: skip
        _choose_digit[(n_saes,)](bits, wanted, counts, SHIFT=shift)
    return bits.view(torch.float32).view(n_saes, 1, 1)


@triton.jit
@no_type_check
def _key(m, threshold):
    """Return the bits of m - threshold as an integer that grows with it; 0 where it is not above 0."""
    above = m - threshold
    return tl.where(above > 0, above, 0.0).to(tl.int32, bitcast=True)


@triton.jit
@no_type_check
def _counts(key, inside, bits, SHIFT: tl.constexpr):
    """Return how many of the entries that share the bits found so far have each value of the next eight bits."""
    # Shifted in two steps, because a shift by all 32 bits has no meaning.
    same = inside & ((key >> SHIFT >> 8) == (bits >> SHIFT >> 8))
    counts = tl.zeros([256], tl.int32)
    # After the first passes few blocks have such an entry, and counting is what takes the time.
    if tl.sum(same.to(tl.int32), 0) > 0:
        counts = tl.histogram((key >> SHIFT) & 255, 256, mask=same)
    return counts


@triton.jit
@no_type_check
def _largest_digit(counts, wanted):
    """Return the largest value of the next eight bits that leaves at least `wanted` entries at or above it.

    Also return how many entries lie above that value.
    """
    digits = tl.arange(0, 256)
    at_or_above = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    digit = tl.max(tl.where(at_or_above >= wanted, digits, 0), 0)
    return digit, tl.sum(tl.where(digits > digit, counts, 0), 0)


@triton.jit
@no_type_check
def _kth_of_row(m, threshold, bound, batch, d_sae, k, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    # In 64 bits: a stack of large matrices has more entries than 32 bits count.
    m += row.to(tl.int64) * d_sae
    threshold += (row // batch).to(tl.int64) * d_sae
    bits = tl.zeros((), tl.int32)
    wanted = k
    for shift in tl.static_range(24, -8, -8):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, d_sae, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < d_sae
            key = _key(tl.load(m + at, mask=inside, other=0.0), tl.load(threshold + at, mask=inside, other=0.0))
            counts += _counts(key, inside, bits, shift)
        digit, above = _largest_digit(counts, wanted)
        wanted -= above
        bits |= digit << shift
    tl.store(bound + row, bits.to(tl.float32, bitcast=True))


@triton.jit
@no_type_check
def _count_digits(
    m, threshold, bits, counts, n_entries, d_sae, SHIFT: tl.constexpr, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr
):
    sae = tl.program_id(1)
    m += sae.to(tl.int64) * n_entries
    threshold += sae.to(tl.int64) * d_sae
    found = tl.load(bits + sae)
    own = tl.zeros([256], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK * N_BLOCKS
    for block in range(N_BLOCKS):
        at = first + block * BLOCK + tl.arange(0, BLOCK)
        inside = at < n_entries
        latent = at % d_sae
        key = _key(tl.load(m + at, mask=inside, other=0.0), tl.load(threshold + latent, mask=inside, other=0.0))
        own += _counts(key, inside, found, SHIFT)
    tl.atomic_add(counts + sae * 256 + tl.arange(0, 256), own)


@triton.jit
@no_type_check
def _choose_digit(bits, wanted, counts, SHIFT: tl.constexpr):
    sae = tl.program_id(0)
    place = counts + sae * 256 + tl.arange(0, 256)
    n = tl.load(wanted + sae)
    digit, above = _largest_digit(tl.load(place), n)
    tl.store(bits + sae, tl.load(bits + sae) | (digit << SHIFT))
    tl.store(wanted + sae, n - above)
    # For the next pass.
    tl.store(place, tl.zeros([256], tl.int32))
