"""How far probes of one run differ by noise, and how soon the convergence rule may be asked.

`python benchmarks/probe_noise.py --json FILE` trains a few SAEs, 128 -> 512 in batches of 512, at a constant learning
rate on the built-in model's activations, and measures L0 and MSE on held-out text every 10 steps. It prints

- the noise: once the state is constant, the differences between probes that are so many steps apart;
- the errors: for a run that ended after N steps, whether the rule calls it converged (less than 5% of change from 0.8 N
  to N), beside how far L0 and MSE still moved when it was trained five times as long.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import prolu
from prolu.evaluation.comparison.frontiers import CONVERGENCE_TOLERANCE
from prolu.evaluation.held_out import HeldOut
from prolu.evaluation.scoring import probe
from prolu.training.trainer import Trainer

BATCH = 512
EVERY = 10
"""The number of steps between two probes."""
DISTANCES = (10, 20, 50, 100, 200, 500)
RUNS = [
    {"nonlinearity": "relu", "penalty": "l1", "coeff": 0.01},
    {"nonlinearity": "prolu_ste", "penalty": "sqrt_l1", "coeff": 0.006},
    {"nonlinearity": "topk(32)"},
    {"nonlinearity": "jumprelu(1)", "coeff": 0.005},
]


def probes(stream: prolu.ActivationStream, n_steps: int, eval_tokens: int) -> dict[str, np.ndarray]:
    """Return L0 and MSE of each run at each probe, as [probe, 2]."""
    held_out = HeldOut(stream.lm, stream.blocks, eval_tokens)
    base = {"d_sae": 512, "n_tokens": n_steps * BATCH, "lr": 3e-3, "decay_start_fraction": 1.0}
    configs = [prolu.RunConfig(**base, decay_end_fraction=2.0, warmup_fraction=50 / n_steps, **run) for run in RUNS]
    trainers = [Trainer(config, stream.d_in, BATCH) for config in configs]
    found: list[list[tuple[float, float]]] = [[] for _ in trainers]
    for step in range(n_steps):
        acts = stream[step].acts
        for trainer, seen in zip(trainers, found, strict=True):
            trainer.step(acts)
            if (step + 1) % EVERY == 0:
                figures = probe(trainer.sae(), held_out)
                seen.append((figures["l0"], figures["mse"]))
    return {config.family: np.array(seen) for config, seen in zip(configs, found, strict=True)}


def noise(curve: np.ndarray) -> dict[int, list[float]]:
    """Return, by distance in steps, the root mean square relative difference of two probes in the last half."""
    settled = np.log(np.maximum(curve[len(curve) // 2 :], 1e-12))
    rms = {}
    for distance in DISTANCES:
        places = distance // EVERY
        change = settled[places:] - settled[:-places]
        rms[distance] = [round(float(x), 5) for x in np.sqrt((change**2).mean(0))]
    return rms


def errors(curve: np.ndarray) -> dict[int, tuple[bool, list[float]]]:
    """Return, by the steps N of a run, what the rule says, and the relative changes from N to 5 N."""
    found = {}
    for end in (20, 50, 100, 150, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1200):
        if 5 * end > EVERY * len(curve):
            continue
        before, now, later = (curve[round(n / EVERY) - 1] for n in (0.8 * end, end, 5 * end))
        says = bool((abs(now - before) < CONVERGENCE_TOLERANCE * np.maximum(before, 1e-12)).all())
        found[end] = (says, [round(float(x), 3) for x in later / np.maximum(now, 1e-12) - 1])
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lm = prolu.LanguageModel("builtin", hook="blocks.2.hook_resid_pre")
    blocks = prolu.load_blocks("builtin", lm.tokenizer, max_train_tokens=args.steps * BATCH)
    stream = prolu.ActivationStream(lm, blocks, batch_size=BATCH, seed=0)
    curves = probes(stream, args.steps, args.eval_tokens)
    for family, curve in curves.items():
        print(f"{family}: noise of L0 and MSE by distance {noise(curve)}")
        for end, (says, change) in errors(curve).items():
            print(f"  {end:5d} steps: {'converged' if says else 'moving':9}  L0, MSE to 5 N {change}")
    if args.json:
        args.json.write_text(json.dumps({family: curve.tolist() for family, curve in curves.items()}) + "\n")


if __name__ == "__main__":
    main()
