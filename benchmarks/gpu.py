"""The GPU's step on a GPU: first whether it is right, then how fast. One command; nothing else is needed.

    python benchmarks/gpu.py --json gpu.json

Right: in fp64, fp32, tf32 and bf16, uncaptured and captured, against the plain dense step on the CPU in fp64. Fast:
median of 30 updates each of plain autograd (fp32, tf32, bf16 autocast) and of our step in each precision, and the time
that the five matmuls alone take. The first disagreement ends it with exit code 1.
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
from prolu.training.steps import AdamConfig, DenseStep, Objective
from prolu.training.steps.cuda import CudaStep
from step import COEFF, LR, autograd_step, sparse_problem

LIMITS = {"fp64": 1e-12, "fp32": 1e-5, "tf32": 5e-3, "bf16": 4e-2}
"""Largest difference in a tensor's norm, relative, from the reference."""


def worst_difference(ours: Weights, theirs: Weights) -> float:
    """Norm-relative, over tensors."""
    pairs = zip(ours.tensors(), theirs.tensors(), strict=True)
    return max(((a.cpu().double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


def check(d_in: int, d_sae: int, batch: int) -> list[dict]:
    """Gradients, and where five updates lead, captured graphs included, for every pair of the paper and precision."""
    rows = []
    weights, x = sparse_problem(d_in, d_sae, batch, d_sae / 20)
    weights, x = weights.map(torch.Tensor.double), x.double()
    for code in NONLINEARITIES:
        for penalty in PENALTIES:
            objective = Objective(NONLINEARITIES[code], PENALTIES[penalty], COEFF)
            reference = DenseStep(weights, batch).gradients(weights, x, objective)[0].map(torch.clone)
            end = five_updates(DenseStep(weights, batch), weights, x, objective)
            for name in ("fp64", *PRECISIONS):
                dtype = torch.float64 if name == "fp64" else torch.float32
                w, acts = weights.map(lambda t, d=dtype: t.to("cuda", d)), x.to("cuda", dtype)
                step = CudaStep(w, batch, "fp32" if name == "fp64" else name)
                gradients, _ = step.gradients(w, acts, objective)
                row = {"precision": name, "family": f"{code} + {penalty}"}
                row["gradients"] = worst_difference(gradients, reference)
                row["updates"] = worst_difference(five_updates(step, w, acts, objective), end)
                rows.append(row | {"right": row["gradients"] < LIMITS[name] and row["updates"] < LIMITS[name]})
                print(row, "" if rows[-1]["right"] else "WRONG", flush=True)
    return rows


def five_updates(step: DenseStep | CudaStep, weights: Weights, x: torch.Tensor, objective: Objective) -> Weights:
    """Weights after five updates at a small rate."""
    weights = weights.map(torch.clone)
    first, second = weights.zeros_like(), weights.zeros_like()
    for n in range(5):
        step.update_(weights, first, second, x, objective, n_updates=n, lr=1e-4, adam=AdamConfig())
    return weights


def median_ms(once: Callable[[], object], rounds: int = 30) -> float:
    """Median milliseconds on the GPU's own clock, after ten calls."""
    for _ in range(10):
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
    """One update by our step; the third call on replays a graph."""
    step, weights = CudaStep(weights, len(x), precision), weights.map(torch.clone)
    first, second = weights.zeros_like(), weights.zeros_like()
    objective = Objective(NONLINEARITIES["relu"], L1(), COEFF)
    return lambda: step.update_(weights, first, second, x, objective, n_updates=5, lr=LR, adam=AdamConfig())


def speed(d_in: int, d_sae: int, batch: int) -> dict[str, float]:
    """Milliseconds of an update by every variant, and of what no dense step can avoid."""
    weights, x = sparse_problem(d_in, d_sae, batch, 55)
    weights, x = weights.map(torch.Tensor.cuda), x.cuda()
    a, b = x.bfloat16(), weights.encoder.T.bfloat16()
    times = {"five_bf16_matmuls": 5 * median_ms(lambda: a @ b)}
    for precision in PRECISIONS:
        times[f"ours_{precision}"] = median_ms(our_update(precision, weights, x))
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            times[f"autograd_{precision}"] = median_ms(autograd_step(weights, x))
    torch.backends.cuda.matmul.allow_tf32 = False
    return times


def main() -> None:
    """Correctness, then speed, then JSON."""
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
