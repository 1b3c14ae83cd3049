"""Time the training of one SAE on one and two processes of this machine, and compare it with a cost model.

    python benchmarks/scaling.py --json scaling.json

Every process has one thread, so that a second one brings a second core. Layouts take turns, round by round. Strong
scaling shares the work of one process between two; weak scaling gives each of two the work of one. The model: seconds =
compute of a rank + bytes sent / rate of an all-reduce, where the compute is measured on one process at a rank's shape,
and the rate on an all-reduce of the same size. At the end stand predictions for GPUs that were not measured, with the
assumptions that they are computed from.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from prolu.runtime.mesh import ALONE, MeshShape, bytes_per_step, leave, mesh_of
from prolu.studies.recipes import RECIPES
from prolu.training.config import RunConfig
from prolu.training.steps.dense import ROWS_PER_CHUNK
from prolu.training.trainer import Trainer
from step import sparse_problem

L0 = 60.0
AT_D_SAE = 12_288
"""The L0 at this d_sae. Another d_sae has an L0 in proportion, so that ranks of one shape have the same work."""


class Layout(NamedTuple):
    """A way to lay one SAE out on processes."""

    name: str
    """Its name in the table."""
    mesh: str
    """The mesh, as in latent=2; empty for one process."""
    d_sae: int
    """The number of latents of all ranks together."""
    batch: int
    """The number of tokens per step of all ranks together."""


def layouts(d_sae: int, batch: int) -> list[Layout]:
    """Return the layouts: one process, two that share its work, two with twice the work, and one at a rank's shapes."""
    return [
        Layout("one process", "", d_sae, batch),
        Layout("strong latent=2", "latent=2", d_sae, batch),
        Layout("strong data=2", "data=2", d_sae, batch),
        Layout("weak latent=2", "latent=2", 2 * d_sae, batch),
        Layout("weak data=2", "data=2", d_sae, 2 * batch),
        Layout("half the latents", "", d_sae // 2, batch),
        Layout("half the batch", "", d_sae, batch // 2),
    ]


def measure(layout: Layout, d_in: int, step_kind: str, n_steps: int) -> dict[str, Any]:
    """Return the seconds per step of this rank, its memory, and the rate of an all-reduce."""
    mesh = mesh_of(layout.mesh, "cpu", 1)
    torch.set_num_threads(1)
    before = anonymous_bytes()
    whole, x = sparse_problem(d_in, layout.d_sae, layout.batch, L0 * layout.d_sae / AT_D_SAE)
    config = RunConfig(
        nonlinearity="relu", coeff=1e-3, lr=1e-7, d_sae=layout.d_sae, n_tokens=1000 * layout.batch, step=step_kind
    )
    trainer = Trainer(config, d_in, layout.batch, mesh=mesh)
    # Each rank takes its part of one problem, so that all ranks together compute what one process would.
    here = mesh.latents(layout.d_sae)
    weights = trainer.state.weights
    weights.encoder.copy_(whole.encoder[here])
    weights.decoder.copy_(whole.decoder[here])
    weights.own["b_enc"].copy_(whole.own["b_enc"][here])
    rows = layout.batch // mesh.n_data
    acts = x[mesh.data_rank * rows : (mesh.data_rank + 1) * rows].contiguous()
    del whole, x
    trainer.step(acts)  # compiles
    trainer.step(acts)  # allocates what the sparse step needs at this L0
    mesh.bytes_sent.clear()
    times = []
    for _ in range(n_steps):
        mesh.wait()
        start = time.perf_counter()
        report = trainer.step(acts)
        mesh.wait()
        times.append(time.perf_counter() - start)
    sent = {name: n // n_steps for name, n in mesh.bytes_sent.items()}
    on_here = float(report.n_active) / mesh.n_ranks
    return {
        "seconds": statistics.median(times),
        "l0": float(report.n_active) / layout.batch,
        "sent": sent,
        "rate": all_reduce_rate(max(sent.values())) if mesh is not ALONE else None,
        "memory": anonymous_bytes() - before,
        "memory_formula": memory_per_rank(step_kind, rows, d_in, weights.d_sae, on_here, gradients=mesh.n_data > 1),
        "first": mesh.is_first,
    }


def anonymous_bytes() -> int:
    """Return the memory of this process that no file stands behind, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def memory_per_rank(step_kind: str, rows: int, d_in: int, latents: int, n_active: float, *, gradients: bool) -> float:
    """Compute the memory of a rank in bytes: weights and moments, the step's buffers, activations, and gradients.

    A sparse step keeps gradients only if other ranks need them.
    """
    chunk = min(rows, ROWS_PER_CHUNK) * latents
    state = 6 * latents * d_in
    matrices = 2 * latents * d_in
    if step_kind == "dense":
        return 4 * (state + matrices + 4 * chunk + 2 * rows * d_in)
    return 4 * (state + matrices * gradients + chunk + 3 * rows * d_in + 12 * n_active)


def all_reduce_rate(n_bytes: int) -> float:
    """Measure how many bytes an all-reduce of this size reduces per second on each rank."""
    t = torch.ones(n_bytes // 4)
    times = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(t)
        times.append(time.perf_counter() - start)
        t.fill_(1.0)
    return n_bytes / statistics.median(times)


def run(layout: Layout, d_in: int, step_kind: str, n_steps: int) -> dict[str, Any]:
    """Measure a layout in processes of its own."""
    command = [sys.executable]
    if layout.mesh:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [__file__, "--worker", json.dumps(layout), str(d_in), step_kind, str(n_steps)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


def with_model(found: dict[str, list[dict[str, Any]]], shapes: list[Layout], d_in: int) -> list[dict[str, Any]]:
    """Return a row for each layout: medians, speedup, and what the cost model predicts."""
    seconds = {name: statistics.median(f["seconds"] for f in some) for name, some in found.items()}
    part = {
        "strong latent=2": seconds["half the latents"],
        "strong data=2": seconds["half the batch"],
        "weak latent=2": seconds["one process"],
        "weak data=2": seconds["one process"],
    }
    lines = []
    for layout in shapes:
        one = found[layout.name][0]
        line = {"layout": layout.name, "d_sae": layout.d_sae, "batch": layout.batch, "l0": one["l0"]}
        line |= {"seconds": seconds[layout.name], "memory": one["memory"], "memory_formula": one["memory_formula"]}
        if layout.mesh:
            rate = statistics.median(f["rate"] for f in found[layout.name])
            said = bytes_per_step(MeshShape.parse(layout.mesh), layout.batch, d_in, layout.d_sae, n_own=1)
            total = sum(said.values())
            line |= {"sent": one["sent"], "formula": said, "rate": rate}
            line |= {"predicted": part[layout.name] + total / rate, "wire_seconds": total / rate}
            work = 1 if layout.name.startswith("strong") else 2
            line["speedup"] = work * seconds["one process"] / seconds[layout.name]
        lines.append(line)
    return lines


class Gpu(NamedTuple):
    """What is assumed of a GPU and of the links between the GPUs of one machine."""

    flops: float = 400e12
    """The FLOPs per second that bf16 matmuls of these shapes reach: 40% of an H100's 989 TFLOP/s."""
    memory_rate: float = 2.3e12
    """The bytes per second that are read from memory: 70% of 3.35 TB/s."""
    wire_rate: float = 300e9
    """The bytes per second that a ring all-reduce moves over NVLink, of 450 GB/s in one direction."""


GPU = Gpu()


def predicted_step(shape: MeshShape, batch: int, d_in: int, d_sae: int, gpu: Gpu = GPU) -> dict[str, float]:
    """Predict the seconds of one dense step on GPUs, by part, and the bytes of memory per rank.

    A step makes five matmuls of 2 B F d FLOPs, about twelve passes over the [batch, d_sae] matrices, and moves 28 bytes
    per parameter for Adam and 8 more to write and read the gradients. An all-reduce moves 2 (n - 1) / n of its bytes.
    """
    rows = batch // shape.data
    latents = d_sae // shape.latent
    entries = rows * latents
    parameters = 2 * latents * d_in
    sent = bytes_per_step(shape, batch, d_in, d_sae, n_own=1)
    over_latents = sent.get("reconstruction", 0) + sent.get("b_dec", 0)
    over_data = sent.get("gradients", 0) + sent.get("fired", 0)
    ring = [2 * (n - 1) / n for n in shape]
    seconds = {
        "matmuls": 10 * entries * d_in / gpu.flops,
        "entries": 12 * 4 * entries / gpu.memory_rate,
        "adam": 36 * parameters / gpu.memory_rate,
        "wire": (ring[1] * over_latents + ring[0] * over_data) / gpu.wire_rate,
    }
    memory = 4 * 4 * parameters + 5 * 4 * entries + 3 * 4 * rows * d_in
    return seconds | {"seconds": sum(seconds.values()), "memory": memory}


def predictions() -> dict[str, Any]:
    """Predict a million latents on 8 GPUs, for each way to split them, and the paper's runs on one GPU each."""
    million = {
        f"data={shape.data},latent={shape.latent}": predicted_step(shape, 4096, 768, 2**20)
        for shape in (MeshShape(1, 8), MeshShape(2, 4), MeshShape(4, 2), MeshShape(8, 1))
    }
    paper = {}
    for name in ("experiment1", "experiment2", "experiment3"):
        recipe = RECIPES[name]
        runs = recipe.runs_at(768)
        step = [predicted_step(MeshShape(), recipe.batch_size, 768, r.d_sae)["seconds"] for r in runs]
        steps = [r.n_tokens / recipe.batch_size for r in runs]
        hours = sum(s * n for s, n in zip(step, steps, strict=True)) / 3600
        paper[name] = {"runs": len(runs), "gpu_hours": hours}
    return {"assumed": GPU._asdict(), "a million latents, 8 GPUs": million, "the paper": paper}


def show(lines: list[dict[str, Any]], step_kind: str) -> None:
    """Print the table of one kind of step."""
    print(f"\n{step_kind} step\n{'layout':18} {'d_sae':>6} {'batch':>6} {'L0':>5} {'s/step':>7} {'model':>7} "
          f"{'speedup':>8} {'sent MB':>8} {'formula':>8} {'wire s':>7} {'memory MB':>9} {'formula':>8}")  # fmt: skip
    for line in lines:
        sent = sum(line.get("sent", {}).values()) / 1e6
        print(
            f"{line['layout']:18} {line['d_sae']:6} {line['batch']:6} {line['l0']:5.1f} {line['seconds']:7.3f} "
            f"{line.get('predicted', float('nan')):7.3f} {line.get('speedup', 1):8.2f} {sent:8.2f} "
            f"{sum(line.get('formula', {}).values()) / 1e6:8.2f} {line.get('wire_seconds', 0):7.3f} "
            f"{line['memory'] / 1e6:9.1f} {line['memory_formula'] / 1e6:8.1f}"
        )


def main() -> None:
    """Measure all layouts, compare them with the model, and predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--step-kinds", nargs="+", default=["sparse", "dense"], help="kinds of step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps to time for each layout and round")
    parser.add_argument("--json", type=Path, help="write all figures here")
    request = parser.parse_args()
    shapes = layouts(request.d_sae, request.batch)
    results = {}
    for step_kind in request.step_kinds:
        found: dict[str, list[dict[str, Any]]] = {layout.name: [] for layout in shapes}
        for _ in range(request.rounds):
            for layout in shapes:
                found[layout.name].append(run(layout, request.d_in, step_kind, request.steps))
        results[step_kind] = with_model(found, shapes, request.d_in)
        show(results[step_kind], step_kind)
    results["predictions"] = predictions()
    print(json.dumps(results["predictions"], indent=1))
    if request.json:
        request.json.write_text(json.dumps(results, indent=1) + "\n")
    on_meshes = [line for step_kind in request.step_kinds for line in results[step_kind] if "sent" in line]
    misses = [line["predicted"] / line["seconds"] - 1 for line in on_meshes]
    print(f"model against measurement: {min(misses):+.0%} to {max(misses):+.0%}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        layout = Layout(*json.loads(sys.argv[2]))
        facts = measure(layout, int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
        if facts["first"]:
            print(json.dumps(facts), flush=True)
        leave()
    else:
        main()
