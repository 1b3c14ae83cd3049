"""An estimate of what a study will cost: tokens, FLOPs, memory, disk, and time at rates measured on this machine."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from prolu.activations.builtin import MODEL_DIR
from prolu.activations.hooks import architecture_of, locate
from prolu.activations.language_model import BATCH_TOKENS
from prolu.runtime.files import first_line
from prolu.sae.autoencoder import SAEConfig
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.training.config import RunConfig
from prolu.training.moments import Moments
from prolu.training.starting_weights import initial_weights
from prolu.training.steps import Objective, Steps, Update
from prolu.training.steps.choice import has_numba
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
"""The number of passes of the language model over the held-out tokens that belong to no SAE: one without changes, and
two with zeros in place of the activations."""

TYPICAL_L0 = 64
"""The L0 at which the sparse step is timed."""


class Outline(NamedTuple):
    """The sizes of a language model that decide what it costs to read it at a hook and to run it on from there."""

    d_model: int
    """The width of the residual stream, and of the activations."""
    n_parameters: int
    """The number of parameters."""
    n_vocabulary: int
    """The number of tokens in the vocabulary."""
    n_per_block: int
    """The number of parameters of one transformer block."""
    blocks_below: int
    """The number of blocks that run before the hook is reached."""
    blocks_above: int
    """The number of blocks that run after it."""


def outline(name: str, hook: str) -> Outline:
    """Return the sizes of a language model, from its config alone, without reading its weights.

    The name of an architecture stands for its default config: `gpt2` is GPT-2 small. The hub is asked only if the
    model is neither on this disk nor such a name.

    Args:
        name: The language model: a folder, a name on the hub, or builtin.
        hook: The hook, as blocks.L.hook_SITE.

    Raises:
        ValueError: There is no such model, or no such hook in it.
    """
    from transformers import AutoModelForCausalLM

    config = _config(str(MODEL_DIR) if name == "builtin" else name)
    with torch.device("meta"):  # tensors with a shape and no memory
        model = AutoModelForCausalLM.from_config(config)
    architecture = architecture_of(model)
    below = locate(model, hook).blocks_below
    if architecture is None or not hook.startswith("blocks."):
        raise ValueError(f"hook {hook!r}: a dry run knows the width at blocks.L.hook_SITE of known architectures only")
    blocks = list(model.get_submodule(architecture.blocks))
    return Outline(
        d_model=config.hidden_size,
        n_parameters=_n_parameters(model),
        n_vocabulary=config.vocab_size,
        n_per_block=_n_parameters(blocks[0]),
        blocks_below=len(below),
        blocks_above=len(blocks) - len(below),
    )


def _config(name: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers raises many kinds, and each means that the config is not on this disk
        if name in CONFIG_MAPPING:
            return AutoConfig.for_model(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as problem:  # likewise: that the hub does not have it, or does not answer
        reason = first_line(problem)
        raise ValueError(f"lm {name!r}: its config cannot be loaded ({reason})") from None


def _n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Rates(NamedTuple):
    """How fast this machine is, as measured."""

    flops: float
    """The number of FLOPs per second in a matmul of a language model's shape."""
    dense_step: float
    """The time of a dense step, in seconds."""
    sparse_step: float
    """The time of a sparse step at an L0 of `TYPICAL_L0`, in seconds."""


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
        rates: The rates of the machine to estimate for. If None, this machine's are measured, which takes seconds.
    """
    deepest = max(lms, key=lambda lm: lm.blocks_below)  # one pass up to its hook reaches all others
    n_hooks = len(lms)
    d = deepest.d_model
    largest = max(runs, key=lambda run: run.d_sae)
    rates = rates or measure(largest, d, batch_size)
    n_steps = [run.n_steps(batch_size) for run in runs]
    d_saes = [run.d_sae for run in runs]
    tokens = max(n_steps) * batch_size
    n_candidates = [len(run.resample_fractions) * run.resample_candidates for run in runs]

    # Two sums over runs and hooks: of steps times latents, and of tokens outside of training times latents.
    trained = n_hooks * sum(n * f for n, f in zip(n_steps, d_saes, strict=True))
    scored = n_hooks * sum((n + eval_tokens) * f for n, f in zip(n_candidates, d_saes, strict=True))
    matmul = 2 * d  # FLOPs per token and latent
    # A sparse step pays for one matmul, the encoder's. A dense one is counted as six, as many as autograd needs.
    # Tokens that are scored are encoded and decoded.
    flops_training = matmul * (batch_size * trained * (1 + 5 * DENSE_FRACTION) + 2 * scored)
    flops_language_model = _language_model_flops(
        lms, ctx, n_harvested=tokens + max(n_candidates), eval_tokens=eval_tokens, n_runs=len(runs)
    )

    # Rates were measured at the largest d_sae; the time of a step grows in proportion to it.
    per_step = DENSE_FRACTION * rates.dense_step + (1 - DENSE_FRACTION) * rates.sparse_step
    seconds = per_step * trained / largest.d_sae
    seconds += (flops_language_model + 2 * matmul * scored) / rates.flops

    state = n_hooks * state_bytes(d_saes, d)
    buffers = buffer_bytes(
        largest.d_sae,
        d,
        batch_size=batch_size,
        window_tokens=window_tokens,
        eval_tokens=eval_tokens,
        n_parameters=deepest.n_parameters,
        n_vocabulary=deepest.n_vocabulary,
        n_hooks=n_hooks,
    )
    return Estimate(
        n_hooks=n_hooks,
        n_runs=n_hooks * len(runs),
        steps_per_run=max(n_steps),
        tokens=tokens,
        sae_tokens=n_hooks * sum(n_steps) * batch_size,
        flops_training=flops_training,
        flops_language_model=flops_language_model,
        memory=state + buffers + BYTES_PER_TOKEN * tokens,
        checkpoint=state,
        disk=n_hooks * sum((2 * d + 1) * f + d for f in d_saes) * BYTES,  # two matrices, b_enc, b_dec
        seconds=seconds,
        rates=rates,
    )


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
) -> int:
    """Return the size of what a process holds once, however many SAEs of at most `d_sae` latents it trains.

    These are the buffers of a step, the window, the held-out activations and the language model.
    """
    # Gradients of both matrices, a chunk's dense temporaries, the centred input and the error.
    numbers = (2 * d + 5 * ROWS_PER_CHUNK) * d_sae + 2 * batch_size * d
    # A window with its raw norms at each hook, and the raw windows of the hooks that wait for their turn.
    numbers += n_hooks * window_tokens * (d + 1) + (n_hooks - 1) * window_tokens * d
    numbers += n_hooks * COPIES_OF_HELD_OUT * eval_tokens * d
    # The logits of a batch of the language model, and their log-softmax.
    return (numbers + n_parameters + 2 * BATCH_TOKENS * n_vocabulary) * BYTES


def harvest_seconds(n_tokens: int, lm: Outline, ctx: int) -> float:
    """Estimate the time of harvesting `n_tokens` tokens at a hook, in seconds, at a rate that is measured now."""
    return n_tokens * lm.blocks_below * _block_flops(lm, ctx) / _flops(lm.d_model)


def _block_flops(lm: Outline, ctx: int) -> int:
    """Return the FLOPs of one transformer block, per token."""
    # Each parameter is multiplied and added once; 4 ctx d_model is attention's scores and weighted sums.
    return 2 * lm.n_per_block + 4 * ctx * lm.d_model


def measure(run: RunConfig, d_in: int, batch_size: int) -> Rates:
    """Time a dense and a sparse step of a ReLU SAE of a run's shape, and a matmul of a language model's shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, d_in, generator=generator)
    weights = initial_weights(SAEConfig(d_in=d_in, d_sae=run.d_sae, nonlinearity="relu"), 0)
    moments = Moments.zeros_like(weights)
    steps = Steps(weights, batch_size)
    objective = Objective(nonlinearity_named("relu"), penalty_named("l1"), run.coeff)

    def step(kind: str) -> None:
        steps[kind].update_(weights, moments, x, objective, Update(n_updates=0, lr=0.0))

    dense = _seconds(lambda: step("dense"), 2)
    m = x[:256] @ weights.encoder.T
    # The bias at which these 256 tokens have an L0 of `TYPICAL_L0`. The dense step does not depend on L0.
    n_active = min(TYPICAL_L0 * len(m), m.numel())
    weights.own["b_enc"].fill_(-float(m.flatten().kthvalue(m.numel() - n_active + 1).values))
    sparse = _seconds(lambda: step("sparse" if has_numba() else "sparse_torch"), 3)
    return Rates(_flops(d_in), dense, sparse)


def _flops(d_in: int) -> float:
    """Measure the FLOPs per second of a matmul of a language model's shape."""
    a = torch.randn(1024, d_in)
    b = torch.randn(d_in, 4 * d_in)
    out = torch.empty(1024, 4 * d_in)
    return 2 * a.numel() * b.shape[1] / _seconds(lambda: torch.mm(a, b, out=out), 9)


def _seconds(work: Callable[[], object], n: int) -> float:
    """Return the median time of `n` calls, in seconds."""
    work()  # the first call compiles and allocates
    times = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
