"""Check the GPU's sparse step against the dense step, then time both.

    python benchmarks/gpu_sparse.py --json gpu_sparse.json
    python benchmarks/gpu_sparse.py --device cpu

The step is compared in fp32, tf32 and bf16 with the dense step on the CPU, in fp64 or with the same rounding to bf16:
gradients, statistics, and the weights after five updates. The exit code is 1 if anything is wrong; if all is wrong,
nothing is timed. Then follow the median milliseconds of an update by the dense step of the GPU and by the sparse one
(in every precision at the smaller shapes), those of its encoder matmul alone, and where the sparse update in bf16
spends its time. At the middle L0 it is also timed with its kernels started one by one, without CUDA graphs.

On a CPU the same runs at a tiny size in Triton's interpreter, whose times mean nothing.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Read when triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from prolu.sae.nonlinearities import NONLINEARITIES, Nonlinearity, Selection, TopK
from prolu.sae.penalties import PENALTIES
from prolu.sae.weights import Weights
from prolu.training.choices import PRECISIONS
from prolu.training.moments import Moments
from prolu.training.steps import DenseStep, Objective, Update
from prolu.training.steps.base import Step
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.sparse_triton import SparseTritonStep
from step import COEFF, LR, sparse_problem

LIMITS = {"fp64": 1e-12, "fp32": 2e-5, "tf32": 2e-2, "bf16": 1e-2}
"""The largest difference from the reference, relative to a tensor's norm, in each precision. In bf16 the reference, the
dense step, rounds the error once more than the sparse step does; in tf32 there are a few other active latents."""

TOPK = TopK(Selection(8), has_auxiliary=False)

FAMILIES: dict[str, tuple[Nonlinearity, str]] = {
    "relu + l1": (NONLINEARITIES["relu"], "l1"),
    "prolu_ste + sqrt_l1": (NONLINEARITIES["prolu_ste"], "sqrt_l1"),
    "jumprelu + l0": (NONLINEARITIES["jumprelu"], "l0"),
    "topk(8)": (TOPK, "none"),
}

CHECKS = [
    ("bf16", "prolu_ste + sqrt_l1"),
    ("fp32", "jumprelu + l0"),
    ("bf16", "topk(8)"),
    ("tf32", "relu + l1"),
]
"""The precision and the family of each comparison. They are few, as each compiles functions and kernels of its own; all
families are compared in Triton's interpreter by the tests."""

SHAPES = ((768, 12_288, 4096), (2304, 65_536, 4096))
"""The width of the activations, the number of latents, and the tokens of a batch."""

L0S = (64,)
"""The numbers of active latents per token."""

BATCH = 4096
"""The tokens of a batch, where a shape does not say."""


def worst_difference(ours: Weights, theirs: Weights) -> float:
    """Return the largest difference over all tensors, each relative to its norm, or in itself where that is 0."""
    pairs = zip(ours.tensors(), theirs.tensors(), strict=True)
    return max(((a.cpu().double() - b.double()).norm() / (b.double().norm().item() or 1)).item() for a, b in pairs)


def five_updates(step: Step, weights: Weights, x: torch.Tensor, objective: Objective) -> Weights:
    """Return the weights after five updates."""
    weights = weights.map(torch.clone)
    moments = Moments.zeros_like(weights)
    for n in range(5):
        step.update_(weights, moments, x, objective, Update(n, lr=1e-4))
    return weights


def check(device: str, precision: str, family: str, d_in: int, d_sae: int, batch: int) -> dict:
    """Compare gradients, statistics and the weights after five updates with the dense step's on the CPU."""
    base, x = sparse_problem(d_in, d_sae, batch, d_sae / 20)
    x = x.double()
    nonlinearity, penalty = FAMILIES[family]
    own = {name: torch.full((d_sae,), nonlinearity.initial(name)).double() for name in nonlinearity.parameter_names}
    own["b_enc"] = base.own["b_enc"].double()
    weights = Weights(base.encoder.double(), base.decoder.double(), base.b_dec.double() + 0.01, own)
    objective = Objective(nonlinearity, PENALTIES[penalty], COEFF)
    there: Step = DenseStep(weights, batch)
    if precision == "bf16":
        weights = weights.map(torch.Tensor.float)
        x = x.float()
        there = CudaStep(weights, batch, "bf16")
    reference, theirs = there.gradients(weights, x, objective)
    reference = reference.map(torch.clone)
    end = five_updates(there, weights, x, objective)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    row: dict = {"precision": precision, "family": family, "shape": [d_in, d_sae, batch]}
    begin = time.perf_counter()
    try:
        w = weights.map(lambda t: t.to(device, dtype))
        acts = x.to(device, dtype)
        step = SparseTritonStep(w, batch, "fp32" if precision == "fp64" else precision)
        gradients, ours = step.gradients(w, acts, objective)
        row["gradients"] = worst_difference(gradients, reference)
        row["mse"] = abs(ours.mse.item() / theirs.mse.item() - 1)
        row["fired"] = (ours.fired.cpu().double() - theirs.fired).abs().sum().item() / theirs.fired.sum().item()
        row["updates"] = worst_difference(five_updates(step, w, acts, objective), end)
        worst = max(row[part] for part in ("gradients", "mse", "fired", "updates"))
        row["right"] = worst < LIMITS[precision]
        again = [five_updates(step, w, acts, objective) for _ in range(2)]
        row["same_bits"] = all(torch.equal(a, b) for a, b in zip(*(end.tensors() for end in again), strict=True))
        graphless = five_updates(without_graphs(step), w, acts, objective)
        row["graphs_same_bits"] = all(map(torch.equal, again[0].tensors(), graphless.tensors()))
    except Exception as problem:
        row |= {"right": False, "error": repr(problem)[:2000], "where": traceback.format_exc()[-2000:]}
    row["seconds"] = round(time.perf_counter() - begin, 1)
    print(row, "" if row["right"] else "WRONG", flush=True)
    return row


def without_graphs(step: SparseTritonStep) -> SparseTritonStep:
    """Return the step, which from now on starts its kernels one by one."""
    step._pool = None
    step._of_saes.clear()
    return step


@cache
def checks(device: str) -> list[dict]:
    """Return all comparisons; they are made once in a process, however many shapes are timed."""
    if device == "cpu":
        return [check(device, precision, "prolu_ste + sqrt_l1", 9, 24, 10) for precision in ("fp64", "bf16")]
    return [check(device, precision, family, 63, 1000, 130) for precision, family in CHECKS]


def median_ms(once: Callable[[], object], device: str, rounds: int) -> float:
    """Return the median time of a call in milliseconds, on the GPU's own clock where there is one."""
    for _ in range(min(8, rounds)):  # to compile, and to bring a GPU to its full clock rate
        once()
    times = []
    for _ in range(rounds):
        if device == "cpu":
            begin = time.perf_counter()
            once()
            times.append(1e3 * (time.perf_counter() - begin))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        once()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def in_turn_ms(once: Callable[[], object], rounds: int) -> float:
    """Return the mean time of calls that do not wait for each other, as in a training, in milliseconds."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(rounds):
        once()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / rounds


def kernels_ms(once: Callable[[], object], rounds: int = 5) -> dict[str, float]:
    """Return the milliseconds per call that the GPU spends in each of its 20 longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(rounds):
            once()
        torch.cuda.synchronize()
    longest = sorted(seen.key_averages(), key=lambda event: -event.device_time_total)[:20]
    return {event.key[:80]: round(event.device_time_total / 1e3 / rounds, 4) for event in longest}


def large_problem(device: str, d_in: int, d_sae: int, batch: int) -> tuple[Weights, torch.Tensor]:
    """Return an SAE and a batch like those of `sparse_problem`, made on the device itself."""
    g = torch.Generator(device).manual_seed(0)
    features = torch.randn(d_sae, d_in, generator=g, device=device)
    features /= features.norm(dim=1, keepdim=True)
    order = torch.randperm(d_sae, generator=g, device=device)
    popularity = torch.arange(1, d_sae + 1, device=device).float().pow(-0.6)[order]
    which = torch.multinomial(popularity, batch * 30, replacement=True, generator=g).view(batch, 30)
    size = torch.exp(0.5 * torch.randn(batch, 30, generator=g, device=device))
    x = torch.nn.functional.embedding_bag(which, features, mode="sum", per_sample_weights=size)
    x += 0.025 * torch.randn(batch, d_in, generator=g, device=device)
    own = {"b_enc": torch.zeros(d_sae, device=device)}
    return Weights(features, features.clone(), torch.zeros(d_in, device=device), own), x


def speed(device: str, d_in: int, d_sae: int, batch: int, l0s: Sequence[float], rounds: int) -> dict:
    """Return the milliseconds of an update by every variant, at every L0; and why a variant failed."""
    weights, x = large_problem(device, d_in, d_sae, batch)
    moments = Moments.zeros_like(weights)
    some = x[:512]
    m = (some @ weights.encoder.T).flatten()
    found: dict = {}
    threshold_family = Objective(NONLINEARITIES["prolu_ste"], PENALTIES["sqrt_l1"], COEFF)
    middle = l0s[len(l0s) // 2]
    plan: list[tuple[str, Callable[..., Step], str, float, Objective]] = []
    for l0 in l0s:
        plan.append(("sparse", SparseTritonStep, "bf16", l0, threshold_family))
    plan.append(("sparse_without_graphs", graphless_step, "bf16", middle, threshold_family))
    plan.append(("dense", CudaStep, "bf16", middle, threshold_family))
    selecting = Objective(TopK(Selection(max(1, int(middle))), has_auxiliary=False), PENALTIES["none"], 0.0)
    plan.append(("sparse_topk", SparseTritonStep, "bf16", middle, selecting))
    if d_in * d_sae < 10_000_000:
        for precision in PRECISIONS:
            if precision != "bf16":
                plan.append(("sparse", SparseTritonStep, precision, middle, threshold_family))
                plan.append(("dense", CudaStep, precision, middle, threshold_family))
    for kind, step_type, precision, l0, objective in plan:
        # A selection finds its latents among all that are above 0.
        bias = 0.0 if objective is selecting else -m.topk(max(1, int(l0 * len(some)))).values.min()
        weights.own["b_enc"].fill_(bias)
        name = f"{kind}_{precision}" + ("" if kind == "dense" else f"_l0_{l0:g}")
        try:
            timed(found, name, step_type(weights, batch, precision), weights, moments, x, objective, device, rounds)
        except Exception as problem:
            found.setdefault("errors", {})[name] = traceback.format_exc()[-3000:]
            print(name, repr(problem)[:500], flush=True)
        if device != "cpu":
            torch.cuda.empty_cache()
    found["encoder_matmul_bf16"] = matmul_ms(device, d_in, d_sae, batch, rounds)
    return {"shape": [d_in, d_sae, batch]} | found


def graphless_step(*arguments: Any) -> SparseTritonStep:
    """Return a sparse step without graphs."""
    return without_graphs(SparseTritonStep(*arguments))


def timed(
    found: dict,
    name: str,
    step: Step,
    weights: Weights,
    moments: Moments,
    x: torch.Tensor,
    objective: Objective,
    device: str,
    rounds: int,
) -> None:
    """Add the times of one variant to `found`."""

    def once():
        # At so small a learning rate that L0 stays what it is.
        return step.update_(weights, moments, x, objective, Update(5, lr=LR))

    found[name] = {"ms": median_ms(once, device, rounds), "l0": once().fired.sum().item() / len(x)}
    if device != "cpu":
        found[name]["in_turn_ms"] = in_turn_ms(once, rounds)
        if isinstance(step, SparseTritonStep) and step._precision == "bf16":
            found[name]["kernels_ms"] = kernels_ms(once)
    print(name, found[name], flush=True)


def matmul_ms(device: str, d_in: int, d_sae: int, batch: int, rounds: int) -> float:
    """Return the milliseconds of the encoder matmul in bf16 with its result in fp32, which no step can avoid."""
    a = torch.randn(batch, d_in, device=device).bfloat16()
    b = torch.randn(d_sae, d_in, device=device).bfloat16()
    if device == "cpu":
        return median_ms(lambda: a @ b.T, device, rounds)
    return median_ms(lambda: torch.mm(a, b.T, out_dtype=torch.float32), device, rounds)


def figures(device: str = "cuda", shapes: Sequence[Sequence[int]] = SHAPES, l0s: Sequence[float] = L0S) -> dict:
    """Return whether the sparse step is right, and its times beside those of the dense step.

    Args:
        device: cuda, or cpu for Triton's interpreter.
        shapes: d_in, d_sae and, if it is not `BATCH`, the tokens of a batch, of each problem that is timed.
        l0s: the numbers of active latents per token.
    """
    interpreted = device == "cpu"
    compared = checks(device)
    result: dict = {"right": all(row["right"] for row in compared), "checks": compared, "speed": []}
    if not any(row["right"] for row in compared):
        return result
    for d_in, d_sae, *batch in shapes:
        if interpreted:
            # The interpreter takes a hundredth of a second for a row.
            result["speed"].append(speed(device, min(d_in, 9), min(d_sae, 24), 8, [3], 1))
        else:
            result["speed"].append(speed(device, d_in, d_sae, batch[0] if batch else BATCH, l0s, 15))
    return result


def main() -> None:
    """Check the step, time it, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if options.device == "cpu":
        result = figures("cpu", [(9, 24)])
    elif not torch.cuda.is_available():
        print("this machine has no GPU that torch can use", file=sys.stderr)
        sys.exit(2)
    else:
        result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__} | figures()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if not result["right"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
