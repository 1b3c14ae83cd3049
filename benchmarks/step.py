"""Time one training step of every kind, in turns in one process, against the least that the machine allows.

    python benchmarks/step.py --d-in 768 --d-sae 12288 --batch 4096 --l0 55 --json step.json

That floor is the time of the encoder matmul, in the chunks that the steps use, plus the time to move the 28 bytes that
Adam needs per parameter (read parameter, gradient and both moments; write parameter and both moments) at the machine's
measured triad bandwidth. Plain autograd is what one would write first: `loss.backward()` and `torch.optim.Adam`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peers import ENVIRONMENT, environment, peer_steps
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.penalties import L1
from prolu.sae.weights import Weights
from prolu.training.moments import Moments
from prolu.training.steps import Objective, Steps, Update
from prolu.training.steps.dense import ROWS_PER_CHUNK

COEFF = 1e-3

LR = 1e-7
"""A learning rate so small that L0 stays what it is set to."""

HEAP_REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "268435456"}
"""Variables, read when a process starts, that make glibc keep freed memory, which hides what an allocation costs."""


def sparse_problem(d_in: int, d_sae: int, batch: int, l0: float) -> tuple[Weights, torch.Tensor]:
    """Return an SAE with the wanted L0 and a batch of data that is made of the SAE's own directions."""
    g = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
    # Each token is a sum of 30 directions; some directions are common and most are rare, as with latents of real text.
    popularity = torch.arange(1, d_sae + 1).float().pow(-0.6)[torch.randperm(d_sae, generator=g)]
    which = torch.multinomial(popularity, batch * 30, replacement=True, generator=g).view(batch, 30)
    size = torch.exp(0.5 * torch.randn(batch, 30, 1, generator=g))
    x = torch.stack([(features[w] * s).sum(0) for w, s in zip(which, size, strict=True)])
    x += 0.025 * torch.randn(batch, d_in, generator=g)
    m = x[:512] @ features.T
    bias = -m.flatten().kthvalue(max(1, m.numel() - int(l0 * len(m)))).values
    own = {"b_enc": torch.full((d_sae,), float(bias))}
    return Weights(features.clone(), features.clone(), torch.zeros(d_in), own), x


def our_step(
    kind: str, weights: Weights, x: torch.Tensor, name: str = "relu", precision: str = "fp32", **nested: Any
) -> Callable[[], None]:
    """Return a function that makes one update by a step of ours; `nested` is what Objective takes of prefixes."""
    weights = weights.map(torch.clone)
    if "topk" in name:  # whose selection leaves few active, with any bias
        weights.own["b_enc"].zero_()
    moments = Moments.zeros_like(weights)
    n = 0
    step = Steps(weights, len(x), precision)[kind]
    objective = Objective(nonlinearity_named(name).in_training, L1(), COEFF, **nested)

    def once() -> None:
        nonlocal n
        step.update_(weights, moments, x, objective, Update(n, lr=LR))
        n += 1

    return once


def autograd_step(weights: Weights, x: torch.Tensor) -> Callable[[], None]:
    """Return a function that makes the same update in plain torch, with the weight matrices in their public shapes."""
    parameters = [
        weights.encoder.T.clone(),
        weights.own["b_enc"].clone(),
        weights.decoder.clone(),
        weights.b_dec.clone(),
    ]
    W_enc, b_enc, W_dec, b_dec = (p.contiguous().requires_grad_() for p in parameters)
    adam = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=LR)

    def once() -> None:
        adam.zero_grad()
        f = torch.relu((x - b_dec) @ W_enc + b_enc)
        x_hat = f @ W_dec + b_dec
        ((x_hat - x).square().mean() + COEFF * f.sum(-1).mean()).backward()
        with torch.no_grad():  # decoder rows keep norm 1: the gradient along a row is dropped
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec  # pyright: ignore[reportOperatorIssue]
            adam.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return once


def encoder_matmul(weights: Weights, x: torch.Tensor) -> Callable[[], None]:
    """Return a function that makes the encoder matmul alone, which no step can avoid."""
    out = torch.empty(min(len(x), ROWS_PER_CHUNK), weights.d_sae)

    def once() -> None:
        for chunk in x.split(ROWS_PER_CHUNK):
            torch.mm(chunk, weights.encoder.T, out=out[: len(chunk)])

    return once


def triad_bandwidth(n: int = 2**25) -> float:
    """Measure the bytes per second of a = b + s c on arrays far larger than the caches."""
    a, b, c = (torch.rand(n) for _ in range(3))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        torch.add(b, c, alpha=3.0, out=a)
        times.append(time.perf_counter() - start)
    return 3 * 4 * n / statistics.median(times)


def interleaved(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each variant. All are called once per round, and the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, once in variants.items():
            start = time.perf_counter()
            once()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure(options: argparse.Namespace) -> dict:
    """Time everything at one shape."""
    torch.set_num_threads(options.threads)
    weights, x = sparse_problem(options.d_in, options.d_sae, options.batch, options.l0)
    pre = (x - weights.b_dec) @ weights.encoder.T + weights.own["b_enc"]
    l0 = (pre > 0).sum().item() / len(x)
    del pre
    kinds = {"sparse_numba": "sparse", "sparse_torch": "sparse_torch", "dense": "dense"}
    variants = {name: our_step(kind, weights, x) for name, kind in kinds.items()}
    variants["autograd"] = autograd_step(weights, x)
    if options.prefixes:
        nested = {"prefixes": options.prefixes}
        variants |= {f"{name}, nested": our_step(kind, weights, x, **nested) for name, kind in kinds.items()}
    if options.bf16:
        variants |= {f"{name}, bf16": our_step(kind, weights, x, precision="bf16") for name, kind in kinds.items()}
    if options.batchtopk:
        of_batch = f"batchtopk({round(l0)})"
        variants["sparse_numba, batchtopk"] = our_step("sparse", weights, x, of_batch)
    if options.variants:
        chosen = options.variants.split(",")
        variants = {name: once for name, once in variants.items() if name.partition(", ")[0] in chosen}
    if options.peers:
        variants |= peer_steps(weights, x, LR)
    medians = interleaved(variants | {"matmul": encoder_matmul(weights, x)}, options.rounds)
    n_parameters = sum(t.numel() for t in weights.tensors())
    floor = medians.pop("matmul") + 28 * n_parameters / triad_bandwidth()
    figures = {name: {"median_s": s, "x_floor": s / floor} for name, s in medians.items()}
    shape = {name: getattr(options, name) for name in ("d_in", "d_sae", "batch", "rounds", "threads")}
    return {"floor_s": floor, "l0": l0, **shape, "heap_reuse": options.heap_reuse, "variants": figures}


def prefixes_of(text: str) -> tuple[int, ...]:
    """Return the numbers that a text such as "256,1024" lists."""
    return tuple(map(int, text.split(",")))


def again(python: Path, extra: dict[str, str]) -> None:
    """Run this same command with another interpreter or environment, and exit with its exit code."""
    sys.exit(subprocess.run([python, *sys.argv], env=os.environ | extra, check=False).returncode)


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--batch", type=int, default=4096, help="tokens per step")
    parser.add_argument("--l0", type=float, default=55, help="active latents per token")
    parser.add_argument("--rounds", type=int, default=9, help="how often each step is timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--variants", help="only these of ours, separated by commas: sparse_numba,dense,...")
    parser.add_argument("--prefixes", type=prefixes_of, default=(), help="also nested losses, of 256,1024,... latents")
    parser.add_argument("--bf16", action="store_true", help="also steps whose matrix products round to bf16")
    parser.add_argument("--batchtopk", action="store_true", help="also the sparse step of BatchTopK, at the same L0")
    parser.add_argument("--peers", action="store_true", help="also SAELens and dictionary_learning, in .venv-peers")
    parser.add_argument("--heap-reuse", action="store_true", help="let glibc keep freed memory")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if options.peers and Path(sys.prefix) != ENVIRONMENT:
        again(environment(), {})
    if options.heap_reuse and not all(os.environ.get(k) == v for k, v in HEAP_REUSE.items()):
        again(Path(sys.executable), HEAP_REUSE)
    result = measure(options)
    allocator = "heap reuse" if options.heap_reuse else "stock allocator"
    print(f"{options.d_in} -> {options.d_sae}, batch {options.batch}, L0 {result['l0']:.1f}, {allocator}")
    print(f"{'floor':28} {result['floor_s'] * 1e3:9.1f} ms")
    for name, figure in result["variants"].items():
        print(f"{name:28} {figure['median_s'] * 1e3:9.1f} ms {figure['x_floor']:7.2f} x floor")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
