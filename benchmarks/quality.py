"""Compare our Gated, JumpReLU and TopK SAEs with those of dictionary_learning's own trainers: the MSE at equal L0.

    python benchmarks/quality.py --json benchmarks/quality.json

Both train on the same activations of the built-in model (scaled per token to norm sqrt(d)), in the same batches, for
the same number of steps. dictionary_learning runs in an environment of its own, on activations of norm 1, the scale
that its constants are meant for, at two learning rates (its default and ours), of which the better one counts. Then
ours is asked for the L0 that its SAE had on held-out tokens. The MSE is in our scale. The last line is a summary.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BATCH = 1024
D_SAE = 1024
PEERS: dict[str, list[dict[str, Any]]] = {
    "topk": [{"k": 16}, {"k": 32}],
    "jumprelu": [{"target_l0": 16.0}, {"target_l0": 32.0}],
    "gated": [{"l1_penalty": 0.3}, {"l1_penalty": 0.15}],
}
OURS = {"topk": ("topk", "none"), "jumprelu": ("jumprelu(1)", "l0"), "gated": ("gated", "l1")}
DEFAULT_LR = {"topk": 2e-4 / (D_SAE / 2**14) ** 0.5, "jumprelu": 7e-5, "gated": 5e-5}
LR = 4e-3


def train_peer(name: str, settings: dict[str, Any], lr: float, acts: torch.Tensor, held_out: torch.Tensor) -> dict:
    """Train one SAE by dictionary_learning's trainer, and return its L0 and MSE on held-out tokens."""
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    n_steps = len(acts) // BATCH
    d_in = acts.shape[1]
    trainer_class = {"topk": TopKTrainer, "jumprelu": JumpReluTrainer, "gated": GatedSAETrainer}[name]
    schedule: dict[str, Any] = {"warmup_steps": n_steps // 20, "decay_start": n_steps // 2}
    if name != "topk":
        schedule["sparsity_warmup_steps"] = n_steps // 20
    torch.manual_seed(0)
    trainer = trainer_class(
        steps=n_steps, activation_dim=d_in, dict_size=D_SAE, layer=0, lm_name="none", lr=lr, device="cpu",
        **schedule, **settings,
    )  # fmt: skip
    if name == "topk":
        trainer.dead_feature_threshold = 200_000  # by default 10M tokens, more than it is trained on here
    scale = d_in**-0.5
    start = time.perf_counter()
    for i in range(n_steps):
        trainer.update(i, acts[i * BATCH : (i + 1) * BATCH] * scale)
    seconds = time.perf_counter() - start
    l0 = 0.0
    error = 0.0
    with torch.no_grad():
        for part in held_out.split(4096):
            x = part * scale
            latents = trainer.ae.encode(x)
            l0 += (latents > 0).sum().item()
            error += (x - trainer.ae.decode(latents)).double().square().sum().item()
    # A squared error summed over d_in at norm 1 is a mean over d_in at norm sqrt(d_in), which is our MSE.
    return {"lr": lr, "l0": l0 / len(held_out), "mse": error / len(held_out), "seconds": seconds}


def peers(file: Path) -> None:
    """Train all settings at both learning rates, in the peers' environment, and print a JSON line for each."""
    tensors = load_file(file)
    for name, some in PEERS.items():
        for settings in some:
            for lr in (DEFAULT_LR[name], LR):
                found = train_peer(name, settings, lr, tensors["acts"], tensors["held_out"])
                print(json.dumps({"name": name, "settings": settings} | found), flush=True)


def run_peers(file: Path, n_threads: int) -> list[dict[str, Any]]:
    """Run `peers` in its environment, show each line when it comes, and return all."""
    from peers import environment

    command = [environment(), __file__, "--peers", file, "--threads", str(n_threads)]
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("{"):
                found.append(json.loads(line))
                print(f"peer {line}", end="", flush=True)
    if process.returncode:
        sys.exit(f"the peers' process failed with {process.returncode}")
    return found


def train_ours(name: str, l0: float, acts: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
    """Train one SAE of ours at this target L0, and return its L0 and MSE on held-out tokens."""
    from prolu import RunConfig, Trainer
    from prolu.evaluation.metrics import CodeSums, ReconstructionSums

    nonlinearity, penalty = OURS[name]
    config = RunConfig(
        nonlinearity=nonlinearity, penalty=penalty, target_l0=l0, d_sae=D_SAE, n_tokens=len(acts), lr=LR,
        coeff=(0.7 if penalty == "l0" else 2.0) / acts.shape[1], warmup_fraction=0.05, coeff_warmup_fraction=0.05,
        decay_start_fraction=0.5, lr_floor=0.02, aux_dead_tokens=200_000,
    )  # fmt: skip
    trainer = Trainer(config, acts.shape[1], BATCH)
    start = time.perf_counter()
    for i in range(trainer.n_steps):
        trainer.step(acts[i * BATCH : (i + 1) * BATCH])
    seconds = time.perf_counter() - start
    sae = trainer.sae()
    code = CodeSums(D_SAE)
    recon = ReconstructionSums(acts.shape[1])
    with torch.no_grad():
        for part in held_out.split(4096):
            latents = sae.encode_normalised(part)
            code.update(latents)
            recon.update(part, sae.decode_normalised(latents))
    return {"l0": code.figures()["l0"], "mse": recon.mse, "seconds": seconds}


def write_activations(file: Path, n_tokens: int) -> None:
    """Write activations of the built-in model, shuffled and scaled per token, and held-out ones."""
    import prolu
    from prolu.sae.scaling import normalise

    lm = prolu.LanguageModel("builtin", hook="blocks.2.hook_resid_pre")
    blocks = prolu.load_blocks("builtin", lm.tokenizer, ctx=128, max_train_tokens=n_tokens + 2**18, progress=True)
    stream = prolu.ActivationStream(lm, blocks, batch_size=BATCH)
    acts = torch.cat([stream[i].acts for i in range(n_tokens // BATCH)])
    held_out, _ = normalise(lm.activations(blocks.held_out[:512]).flatten(0, 1))
    save_file({"acts": acts, "held_out": held_out}, file)


def in_words(row: dict[str, Any]) -> str:
    """Return one comparison as a line of text."""
    peer = row["peer"]
    ours = row["ours"]
    return (
        f"{row['name']:9} {json.dumps(row['settings']):22} peer L0 {peer['l0']:6.2f} MSE {peer['mse']:.5f} "
        f"(lr {peer['lr']:.1e}, {peer['seconds']:.0f} s); ours L0 {ours['l0']:6.2f} MSE {ours['mse']:.5f} "
        f"({ours['seconds']:.0f} s); {ours['mse'] / peer['mse'] - 1:+.1%}"
    )


def main() -> None:
    """Train everything, and print a line for each setting and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**21)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peers:
        peers(options.peers)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "activations.safetensors"
        write_activations(file, options.tokens)
        theirs = run_peers(file, options.threads)
        tensors = load_file(file)
        rows = []
        for name, some in PEERS.items():
            for settings in some:
                tried = [t for t in theirs if t["name"] == name and t["settings"] == settings]
                # An SAE with a quite different L0 may have a lower MSE, and is no comparison.
                best = min(tried, key=lambda t: t["mse"] if 0.5 * 16 < t["l0"] < 4 * 32 else math.inf)
                ours = train_ours(name, best["l0"], tensors["acts"], tensors["held_out"])
                rows.append({"name": name, "settings": settings, "peer": best, "tried": tried, "ours": ours})
                print(in_words(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    worst = max(row["ours"]["mse"] / row["peer"]["mse"] - 1 for row in rows)
    faster = [row["peer"]["seconds"] / row["ours"]["seconds"] for row in rows]
    print(
        f"quality: MSE against dictionary_learning's at equal L0, at worst {worst:+.1%} (limit +3%), over {len(rows)} "
        f"settings; {min(faster):.1f} to {max(faster):.1f} times as fast"
    )


if __name__ == "__main__":
    sys.exit(main())
