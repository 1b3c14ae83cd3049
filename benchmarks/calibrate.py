"""Remakes the table of crossover densities, where a dense and a sparse step take the same time: `make calibrate`.

For each shape the density is bisected until the two medians, interleaved, are equal.
"""

import argparse
import json
import os

import torch

from prolu.training.steps.choice import CROSSOVERS
from step import interleaved, our_step, sparse_problem

SHAPES = [(64, 1024), (128, 1024), (128, 4096), (512, 8192), (768, 12_288)]
BATCH, ROUNDS, HALVINGS = 1024, 5, 5


def crossover(d_in: int, d_sae: int) -> float:
    """Share of latents on at which both take equally long."""
    low, high = 0.01, 0.9
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        weights, x = sparse_problem(d_in, d_sae, BATCH, middle * d_sae)
        seconds = interleaved({f: our_step(f, weights, x) for f in ("dense", "sparse")}, ROUNDS)
        low, high = (middle, high) if seconds["sparse"] < seconds["dense"] else (low, middle)
    return round((low + high) / 2, 3)


def main() -> None:
    """Measures every shape and rewrites the table's CPU rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    torch.set_num_threads(parser.parse_args().threads)
    rows = [row for row in json.loads(CROSSOVERS.read_text()) if row["device"] != "cpu"]
    for d_in, d_sae in SHAPES:
        rows.append({"device": "cpu", "d_in": d_in, "d_sae": d_sae, "density": crossover(d_in, d_sae)})
        print(rows[-1], flush=True)
    CROSSOVERS.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
