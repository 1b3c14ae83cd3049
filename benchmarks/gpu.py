"""Check the GPU's training step on a GPU, then time it.

    python benchmarks/gpu.py --json gpu.json

The step is compared in fp64, fp32, tf32 and bf16, before and after its graph is captured, with the plain dense step on
the CPU in fp64. If any of them differs by more than its limit, nothing is timed and the exit code is 1. Then follow the
median times of 30 updates by plain autograd (fp32, tf32, bf16 autocast) and by our step in each precision, and the time
that the five matmuls of a step take alone.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from prolu.sae.nonlinearities import NONLINEARITIES
from prolu.sae.penalties import L1, PENALTIES
from prolu.sae.weights import Weights
from prolu.training.config import PRECISIONS
from prolu.training.moments import Moments
from prolu.training.steps import DenseStep, Objective, Update
from prolu.training.steps.cuda import CudaStep
from step import COEFF, LR, autograd_step, sparse_problem

LIMITS = {"fp64": 1e-12, "fp32": 1e-5, "tf32": 5e-3, "bf16": 4e-2}
"""The largest difference from the reference, relative to a tensor's norm, in each precision."""


def worst_difference(ours: Weights, theirs: Weights) -> float:
    """Return the largest difference over all tensors, each relative to its norm."""
    pairs = zip(ours.tensors(), theirs.tensors(), strict=True)
    return max(((a.cpu().double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


def check(d_in: int, d_sae: int, batch: int) -> list[dict]:
    """Compare gradients and the weights after five updates, for every nonlinearity, penalty and precision."""
    rows = []
    weights, x = sparse_problem(d_in, d_sae, batch, d_sae / 20)
    weights = weights.map(torch.Tensor.double)
    x = x.double()
    for code in NONLINEARITIES:
        for penalty in PENALTIES:
            objective = Objective(NONLINEARITIES[code], PENALTIES[penalty], COEFF)
            reference = DenseStep(weights, batch).gradients(weights, x, objective)[0].map(torch.clone)
            end = five_updates(DenseStep(weights, batch), weights, x, objective)
            for name in ("fp64", *PRECISIONS):
                dtype = torch.float64 if name == "fp64" else torch.float32
                w = weights.map(lambda t, d=dtype: t.to("cuda", d))
                acts = x.to("cuda", dtype)
                step = CudaStep(w, batch, "fp32" if name == "fp64" else name)
                gradients, _ = step.gradients(w, acts, objective)
                row = {"precision": name, "family": f"{code} + {penalty}"}
                row["gradients"] = worst_difference(gradients, reference)
                row["updates"] = worst_difference(five_updates(step, w, acts, objective), end)
                rows.append(row | {"right": row["gradients"] < LIMITS[name] and row["updates"] < LIMITS[name]})
                print(row, "" if rows[-1]["right"] else "WRONG", flush=True)
    return rows


def five_updates(step: DenseStep | CudaStep, weights: Weights, x: torch.Tensor, objective: Objective) -> Weights:
    """Return the weights after five updates. From the third on the GPU's step replays a captured graph."""
    weights = weights.map(torch.clone)
    moments = Moments.zeros_like(weights)
    for n in range(5):
        step.update_(weights, moments, x, objective, Update(n, lr=1e-4))
    return weights


def median_ms(once: Callable[[], object], rounds: int = 30) -> float:
    """Return the median time of a call on the GPU's own clock, in milliseconds."""
    for _ in range(10):  # to compile, to capture, and to bring the GPU to its full clock rate
        once()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        once()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def our_update(precision: str, weights: Weights, x: torch.Tensor) -> Callable[[], object]:
    """Return a function that makes one update by our step."""
    step = CudaStep(weights, len(x), precision)
    weights = weights.map(torch.clone)
    moments = Moments.zeros_like(weights)
    objective = Objective(NONLINEARITIES["relu"], L1(), COEFF)
    return lambda: step.update_(weights, moments, x, objective, Update(5, lr=LR))


def speed(d_in: int, d_sae: int, batch: int) -> dict[str, float]:
    """Return the milliseconds of an update by every variant, and of the five matmuls of a dense step."""
    weights, x = sparse_problem(d_in, d_sae, batch, 55)
    weights = weights.map(torch.Tensor.cuda)
    x = x.cuda()
    a = x.bfloat16()
    b = weights.encoder.T.bfloat16()
    times = {"five_bf16_matmuls": 5 * median_ms(lambda: a @ b)}
    for precision in PRECISIONS:
        times[f"ours_{precision}"] = median_ms(our_update(precision, weights, x))
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            times[f"autograd_{precision}"] = median_ms(autograd_step(weights, x))
    torch.backends.cuda.matmul.allow_tf32 = False
    return times


def main() -> None:
    """Check the step, time it, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--batch", type=int, default=4096, help="tokens per step")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this machine has no GPU that torch can use", file=sys.stderr)
        sys.exit(2)
    result: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["checks"] = check(63, 1000, 130) + check(128, 1024, 512)
    if not all(row["right"] for row in result["checks"]):
        sys.exit(1)
    result["milliseconds"] = speed(options.d_in, options.d_sae, options.batch)
    print("\n".join(f"{name:20} {ms:8.3f} ms" for name, ms in result["milliseconds"].items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
