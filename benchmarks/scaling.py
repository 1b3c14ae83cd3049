"""One SAE on 1, 2, ... processes of one thread each: seconds and bytes a step, beside `docs/scaling.md`.

python benchmarks/scaling.py --ranks 2 --json scaling.json
"""

import argparse
import json
import os
import socket
import statistics
import time
from pathlib import Path

import torch
from torch import multiprocessing

from prolu import RunConfig, Trainer
from prolu.mesh import Mesh, start_processes

D_IN, D_SAE, BATCH = 512, 8192, 1024
WARM, ROUNDS = 2, 9


def rank_of(rank: int, data: int, latent: int, port: int, step: str, out: str) -> None:
    """What each process does; the first writes what it saw."""
    torch.set_num_threads(1)
    own = {"RANK": rank, "WORLD_SIZE": data * latent, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()}
    if data * latent > 1:
        start_processes()
    mesh = Mesh(data, latent)
    run = RunConfig(d_sae=D_SAE, n_tokens=BATCH * 1000, step=step)
    trainer, seconds = Trainer(run, D_IN, BATCH, mesh=mesh), []
    acts = torch.nn.functional.normalize(torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0)), dim=1)
    for _ in range(WARM + ROUNDS):
        before, start = dict(mesh.sent), time.perf_counter()
        trainer.step(acts * D_IN**0.5)
        seconds.append(time.perf_counter() - start)
    sent = {axis: n - before.get(axis, 0) for axis, n in mesh.sent.items()}
    if mesh.is_first:
        Path(out).write_text(json.dumps({"seconds": statistics.median(seconds[WARM:]), "sent": sent}))


def measured(data: int, latent: int, step: str, out: str) -> dict:
    """One mesh, one family of steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(rank_of, (data, latent, port, step, out), nprocs=data * latent)
    return {"data": data, "latent": latent, "step": step} | json.loads(Path(out).read_text())


def main() -> None:
    """Each mesh of so many ranks in a row or a column, beside one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", default="scaling.json")
    asked = parser.parse_args()
    rows = []
    for step in ("dense", "sparse"):
        for data, latent in ((1, 1), (1, asked.ranks), (asked.ranks, 1)):
            rows.append(measured(data, latent, step, asked.json))
            speed = next(r["seconds"] for r in rows if r["step"] == step) / rows[-1]["seconds"]
            figures = f"{1e3 * rows[-1]['seconds']:7.0f} ms, {speed:.2f} of one process's speed"
            print(f"{step:6} data={data} latent={latent}: {figures}, bytes {rows[-1]['sent']}", flush=True)
    facts = {"d_in": D_IN, "d_sae": D_SAE, "batch": BATCH, "threads_per_rank": 1, "rows": rows}
    Path(asked.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
