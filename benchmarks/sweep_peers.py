"""Train many SAEs from one pass of the language model, with this library and with SAELens's runner of several SAEs.

`sweep.py --peers` starts it, in an environment that is made for it (`peers.py`).

Both get the same documents, the built-in language model, and the same list of SAEs: TopK, BatchTopK, ReLU, Gated and
JumpReLU in turns, at L0s of 32, 16 and 64. Both begin with text and end with weights on the disk. Ours also scores its
SAEs, on few tokens, because a study always does; SAELens is not asked to evaluate, nor to estimate norms. They take
turns, after a short training of all families in which kernels are compiled.

TopK and BatchTopK have the same k in both. For the other families ours has a controller of L0, and SAELens a
coefficient, so that their L0s are not equal: the table has those that both ended at. SAELens's steps of these families
are dense, and their time does not depend on L0; that of ours does.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

CTX = 128
BATCH = 1024
D_SAE = 1024
HOOK = "blocks.2.hook_resid_pre"
LR = 2e-3
COUNTS = (1, 6, 16)
PASS_TOKENS = 4096
"""The number of tokens in one pass of the language model."""

FAMILIES = ("topk", "batchtopk", "relu", "gated", "jumprelu")
L0S = (32, 16, 64, 24)

L1_COEFFICIENT = 5.0
"""The coefficient of SAELens's ReLU and Gated SAEs. Its JumpReLU is asked for the L0 itself."""


def kinds(n: int) -> list[tuple[str, int]]:
    """Return the families and L0s of `n` SAEs."""
    return [(family, l0) for l0 in L0S for family in FAMILIES][:n]


def ours(documents: list[str], lm: Any, n: int, n_tokens: int, out: Path) -> list[float]:
    """Train `n` SAEs with this library; return their L0s on held-out text."""
    import prolu

    blocks = prolu.load_blocks(documents, lm.tokenizer, CTX)
    stream = prolu.ActivationStream(lm, blocks, BATCH, window_tokens=25 * BATCH)
    common: dict[str, Any] = {"d_sae": D_SAE, "n_tokens": n_tokens, "lr": LR}
    runs = [prolu.RunConfig(nonlinearity=family, target_l0=float(l0), **common) for family, l0 in kinds(n)]
    results = prolu.run_sweep(runs, stream, out, eval_tokens=2048, progress=False, min_eval_fraction=0.1)
    return [record["l0"] for record in results.records]


def their_config(family: str, l0: int, d_in: int) -> Any:
    """Return SAELens's configuration of an SAE."""
    import sae_lens

    shape = {"d_in": d_in, "d_sae": D_SAE, "device": "cpu", "dtype": "float32"}
    if family == "topk":
        return sae_lens.TopKTrainingSAEConfig(k=l0, **shape)
    if family == "batchtopk":
        return sae_lens.BatchTopKTrainingSAEConfig(k=l0, **shape)
    if family == "jumprelu":
        quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": l0}
        return sae_lens.JumpReLUTrainingSAEConfig(**quadratic, **shape)
    made = {"relu": sae_lens.StandardTrainingSAEConfig, "gated": sae_lens.GatedTrainingSAEConfig}[family]
    return made(l1_coefficient=L1_COEFFICIENT, **shape)


def theirs(documents: list[str], lm: Any, n: int, n_tokens: int, out: Path) -> list[float]:
    """Train `n` SAEs with SAELens's runner; return their L0s on the last batch."""
    from datasets import Dataset
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig

    saes = {f"{i}-{family}-{l0}": their_config(family, l0, lm.cfg.d_model) for i, (family, l0) in enumerate(kinds(n))}
    config = MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=HOOK,
        model_name="gpt2",
        dataset_path="documents",
        streaming=False,
        context_size=CTX,
        training_tokens=n_tokens,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=PASS_TOKENS // CTX,
        lr=LR,
        checkpoint_path=None,
        output_path=str(out),
    )
    config.logger.log_to_wandb = False
    runner = MultiSAETrainingRunner(config, override_dataset=Dataset.from_dict({"text": documents}), override_model=lm)
    trained = runner.run()
    batch = next(runner.activations_store.get_multi_hook_data_loader())[HOOK]
    with torch.no_grad():
        return [(sae.encode(batch) > 0).sum().item() / len(batch) for sae in trained.values()]


def stdlib(n_characters: int) -> list[str]:
    """Return files of Python's standard library, as documents."""
    found: list[str] = []
    n_found = 0
    for file in sorted(Path(os.__file__).parent.rglob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        if "site-packages" in file.parts or not text.strip():
            continue
        found.append(text)
        n_found += len(text)
        if n_found > n_characters:
            break
    return found


def write_gpt2(folder: Path) -> None:
    """Copy the built-in model to where TransformerLens, which knows models by name, looks for GPT-2."""
    from prolu.activations import builtin

    shutil.copytree(builtin.MODEL_DIR, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"n_ctx": config["n_positions"]}))


def measure(n_tokens: int, rounds: int, counts: list[int]) -> list[dict[str, Any]]:
    """Train with both in turns, and return a row for each number of SAEs."""
    from transformer_lens import HookedTransformer

    import prolu

    write_gpt2(Path("gpt2"))
    our_lm = prolu.LanguageModel("builtin", HOOK, batch_tokens=PASS_TOKENS)
    their_lm = HookedTransformer.from_pretrained_no_processing("gpt2", device="cpu")
    # A token of source code has about three characters; enough for all, so that no document is read twice.
    # At least enough that some documents are held out, whatever files a Python has.
    documents = stdlib(max(300_000, 5 * n_tokens))
    ways = {"ours": (ours, our_lm), "saelens": (theirs, their_lm)}

    def train(name: str, n: int, n_tokens: int) -> tuple[float, list[float]]:
        shutil.rmtree(name, ignore_errors=True)
        way, lm = ways[name]
        start = time.perf_counter()
        l0s = way(documents, lm, n, n_tokens, Path(name))
        return time.perf_counter() - start, l0s

    for name in ways:
        train(name, len(FAMILIES), 5 * BATCH)  # compiles kernels
    rows = []
    for n in counts:
        found = [{name: train(name, n, n_tokens) for name in ways} for _ in range(rounds)]
        row: dict[str, Any] = {"n_saes": n}
        for name in ways:
            rates = [n * n_tokens / one[name][0] for one in found]
            row[f"{name}_sae_tokens_per_second"] = round(statistics.median(rates))
        row["ratios"] = [round(one["saelens"][0] / one["ours"][0], 2) for one in found]
        row["wanted_l0"] = [l0 for _, l0 in kinds(n)]
        row |= {f"{name}_l0": [round(l0, 1) for l0 in found[-1][name][1]] for name in ways}
        row["load"] = os.getloadavg()[0]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure, print a line of JSON for each number of SAEs, and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps of each SAE")
    parser.add_argument("--rounds", type=int, default=2, help="times each is timed")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="numbers of SAEs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    file = options.json and options.json.absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = measure(options.steps * BATCH, options.rounds, options.counts)
        os.chdir("/")
    if file:
        file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
