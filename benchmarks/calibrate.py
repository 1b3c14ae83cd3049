"""Remake the table of crossover densities, at which a dense and a sparse step take the same time: `make calibrate`.

For each shape and precision the density is bisected until the median times of both steps, measured in turns, are equal.
In bf16 this asks for a CPU that multiplies such numbers itself (AMX or AVX512-BF16).
"""

import argparse
import itertools
import json
import os

import torch

from prolu.training.steps.choice import CROSSOVERS
from step import interleaved, our_step, sparse_problem

SHAPES = [(64, 1024), (128, 1024), (128, 4096), (576, 4608), (512, 8192), (768, 12_288)]
BATCH = 1024
ROUNDS = 5
HALVINGS = 5


def crossover(d_in: int, d_sae: int, precision: str) -> float:
    """Return the fraction of active latents at which both kinds of step take equally long."""
    low = 0.01
    high = 0.9
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        weights, x = sparse_problem(d_in, d_sae, BATCH, middle * d_sae)
        steps = {kind: our_step(kind, weights, x, precision=precision) for kind in ("dense", "sparse")}
        seconds = interleaved(steps, ROUNDS)
        if seconds["sparse"] < seconds["dense"]:
            low = middle
        else:
            high = middle
    return round((low + high) / 2, 3)


def main() -> None:
    """Measure every shape and rewrite the CPU rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    torch.set_num_threads(parser.parse_args().threads)
    rows = [row for row in json.loads(CROSSOVERS.read_text()) if row["device"] != "cpu"]
    for precision, (d_in, d_sae) in itertools.product(("fp32", "bf16"), SHAPES):
        shape = {"device": "cpu", "precision": precision, "d_in": d_in, "d_sae": d_sae}
        rows.append(shape | {"density": crossover(d_in, d_sae, precision)})
        print(rows[-1], flush=True)
    CROSSOVERS.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
