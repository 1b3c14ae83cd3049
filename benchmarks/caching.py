"""Activations to the disk: our harvest beside SAELens's caching runner. JSON and a sentence.

python benchmarks/caching.py --json benchmarks/caching.json

A randomly initialised model of GPT-2 small's shape, at `blocks.6.hook_resid_pre`, the same tokens, 64 prompts a pass,
float32, each through its own public entry, files included. Both in one process, in an environment made here (see
`peers.py`), taking turns. SAELens gets a pre-tokenised dataset, and is not asked to shuffle. The activations that both
wrote are compared.
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
"""In one pass of the language model."""


def measure(tokens: int, rounds: int) -> dict[str, float]:
    """Tokens per second of either, and how far apart what they wrote is."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    from prolu import LanguageModel, harvest

    write_gpt2(Path("gpt2"))  # the name that TransformerLens knows, found where this runs
    lm, blocks = LanguageModel("gpt2", HOOK, batch_tokens=PROMPTS * CTX), random_blocks(tokens)
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
    """Of what both wrote, relative to its norm; SAELens does not remove the mean, so that is done here.

    Raises:
        AssertionError: they did not write the same activations.
    """
    from datasets import Dataset
    from safetensors.torch import load_file

    files = sorted(Path("ours", HOOK).iterdir())
    ours = torch.cat([load_file(file)["acts"] for file in files])
    theirs = Dataset.load_from_disk("theirs").with_format("torch")[HOOK][:].view_as(ours)
    theirs = theirs - theirs.mean(-1, keepdim=True)
    apart = ((ours - theirs).norm() / ours.norm()).item()
    assert ours.shape[0] * ours.shape[1] == tokens
    assert apart < 1e-5, f"they differ by {apart}"
    return apart


def main() -> None:
    """Goes into the peers' environment, measures, writes."""
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
    folder = Path(f"caching-{os.getpid()}").absolute()  # no random letters: a path with `t5` in it is a T5 to SAELens
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
