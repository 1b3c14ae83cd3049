"""What SAEBench's core evaluation says of our runs; run by another environment's Python.

    cd WORK && python saebench_reference.py BATCH N_BATCHES ANSWERS RUN...

WORK holds what its code would fetch from the hub, under names that it accepts: `gpt2` a model's folder, `tokens` a
folder with a parquet file of token blocks. ANSWERS is written as JSON: for each run, the figures of its result file.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from sae_bench.evals.core.main import multiple_evals

from prolu.interop.saebench import SAEBenchSAE


def main(batch: int, n_batches: int, answers: Path, runs: list[str]) -> None:
    """Runs the whole evaluation, all of its figures, special tokens spliced too, and reads the files that it wrote."""
    saes = {Path(run).name: SAEBenchSAE.load(run, "gpt2") for run in runs}
    ctx = next(iter(saes.values())).cfg.context_size
    multiple_evals(
        selected_saes=list(saes.items()),  # pyright: ignore[reportArgumentType]
        n_eval_reconstruction_batches=n_batches,
        n_eval_sparsity_variance_batches=n_batches,
        eval_batch_size_prompts=batch,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=False,
        dataset="tokens",
        context_size=ctx,
        output_folder="results",
        dtype="float32",
        device="cpu",
        force_rerun=True,
    )
    found = {name: figures_in(Path("results") / f"{name}_custom_sae_eval_results.json") for name in saes}
    versions = {name: version(name) for name in ("sae-bench", "sae-lens", "transformer-lens", "torch")}
    answers.write_text(json.dumps({"versions": versions, "runs": found}))


def figures_in(file: Path) -> dict[str, float]:
    """All scalar figures of a result file, by their own names; the evaluation logs its failures and goes on."""
    if not file.exists():
        raise SystemExit(f"SAEBench wrote no {file}: what it says above is why")
    groups = json.loads(file.read_text())["eval_result_metrics"].values()
    return {name: value for group in groups for name, value in group.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
