"""What a study will cost before it starts: tokens, FLOPs, memory, disk, and time at rates measured here."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from prolu.activations.builtin import MODEL_DIR
from prolu.activations.hooks import architecture_of, locate
from prolu.activations.language_model import BATCH_TOKENS
from prolu.sae.autoencoder import SAEConfig
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.training.config import RunConfig
from prolu.training.starting_weights import initial_weights
from prolu.training.steps import AdamConfig, Objective, Steps
from prolu.training.steps.choice import has_numba
from prolu.training.steps.dense import ROWS_PER_CHUNK

BYTES = 4
"""Of a number in fp32."""

DENSE_SHARE = 0.05
"""Share of the steps that are assumed dense: early on, before L0 has fallen below the crossover."""

COPIES_OF_HELD_OUT = 3
"""Arrays of the size of the held-out activations: themselves, a reconstruction, zeros."""

CROSS_ENTROPIES = 3
"""Passes of the language model that no SAE needs: clean, and with zeros twice."""

TYPICAL_L0 = 64
"""At which the sparse step is timed."""


class Outline(NamedTuple):
    """A language model by its shape: what reading it at a hook, and running on from there, will cost."""

    d_model: int
    """Width of the residual stream, and of the activations."""
    n_parameters: int
    n_vocabulary: int
    n_per_block: int
    """Parameters of one block."""
    blocks_below: int
    """Blocks that run before the hook is reached."""
    blocks_above: int


def outline(name: str, hook: str) -> Outline:
    """The shape of a model, from its config alone: no weights are read.

    The hub is asked only for what is neither on the disk nor the name of a family, whose default config it then
    is: `gpt2` is GPT-2 small.

    Raises:
        ValueError: no such model, or no such hook in it.
    """
    from transformers import AutoModelForCausalLM

    config = _config(str(MODEL_DIR) if name == "builtin" else name)
    with torch.device("meta"):
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
    except Exception:  # many kinds, each means: not on this disk
        if name in CONFIG_MAPPING:
            return AutoConfig.for_model(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as problem:  # the same of the hub
        reason = str(problem).strip().split("\n")[0]
        raise ValueError(f"lm {name!r}: its config cannot be loaded ({reason})") from None


def _n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Rates(NamedTuple):
    """What this machine does, measured."""

    flops: float
    """Per second, in the language model's kind of matmul."""
    dense_step: float
    """Seconds."""
    sparse_step: float
    """Seconds, at an L0 of 64."""


class Estimate(NamedTuple):
    """The cost of a study. Sizes are in bytes, times in seconds."""

    n_hooks: int
    n_runs: int
    """At all hooks together."""
    steps_per_run: int
    tokens: int
    """Of the stream: each is seen by every run."""
    sae_tokens: int
    """Summed over runs."""
    flops_training: float
    flops_language_model: float
    """Harvest, resampling's candidates, and the splices of evaluation."""
    memory: int
    """Peak, if all runs train at once."""
    checkpoint: int
    """Weights, moments and counters of all runs."""
    disk: int
    """The finished study: one file of weights per run."""
    seconds: float
    """On this machine's CPU, at `rates`."""
    rates: Rates

    def describe(self) -> dict[str, Any]:
        """As JSON has it."""
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
    """The cost of training `runs` at each hook, on one pass of the language model, and of scoring them.

    Args:
        lms: the language model, by its shape, as seen from each hook; widths are alike.
        rates: of another machine; else this one's are measured, for some seconds.
    """
    deepest, n_hooks = max(lms, key=lambda lm: lm.blocks_below), len(lms)
    d = deepest.d_model
    largest = max(runs, key=lambda run: run.d_sae)
    rates = rates or measure(largest, d, batch_size)
    n_steps = [run.n_steps(batch_size) for run in runs]
    d_saes = [run.d_sae for run in runs]
    steps_times_latents = n_hooks * sum(n * f for n, f in zip(n_steps, d_saes, strict=True))
    tokens = max(n_steps) * batch_size
    candidates = [len(run.resample_fractions) * run.resample_candidates for run in runs]

    encode = 2 * d  # per token and latent
    scored = n_hooks * sum((n + eval_tokens) * f for n, f in zip(candidates, d_saes, strict=True))
    flops_training = encode * (batch_size * steps_times_latents * (1 + 5 * DENSE_SHARE) + 2 * scored)
    block = _block_flops(deepest, ctx)
    below = (tokens + max(candidates)) * deepest.blocks_below + eval_tokens * sum(lm.blocks_below for lm in lms)
    logits = 2 * d * deepest.n_vocabulary
    splices = (len(runs) + CROSS_ENTROPIES) * eval_tokens
    flops_language_model = below * block + splices * sum(lm.blocks_above * block + logits for lm in lms)

    per_step = DENSE_SHARE * rates.dense_step + (1 - DENSE_SHARE) * rates.sparse_step
    seconds = per_step * steps_times_latents / largest.d_sae
    seconds += (flops_language_model + 2 * encode * scored) / rates.flops

    state = n_hooks * state_bytes(d_saes, d)
    buffers = buffer_bytes(
        largest.d_sae, d, batch_size=batch_size, window_tokens=window_tokens, eval_tokens=eval_tokens,
        n_parameters=deepest.n_parameters, n_vocabulary=deepest.n_vocabulary, n_hooks=n_hooks,
    )  # fmt: skip
    return Estimate(
        n_hooks=n_hooks,
        n_runs=n_hooks * len(runs),
        steps_per_run=max(n_steps),
        tokens=tokens,
        sae_tokens=n_hooks * sum(n_steps) * batch_size,
        flops_training=flops_training,
        flops_language_model=flops_language_model,
        memory=state + buffers + 2 * tokens,
        checkpoint=state,
        disk=n_hooks * sum((2 * d + 1) * f + d for f in d_saes) * BYTES,
        seconds=seconds,
        rates=rates,
    )


def state_bytes(d_saes: Sequence[int], d: int) -> int:
    """Weights, moments and counters of SAEs on activations of width d."""
    return sum((6 * d + 5) * f + 3 * d for f in d_saes) * BYTES


def buffer_bytes(
    d_sae: int, d: int, *, batch_size: int, window_tokens: int, eval_tokens: int, n_parameters: int, n_vocabulary: int,
    n_hooks: int = 1,
) -> int:  # fmt: skip
    """What a process holds once, however many SAEs of at most `d_sae` latents it trains: a step's buffers, the window,
    held-out activations, the language model.
    """
    numbers = (2 * d + 5 * ROWS_PER_CHUNK) * d_sae + 2 * batch_size * d
    # A window at each hook, and the raw ones of the hooks that wait for their turn.
    numbers += n_hooks * window_tokens * (d + 1) + (n_hooks - 1) * window_tokens * d
    numbers += n_hooks * COPIES_OF_HELD_OUT * eval_tokens * d
    return (numbers + n_parameters + 2 * BATCH_TOKENS * n_vocabulary) * BYTES


def harvest_seconds(n_tokens: int, lm: Outline, ctx: int) -> float:
    """Time of reading so many tokens at a hook, at a rate measured here and now."""
    return n_tokens * lm.blocks_below * _block_flops(lm, ctx) / _flops(lm.d_model)


def _block_flops(lm: Outline, ctx: int) -> int:
    """Of one block of the model, per token; attention's scores and weighted sums included."""
    return 2 * lm.n_per_block + 4 * ctx * lm.d_model


def measure(run: RunConfig, d_in: int, batch_size: int) -> Rates:
    """Times a dense and a sparse step of a ReLU SAE of this shape, and a matmul of the language model's, here."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, d_in, generator=generator)
    weights = initial_weights(SAEConfig(d_in=d_in, d_sae=run.d_sae, nonlinearity="relu"), 0)
    first, second, steps = weights.zeros_like(), weights.zeros_like(), Steps(weights, batch_size)
    objective = Objective(nonlinearity_named("relu"), penalty_named("l1"), run.coeff)

    def step(family: str) -> None:
        steps[family].update_(weights, first, second, x, objective, n_updates=0, lr=0.0, adam=AdamConfig())

    dense = _seconds(lambda: step("dense"), 2)
    m = x[:256] @ weights.encoder.T
    on = min(TYPICAL_L0 * len(m), m.numel())
    weights.own["b_enc"].fill_(-float(m.flatten().kthvalue(m.numel() - on + 1).values))
    sparse = _seconds(lambda: step("sparse" if has_numba() else "sparse_torch"), 3)
    return Rates(_flops(d_in), dense, sparse)


def _flops(d_in: int) -> float:
    """Per second, in a matmul of a language model's shape."""
    a, b = torch.randn(1024, d_in), torch.randn(d_in, 4 * d_in)
    out = torch.empty(1024, 4 * d_in)
    return 2 * a.numel() * b.shape[1] / _seconds(lambda: torch.mm(a, b, out=out), 9)


def _seconds(work: Callable[[], object], n: int) -> float:
    """Median of `n` calls after one that warms up."""
    work()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
