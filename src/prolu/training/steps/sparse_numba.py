"""The exactly sparse step on a CPU: one dense matmul, then only pairs on the support (numba).

    m = (x - b_dec) W_enc, a chunk of tokens at a time      the only matmul
    pairs (token, latent) on the support, by token          count, then fill
    error and its product with each pair's decoder row      while the token's row is in the cache
    pairs by latent                                         counting sort
    both weight gradients of a latent, then its update      while the latent's rows are in the cache

An auxiliary term is a second batch: its pairs are those of rows batch ... 2 batch, with targets and errors of their
own. From the sort on they are treated like all other pairs, so no kernel needs to distinguish them.

Nothing of size batch x d_sae is ever made. This file does not know what the nonlinearity or the penalty is: it applies
their own functions to the pairs.

Memory in numbers of 4 bytes, with F = d_sae, d = d_in, B = batch, n = pairs: 6 F d (weights and Adam) + 1024 F (one
chunk of m) + 2 B d (centred input and error) + about 12 n.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.nonlinearities import Auxiliary, Parameters, Pullback
from prolu.sae.weights import Weights
from prolu.training.moments import Moments
from prolu.training.steps import numba_pairs, numba_rows
from prolu.training.steps.adam import Update
from prolu.training.steps.base import Step
from prolu.training.steps.latent_sorter import LatentSorter, PairsByLatent
from prolu.training.steps.numba_threads import use_torchs_threads
from prolu.training.steps.objective import Objective, StepStats, smallest_active
from prolu.training.steps.pair_finder import GrowingArrays, PairFinder


class PairsByToken(NamedTuple):
    """Pairs of some rows in order of token: what `_decode` needs, and where it writes."""

    starts: np.ndarray
    """Where each row's pairs start, and where the last row's end: [rows + 1]."""
    latents: np.ndarray
    """The latent of each pair."""
    values: Tensor
    """f of each pair."""
    upstream: np.ndarray
    """Written: the gradient of the error with respect to f, of each pair."""


class _AuxiliaryPairs(NamedTuple):
    """What an auxiliary term adds to a step."""

    latents: np.ndarray
    """The latents of all pairs: the SAE's, then the term's."""
    values: Tensor
    """The auxiliary latents, of the term's pairs."""
    back: Pullback
    """Gradients of the term's pairs."""
    loss: Tensor
    """The term, coefficient included."""


class _TokenPass(NamedTuple):
    """What is computed in order of token. Pairs are the SAE's, then those of an auxiliary term."""

    starts: np.ndarray
    """Where each row's pairs start, and where the last row's end: [rows + 1]."""
    latents: np.ndarray
    """The latent of each pair."""
    back: Pullback
    """The gradients with respect to m and the own parameters, of each pair."""
    to_decoder: Tensor
    """f of each pair; 0 where the decoder is not trained."""
    centred: Tensor
    """x - b_dec of each row."""
    error: Tensor
    """The scaled error of each row."""
    stats: StepStats
    """Statistics of the batch; without an auxiliary term, `fired` is empty and is counted while pairs are sorted."""


class SparseNumbaStep(Step):
    """The sparse step for SAEs of one shape."""

    def __init__(self, like: Weights, batch_size: int, mesh: Mesh = ALONE):
        """Args: see `Steps`."""
        self.mesh = mesh
        dtype = like.encoder.numpy().dtype
        self._like = like
        self._centred = like.encoder.new_empty(batch_size, like.d_in)
        self._error = like.encoder.new_empty(batch_size, like.d_out)
        self._starts = np.zeros(2 * batch_size + 1, np.int64)
        self._squares = np.empty(batch_size, dtype)
        self._finder = PairFinder(like, batch_size)
        self._sorter = LatentSorter(like)
        self._arrays = GrowingArrays(dtype)

    @cached_property
    def _gradients(self) -> Weights:
        """Buffers for gradients, made when first asked for: the fused update does without."""
        return self._like.zeros_like()

    def gradients(
        self,
        weights: Weights,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> tuple[Weights, StepStats]:
        """Return gradients, written out into the step's own buffers, and statistics of the batch."""
        pairs, others, stats = self._pair_gradients(weights, acts, objective, target)
        gradients = self._gradients
        numba_rows.latent_gradients(*pairs, gradients.encoder.numpy(), gradients.decoder.numpy())
        for name, gradient in (gradients.shared() | gradients.own).items():
            gradient.copy_(others[name]) if name in others else gradient.zero_()
        return gradients, stats

    def update_(
        self,
        weights: Weights,
        moments: Moments,
        acts: Float[Tensor, "batch d_in"],
        objective: Objective,
        update: Update,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> StepStats:
        """Make one projected Adam update, in place; return statistics from before it.

        No gradient matrix is made, unless it is needed whole: for a clip, which takes the norm of all gradients, for a
        sum over ranks, and for terms of the weights.
        """
        if update.adam.max_grad_norm is not None or self.mesh.n_data > 1 or objective.weight_terms:
            return super().update_(weights, moments, acts, objective, update, target)
        first, second = moments
        pairs, others, stats = self._pair_gradients(weights, acts, objective, target)
        constants = update.constants(weights.encoder.numpy().dtype)
        matrices = (weights.encoder, weights.decoder, first.encoder, second.encoder, first.decoder, second.decoder)
        numba_rows.latent_updates(*pairs, *(t.numpy() for t in matrices), constants)
        named = [part.shared() | part.own for part in (weights, first, second)]
        for name, gradient in others.items():
            # W_skip is updated as one long row.
            p, m, v = (part[name].view(-1).numpy() for part in named)
            numba_rows.adam_row(p, gradient.reshape(-1).numpy(), m, v, constants)
        return stats

    def _pair_gradients(
        self, weights: Weights, acts: Tensor, objective: Objective, target: Tensor | None
    ) -> tuple[PairsByLatent, dict[str, Tensor], StepStats]:
        """Compute all of a step but the gradients of the two matrices.

        Returns:
            What the kernels need for these two, the gradients of all other tensors by name, and statistics.
        """
        use_torchs_threads()
        found = self._pass_over_tokens(weights, acts, objective, target)
        # In order of latent: from here on the pairs of an auxiliary term are pairs like the others.
        self._sorter.sort(found.starts, found.latents)
        to_m, m_sums = self._sorter.sorted_and_summed("to_m", found.back.m)
        others = {
            # A bias often has the gradient of m itself, which is summed already.
            name: m_sums if gradient is found.back.m else self._sorter.sorted_and_summed("to_own", gradient)[1]
            for name, gradient in found.back.parameters.items()
        }
        # All prefixes contain the first block. An auxiliary term's rows have neither a bias nor a skip at their output.
        error = found.error[: len(acts)]
        to_input = self.mesh.sum_over_latents_(m_sums @ weights.encoder, "b_dec")
        others |= weights.bias_gradients(error.sum(0), to_input)
        if weights.skip is not None:
            others["skip"] = acts.T @ error
        values, counted = self._sorter.sorted_and_counted(found.to_decoder)
        stats = found.stats._replace(fired=counted) if objective.auxiliary is None else found.stats
        pairs = self._sorter.pairs(values, to_m, found.centred, found.error, objective.prefixes, len(acts))
        return pairs, others, stats

    def _pass_over_tokens(
        self, weights: Weights, acts: Tensor, objective: Objective, target: Tensor | None
    ) -> _TokenPass:
        """Encode, decode, and bring the error back to the pairs, token by token."""
        nonlinearity = objective.nonlinearity
        term = objective.auxiliary
        batch = len(acts)
        whole_batch = batch * self.mesh.n_data
        scale = 2 / (whole_batch * weights.d_out)
        n_rows = batch if term is None else 2 * batch
        blocks = objective.blocks(weights.d_sae)
        of_blocks = len(blocks) * batch
        centred, error = self._rows(n_rows, of_blocks + n_rows - batch)
        torch.sub(acts, weights.b_dec, out=centred[:batch])

        starts = self._starts[: batch + 1]
        n = self._finder.find(weights.encoder, weights.own, nonlinearity, centred[:batch], starts)
        latents, m = self._finder.found(n)
        own = self._at_pairs("own", weights.own, latents)
        values = nonlinearity.value(m, own)
        pairs = PairsByToken(starts, latents, values, self._arrays.array("upstream", n))
        wanted = weights.for_decoder(acts, target).contiguous()
        each = scale / len(blocks)
        bias = weights.output_bias
        upstream, mse = self._decode(weights.decoder, pairs, bias, wanted, each, error[:of_blocks], blocks)
        at = torch.from_numpy(latents)
        objective, of_means = objective.at_pairs(values, m, own, at, weights.d_sae, whole_batch, self.mesh)
        back, penalty = objective.pull_back(upstream, values, m, own, whole_batch)
        # A penalty may be above 0 at f = 0 (Sqrt(L1) is): every kind of step reports the same loss.
        n_inactive = batch * weights.d_sae - n
        penalty = (penalty + n_inactive * objective.penalty.at_zero) / whole_batch if of_means is None else of_means
        stats = StepStats(
            mse=mse,
            penalty=penalty,
            auxiliary=torch.zeros_like(mse),
            fired=values.new_empty(0),
            smallest=smallest_active(nonlinearity, values),
        )
        if term is None:
            return _TokenPass(starts, latents, back, values, centred, error, stats)

        # Counted before the term's pairs join: they are not latents of the SAE.
        fired = np.bincount(latents[values.numpy() > 0], minlength=weights.d_sae)
        # The residual is the error of all latents, which the last block sees, without its scale and sign.
        last = error[of_blocks - batch : of_blocks]
        of_term = last * (-1 / each) if term.target == "residual" else wanted - bias
        latents, also, also_back, loss = self._auxiliary(weights, term, n, centred, of_term, error[of_blocks:], scale)
        to_decoder = torch.cat([values, also if term.trains_decoder else torch.zeros_like(also)])
        stats = stats._replace(auxiliary=loss, fired=torch.from_numpy(fired).to(values.dtype))
        starts = self._starts[: n_rows + 1]
        return _TokenPass(starts, latents, _joined(back, also_back), to_decoder, centred, error, stats)

    def _rows(self, n_centred: int, n_error: int) -> tuple[Tensor, Tensor]:
        """Return so many rows for the centred input and for the error.

        An auxiliary term has rows of its own in both, and with a nested loss the error has rows for every block.
        """
        if len(self._centred) < n_centred:
            self._centred = self._like.encoder.new_empty(n_centred, self._like.d_in)
        if len(self._error) < n_error:
            self._error = self._like.encoder.new_empty(n_error, self._like.d_out)
        return self._centred[:n_centred], self._error[:n_error]

    def _decode(
        self,
        decoder: Tensor,
        pairs: PairsByToken,
        bias: Tensor,
        target: Tensor,
        scale: float,
        error: Tensor,
        blocks: Sequence[slice] = (),
    ) -> tuple[Tensor, Tensor]:
        """Fill `error` with (f W_dec + bias - target) * scale, row by row; of several blocks, with what each sees.

        Returns:
            The product of the error with each pair's decoder row, and the mean of the unscaled error's squares.
        """
        starts, latents, values, upstream = pairs
        squares = self._squares[: len(target)]
        x = target.numpy()
        rows = decoder.numpy()
        factor = x.dtype.type(scale)
        if self.mesh.n_latent > 1:
            # The other ranks' latents belong to the reconstruction too, so it is summed before the error is known.
            numba_rows.reconstruct(starts, latents, values.numpy(), rows, error.numpy())
            self.mesh.sum_over_latents_(error, "reconstruction").add_(bias)
            numba_rows.send_back(starts, latents, rows, x, factor, error.numpy(), upstream, squares)
        elif len(blocks) > 1:
            ends = np.array([block.stop for block in blocks])
            each = error.view(len(blocks), len(target), -1).numpy()
            numba_rows.decode_nested(
                ends, starts, latents, values.numpy(), rows, bias.numpy(), x, factor, each, upstream, squares
            )
        else:
            numba_rows.decode(
                starts, latents, values.numpy(), rows, bias.numpy(), x, factor, error.numpy(), upstream, squares
            )
        mean = squares.sum(dtype=np.float64) / (target.numel() * self.mesh.n_data)
        return torch.from_numpy(upstream), torch.tensor(mean)

    def _auxiliary(
        self, weights: Weights, term: Auxiliary, n: int, centred: Tensor, target: Tensor, error: Tensor, scale: float
    ) -> _AuxiliaryPairs:
        """Append an auxiliary term's pairs to the n of the SAE; fill the second half of `centred`, and `error`."""
        batch = len(centred) // 2
        centred[batch:] = centred[:batch]
        starts = self._starts[batch : 2 * batch + 1]
        if term.of_dead:
            assert term.among is not None
            # Only the dead latents' rows are encoded: their pairs count latents among the dead, and are renumbered.
            dead = term.among.nonzero().squeeze(1)
            dead_own = {name: p[dead] for name, p in weights.own.items()}
            total = self._finder.find(weights.encoder[dead], dead_own, term.nonlinearity, centred[:batch], starts, n)
            latents, m = self._finder.found(total, n)
            np.take(dead.numpy().astype(np.int32), latents, out=latents)
        else:
            # The term's latents are active where the SAE's are, so its pairs are the same ones.
            total = 2 * n
            starts[1:] = self._starts[1 : batch + 1] + n
            latents, m = self._finder.found(total, n)
            main_latents, main_m = self._finder.found(n)
            latents[:] = main_latents
            m[:] = main_m
        own = self._at_pairs("also own", weights.own, latents)
        values = term.nonlinearity.value(m, own)
        if term.target is None:
            # The pairs have no decoder gradient, but 0 times an old number in this buffer might be NaN.
            error[:] = 0
            to_pairs = torch.full_like(values, scale / 2 * term.coeff)
            value = self.mesh.sum_over_latents_(values.sum(dtype=torch.float64) * (scale / 2), "scalars")
        else:
            upstream = self._arrays.array("also upstream", len(latents))
            pairs = PairsByToken(starts - starts[0], latents, values, upstream)
            nothing = torch.zeros_like(weights.output_bias)
            to_pairs, value = self._decode(weights.decoder, pairs, nothing, target, scale * term.coeff, error)
        back = term.nonlinearity.pullback(to_pairs, m, own)
        return _AuxiliaryPairs(self._finder.found(total)[0], values, back, term.coeff * value)

    def _at_pairs(self, purpose: str, parameters: Parameters, latents: np.ndarray) -> dict[str, Tensor]:
        """Return parameters pair by pair, in arrays named by their purpose."""
        return {name: self._gathered(f"{purpose} {name}", latents, p) for name, p in parameters.items()}

    def _gathered(self, name: str, source: np.ndarray, values: Tensor) -> Tensor:
        out = self._arrays.array(name, len(source))
        numba_pairs.gather(source, values.numpy(), out)
        return torch.from_numpy(out)


def _joined(main: Pullback, also: Pullback) -> Pullback:
    """Return the gradients of both sets of pairs, one after the other; a parameter without a gradient in one gets 0."""
    no_main = torch.zeros_like(main.m)
    no_also = torch.zeros_like(also.m)
    names = [*main.parameters, *(name for name in also.parameters if name not in main.parameters)]
    joined = {
        name: torch.cat([main.parameters.get(name, no_main), also.parameters.get(name, no_also)]) for name in names
    }
    return Pullback(torch.cat([main.m, also.m]), joined)
