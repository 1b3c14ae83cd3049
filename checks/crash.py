"""Kills a sweep at every disk operation of a checkpoint and at random moments: `make crash`.

After each kill the same command is run again. The folder (all but `log.jsonl`) must then equal, bit for bit, that of
a sweep nobody killed, and results.jsonl must hold every run once.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

from prolu import ActivationStream, LanguageModel, RunConfig, load_blocks, run_sweep
from prolu.runtime.files import before_operation
from support import models
from support.interruptions import end_of, in_a_process
from support.sweeps import contents

AT_ONCE = 0.0
"""Seconds between checkpoints: one after every step."""


def runs() -> list[RunConfig]:
    """Return runs that differ in all that a state can hold.

    Six have a resampling step; four have a target L0, a threshold that is observed, or dead latents that an auxiliary
    term revives.
    """
    families = itertools.product(["relu", "prolu_relu", "prolu_ste"], ["l1", "sqrt_l1"])
    steps = ["dense", "sparse", "sparse_torch", "auto", "sparse", "auto"]
    lengths = [10240, 10240, 7680, 10240, 10240, 7680]
    resampled = [
        RunConfig(
            nonlinearity=n, penalty=p, coeff=0.05, d_sae=48, n_tokens=length, lr=0.02, step=step,
            resample_fractions=(0.5,), resample_count_fraction=0.4, resample_candidates=640, resample_dead_below=0.01,
        )
        for (n, p), step, length in zip(families, steps, lengths, strict=True)
    ]  # fmt: skip
    base = RunConfig(coeff=0.05, d_sae=48, n_tokens=10240, lr=0.02, target_l0=6.0, aux_dead_tokens=640)
    others = [("gated", "l1"), ("jumprelu(0.3)", "l0"), ("topk", "none"), ("batchtopk", "none")]
    return resampled + [replace(base, nonlinearity=n, penalty=p) for n, p in others]


def command(folder: Path, out: Path, checkpoint_seconds: float) -> None:
    """What a user would run, and run again."""
    torch.set_num_threads(1)
    lm = LanguageModel(folder / "lm", "blocks.1.hook_resid_pre")
    blocks = load_blocks(str(folder / "stories.txt"), lm.tokenizer, ctx=32)
    stream = ActivationStream(lm, blocks, batch_size=64, window_tokens=1024)
    run_sweep(runs(), stream, out, eval_tokens=320, checkpoint_seconds=checkpoint_seconds, progress=False)


def kill_at(operation: int, checkpoint: int) -> None:
    """From now on this process dies just before that operation of that checkpoint."""
    seen = {"checkpoints": 0, "operations": -1}

    def observe(name: str, path: Path) -> None:
        if name == "unlink" and path.name == ".partial":
            seen["checkpoints"] += 1
        if seen["checkpoints"] >= checkpoint:
            seen["operations"] += 1
        if seen["operations"] == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    before_operation.append(observe)


def n_operations(folder: Path, checkpoint: int) -> int:
    """Disk operations of one checkpoint, from its first to the next one's first."""
    counts = folder / "counts"

    def counted() -> None:
        started = []

        def observe(name: str, path: Path) -> None:
            started.append(name == "unlink" and path.name == ".partial")
            first = [i for i, is_first in enumerate(started) if is_first]
            if len(first) == checkpoint + 1:
                counts.write_text(str(first[-1] - first[-2]))

        before_operation.append(observe)
        command(folder, folder / "counted", AT_ONCE)

    assert end_of(in_a_process(counted)) == 0
    return int(counts.read_text())


def prepare(folder: Path) -> None:
    """A small language model and its text."""
    models.write_model(folder / "lm")
    models.write_stories(folder / "stories.txt")


def main() -> int:
    """All kills, a line each; returns 0 if every end was the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=40, help="kills at random moments")
    parser.add_argument("--checkpoint", type=int, default=14, help="which checkpoint is killed at every operation")
    parser.add_argument("--every", type=int, default=1, help="try only every so many operations")
    request = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prolu-crash-"))
    assert end_of(in_a_process(lambda: prepare(folder))) == 0
    assert end_of(in_a_process(lambda: command(folder, folder / "warm", 1e9))) == 0  # kernels are compiled
    started = time.monotonic()
    assert end_of(in_a_process(lambda: command(folder, folder / "whole", 1e9))) == 0
    seconds = time.monotonic() - started
    wanted = contents(folder / "whole")
    n_finished = len(wanted["results.jsonl"].splitlines())
    resampled = [json.loads(line)["resampled"] for line in wanted["results.jsonl"].splitlines()]
    reborn = [entry["n_reborn"] for entries in resampled for entry in entries]
    print(f"uninterrupted: {seconds:.1f} s, {n_finished} runs, latents resampled {reborn}")
    assert n_finished == len(runs())
    assert any(reborn)

    kills: list[tuple[str, Callable[[Path], int]]] = []
    for operation in range(0, n_operations(folder, request.checkpoint), request.every):

        def at_operation(out: Path, operation: int = operation) -> int:
            def work() -> None:
                kill_at(operation, request.checkpoint)
                command(folder, out, AT_ONCE)

            return end_of(in_a_process(work))

        kills.append((f"operation {operation}", at_operation))
    moments = random.Random(0)
    for _ in range(request.random):
        delay = moments.uniform(0.1 * seconds, 0.95 * seconds)

        def at_moment(out: Path, delay: float = delay) -> int:
            child = in_a_process(lambda: command(folder, out, 0.05))
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            return end_of(child)

        kills.append((f"after {delay:.2f} s", at_moment))

    identical = killed = 0
    for name, kill in kills:
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        code = kill(out)
        killed += code == -signal.SIGKILL
        there = sorted(p.name for p in (out / "checkpoints").glob("*")) if out.exists() else []
        again = end_of(in_a_process(lambda out=out: command(folder, out, 1e9)))
        found = contents(out)
        same = again == 0 and found == wanted
        identical += same
        different = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        print(
            f"{name}: code {code}, left {there}, {'identical' if same else f'DIFFERENT {again} {different}'}",
            flush=True,
        )
    shutil.rmtree(folder)
    print(f"{killed} died of the kill, the others had ended before it")
    print(f"kills {len(kills)}, identical {identical}/{len(kills)}")
    return int(identical != len(kills))


if __name__ == "__main__":
    sys.exit(main())
