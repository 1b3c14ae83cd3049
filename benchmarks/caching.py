"""Compare the speed of `prolu.harvest` with that of SAELens's caching runner, which both write activations to the disk.

    python benchmarks/caching.py --json benchmarks/caching.json

Both read a randomly initialised model of GPT-2 small's shape at `blocks.6.hook_resid_pre`, on the same tokens, 64
prompts per pass, in float32, and each is called through its own public entry point, so the writing of files counts.
They take turns in one process, in an environment that is made for them (`peers.py`). SAELens gets a dataset of tokens
and is not asked to shuffle. At the end the activations that both have written are compared.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch

import peers
from stream import CTX, HOOK, in_turns, random_blocks, write_gpt2

PROMPTS = 64
"""The number of prompts in one pass of the language model."""


def measure(tokens: int, rounds: int) -> dict[str, float]:
    """Return the tokens per second of both, and the largest difference of what they have written."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    from prolu import LanguageModel, harvest

    # SAELens's TransformerLens accepts only names that it knows. It finds this folder before it asks the hub.
    write_gpt2(Path("gpt2"))
    lm = LanguageModel("gpt2", HOOK, batch_tokens=PROMPTS * CTX)
    blocks = random_blocks(tokens)
    dataset = Dataset.from_dict({"tokens": blocks.train.astype("int64")}).with_format("torch")
    settings = {
        "dataset_path": "tokens", "model_name": "gpt2", "model_batch_size": PROMPTS, "hook_name": HOOK, "d_in": lm.d_in,
        "training_tokens": tokens, "context_size": CTX, "shuffle": False, "dtype": "float32", "device": "cpu",
        "buffer_size_gb": (tokens + 1) * lm.d_in * 4 / 1e9, "new_cached_activations_path": "theirs",
    }  # fmt: skip
    runner = CacheActivationsRunner(CacheActivationsRunnerConfig(**settings), override_dataset=dataset)

    def ours() -> None:
        shutil.rmtree("ours", ignore_errors=True)
        harvest(lm, blocks, "ours", dtype="fp32", progress=False)

    def theirs() -> None:
        shutil.rmtree("theirs", ignore_errors=True)
        # The runner's iterator is used up by the round before.
        runner.activations_store.iterable_sequences = runner.activations_store._iterate_tokenized_sequences()
        runner.run()

    seconds = in_turns(rounds, ours=ours, theirs=theirs)
    return {
        "ours_tokens_per_second": tokens / seconds["ours"],
        "saelens_tokens_per_second": tokens / seconds["theirs"],
        "ours_over_saelens": seconds["theirs"] / seconds["ours"],
        "largest_difference": difference(tokens),
    }


def difference(tokens: int) -> float:
    """Return how far apart the written activations are, relative to their norm.

    Raises:
        AssertionError: They are not the same activations.
    """
    from datasets import Dataset
    from safetensors.torch import load_file

    files = sorted(Path("ours", HOOK).iterdir())
    ours = torch.cat([load_file(file)["acts"] for file in files])
    theirs = Dataset.load_from_disk("theirs").with_format("torch")[HOOK][:].view_as(ours)
    theirs = theirs - theirs.mean(-1, keepdim=True)  # our harvest of a LayerNorm model is centred
    apart = ((ours - theirs).norm() / ours.norm()).item()
    assert ours.shape[0] * ours.shape[1] == tokens
    assert apart < 1e-5, f"the activations that the two libraries wrote differ by {apart}"
    return apart


def main() -> None:
    """Run again in the peers' environment, measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4 * PROMPTS * CTX)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if Path(sys.prefix).resolve() != peers.ENVIRONMENT.resolve():
        python = peers.environment()
        os.execv(python, [str(python), *sys.argv])
    torch.set_num_threads(options.threads)
    target = options.json and options.json.absolute()
    # A name without random letters: SAELens takes a model for a T5 if its path contains `t5`.
    folder = Path(f"caching-{os.getpid()}").absolute()
    folder.mkdir()
    os.chdir(folder)
    try:
        found = measure(options.tokens, options.rounds)
    finally:
        os.chdir(folder.parent)
        shutil.rmtree(folder)
    if target:
        target.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"caching: {found['ours_tokens_per_second']:,.0f} tokens/s, SAELens {found['saelens_tokens_per_second']:,.0f}: "
        f"{found['ours_over_saelens']:.2f} times as fast; the same activations to {found['largest_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
