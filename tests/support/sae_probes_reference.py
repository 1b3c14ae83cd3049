"""What sae-probes says of our runs; run by another environment's Python.

    cd WORK && python sae_probes_reference.py HOOK DATASETS RUN...

WORK holds what its code would fetch or make: `gpt2` is a model's folder, and `tasks` a folder with a .safetensors file
of activations and labels for each task of ours. DATASETS, separated by commas, are some of its own. Its result files
are written into `results/RUN`, and the versions used into `versions.json`.
"""

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

from prolu.interop.saebench import SAEBenchSAE
from sae_probes import run_sae_evals

KS = [1, 5, 16]
MODEL = "gpt2"
CTX = 128
"""The longest prompt: sae-probes takes 1,024 tokens unless it is told otherwise, which a small model does not."""


def add_tasks(hook: str) -> list[str]:
    """Lay our tasks out as sae-probes' own data sets, and return their names."""
    data = import_module("sae_probes.utils_data")
    shipped = data.DATA_PATH
    names = []
    rows = []
    cache = Path("cache") / f"model_activations_{MODEL}"
    cache.mkdir(parents=True)
    cleaned = Path("data").absolute() / "cleaned_data"
    cleaned.mkdir(parents=True)
    for number, file in enumerate(sorted(Path("tasks").glob("*.safetensors")), 901):
        task = load_file(file)
        name = f"{number}_{file.stem}"
        torch.save(task["acts"], cache / f"{name}_{hook}.pt")
        frame = pd.DataFrame({"prompt": "", "target": task["labels"].int().numpy()})
        frame.to_csv(cleaned / f"{name}.csv.zst", compression="zstd", index=False)
        rows.append((f"cleaned_data/{name}.csv", file.stem, "Binary Classification"))
        names.append(name)
    # Its own data sets are found beside ours: both lists in one, and links to its files.
    own = pd.read_csv(shipped / "probing_datasets_MASTER.csv.zst", compression="zstd")
    ours = pd.DataFrame(rows, columns=["Dataset save name", "Dataset Tag", "Data type"])
    master = pd.concat([own, ours], ignore_index=True)
    master.to_csv(cleaned.parent / "probing_datasets_MASTER.csv.zst", compression="zstd", index=False)
    for file in (shipped / "cleaned_data").iterdir():
        (cleaned / file.name).symlink_to(file)
    data.DATA_PATH = import_module("sae_probes.generate_model_activations").DATA_PATH = cleaned.parent
    # What was read of its own list when it was imported, it would not read again.
    sizes = data.get_dataset_sizes()
    data.get_binary_df.cache_clear()
    sizes.update({name: len(data.read_numbered_dataset_df(name)) for name in names})
    return names


def main(hook: str, datasets: list[str], runs: list[str]) -> None:
    """Run its whole evaluation of every SAE, on our tasks and on its own data sets."""
    ours = add_tasks(hook)
    generate = import_module("sae_probes.generate_model_activations")
    if datasets:
        generate.ensure_dataset_activations(MODEL, datasets, [hook], "cache", device="cpu", max_seq_len=CTX)
    for run in runs:
        run_sae_evals(
            sae=SAEBenchSAE.load(run, MODEL),  # pyright: ignore[reportArgumentType]
            model_name=MODEL,
            hook_name=hook,
            reg_type="l2",
            setting="normal",
            ks=KS,
            results_path=Path("results") / Path(run).name,
            model_cache_path="cache",
            datasets=[*ours, *datasets],
            device="cpu",
        )
    packages = ("sae-probes", "sae-lens", "transformer-lens", "scikit-learn", "torch")
    Path("versions.json").write_text(json.dumps({name: version(name) for name in packages}))


if __name__ == "__main__":
    main(sys.argv[1], [name for name in sys.argv[2].split(",") if name], sys.argv[3:])
