"""Compare SAEBench's core evaluation of our SAEs with our own evaluation, on the same tokens.

    python checks/saebench_core.py [--json FILE]

This trains three SAEs on the built-in model, makes the environment `.venv-saebench` if it does not exist, runs
SAEBench's code there, and computes SAEBench's figures a second time with our model and SAEs by SAEBench's definitions.
The exit code is 1 if one of these differs from SAEBench's. `docs/howto/saebench.md` explains the definitions, and what
takes the place of the hub.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

import prolu
from prolu.activations.builtin import HOOK, MODEL_DIR
from prolu.interop.saebench import SAEBenchSAE

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-saebench"
PACKAGE = "sae-bench==0.6.0"
TOLERANCE = 1e-5
"""The largest relative difference that is allowed. Both sides compute in float32, with two implementations of the
language model and with sums in different orders."""
N_BLOCKS = 128
BATCH = 16
SHARED = {"d_sae": 512, "n_tokens": 300_000, "lr": 4e-3}
RUNS = [
    prolu.RunConfig(nonlinearity="prolu_ste", coeff=0.006, **SHARED),
    prolu.RunConfig(nonlinearity="relu", coeff=0.006, normalisation="none", **SHARED),
    prolu.RunConfig(nonlinearity="gated", coeff=0.01, **SHARED),
]


def environment() -> Path:
    """Return the Python of an environment with SAEBench and this library, which is made once.

    Raises:
        LookupError: It does not exist yet, and PyPI does not answer.
    """
    python = ENVIRONMENT / "bin" / "python"
    made = ENVIRONMENT / "installed"
    if made.exists() and made.read_text() == PACKAGE:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
    pip = [python, "-m", "pip"]
    name = PACKAGE.partition("==")[0]
    asked = subprocess.run([*pip, "index", "versions", name, "--retries", "1"], capture_output=True, check=False)
    if asked.returncode != 0:
        raise LookupError(f"PyPI does not answer, and {ENVIRONMENT.name} is not made yet")
    constraints = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "install", "--quiet", *constraints, PACKAGE, "--editable", ROOT], check=True, timeout=1800)
    # torchvision comes along in a build for another torch, with which transformers cannot be imported.
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    made.write_text(PACKAGE)
    return python


def stand_ins(work: Path, tokens) -> None:
    """Write what SAEBench's code finds in place of the hub: our model as `gpt2`, our blocks as the dataset `tokens`."""
    shutil.copytree(MODEL_DIR, work / "gpt2")
    config = work / "gpt2" / "config.json"
    facts = json.loads(config.read_text())
    # n_ctx is in the config of the hub's GPT-2 too, and TransformerLens reads the context length from it.
    config.write_text(json.dumps(facts | {"n_ctx": facts["n_positions"]}))
    (work / "tokens").mkdir()
    pq.write_table(pa.table({"tokens": [row.tolist() for row in tokens]}), work / "tokens" / "train.parquet")
    # SAELens asks the hub which tokenizer made a dataset of tokens. It finds the answer here, in the hub's cache.
    cached = work / "hf" / "hub" / "datasets--tokens"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("0" * 40) / "sae_lens.json").write_text(json.dumps({"tokenizer_name": "gpt2"}))


def theirs(work: Path, folders: list[Path]) -> dict:
    """Return SAEBench's figures of the SAEs in these folders."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hf"), "WANDB_MODE": "disabled"}
    script = ROOT / "tests" / "support" / "saebench_reference.py"
    answers = work / "answers.json"
    command = [environment(), script, str(BATCH), str(N_BLOCKS // BATCH), answers, *folders]
    subprocess.run(command, cwd=work, check=True, timeout=1200, env=os.environ | offline)
    return json.loads(answers.read_text())


@torch.no_grad()
def by_their_definitions(sae: SAEBenchSAE, lm: prolu.LanguageModel, tokens: torch.Tensor) -> dict[str, float]:
    """Return SAEBench's figures, computed from our model and our SAE by SAEBench's formulas."""
    losses = {}
    errors = []
    codes = []
    batches = []
    for part in tokens.split(BATCH):
        kept = part != lm.bos  # SAEBench leaves out EOS and padding too, which are the same token here
        x = lm._read(part, [lm._site])[0]  # not centred
        f = sae.encode(x)
        out = sae.decode(f)
        clean = lm.logits(part).log_softmax(-1)
        for name, splice in (("sae", out), ("ablation", torch.zeros_like(x))):
            spliced = lm.logits(part, splice).log_softmax(-1)
            divergence = (clean.exp() * (clean - spliced)).sum(-1)
            losses.setdefault(f"kl_div_with_{name}", []).append(divergence[kept])
            losses.setdefault(f"ce_loss_with_{name}", []).append(_ce(spliced, part)[kept[:, :-1]])
        losses.setdefault("ce_loss_without_sae", []).append(_ce(clean, part)[kept[:, :-1]])
        x = x[kept]
        out = out[kept]
        f = f[kept]
        error = (x - out).square().sum(-1)
        norms = x.norm(dim=-1)
        out_norms = out.norm(dim=-1)
        product = (x * out).sum(-1)
        codes.append(torch.stack([(f > 0).float(), f.double()]).sum(1))
        errors.append({
            "l0": (f != 0).sum(-1), "l1": f.sum(-1), "l2_norm_in": norms, "l2_norm_out": out_norms,
            "l2_ratio": out_norms / norms, "cossim": product / norms / out_norms,
            "mse": error / len(x),  # the mean over tokens follows below, so SAEBench divides by their number twice
            "explained_variance_legacy": 1 - error / (x - x.mean(0)).square().sum(-1),
        })  # fmt: skip
        batches.append([(out_norms.square().mean() / product.mean()), x.square().sum(-1).mean(), error.mean()])
    mean = {name: torch.cat(parts).double().mean().item() for name, parts in losses.items()}
    mean |= {name: torch.cat([part[name] for part in errors]).double().mean().item() for name in errors[0]}
    bias, square, residual = torch.tensor(batches).double().mean(0).tolist()
    density = sum(codes)[0] / (tokens != lm.bos).sum()
    return mean | {
        "kl_div_score": 1 - mean["kl_div_with_sae"] / mean["kl_div_with_ablation"],
        "ce_loss_score": (mean["ce_loss_with_ablation"] - mean["ce_loss_with_sae"])
        / (mean["ce_loss_with_ablation"] - mean["ce_loss_without_sae"]),
        "relative_reconstruction_bias": bias,
        # SAEBench's denominator is E |x|^2 - (E |x|^2 / d)^2, which is not the variance.
        "explained_variance": 1 - residual / (square - (square / lm.d_in) ** 2),
        "frac_alive": (density > 0).double().mean().item(),
        "freq_over_1_percent": (density > 0.01).double().mean().item(),
        "freq_over_10_percent": (density > 0.1).double().mean().item(),
    }


def _ce(log_probabilities, tokens):
    return -log_probabilities[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


NEAREST = {
    "l0": "l0", "ce_loss_with_sae": "ce_recon", "ce_loss_without_sae": "ce_clean", "ce_loss_with_ablation": "ce_zero",
    "ce_loss_score": "recovered", "kl_div_with_sae": "kl", "l1": "l1", "mse": "mse", "l2_ratio": "norm_ratio",
    "relative_reconstruction_bias": "relative_bias",
}  # fmt: skip
"""The figure of ours that is nearest to each of SAEBench's."""


def ours_beside(evaluated: dict[str, float]) -> dict[str, float]:
    """Return our own figures by SAEBench's names."""
    found = {theirs: evaluated[ours] for theirs, ours in NEAREST.items()}
    return found | {"explained_variance": 1 - evaluated["fvu"], "frac_alive": 1 - evaluated["dead_fraction"]}


@torch.no_grad()
def variance_steps(
    sae: SAEBenchSAE, lm: prolu.LanguageModel, tokens: torch.Tensor, evaluated: dict
) -> dict[str, float]:
    """Return the explained variance by our definition, then with one change after the other up to SAEBench's."""
    x = lm._read(tokens, [lm._site])[0]
    kept = tokens != lm.bos
    error = (x - sae(x))[kept].double().square().sum(-1).mean()
    square = x[kept].double().square().sum(-1).mean()
    middle = x[kept].double().mean(0).square().sum()
    return {
        "ours, where the SAE works": 1 - evaluated["fvu"],
        "in the model's own scale": 1 - evaluated["fvu_raw"],
        "without special tokens, with the mean over d_in": 1 - (error / (square - middle)).item(),
        "their formula in place of the variance": 1 - (error / (square - (square / lm.d_in) ** 2)).item(),
    }


def compare(work: Path) -> dict:
    """Return all figures of all runs: ours, SAEBench's, and SAEBench's by its definitions."""
    lm = prolu.LanguageModel("builtin", HOOK)
    blocks = prolu.load_blocks("builtin", lm.tokenizer, ctx=128, max_train_tokens=500_000)
    stream = prolu.ActivationStream(lm, blocks, 512)
    study = prolu.run_sweep(RUNS, stream, work / "study", eval_tokens=8192, progress=False)
    held_out = prolu.HeldOut(lm, blocks, N_BLOCKS * 128)
    tokens = torch.from_numpy(held_out.tokens.astype("int64"))
    assert len(tokens) == N_BLOCKS
    stand_ins(work, tokens)
    said = theirs(work, [run.folder for run in study.runs])
    found = {"versions": said["versions"], "n_tokens": tokens.numel(), "runs": {}}
    for run in study.runs:
        evaluated = prolu.evaluate(run.load(), held_out)
        sae = SAEBenchSAE.load(run.folder, "gpt2")
        ours = ours_beside(evaluated)
        named = said["runs"][run.folder.name]
        figures = {
            figure: {"prolu": ours.get(figure), "by_definition": value, "saebench": named[figure]}
            for figure, value in by_their_definitions(sae, lm, tokens).items()
        }
        steps = variance_steps(sae, lm, tokens, evaluated)
        found["runs"][run.folder.name] = {"figures": figures, "explained_variance_in_steps": steps}
    return found


def unexplained(found: dict) -> float:
    """Return the largest relative difference between a figure of SAEBench's and ours by the same definition."""
    figures = [figure for run in found["runs"].values() for figure in run["figures"].values()]
    return max(abs(figure["by_definition"] / figure["saebench"] - 1) for figure in figures)


def main() -> int:
    """Print a table for each run, and a summary; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    request = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder))
    for name, run in found["runs"].items():
        print(f"{name:36}{'prolu eval':>14}{'its definition':>16}{'SAEBench':>14}")
        for figure, said in run["figures"].items():
            ours = "" if said["prolu"] is None else f"{said['prolu']:.6g}"
            print(f"  {figure:34}{ours:>14}{said['by_definition']:>16.6g}{said['saebench']:>14.6g}")
        for step, value in run["explained_variance_in_steps"].items():
            print(f"  explained variance, {step}: {value:.5f}")
    if request.json:
        request.json.write_text(json.dumps(found, indent=1) + "\n")
    worst = unexplained(found)
    n = sum(len(run["figures"]) for run in found["runs"].values())
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    print(
        f"saebench: {len(found['runs'])} SAEs, {n} figures, at most {worst:.1g} from ours by SAEBench's definitions "
        f"({versions})"
    )
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
