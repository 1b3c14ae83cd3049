"""How fast this machine trains and multiplies, measured for an estimate of what a study will cost."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.sae.saved_sae import SAEConfig
from prolu.training.config import RunConfig
from prolu.training.moments import Moments
from prolu.training.starting_weights import initial_weights
from prolu.training.steps import Objective, Steps, Update
from prolu.training.steps.choice import has_numba

TYPICAL_L0 = 64
"""The L0 at which the sparse step is timed."""


class Rates(NamedTuple):
    """How fast this machine is, as measured."""

    flops: float
    """The number of FLOPs per second in a matmul of a language model's shape."""
    dense_step: float
    """The time of a dense step, in seconds."""
    sparse_step: float
    """The time of a sparse step at an L0 of `TYPICAL_L0`, in seconds."""


def measure(run: RunConfig, d_in: int, batch_size: int) -> Rates:
    """Time a dense and a sparse step of a ReLU SAE of a run's shape, and a matmul of a language model's shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, d_in, generator=generator)
    weights = initial_weights(SAEConfig(d_in=d_in, d_sae=run.d_sae, nonlinearity="relu"), 0)
    moments = Moments.zeros_like(weights)
    steps = Steps(weights, batch_size)
    objective = Objective(nonlinearity_named("relu"), penalty_named("l1"), run.coeff)

    def step(kind: str) -> None:
        # A learning rate of 0 takes as long as any other, and leaves the weights as they are for the next step.
        steps[kind].update_(weights, moments, x, objective, Update(n_updates=0, lr=0.0))

    dense = _seconds(lambda: step("dense"), 2)
    m = x[:256] @ weights.encoder.T
    # The bias at which these 256 tokens have an L0 of `TYPICAL_L0`. The dense step does not depend on L0.
    n_active = min(TYPICAL_L0 * len(m), m.numel())
    weights.own["b_enc"].fill_(-float(m.flatten().kthvalue(m.numel() - n_active + 1).values))
    sparse = _seconds(lambda: step("sparse" if has_numba() else "sparse_torch"), 3)
    return Rates(matmul_flops(d_in), dense, sparse)


def matmul_flops(d_in: int) -> float:
    """Measure the FLOPs per second of a matmul of a language model's shape."""
    a = torch.randn(1024, d_in)
    b = torch.randn(d_in, 4 * d_in)
    out = torch.empty(1024, 4 * d_in)
    return 2 * a.numel() * b.shape[1] / _seconds(lambda: torch.mm(a, b, out=out), 9)


def _seconds(work: Callable[[], object], n: int) -> float:
    """Return the median time of `n` calls, in seconds."""
    work()  # the first call compiles and allocates
    # The median, because another process may take the machine for some of the calls.
    times = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
