"""Time the activation stream against what limits it: the bare language model, the training step, and the disk.

    python benchmarks/stream.py --json benchmarks/stream.json

The language model is randomly initialised, of GPT-2 small's shape, and read at `blocks.6.hook_resid_pre`. Alternatives
take turns in one process, and figures are medians over rounds. The last line is a summary.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from prolu import ActivationStore, ActivationStream, LanguageModel, RunConfig, TokenBlocks, Trainer, harvest

HOOK = "blocks.6.hook_resid_pre"
CTX = 128
VOCABULARY = 50_257


def write_gpt2(folder: Path, n_ids: int = VOCABULARY, **shape: int) -> None:
    """Write a model with random weights and a tokenizer with as many ids, of GPT-2 small's shape unless told else."""
    torch.manual_seed(0)
    # n_ctx is in the config of the hub's GPT-2 too, and TransformerLens reads it.
    config = GPT2Config(bos_token_id=0, eos_token_id=0, n_ctx=1024, vocab_size=n_ids, **shape)
    GPT2LMHeadModel(config).save_pretrained(folder)
    ids = {f"t{i}": i for i in range(n_ids)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="t1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t0", eos_token="t0").save_pretrained(folder)


def random_blocks(n_tokens: int, n_ids: int = VOCABULARY) -> TokenBlocks:
    """Return token blocks of random ids."""
    ids = np.random.default_rng(0).integers(1, n_ids, (n_tokens // CTX, CTX)).astype(np.uint16)
    ids[:, 0] = 0
    return TokenBlocks(train=ids, held_out=ids[:8], source="random", max_train_tokens=n_tokens, n_documents=1)


def in_turns(rounds: int, **alternatives: Callable[[], object]) -> dict[str, float]:
    """Return the median seconds of each alternative. All are called once per round, and the first round is left out."""
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for i in range(rounds + 1):
        for name, work in alternatives.items():
            start = time.perf_counter()
            work()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(some) for name, some in times.items()}


def harvesting(lm: LanguageModel, folder: Path, rounds: int) -> dict[str, float]:
    """Compare a harvest (with its checks, rounding, checksums and fsync) with the bare model's first six blocks."""
    blocks = random_blocks(lm.batch_tokens)
    ids = torch.from_numpy(blocks.train.astype(np.int64))
    body = GPT2LMHeadModel.from_pretrained(lm.name).transformer.eval()
    body.h = body.h[:6]
    body.ln_f = torch.nn.Identity()
    numbers = iter(range(10**6))

    @torch.inference_mode()
    def bare() -> None:
        body(input_ids=ids, use_cache=False)

    seconds = in_turns(
        rounds,
        bare=bare,
        harvest=lambda: harvest(lm, blocks, folder / f"harvest-{next(numbers)}", dtype="fp16", progress=False),
    )
    n = blocks.train.size
    return {
        "bare_tokens_per_second": n / seconds["bare"],
        "harvest_tokens_per_second": n / seconds["harvest"],
        "harvest_over_bare": seconds["bare"] / seconds["harvest"],
    }


class Noise:
    """A language model without its computation, so that a large store is written at the speed of the disk."""

    def __init__(self, lm: LanguageModel):
        self._lm = lm

    def __getattr__(self, name: str) -> object:
        return getattr(self._lm, name)

    def at(self, hook: str) -> "Noise":
        """Return the same: all hooks give the same numbers."""
        return self

    def activations_at(self, hooks: list[str], tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return numbers that depend on the tokens and cost nothing to compute."""
        noise = torch.linspace(-1, 1, self._lm.d_in)
        return [tokens[..., None] % 97 * noise + noise]


def feeding(lm: LanguageModel, store: ActivationStore, rounds: int) -> dict[str, float]:
    """Compare the time to get a batch of 4,096 from a store, its part of reading the window included, with a step."""
    stream = ActivationStream(lm, store.blocks(), 4096, source=store)
    per_window = stream.window_tokens // 4096
    run = RunConfig(d_sae=16 * lm.d_in, n_tokens=10**9, nonlinearity="relu", coeff=0.0, lr=1e-8)
    trainer = Trainer(run, lm.d_in, 4096)
    x = torch.randn(4096, lm.d_in)
    x *= lm.d_in**0.5 / x.norm(dim=1, keepdim=True)
    pre = x[:256] @ trainer.state.weights.encoder.T
    # The bias at which the L0 is 59.
    trainer.state.weights.own["b_enc"].fill_(-float(pre.flatten().kthvalue(pre.numel() - 59 * 256).values))
    windows = iter(range(10**6))

    def window() -> None:
        first = next(windows) * per_window
        for i in range(first, first + per_window):
            stream[i]

    def step() -> None:
        trainer.state = trainer.state._replace(step="sparse")
        trainer.step(x)

    seconds = in_turns(rounds, window=window, step=step)
    return {
        "seconds_per_step": seconds["step"],
        "seconds_per_batch": seconds["window"] / per_window,
        "feed_over_step": seconds["window"] / per_window / seconds["step"],
    }


def waiting(
    trainer: Trainer, streams: dict[str, ActivationStream], n_windows: int, rounds: int, wait: Callable[[], object]
) -> dict[str, float]:
    """Return which fraction of the time of training each stream's data is waited for, and the time of a step alone.

    That is 1 - (time of steps on one batch that is there) / (time of as many steps on the stream's batches). Streams
    are timed from a window's first batch to that of the window `n_windows` later, so that each fills as many windows
    within its time as it trains on.

    Args:
        trainer: makes the steps.
        streams: the streams to compare.
        n_windows: the number of windows in each round.
        rounds: the number of rounds, in each of which all take turns.
        wait: waits until the device has done what it was asked for.
    """
    per_window = next(iter(streams.values())).window_tokens // trainer.batch_size
    n_steps = n_windows * per_window
    seconds: dict[str, list[float]] = {name: [] for name in ("steps alone", *streams)}
    for i in range(rounds + 1):
        first = i * n_steps
        for name, found in seconds.items():
            stream = streams.get(name)
            resident = next(iter(streams.values()))[first].acts if stream is None else stream[first].acts
            wait()
            start = time.perf_counter()
            for step in range(first, first + n_steps):
                trainer.step(resident if stream is None else stream[step].acts)
            if stream is not None:
                stream[first + n_steps]
            wait()
            if i:
                found.append(time.perf_counter() - start)
            for one in streams.values():
                one.close()  # so that it reads nothing in the others' time
    alone = statistics.median(seconds.pop("steps alone"))
    return {"seconds_per_step": alone / n_steps} | {
        f"waiting_{name}": 1 - alone / statistics.median(some) for name, some in seconds.items()
    }


def read_ahead(lm: LanguageModel, store: ActivationStore, rounds: int) -> dict[str, float]:
    """Compare small steps on batches from a store, whose windows are read between steps or ahead of them."""
    run = RunConfig(d_sae=2 * lm.d_in, n_tokens=10**9, nonlinearity="topk(32)", lr=1e-8)
    streams = {
        f"read_ahead_{way}": ActivationStream(
            lm, store.blocks(), 4096, window_tokens=65_536, source=ActivationStore(store.folder), read_ahead=way
        )
        for way in ("off", "on")
    }
    return waiting(Trainer(run, lm.d_in, 4096), streams, 3, rounds, lambda: None)


def reading(store: ActivationStore, rounds: int) -> dict[str, float]:
    """Compare reading windows (random blocks) with reading the files from end to end, in bytes per second.

    Both are measured from a cold cache and from a warm one.
    """
    hook = store.hooks[0]
    files = sorted((store.folder / hook).iterdir())
    n_blocks = store.made["n_blocks"]
    per_window = 2048
    g = np.random.default_rng(0)
    buffer = bytearray(2**24)

    def drop_cache() -> None:
        for file in files:
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def sequential() -> float:
        start = time.perf_counter()
        n = 0
        for file in files:
            with file.open("rb", buffering=0) as handle:
                while got := handle.readinto(buffer):
                    n += got
        return n / (time.perf_counter() - start)

    def window(*, announced: bool) -> float:
        chosen = g.permutation(n_blocks)[:per_window]
        fresh = ActivationStore(store.folder)  # no page of it is mapped yet
        start = time.perf_counter()
        n = 0
        if announced:
            fresh.expect(hook, chosen)
        for piece in fresh.at(hook, chosen):
            n += piece.nbytes
        return n / (time.perf_counter() - start)

    rates: dict[str, list[float]] = {}
    plain = partial(window, announced=False)
    ways = {"sequential": sequential, "window": partial(window, announced=True), "window_unannounced": plain}
    for _ in range(rounds):
        for name, read in ways.items():
            drop_cache()
            rates.setdefault(name, []).append(read())
        for name, read in (("sequential_cached", sequential), ("window_cached", plain)):
            sequential()  # fills the cache
            rates.setdefault(name, []).append(read())
    found = {f"{name}_bytes_per_second": statistics.median(some) for name, some in rates.items()}
    cold, cached = (
        found[f"window{kind}_bytes_per_second"] / found[f"sequential{kind}_bytes_per_second"]
        for kind in ("", "_cached")
    )
    return found | {"window_over_sequential": cold, "window_over_sequential_cached": cached}


def anonymous_bytes() -> int:
    """Return the memory of this process that no file stands behind, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def memory(lm: LanguageModel, store: ActivationStore) -> dict[str, float]:
    """Return the anonymous memory after one window, and by how much it has grown after twenty more."""
    stream = ActivationStream(lm, store.blocks(), 4096, window_tokens=32_768, source=store)
    sizes: list[int] = []
    for window in range(21):
        for batch in range(8):
            stream[window * 8 + batch]
        sizes.append(anonymous_bytes())
    return {"anonymous_bytes": sizes[0], "growth_over_20_windows": max(sizes) / sizes[0] - 1}


def resuming(lm: LanguageModel, folder: Path, kills: int) -> dict[str, int]:
    """Kill harvests at random moments, run each again, and count those that end as one that was left alone."""
    from prolu.activations.blocks_folder import copy_blocks

    copy_blocks(random_blocks(40 * 1024), folder / "tokens")
    command = [sys.executable, "-m", "prolu", "harvest", "--lm", lm.name, "--hook", "blocks.1.hook_resid_pre"]
    command += ["--data", str(folder / "tokens"), "--dtype", "fp16", "--out"]

    def contents(name: str) -> Iterator[tuple[str, bytes]]:
        for file in sorted((folder / name).rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                yield str(file.relative_to(folder / name)), file.read_bytes()

    start = time.monotonic()
    subprocess.run([*command, str(folder / "whole")], check=True, capture_output=True)
    took = time.monotonic() - start
    g = np.random.default_rng(0)
    identical = 0
    for i in range(kills):
        process = subprocess.Popen([*command, str(folder / f"killed-{i}")], stderr=subprocess.DEVNULL)
        time.sleep(g.uniform(0.5, 1) * took)
        process.kill()
        process.wait()
        subprocess.run([*command, str(folder / f"killed-{i}")], check=True, capture_output=True)
        identical += list(contents("whole")) == list(contents(f"killed-{i}"))
    return {"kills": kills, "identical": identical}


def main() -> None:
    """Measure everything, and print a table and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store-tokens", type=int, default=2**20, help="1.6 GB of disk for a million")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        write_gpt2(folder / "gpt2")
        lm = LanguageModel(folder / "gpt2", HOOK)
        found: dict[str, dict[str, float]] = {"harvest": harvesting(lm, folder, options.rounds)}
        store = harvest(Noise(lm), random_blocks(options.store_tokens), folder / "store", progress=False)
        found["memory"] = memory(lm, store)
        found["feed"] = feeding(lm, store, options.rounds)
        found["read_ahead"] = read_ahead(lm, store, options.rounds)
        found["read"] = reading(store, options.rounds)
        found["resume"] = resuming(lm, folder, options.kills)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    table = Table("", "", "")
    for group, figures in found.items():
        for figure, value in figures.items():
            table.add_row(group, figure, f"{value:,.4g}")
    Console().print(table)
    print(
        f"stream: harvest {found['harvest']['harvest_over_bare']:.2f} of the bare model (at least 0.90 wanted), "
        f"feed {found['feed']['feed_over_step']:.1%} of a step (at most 5% wanted), "
        f"windows {found['read']['window_over_sequential']:.2f} of sequential (at least 0.80 wanted), "
        f"{found['read']['window_over_sequential_cached']:.2f} cached, "
        f"memory {found['memory']['growth_over_20_windows']:+.1%} (at most 5% wanted), "
        f"resume {found['resume']['identical']}/{found['resume']['kills']} identical"
    )


if __name__ == "__main__":
    main()
