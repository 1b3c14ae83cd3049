"""How near runs come to their target L0, by family and number of steps: `python benchmarks/target_l0.py --json FILE`.

Every run is trained on the built-in model's activations, 128 -> 512 in batches of 512, with the learning rate falling
over the second half, as docs/howto/target-l0.md advises. What is printed is the L0 on held-out text over the target.
"""

import argparse
import json
import tempfile
from pathlib import Path

import prolu

FAMILIES = [
    {"nonlinearity": "relu", "penalty": "l1"},
    {"nonlinearity": "relu", "penalty": "sqrt_l1"},
    {"nonlinearity": "prolu_relu", "penalty": "sqrt_l1"},
    {"nonlinearity": "prolu_ste", "penalty": "sqrt_l1"},
    {"nonlinearity": "gated", "penalty": "l1"},
    {"nonlinearity": "jumprelu(1)", "penalty": "l0"},
]
BATCH = 512
TARGETS = [16.0, 32.0]


def measured(stream: prolu.ActivationStream, n_steps: int) -> dict[str, list[float]]:
    """Return, for each family, L0 over target at each target after `n_steps` steps."""
    base = prolu.RunConfig(
        d_sae=512, n_tokens=n_steps * BATCH, lr=4e-3, coeff=0.01, warmup_fraction=0.05, coeff_warmup_fraction=0.05,
        decay_start_fraction=0.5, lr_floor=0.02,
    )  # fmt: skip
    runs = [
        run for family in FAMILIES for run in prolu.grid(base, **{k: [v] for k, v in family.items()}, target_l0=TARGETS)
    ]
    with tempfile.TemporaryDirectory() as out:
        results = prolu.run_sweep(runs, stream, out=Path(out) / "study", eval_tokens=8192, progress=False)
    found: dict[str, list[float]] = {}
    for record in results.records:
        name = f"{record['nonlinearity']} + {record['penalty']}"
        found.setdefault(name, []).append(round(record["l0"] / record["target_l0"], 3))
    return found


def main() -> None:
    """Measure at each number of steps, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400, 800, 1600, 3200])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lm = prolu.LanguageModel("builtin", hook="blocks.2.hook_resid_pre")
    blocks = prolu.load_blocks("builtin", lm.tokenizer, max_train_tokens=max(args.steps) * BATCH)
    stream = prolu.ActivationStream(lm, blocks, batch_size=BATCH, seed=0)
    found = {}
    for n_steps in args.steps:
        found[n_steps] = measured(stream, n_steps)
        worst = max(
            max(max(r, 1 / r) for r in ratios) if min(ratios) > 0 else float("inf")
            for ratios in found[n_steps].values()
        )
        print(f"{n_steps:6d} steps, worst {worst:.2f}: {found[n_steps]}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
