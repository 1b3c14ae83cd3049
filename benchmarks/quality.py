"""Compare our SAEs with those of dictionary_learning's and SAELens's own trainers: the MSE at equal L0.

    python benchmarks/quality.py --json benchmarks/quality.json

TopK, JumpReLU, Gated and Matryoshka BatchTopK SAEs are compared (`quality_peers.py`). All are trained on the same
activations of the built-in model (scaled per token to norm sqrt(d_in)), in the same batches, for the same number of
steps. The others run in an environment of their own, at two learning rates (their default and ours), of which the
better one counts. Then ours is asked for the L0 that the other SAE had on held-out tokens. The MSE is in our scale. The
last line is a summary.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quality_peers import BATCH, D_SAE, DEAD_TOKENS, LR, SETTINGS, WIDTHS, Setting, train_all


def run_peers(file: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train the peers' SAEs in their environment, show each line when it comes, and return all."""
    from peers import environment

    command = [environment(), __file__, "--peers", file, "--threads", str(options.threads), "--only", *options.only]
    command += ["--one-rate"] if options.one_rate else []
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.startswith("{"):
                found.append(json.loads(line))
                print(f"peer {line}", end="", flush=True)
    if process.returncode:
        sys.exit(f"the peers' process failed with {process.returncode}")
    return found


def better(setting: Setting, tried: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one of two SAEs that counts: the lower MSE, among those within a quarter of the L0 asked for.

    An SAE with quite another L0 may have a lower MSE, and is no comparison. If none is near, the nearest counts.
    """
    if setting.l0 is None:
        near = [t for t in tried if 8 < t["l0"] < 128]
    else:
        near = [t for t in tried if abs(t["l0"] / setting.l0 - 1) < 0.25]
    if near or setting.l0 is None:
        return min(near or tried, key=lambda t: t["mse"])
    return min(tried, key=lambda t: abs(t["l0"] - setting.l0))


def train_ours(fields: dict[str, Any], l0: float, acts: torch.Tensor, held_out: torch.Tensor) -> dict[str, Any]:
    """Train one SAE of ours at this target L0, and return its L0 and MSE on held-out tokens."""
    from prolu import RunConfig, Trainer
    from prolu.evaluation.metrics import CodeSums, ReconstructionSums

    start_coeff = 0.7 if fields.get("penalty") == "l0" else 2.0
    config = RunConfig(
        **fields, target_l0=l0, d_sae=D_SAE, n_tokens=len(acts), lr=LR, coeff=start_coeff / acts.shape[1],
        warmup_fraction=0.05, coeff_warmup_fraction=0.05, decay_start_fraction=0.5, lr_floor=0.02,
        aux_dead_tokens=DEAD_TOKENS,
    )  # fmt: skip
    trainer = Trainer(config, acts.shape[1], BATCH)
    start = time.perf_counter()
    for i in range(trainer.n_steps):
        trainer.step(acts[i * BATCH : (i + 1) * BATCH])
    seconds = time.perf_counter() - start
    sae = trainer.sae()
    code = CodeSums(D_SAE)
    recons = [ReconstructionSums(acts.shape[1]) for _ in WIDTHS]
    with torch.no_grad():
        for part in held_out.split(4096):
            latents = sae.encode_normalised(part)
            code.update(latents)
            for width, recon in zip(WIDTHS, recons, strict=True):
                kept = latents.clone()
                kept[:, width:] = 0
                recon.update(part, sae.decode_normalised(kept))
    prefix_mse = [recon.mse for recon in recons]
    return {"l0": code.figures()["l0"], "mse": prefix_mse[-1], "prefix_mse": prefix_mse, "seconds": seconds}


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
    said = (
        f"{row['library']} {row['name']:13} {json.dumps(row['options']):22} L0 {peer['l0']:6.2f} MSE {peer['mse']:.5f} "
        f"(lr {peer['lr']:.1e}, {peer['seconds']:.0f} s); ours L0 {ours['l0']:6.2f} MSE {ours['mse']:.5f} "
        f"({ours['seconds']:.0f} s); {ours['mse'] / peer['mse'] - 1:+.1%}"
    )
    if row["name"] == "matryoshka":
        said += f"; mean over prefixes {sum(ours['prefix_mse']) / sum(peer['prefix_mse']) - 1:+.1%}"
    return said


def main() -> None:
    """Train everything, and print a line for each setting and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**21)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    names = sorted({setting.name for setting in SETTINGS})
    parser.add_argument("--only", nargs="*", default=[], choices=names, help="compare with these trainers only")
    parser.add_argument("--one-rate", action="store_true", help="train the others at our learning rate only")
    parser.add_argument("--peers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peers:
        train_all(options.peers, options.only, one_rate=options.one_rate)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "activations.safetensors"
        write_activations(file, options.tokens)
        theirs = run_peers(file, options)
        tensors = load_file(file)
        rows: list[dict[str, Any]] = []
        for number, setting in enumerate(SETTINGS):
            tried = [t for t in theirs if t["setting"] == number]
            if not tried:
                continue
            best = better(setting, tried)
            ours = train_ours(setting.ours, best["l0"], tensors["acts"], tensors["held_out"])
            about = {"library": setting.library, "name": setting.name, "options": setting.options}
            rows.append(about | {"peer": best, "tried": tried, "ours": ours})
            print(in_words(rows[-1]), flush=True)
            if options.json:  # as they come, so that nothing is lost when it is stopped
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    worst = max(row["ours"]["mse"] / row["peer"]["mse"] - 1 for row in rows)
    faster = [row["peer"]["seconds"] / row["ours"]["seconds"] for row in rows]
    print(
        f"quality: MSE against the peers' at equal L0, at worst {worst:+.1%}, over {len(rows)} settings; "
        f"{min(faster):.1f} to {max(faster):.1f} times as fast"
    )


if __name__ == "__main__":
    sys.exit(main())
