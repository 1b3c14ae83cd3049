"""Run sae-probes' own code on the SAEs of a study, beside our own probes of the same tokens.

    python checks/sae_probes.py [--study FOLDER] [--datasets NAME...] [--json FILE]

Without --study, this trains two families at three seeds on the built-in model. It makes the environment
`.venv-saebench` if it does not exist, and runs sae-probes there: on our labels of Python source, in its own layout and
with its own split, ranking and regression, and on data sets that it ships. The figures are added to the study, printed
with 95% intervals over seeds, and our accuracies stand beside its own. The exit code is 1 if the two differ by more
than 0.02 in the mean over runs and labels.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr

import prolu
from prolu.activations.builtin import HOOK
from prolu.evaluation.probes import ProbeTask, held_out_modules, latent_figures, python_tasks
from prolu.interop.sae_probes import sae_probes_figures
from prolu.runtime.rng import keyed_generator
from prolu.studies.added_figures import add_figures
from saebench_core import environment, stand_ins

ROOT = Path(__file__).parent.parent
PER_CLASS = 2500
"""The tokens of either class that sae-probes gets: it reads 5,000 rows of a data set."""
DATASETS = ("158_code_C", "159_code_Python", "160_code_HTML")
KS = (1, 5, 16)
TOLERANCE = 0.02
"""The largest difference of the two mean accuracies. They are those of other tokens, latents and regressions."""
SHARED = {"d_sae": 512, "n_tokens": 300_000, "lr": 4e-3}
RUNS = [
    prolu.RunConfig(nonlinearity="prolu_ste", coeff=0.006, **SHARED),
    prolu.RunConfig(nonlinearity="relu", coeff=0.006, **SHARED),
]


def trained(folder: Path, lm: prolu.LanguageModel) -> prolu.Results:
    """Return a study of two families at three seeds."""
    blocks = prolu.load_blocks("builtin", lm.tokenizer, ctx=128, max_train_tokens=500_000)
    stream = prolu.ActivationStream(lm, blocks, 512)
    return prolu.run_sweep(prolu.with_seeds(RUNS, [0, 1, 2]), stream, folder, eval_tokens=8192, progress=False)


def for_sae_probes(task: ProbeTask, name: str) -> dict[str, torch.Tensor]:
    """Return the first tokens of a task in random order, as many with the label as without.

    sae-probes draws the rows to fit on from all of them: tokens of one text may be on both sides, unlike in ours.
    """
    order = torch.randperm(len(task.labels), generator=keyed_generator("sae-probes", name))
    chosen = [order[task.labels[order] == value][:PER_CLASS] for value in (True, False)]
    n = min(map(len, chosen))
    rows = torch.cat([places[:n] for places in chosen])
    rows = rows[torch.randperm(len(rows), generator=keyed_generator("sae-probes", name, "order"))]
    return {"acts": task.acts[rows].contiguous(), "labels": task.labels[rows].contiguous()}


def theirs(work: Path, results: prolu.Results, tasks: dict[str, ProbeTask], datasets: list[str]) -> dict[str, str]:
    """Run sae-probes on the runs of a study, and add its figures to the study; return the versions used."""
    stand_ins(work, [])
    (work / "tasks").mkdir()
    for name, task in tasks.items():
        save_file(for_sae_probes(task, name), work / "tasks" / f"{name}.safetensors")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    script = ROOT / "tests" / "support" / "sae_probes_reference.py"
    folders = [run.folder.resolve() for run in results.runs]
    hook = results.config["stream"]["hook"]
    command = [environment(), script, hook, ",".join(datasets), *folders]
    subprocess.run(command, cwd=work, check=True, timeout=3000, env=os.environ | offline)
    add_figures(
        results.folder,
        {run.record["run_id"]: sae_probes_figures(work / "results" / run.folder.name) for run in results.runs},
    )
    return json.loads((work / "versions.json").read_text())


def main() -> int:
    """Print a table of the families and one of the agreement; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path)
    parser.add_argument("--datasets", nargs="*", default=list(DATASETS))
    parser.add_argument("--json", type=Path)
    request = parser.parse_args()
    lm = prolu.LanguageModel("builtin", HOOK)
    tasks = python_tasks(lm, held_out_modules())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        results = trained(work / "study", lm) if request.study is None else prolu.Results.load(request.study)
        if request.study is not None and results.config["stream"]["lm_digest"] != lm.digest():
            raise SystemExit(f"{request.study}: was not trained on the built-in model")
        versions = theirs(work, results, tasks, request.datasets)
        add_figures(
            results.folder,
            {run.record["run_id"]: latent_figures(run.load(), tasks, KS) for run in results.runs},
        )
        records = prolu.Results.load(results.folder).records
    found = {"versions": versions, "families": families(records), "agreement": agreement(records, list(tasks))}
    print_found(found)
    if request.json:
        request.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(abs(found["agreement"][f"mean_{k}"]["mean_difference"]) > TOLERANCE for k in KS))


def families(records: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Return for each setting the mean over seeds of each figure of sae-probes, and half the width of its interval."""
    names = [name for name in records[0] if name.startswith("sae_probes_") and name.endswith("_auc")]
    found: dict[str, dict[str, list[float]]] = {}
    for name in names:
        for point in prolu.points(records, y=name):
            row = found.setdefault(f"{point.family} at L0 {point.x:.1f}, {point.n_seeds} seeds", {})
            row[name] = [point.y, point.y_half_width]
    return found


def agreement(records: list[dict], labels: list[str]) -> dict[str, dict[str, float]]:
    """Return for each label and k how the accuracies of sae-probes stand to ours over the runs."""
    found = {}
    for k in KS:
        theirs: list[list[float]] = []
        ours: list[list[float]] = []
        for number, label in enumerate(sorted(labels), 901):
            theirs.append([record[f"sae_probes_{number}_{label}_{k}_acc"] for record in records])
            ours.append([record[f"probe_{label}_{k}"] for record in records])
            found[f"{label}_{k}"] = _agreement(theirs[-1], ours[-1])
        means = [[sum(row) / len(labels) for row in zip(*side, strict=True)] for side in (theirs, ours)]
        found[f"mean_{k}"] = _agreement(*means)
    return found


def _agreement(theirs: list[float], ours: list[float]) -> dict[str, float]:
    differences = [their - our for their, our in zip(theirs, ours, strict=True)]
    return {
        "rank_correlation": float(spearmanr(theirs, ours).statistic),
        "mean_difference": sum(differences) / len(differences),
        "largest_difference": max(differences, key=abs),
    }


def print_found(found: dict) -> None:
    """Print what was found."""
    for family, figures in found["families"].items():
        print(family)
        for name, (mean, half_width) in figures.items():
            print(f"  {name:44}{mean:8.3f} +- {half_width:.3f}")
    print(f"\n{'accuracy, sae-probes - prolu':30}{'rank correlation':>18}{'mean':>10}{'largest':>10}")
    for name, row in found["agreement"].items():
        mean, largest = row["mean_difference"], row["largest_difference"]
        print(f"{name:30}{row['rank_correlation']:18.3f}{mean:10.3f}{largest:10.3f}")
    print("sae-probes: " + ", ".join(f"{name} {number}" for name, number in found["versions"].items()))


if __name__ == "__main__":
    sys.exit(main())
