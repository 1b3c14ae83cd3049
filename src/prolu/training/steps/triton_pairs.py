"""The pairs of the GPU's sparse step: the encoder's matmul, what of its result is on the support, and how many fit.

Arrays of pairs have a fixed number of places, which follows from the batches before, as only the GPU knows how many
pairs a batch has. The host reads that number later, and may then have to let the batch be computed again.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from prolu.sae.nonlinearities import Nonlinearity, Selection
from prolu.sae.weights import Weights
from prolu.training.steps import triton_kernels as kernels
from prolu.training.steps.cuda import _fp32_matmuls_in
from prolu.training.steps.selection_triton import bound_of_batch, bound_of_rows

STRETCH = 128
"""The number of pairs of one latent that one program of `partial_rows` sums."""


class Places(NamedTuple):
    """The number of pairs for which arrays have places."""

    per_token: int
    """The most pairs that a token may have."""
    in_all: int
    """The most pairs that a batch may have: a multiple of STRETCH."""

    def hold(self, largest: int, total: int) -> bool:
        """Return whether a batch fits, given the pairs of its largest token and of all tokens."""
        return largest <= self.per_token and total <= self.in_all

    def after(self, largest: int, total: int) -> "Places":
        """Return the places for the next batch: as they are, unless a batch did not fit or most of them are empty.

        Sizes are rounded up to a few different ones, so that the memory of one batch serves the next.
        """
        # Room for one pair at least: a step without any place computes nothing.
        largest = max(largest, 1)
        total = max(total, 1)
        per_token = self.per_token
        if not largest <= per_token <= 8 * max(largest, 32):
            per_token = triton.next_power_of_2(max(2 * largest, 64))
        in_all = self.in_all
        if not total <= in_all <= 4 * max(total, 1024):
            quarter = max(triton.next_power_of_2(total) // 8, STRETCH)
            in_all = (total // quarter + 2) * quarter
        return Places(per_token, in_all)


class TokenPairs(NamedTuple):
    """The pairs of each token in an array of its own, in order of latent."""

    centred: Tensor
    """The batch without b_dec, as its rows are gathered: [batch, d_in]."""
    latents: Tensor
    """The latent of each pair: [batch, places.per_token]."""
    m: Tensor
    """The pre-activation of each pair, likewise."""
    counts: Tensor
    """The number of pairs of each token, which may be more than had places."""
    largest_and_total: Tensor
    """The number of pairs of the largest token, and that of the batch."""


class Pairs(NamedTuple):
    """The pairs of a batch in order of token, and in each token in order of latent."""

    centred: Tensor
    """The batch without b_dec, as its rows are gathered: [batch, d_in]."""

    starts: Tensor
    """Where each token's pairs start."""
    counts: Tensor
    """The number of pairs of each token, which may be more than had places."""
    tokens: Tensor
    """The token of each pair."""
    latents: Tensor
    """The latent of each pair; d_sae at places without a pair."""
    m: Tensor
    """The pre-activation of each pair."""
    places: Places
    """The room that there was for them."""


class PairFinder:
    """Finds the (token, latent) pairs of one SAE on the support, and remembers how many places they need."""

    def __init__(self, like: Weights, batch_size: int, precision: str):
        """Args: see `Steps`."""
        self._precision = precision
        self._d_sae = like.d_sae
        self._on_gpu = like.encoder.device.type == "cuda"
        self.places = Places(64, STRETCH * triton.cdiv(64 * batch_size, STRETCH))
        """The room for the pairs of the next batch."""
        self._last: tuple[int, int] | None = None
        # In memory that the GPU writes to by itself, so that the host need not wait for it here.
        self._counted = torch.zeros(2, dtype=torch.int64, pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None

    def gathered(self, matrix: Tensor) -> Tensor:
        """Return a matrix in the format in which its rows are gathered and multiplied."""
        return matrix.bfloat16() if self._precision == "bf16" else matrix

    def find(self, acts: Tensor, weights: Weights, nonlinearity: Nonlinearity) -> TokenPairs:
        """Return the pairs of each token of a batch, as far as they have places.

        Args:
            acts: the batch [batch, d_in].
            weights: those of the SAE.
            nonlinearity: the SAE's.
        """
        centred = self.gathered(acts - weights.b_dec)
        m = self._encoded(centred, weights.encoder)
        batch = len(m)
        latents_of_tokens = m.new_empty(batch, self.places.per_token, dtype=torch.int32)
        m_of_tokens = m.new_empty(batch, self.places.per_token)
        counts = m.new_empty(batch, dtype=torch.int32)
        _compact(m, weights, nonlinearity, latents_of_tokens, m_of_tokens, counts)
        return TokenPairs(
            centred, latents_of_tokens, m_of_tokens, counts, torch.stack([counts.max().long(), counts.sum()])
        )

    def count(self, found: TokenPairs) -> None:
        """Have the GPU send the host how many pairs were found; the host does not wait for it."""
        self._counted.copy_(found.largest_and_total, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(found.m.device))

    def joined(self, found: TokenPairs) -> Pairs:
        """Return all tokens' pairs in one list, as far as they have places."""
        places = self.places
        held = found.counts.clamp(max=places.per_token)
        starts = torch.cumsum(held, 0, dtype=torch.int32) - held
        tokens = torch.zeros(places.in_all, dtype=torch.int32, device=starts.device)
        latents = torch.full_like(tokens, self._d_sae)
        pair_m = found.m.new_empty(places.in_all)
        of_tokens = (starts, found.counts, found.latents, found.m)
        launch(kernels.join, len(starts), *of_tokens, tokens, latents, pair_m, *places, BLOCK=128)
        return Pairs(found.centred, starts, found.counts, tokens, latents, pair_m, places)

    def had_places(self) -> bool:
        """Wait until the number of pairs of the last batch is known; return whether all of them had places."""
        if self._copied is not None:
            self._copied.synchronize()
        self._last = tuple(self._counted.tolist())
        return self.places.hold(*self._last)

    def fit(self) -> bool:
        """Give the next batch the places that the last one needed; return whether their number changes."""
        before = self.places
        if self._last is not None:
            self.places = before.after(*self._last)
        return self.places != before

    def _encoded(self, centred: Tensor, encoder: Tensor) -> Tensor:
        """Return m in the format of the weights."""
        with _fp32_matmuls_in(self._precision):
            rows = self.gathered(encoder)
            if self._precision != "bf16":
                return centred @ rows.T
            if centred.is_cuda:
                return torch.mm(centred, rows.T, out_dtype=torch.float32)
        # A product of two bf16 numbers is exact in fp32, so this is the same sum.
        return centred.float() @ rows.float().T


def _compact(
    m: Tensor, weights: Weights, nonlinearity: Nonlinearity, latents: Tensor, values: Tensor, counts: Tensor
) -> None:
    """Write the pairs of each token that are on the support and, where the nonlinearity selects, selected."""
    threshold = nonlinearity.threshold(weights.own)
    if threshold is None:
        # Without a threshold, entries off the support are set to -inf, so that all others are above the lowest number.
        m.masked_fill_(~nonlinearity.support(m, weights.own), -torch.inf)
        threshold = torch.full_like(m[0], torch.finfo(m.dtype).min)
    selection = nonlinearity.selection
    bound = m[:, 0] if selection is None else _bound(selection, m, threshold)
    # The blocks are so small that several programs run on one multiprocessor at once, and their reads overlap.
    sizes = {"HAS_BOUND": selection is not None, "BLOCK": min(1024, triton.next_power_of_2(m.shape[1]))}
    launch(kernels.compact, len(m), m, threshold, bound, latents, values, counts, m.shape[1], latents.shape[1], **sizes)


def _bound(selection: Selection, m: Tensor, threshold: Tensor) -> Tensor:
    """Return, for each token, how far above its threshold an entry must lie to be selected."""
    if m.dtype != torch.float32:
        bound = selection.bound(m - threshold)
    elif selection.over_batch:
        bound = bound_of_batch(m[None], threshold[None], min(selection.k * len(m), m.numel()))
    else:
        bound = bound_of_rows(m[None], threshold[None], min(selection.k, m.shape[1]))
    return bound.reshape(-1).expand(len(m)).contiguous()


def launch(kernel: Any, n: int, *arguments, **options) -> None:
    """Start a Triton kernel as n parallel programs, on the GPU that holds its first argument."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(n,)](*arguments, **options)
