"""Measure how the cost of a token grows with d_sae and with the number of SAEs, and where the time of a sweep goes.

    python benchmarks/sweep.py --json sweep.json
    python benchmarks/sweep.py --peers --json sweep-peers.json

With --peers, whole sweeps are measured instead, from text to weights, beside SAELens's runner of several SAEs
(`sweep_peers.py`).
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path

import torch

from peers import environment
from prolu import ActivationStream, HeldOut, LanguageModel, RunConfig, Trainer, evaluate, load_blocks
from prolu.training.steps import Steps
from step import interleaved, our_step, sparse_problem

D_IN = 512
BATCH = 1024
L0 = 50
WIDTHS = [2048, 8192, 32_768, 131_072]
COUNTS = [1, 2, 4, 8, 16, 32]


def growth_with_width(rounds: int) -> list[dict]:
    """Return the microseconds per token of a sparse step at each d_sae."""
    rows = []
    for d_sae in WIDTHS:
        weights, x = sparse_problem(D_IN, d_sae, BATCH, L0)
        seconds = interleaved({"sparse": our_step("sparse", weights, x)}, rounds)["sparse"]
        rows.append({"d_sae": d_sae, "us_per_token": 1e6 * seconds / BATCH})
        print(f"d_sae {d_sae:7}: {rows[-1]['us_per_token']:9.1f} us per token", flush=True)
    return rows


def growth_with_count(steps: int) -> list[dict]:
    """Return the tokens and SAE-tokens per second of a sweep on the built-in model, harvest included."""
    lm = LanguageModel("builtin", "blocks.2.hook_resid_pre")
    blocks = load_blocks("builtin", lm.tokenizer, max_train_tokens=600_000)
    held_out = HeldOut(lm, blocks, 32_768)
    rows = []
    for n in COUNTS:
        stream = ActivationStream(lm, blocks, batch_size=512, window_tokens=512 * steps)
        config = RunConfig(d_sae=1024, n_tokens=512 * steps, coeff=0.01, step="sparse")
        trainers = [Trainer(config, lm.d_in, 512)]
        shared: Steps = trainers[0].steps
        trainers += [Trainer(config, lm.d_in, 512, steps=shared) for _ in range(n - 1)]
        for trainer in trainers:
            trainer.state.weights.own["b_enc"].fill_(-0.8)  # so that few latents are active, as later in training
        start = time.perf_counter()
        _ = stream[0]  # reads the whole window, which holds all steps
        harvested = time.perf_counter()
        for step in range(steps):
            for trainer in trainers:
                trainer.step(stream[step].acts)
        stepped = time.perf_counter()
        evaluate(trainers[0].sae(), held_out)
        evaluated = time.perf_counter()
        row = {
            "n_saes": n,
            "tokens_per_s": 512 * steps / (stepped - start),
            "sae_tokens_per_s": n * 512 * steps / (stepped - start),
            "harvest_s": harvested - start,
            "steps_s": stepped - harvested,
            "evaluation_of_one_s": evaluated - stepped,
        }
        rows.append(row)
        print("  ".join(f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v:3}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    """Print both tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times each width is timed")
    parser.add_argument("--steps", type=int, default=100, help="steps of each count of SAEs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--peers", action="store_true", help="only whole sweeps, beside SAELens")
    options = parser.parse_args()
    if options.peers:
        command = [environment(), Path(__file__).with_name("sweep_peers.py"), "--steps", str(options.steps)]
        command += ["--threads", str(options.threads), *(["--json", options.json] if options.json else [])]
        # A thread that waits sleeps: the libraries' threads would otherwise keep each other from computing.
        subprocess.run(command, check=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
        return
    torch.set_num_threads(options.threads)
    result = {"width": growth_with_width(options.rounds), "count": growth_with_count(options.steps)}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
