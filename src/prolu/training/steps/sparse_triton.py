"""The exactly sparse step on a GPU (Triton): one dense matmul, then only pairs on the support.

    m = (x - b_dec) W_enc                                    the only matmul
    pairs (token, latent) on the support, by token           `compact`, `join`: m is read once
    error and its product with each pair's decoder row       `decode`: one program per token
    pairs by latent                                          a stable sort
    nonlinearity and penalty, forward and back               their own functions, on arrays of pairs
    both weight gradients of a latent, then its update       `latent_rows`: one program per latent

Like the sparse step on a CPU, this file does not know what the nonlinearity or the penalty is. In bf16, the inputs of
the encoder's matmul, the rows that are gathered, and the numbers that multiply gathered rows are rounded. Sums, m,
weights, moments, and the error where it meets decoder rows are in fp32.

**How many pairs there are** is known on the GPU only. Arrays of pairs have a fixed number of places, which follows from
the batches before. While the GPU decodes, the host reads how many pairs the batch had. If they did not fit, the arrays
grow and the batch is computed again: nothing has been updated yet. So no pair is ever left out, the numbers do not
depend on the number of places, and the GPU never waits for the host, as the host reads a number that is there long
before the GPU is done with what it was given.

**Every sum has one order**: no kernel adds to what another program writes. The same batch gives the same bits.

Memory in numbers of 4 bytes, with F = d_sae, d = d_in, B = batch, n = places for pairs: 6 F d (weights and Adam) +
B F (m) + 2 B d (centred input and error) + about 20 n + 2 n d / 128 (sums of stretches) + in bf16 F d (rounded rows).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.checks import one_of
from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.nonlinearities import Selection
from prolu.sae.weights import Weights
from prolu.training.config import PRECISIONS
from prolu.training.moments import Moments
from prolu.training.steps import triton_kernels as kernels
from prolu.training.steps.adam import Update
from prolu.training.steps.base import Step
from prolu.training.steps.cuda import CudaStep, _compiling, _fp32_matmuls_in
from prolu.training.steps.objective import Objective, StepStats
from prolu.training.steps.selection_triton import bound_of_batch, bound_of_rows

STRETCH = 128
"""The number of pairs of one latent that one program of `partial_rows` sums."""

TILE = 8192
"""The number of entries of gathered rows that one program holds at a time, in registers."""


class _Places(NamedTuple):
    """For how many pairs there is room."""

    per_token: int
    """The most pairs that a token may have."""
    in_all: int
    """The most pairs that a batch may have: a multiple of STRETCH."""

    def hold(self, largest: int, total: int) -> bool:
        """Return whether a batch fits, given the pairs of its largest token and of all tokens."""
        return largest <= self.per_token and total <= self.in_all

    def after(self, largest: int, total: int) -> "_Places":
        """Return the places for the next batch: as they are, unless a batch did not fit or most of them are empty.

        Sizes are rounded up to a few different ones, so that functions are compiled for few sizes.
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
        return _Places(per_token, in_all)


class _Tokens(NamedTuple):
    """What is computed in order of token."""

    latents: Float[Tensor, "..."]
    """The latent of each pair; d_sae where there is no pair."""
    tokens: Tensor
    """The token of each pair."""
    m: Tensor
    """The pre-activation of each pair."""
    upstream: Tensor
    """The gradient of the error with respect to f, of each pair."""
    centred: Tensor
    """x - b_dec of each token, as it is gathered."""
    error: Tensor
    """The scaled error of each token."""
    squares: Tensor
    """The squared norm of each token's unscaled error."""
    penalties: Tensor
    """The penalty of each token's pairs."""
    counts: Tensor
    """The number of pairs of each token."""


class _Rows(NamedTuple):
    """What the kernels need for the gradients of both matrices, in the order of their parameters."""

    by_latent: Tensor
    """Where each latent's pairs start, and where the last one's end: [d_sae + 1]."""
    tokens: Tensor
    """The token of each pair, in order of latent like the next two."""
    to_m: Tensor
    """The gradient with respect to m, of each pair, in the format of gathered rows."""
    values: Tensor
    """f of each pair, in the same format."""
    centred: Tensor
    """x - b_dec of each token, in the same format."""
    error: Tensor
    """The scaled error of each token, in the same format."""
    partial: Tensor
    """Sums over stretches of pairs (`partial_rows`)."""


class SparseTritonStep(Step):
    """The GPU's sparse step for SAEs of one shape.

    What it does not know itself, it leaves to the GPU's dense step: auxiliary terms, and a mesh of several ranks.
    """

    def __init__(self, like: Weights, batch_size: int, precision: str = "fp32", mesh: Mesh = ALONE):
        """Args: see `Steps`.

        Raises:
            ValueError: there is no such precision.
        """
        one_of("precision", precision, PRECISIONS)
        self._like = like
        self._batch_size = batch_size
        self._precision = precision
        self.mesh = mesh
        self._on_gpu = like.encoder.device.type == "cuda"
        self._places = _Places(64, 0)
        # Read by the host while the GPU goes on: hence in memory that the GPU can write to by itself.
        self._counted = torch.zeros(2, dtype=torch.int64, pin_memory=self._on_gpu)
        self._latents_of = _compiled(_latents) if self._on_gpu else _latents
        self._pulled_back = _compiled(_pulled_back) if self._on_gpu else _pulled_back
        block = triton.next_power_of_2(like.d_in)
        self._acc = _ACC[like.encoder.dtype]
        self._tile = {"PAIRS": max(1, min(8, TILE // block)), "BLOCK": block, "num_warps": 4 if block <= 1024 else 8}

    @cached_property
    def _gradients(self) -> Weights:
        """Buffers for gradients, made when first asked for: the fused update does without."""
        return self._like.zeros_like()

    @cached_property
    def _dense(self) -> CudaStep:
        """The step that computes what this one does not."""
        return CudaStep(self._like, self._batch_size, self._precision, self.mesh)

    def gradients(
        self, weights: Weights, acts: Float[Tensor, "batch d_in"], objective: Objective
    ) -> tuple[Weights, StepStats]:
        """Return gradients, written out into the step's own buffers, and statistics of the batch."""
        if not self._is_mine(objective):
            return self._dense.gradients(weights, acts, objective)
        rows, vectors, stats = self._pair_gradients(weights, acts, objective)
        gradients = self._gradients
        nothing = [gradients.b_dec] * 5
        self._latent_rows_(rows, gradients.encoder, gradients.decoder, nothing, update=False)
        for name, gradient in vectors.items():
            (gradients.b_dec if name == "b_dec" else gradients.own[name]).copy_(gradient)
        return gradients, stats

    def update_(
        self,
        weights: Weights,
        moments: Moments,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        update: Update,
    ) -> StepStats:
        """Make one projected Adam update, in place; return statistics from before it.

        No gradient matrix is made, unless it is needed whole, for a clip, which takes the norm of all gradients.
        """
        if not self._is_mine(objective):
            return self._dense.update_(weights, moments, acts, objective, update)
        if update.adam.max_grad_norm is not None:
            return super().update_(weights, moments, acts, objective, update)
        constants = torch.from_numpy(update.constants(_NUMPY[weights.encoder.dtype]))
        if self._on_gpu:
            # From pinned memory, so that the host does not wait until the GPU has come here.
            constants = constants.pin_memory().to(weights.encoder.device, non_blocking=True)
        rows, vectors, stats = self._pair_gradients(weights, acts, objective)
        first, second = moments
        of_rows = [first.encoder, second.encoder, first.decoder, second.decoder, constants]
        self._latent_rows_(rows, weights.encoder, weights.decoder, of_rows, update=True)
        trained = [(weights.b_dec, vectors["b_dec"], first.b_dec, second.b_dec)]
        trained += [(p, vectors[name], first.own[name], second.own[name]) for name, p in weights.own.items()]
        for vector in trained:
            n = len(vector[0])
            _launch(kernels.adam_vector, triton.cdiv(n, 1024), *vector, constants, n, BLOCK=1024)
        return stats

    def _is_mine(self, objective: Objective) -> bool:
        return objective.auxiliary is None and self.mesh.n_ranks == 1

    def _latent_rows_(
        self, rows: _Rows, encoder: Tensor, decoder: Tensor, of_update: list[Tensor], *, update: bool
    ) -> None:
        """Update both matrices, or write their gradients into them."""
        _launch(
            kernels.latent_rows,
            len(encoder),
            *rows,
            encoder,
            decoder,
            *of_update,
            encoder.shape[1],
            UPDATE=update,
            ACC=self._acc,
            STRETCH=STRETCH,
            **self._tile,
        )

    def _pair_gradients(
        self, weights: Weights, acts: Tensor, objective: Objective
    ) -> tuple[_Rows, dict[str, Tensor], StepStats]:
        """Compute all of a step but the gradients of the two matrices.

        Returns:
            What the kernels need for these two, the gradients of b_dec and the own parameters, and statistics.
        """
        while True:
            places = self._places
            copied = torch.cuda.Event() if self._on_gpu else None
            found = self._pass_over_tokens(weights, acts, objective, copied)
            result = self._pass_over_latents(weights, found, objective) if found else None
            if copied is not None:
                # The GPU has had this number since before it decoded, and has the decoding still to do.
                copied.synchronize()
            largest, total = self._counted.tolist()
            self._places = places.after(largest, total)
            if result is not None and places.hold(largest, total):
                return result

    def _pass_over_tokens(
        self, weights: Weights, acts: Tensor, objective: Objective, copied: torch.cuda.Event | None
    ) -> _Tokens | None:
        """Find the pairs, decode, and compute the error; send the number of pairs to the host.

        Returns:
            What was computed, or None if there is no place for any pair yet; it is wrong if not all pairs had places.
        """
        batch = len(acts)
        per_token, in_all = self._places
        centred = acts - weights.b_dec
        with _fp32_matmuls_in(self._precision):
            centred, m = self._encoded(centred, weights.encoder)
        new = m.new_empty
        latents_of_tokens = new(batch, per_token, dtype=torch.int32)
        m_of_tokens = new(batch, per_token)
        counts = new(batch, dtype=torch.int32)
        self._compact(m, weights, objective, latents_of_tokens, m_of_tokens, counts)
        # One copy to the host: the pairs of the largest token, and those of the batch.
        self._counted.copy_(torch.stack([counts.max().long(), counts.sum()]), non_blocking=True)
        if copied is not None:
            copied.record(torch.cuda.current_stream(acts.device))
        if not in_all:
            return None
        held = counts.clamp(max=per_token)
        starts = torch.cumsum(held, 0, dtype=torch.int32) - held
        latents = new(in_all, dtype=torch.int32).fill_(weights.d_sae)
        tokens = new(in_all, dtype=torch.int32).zero_()
        pair_m = new(in_all)
        _launch(
            kernels.join,
            batch,
            starts,
            counts,
            latents_of_tokens,
            m_of_tokens,
            tokens,
            latents,
            pair_m,
            per_token,
            in_all,
            BLOCK=128,
        )
        values, penalties = self._latents_of(pair_m, latents, weights.own, objective, weights.d_sae, centred.dtype)
        error = torch.empty_like(acts, memory_format=torch.contiguous_format)
        found = _Tokens(
            latents=latents,
            tokens=tokens,
            m=pair_m,
            upstream=new(in_all),
            centred=centred,
            error=error,
            squares=new(batch),
            penalties=new(batch),
            counts=counts,
        )
        _launch(
            kernels.decode,
            batch,
            starts,
            counts,
            latents,
            values,
            penalties,
            self._gathered(weights.decoder),
            weights.b_dec,
            acts.contiguous(),
            new(1).fill_(2 / acts.numel()),
            error,
            found.upstream,
            found.squares,
            found.penalties,
            per_token,
            in_all,
            weights.d_in,
            ACC=self._acc,
            **self._tile,
        )
        return found

    def _pass_over_latents(
        self, weights: Weights, found: _Tokens, objective: Objective
    ) -> tuple[_Rows, dict[str, Tensor], StepStats]:
        """Sort the pairs by latent, pull the gradient back to m and the own parameters, and sum it by latent."""
        d_sae = weights.d_sae
        batch, d_in = found.error.shape
        n_places = len(found.m)
        # Stable, so that a latent's pairs stay in order of token and every sum has one order. Places without a pair
        # have a number behind the last latent's, and come last.
        latents, order = torch.sort(found.latents, stable=True)
        bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=latents.device)
        by_latent = torch.searchsorted(latents, bounds, out_int32=True)
        of_pairs = (found.m, found.upstream, found.tokens, order, latents)
        format_of_rows = found.centred.dtype
        tokens, to_m, values, columns, smallest = self._pulled_back(
            *of_pairs, weights.own, objective, batch, d_sae, format_of_rows
        )
        sums = columns.new_empty(len(columns), d_sae)
        _launch(
            kernels.latent_sums,
            d_sae,
            by_latent,
            columns,
            sums,
            n_places,
            d_sae,
            len(columns),
            COLUMNS=triton.next_power_of_2(len(columns)),
            BLOCK=64,
            num_warps=1,
        )
        partial = found.error.new_empty(n_places // STRETCH, 2, d_in)
        rows = _Rows(by_latent, tokens, to_m, values, found.centred, self._gathered(found.error), partial)
        _launch(
            kernels.partial_rows,
            len(partial),
            latents,
            *rows[1:],
            d_sae,
            d_in,
            ACC=self._acc,
            STRETCH=STRETCH,
            **self._tile,
        )
        m_sums, fired, *own_sums = sums
        # The tied bias is added at the output and subtracted at the input.
        vectors = {"b_dec": found.error.sum(0) - m_sums @ weights.encoder}
        vectors |= dict(zip(weights.own, own_sums, strict=True))
        mse = found.squares.sum(dtype=torch.float64) / found.error.numel()
        # A penalty may be above 0 at f = 0 (Sqrt(L1) is): every kind of step reports the same loss.
        n_inactive = (batch * d_sae - found.counts.sum()).double()
        penalty = (found.penalties.sum(dtype=torch.float64) + n_inactive * objective.penalty.at_zero) / batch
        return rows, vectors, StepStats(mse, penalty, torch.zeros_like(mse), fired, smallest)

    def _gathered(self, matrix: Tensor) -> Tensor:
        """Return a matrix in the format in which its rows are gathered and multiplied."""
        return matrix.bfloat16() if self._precision == "bf16" else matrix

    def _encoded(self, centred: Tensor, encoder: Tensor) -> tuple[Tensor, Tensor]:
        """Return x - b_dec as it is gathered, and m in the format of the weights."""
        centred = self._gathered(centred)
        rows = self._gathered(encoder)
        if self._precision != "bf16":
            return centred, centred @ rows.T
        if centred.is_cuda:
            return centred, torch.mm(centred, rows.T, out_dtype=torch.float32)
        # A product of two bf16 numbers is exact in fp32, so this is the same sum.
        return centred, centred.float() @ rows.float().T

    def _compact(
        self, m: Tensor, weights: Weights, objective: Objective, latents: Tensor, values: Tensor, counts: Tensor
    ) -> None:
        """Write the pairs of each token that are on the support and, where the nonlinearity selects, selected."""
        nonlinearity = objective.nonlinearity
        batch, d_sae = m.shape
        threshold = nonlinearity.threshold(weights.own)
        if threshold is None:
            # Any support will do, at the price of a mask; then every entry that is left is above the lowest number.
            m.masked_fill_(~nonlinearity.support(m, weights.own), -torch.inf)
            threshold = torch.full_like(m[0], torch.finfo(m.dtype).min)
        bound = m[:, 0]
        if nonlinearity.selection is not None:
            bound = _bound(nonlinearity.selection, m, threshold)
        _launch(
            kernels.compact,
            batch,
            m,
            threshold,
            bound,
            latents,
            values,
            counts,
            d_sae,
            latents.shape[1],
            HAS_BOUND=nonlinearity.selection is not None,
            # Small enough for several programs per multiprocessor, whose reads then overlap.
            BLOCK=min(1024, triton.next_power_of_2(d_sae)),
        )


_ACC = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}
"""The format of sums, by the format of the weights."""

_NUMPY = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
"""NumPy's name of the format of the weights."""


def _bound(selection: Selection, m: Tensor, threshold: Tensor) -> Tensor:
    """Return, for each token, how far above its threshold an entry must lie to be selected."""
    if m.dtype != torch.float32:
        bound = selection.bound(m - threshold)
    elif selection.over_batch:
        bound = bound_of_batch(m[None], threshold[None], min(selection.k * len(m), m.numel()))
    else:
        bound = bound_of_rows(m[None], threshold[None], min(selection.k, m.shape[1]))
    return bound.reshape(-1).expand(len(m)).contiguous()


def _launch(kernel: Any, n: int, *arguments, **options) -> None:
    """Run n programs of a kernel, on the GPU of its first argument. Triton's decorators hide the kernel's type."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(n,)](*arguments, **options)


def _compiled(function: Callable) -> Callable:
    """Return a function of arrays of pairs, fused; one compilation serves all lengths and coefficients."""
    fused = torch.compile(function, dynamic=True)
    seen = set()

    def call(*arguments):
        # A number would be compiled into the function, and coefficients change at every step of a warm-up.
        arguments = [_with_coefficient_on_device(a, arguments[0].device) for a in arguments]
        families = [(a.nonlinearity, a.penalty) for a in arguments if isinstance(a, Objective)]
        variant = (len(arguments[0]), *families)
        if variant in seen:
            return fused(*arguments)
        seen.add(variant)
        with _compiling():
            return fused(*arguments)

    return call


def _with_coefficient_on_device(argument, device: torch.device):
    if not isinstance(argument, Objective):
        return argument
    coeff = argument.coeff
    on_device = coeff.to(device).reshape(()) if isinstance(coeff, Tensor) else torch.full((), coeff, device=device)
    return replace(argument, coeff=on_device)


def _latents(
    m: Tensor, latents: Tensor, own: dict[str, Tensor], objective: Objective, d_sae: int, format_of_rows: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return f, in the format of gathered rows, and the penalty of each pair; 0 at places without a pair."""
    held = latents < d_sae
    own = _at(own, latents, d_sae)
    values = torch.where(held, objective.nonlinearity.value(m, own), 0)
    penalties = objective.penalty.value(objective.nonlinearity.penalised(values, m, own))
    return values.to(format_of_rows), torch.where(held, penalties, 0)


def _pulled_back(
    m: Tensor,
    upstream: Tensor,
    tokens: Tensor,
    order: Tensor,
    latents: Tensor,
    own: dict[str, Tensor],
    objective: Objective,
    batch: int,
    d_sae: int,
    format_of_rows: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what the gradients need of the pairs, in order of latent.

    Args:
        m: the pre-activation of each pair, in order of token.
        upstream: the gradient of the error with respect to f, in the same order.
        tokens: the token of each pair, in the same order.
        order: where each pair in order of latent lies in order of token.
        latents: the latent of each pair in order of latent; d_sae at places without a pair.
        own: the nonlinearity's own parameters.
        objective: the loss.
        batch: the number of tokens.
        d_sae: the number of latents.
        format_of_rows: the number format of rows that are gathered.

    Returns:
        Of each pair the token; the gradient on m and f, both in the format of gathered rows; in one tensor what is
        summed over each latent's pairs: the gradient on m, whether the latent is active, and the gradient on each own
        parameter. Places without a pair have 0. Last, the smallest active latent of a selection.
    """
    held = latents < d_sae
    own = _at(own, latents, d_sae)
    m = m[order]
    values = torch.where(held, objective.nonlinearity.value(m, own), 0)
    back, _ = objective.pull_back(upstream[order], values, m, own, batch)
    nothing = torch.zeros_like(values)
    columns = [back.m, (values > 0).to(values.dtype), *(back.parameters.get(name, nothing) for name in own)]
    # Selected, not multiplied by the mask: 0 * inf would be NaN.
    summed = torch.stack([torch.where(held, column, 0) for column in columns])
    smallest = torch.zeros_like(values[0])
    if objective.nonlinearity.selection is not None:
        smallest = torch.where(values > 0, values, torch.inf).min()
        smallest = torch.where(smallest.isfinite(), smallest, 0)
    return tokens[order], summed[0].to(format_of_rows), values.to(format_of_rows), summed, smallest


def _at(own: dict[str, Tensor], latents: Tensor, d_sae: int) -> dict[str, Tensor]:
    """Return own parameters pair by pair; places without a pair have those of the last latent."""
    at = latents.clamp(max=d_sae - 1)
    return {name: p[at] for name, p in own.items()}
