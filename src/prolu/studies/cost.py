"""An estimate of what a study will cost: tokens, FLOPs, memory, disk, and time at rates measured on this machine."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from prolu.activations.language_model import BATCH_TOKENS
from prolu.studies.model_sizes import Outline
from prolu.studies.rates import Rates, matmul_flops, measure
from prolu.training.config import RunConfig
from prolu.training.steps.dense import ROWS_PER_CHUNK

BYTES = 4
"""The size of a number in fp32."""

BYTES_PER_TOKEN = 2
"""The size of a token in memory."""

DENSE_FRACTION = 0.05
"""The fraction of the steps that are assumed dense: early in training L0 is above the crossover to sparse steps."""

COPIES_OF_HELD_OUT = 3
"""The number of arrays of the size of the held-out activations: themselves, a reconstruction, and zeros."""

CLEAN_PASSES = 3
"""The number of passes of the language model over the held-out tokens that are made once, whatever the number of SAEs:
one without changes, and two with zeros in place of the activations."""


class Estimate(NamedTuple):
    """The cost of a study. Sizes are in bytes."""

    n_hooks: int
    """The number of hooks."""
    n_runs: int
    """The number of runs at all hooks together."""
    steps_per_run: int
    """The number of steps of the longest run."""
    tokens: int
    """The number of tokens of the stream, each of which is seen by every run."""
    sae_tokens: int
    """The number of tokens seen, summed over runs."""
    flops_training: float
    """The FLOPs of training steps, resampling and the SAEs' part of scoring."""
    flops_language_model: float
    """The FLOPs of the language model: harvesting, candidates for resampling, and scoring."""
    memory: int
    """The peak of memory if all runs train at once."""
    checkpoint: int
    """The size of a checkpoint: weights, Adam moments and counters of all runs."""
    disk: int
    """The size of the finished study: one file of weights per run."""
    seconds: float
    """The time on this machine's CPU at `rates`, in seconds."""
    rates: Rates
    """The rates that the time was computed with."""

    def describe(self) -> dict[str, Any]:
        """Return the estimate as a JSON object."""
        return self._asdict() | {"rates": self.rates._asdict()}


def estimate(
    runs: Sequence[RunConfig],
    lms: Sequence[Outline],
    *,
    batch_size: int,
    window_tokens: int,
    eval_tokens: int,
    ctx: int,
    n_windows: int = 1,
    rates: Rates | None = None,
) -> Estimate:
    """Estimate the cost of training runs at each hook, on one pass of the language model, and of scoring them.

    Args:
        runs: The runs that are trained at each hook.
        lms: The sizes of the language model as seen from each hook. The widths at all hooks must be equal.
        batch_size: The number of tokens per training step.
        window_tokens: The number of tokens that are shuffled together.
        eval_tokens: The number of held-out tokens that SAEs are scored on.
        ctx: The number of tokens in a token block.
        n_windows: The number of windows that are held at each hook: 2 if the next one is read ahead.
        rates: The rates of the machine to estimate for. If None, this machine's are measured, which takes seconds.
    """
    deepest = max(lms, key=lambda lm: lm.blocks_below)  # one pass up to its hook reaches all others
    d = deepest.d_model
    largest = max(runs, key=lambda run: run.d_sae)
    rates = rates or measure(largest, d, batch_size)
    work = _Work.of(runs, len(lms), batch_size=batch_size, eval_tokens=eval_tokens)
    flops_language_model = _language_model_flops(
        lms, ctx, n_harvested=work.tokens + work.most_candidates, eval_tokens=eval_tokens, n_runs=len(runs)
    )
    state = len(lms) * state_bytes([run.d_sae for run in runs], d)
    # A frozen matrix is kept a second time, as it started.
    kept = len(lms) * sum(d * run.d_sae * BYTES for run in runs if run.freeze != "none")
    buffers = buffer_bytes(
        largest.d_sae,
        d,
        batch_size=batch_size,
        window_tokens=window_tokens,
        eval_tokens=eval_tokens,
        n_parameters=deepest.n_parameters,
        n_vocabulary=deepest.n_vocabulary,
        n_hooks=len(lms),
        n_windows=n_windows,
    )
    return Estimate(
        n_hooks=len(lms),
        n_runs=len(lms) * len(runs),
        steps_per_run=work.steps_per_run,
        tokens=work.tokens,
        sae_tokens=work.sae_tokens,
        flops_training=_training_flops(work, d, batch_size),
        flops_language_model=flops_language_model,
        memory=state + kept + buffers + BYTES_PER_TOKEN * work.tokens,
        checkpoint=state,
        disk=len(lms) * sum((2 * d + 1) * run.d_sae + d for run in runs) * BYTES,  # two matrices, b_enc, b_dec
        seconds=_seconds(work, rates, d, largest.d_sae, flops_language_model),
        rates=rates,
    )


class _Work(NamedTuple):
    """What the runs of a study have to do at all hooks, counted."""

    steps_per_run: int
    """The number of steps of the longest run."""
    tokens: int
    """The number of tokens of the longest run."""
    sae_tokens: int
    """The number of tokens seen, summed over runs and hooks."""
    most_candidates: int
    """The number of candidates for resampling of the run that has most of them."""
    trained: int
    """Steps times latents, summed over runs and hooks."""
    scored: int
    """Tokens outside of training (scored, or candidates for resampling) times latents, summed over runs and hooks."""

    @classmethod
    def of(cls, runs: Sequence[RunConfig], n_hooks: int, *, batch_size: int, eval_tokens: int) -> "_Work":
        """Count the work of runs that are trained at each hook."""
        n_steps = [run.n_steps(batch_size) for run in runs]
        n_candidates = [len(run.resample_fractions) * run.resample_candidates for run in runs]
        d_saes = [run.d_sae for run in runs]
        return cls(
            steps_per_run=max(n_steps),
            tokens=max(n_steps) * batch_size,
            sae_tokens=n_hooks * sum(n_steps) * batch_size,
            most_candidates=max(n_candidates),
            trained=n_hooks * sum(n * f for n, f in zip(n_steps, d_saes, strict=True)),
            scored=n_hooks * sum((n + eval_tokens) * f for n, f in zip(n_candidates, d_saes, strict=True)),
        )


def _training_flops(work: _Work, d: int, batch_size: int) -> float:
    """Return the FLOPs of all training steps, and of the SAEs' part of resampling and scoring."""
    matmul = 2 * d  # FLOPs per token and latent
    # A sparse step pays for one matmul, the encoder's. A dense one needs five: encode, decode, and the
    # gradients of the latents and of both weights.
    # Tokens that are scored are encoded and decoded.
    return matmul * (batch_size * work.trained * (1 + 4 * DENSE_FRACTION) + 2 * work.scored)


def _seconds(work: _Work, rates: Rates, d: int, largest_d_sae: int, flops_language_model: int) -> float:
    """Return the time of all work at these rates, which were measured at the largest d_sae."""
    # The time of a step grows in proportion to d_sae.
    per_step = DENSE_FRACTION * rates.dense_step + (1 - DENSE_FRACTION) * rates.sparse_step
    training = per_step * work.trained / largest_d_sae
    scoring = 2 * (2 * d) * work.scored  # an encoding and a decoding, 2 d FLOPs per token and latent each
    return training + (flops_language_model + scoring) / rates.flops


def _language_model_flops(lms: Sequence[Outline], ctx: int, *, n_harvested: int, eval_tokens: int, n_runs: int) -> int:
    """Return the FLOPs of reading `n_harvested` tokens once for all hooks, and of scoring at each hook."""
    deepest = max(lms, key=lambda lm: lm.blocks_below)
    block = _block_flops(deepest, ctx)
    logits = 2 * deepest.d_model * deepest.n_vocabulary
    blocks_read = n_harvested * deepest.blocks_below + eval_tokens * sum(lm.blocks_below for lm in lms)
    # A splice runs the blocks above the hook and the unembedding only, once per SAE.
    spliced = (n_runs + CLEAN_PASSES) * eval_tokens
    return blocks_read * block + spliced * sum(lm.blocks_above * block + logits for lm in lms)


def state_bytes(d_saes: Sequence[int], d: int) -> int:
    """Return the size of the weights, Adam moments and counters of SAEs on activations of width d."""
    # Per SAE, in numbers of 4 bytes: two matrices, b_enc and b_dec, each with two moments; and for each latent the
    # 8-byte update at which it last fired.
    return sum((6 * d + 5) * f + 3 * d for f in d_saes) * BYTES


def buffer_bytes(
    d_sae: int,
    d: int,
    *,
    batch_size: int,
    window_tokens: int,
    eval_tokens: int,
    n_parameters: int,
    n_vocabulary: int,
    n_hooks: int = 1,
    n_windows: int = 1,
) -> int:
    """Return the size of what a process holds once, however many SAEs of at most `d_sae` latents it trains.

    These are the buffers of a step, the windows, the held-out activations and the language model.
    """
    # Gradients of both matrices, a chunk's dense temporaries, the centred input and the error.
    numbers = (2 * d + 5 * ROWS_PER_CHUNK) * d_sae + 2 * batch_size * d
    # Windows with their raw norms at each hook, and the raw windows of the hooks that wait for their turn.
    numbers += n_hooks * n_windows * window_tokens * (d + 1) + (n_hooks - 1) * window_tokens * d
    numbers += n_hooks * COPIES_OF_HELD_OUT * eval_tokens * d
    # The logits of a batch of the language model, and their log-softmax.
    return (numbers + n_parameters + 2 * BATCH_TOKENS * n_vocabulary) * BYTES


def harvest_seconds(n_tokens: int, lm: Outline, ctx: int) -> float:
    """Estimate the time of harvesting `n_tokens` tokens at a hook, in seconds, at a rate that is measured now."""
    return n_tokens * lm.blocks_below * _block_flops(lm, ctx) / matmul_flops(lm.d_model)


def _block_flops(lm: Outline, ctx: int) -> int:
    """Return the FLOPs of one transformer block, per token."""
    # Each parameter is multiplied and added once; 4 ctx d_model is attention's scores and weighted sums.
    return 2 * lm.n_per_block + 4 * ctx * lm.d_model
