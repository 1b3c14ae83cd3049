"""What SAEBench's absorption evaluation says of SAEs on given activations; run by another environment's Python.

    cd WORK && python saebench_absorption_reference.py SAE...

WORK holds `words.json`, the words, and `acts.safetensors`, the language model's activation at each. They stand in for
the language model: whatever examples of spelling SAEBench writes before a word, its activation is the one given.
`answers.json` and `probes.safetensors` are written, with what each step of SAEBench's code found.
"""

import json
import random
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.absorption.feature_absorption import run_feature_absortion_experiment
from sae_bench.evals.absorption.k_sparse_probing import run_k_sparse_probing_experiment
from sae_bench.evals.absorption.main import _aggregate_results_df
from safetensors.torch import load_file, save_file

from prolu import SAE
from prolu.interop.saebench import SAEBenchConfig, SAEBenchSAE

MODEL = "table"
LAYER = 0
CONFIG = AbsorptionEvalConfig()
"""SAEBench's own settings."""


class Words:
    """In place of a tokenizer: every word is one token."""

    def __init__(self, words: list[str]):
        """Take the words, each of letters only but for a space before it."""
        self.vocab = {word: i for i, word in enumerate(words)}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the tokens in one text."""
        return "".join(tokens)


class Table:
    """In place of a HookedTransformer: the activation at the last word of a prompt is looked up."""

    def __init__(self, words: list[str], acts: torch.Tensor):
        """Take the words and the activation at each, [n_words, d_in]."""
        self.cfg = SimpleNamespace(model_name=MODEL, d_model=acts.shape[1])
        self.tokenizer = Words(words)
        self.acts = acts

    def to_tokens(self, prompt: str) -> torch.Tensor:
        """Return a prompt's tokens, of which SAEBench asks only that there are as many in each."""
        return torch.zeros(1, 1)

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict[str, torch.Tensor]]:
        """Return the activation at the last word of each prompt, at all of the positions that are read."""
        ending = CONFIG.prompt_template.removeprefix("{word}")
        words = [prompt.rpartition("\n")[2].removesuffix(ending) for prompt in prompts]
        acts = self.acts[[self.tokenizer.vocab[word] for word in words]]
        return None, {names_filter[0]: acts[:, None].expand(-1, -CONFIG.prompt_token_pos, -1)}


def saebench_sae(folder: str, *, raw_latents: bool) -> SAEBenchSAE:
    """Return one of our SAEs as SAEBench takes it."""
    sae = SAE.load(folder)
    cfg = SAEBenchConfig(
        model_name=MODEL, d_in=sae.config.d_in, d_sae=sae.config.d_sae, hook_layer=LAYER,
        hook_name=f"blocks.{LAYER}.hook_resid_post", context_size=2, architecture=sae.config.nonlinearity,
        dtype="float32", device="cpu", dataset_path="words", training_tokens=0,
    )  # fmt: skip
    return SAEBenchSAE(sae, cfg, raw_latents=raw_latents)


def evaluated(sae: Any, name: str, model: Any) -> dict[str, Any]:
    """Return what SAEBench finds for one SAE, as its `run_eval` finds it, and what it found on the way."""
    settings: dict[str, Any] = {
        "model": model, "sae": sae, "layer": LAYER, "sae_name": name, "max_k_value": CONFIG.max_k_value,
        "prompt_template": CONFIG.prompt_template, "prompt_token_pos": CONFIG.prompt_token_pos, "device": "cpu",
        "probes_dir": Path("probes"),
    }  # fmt: skip
    probing = run_k_sparse_probing_experiment(
        **settings,
        experiment_dir=Path("k_sparse"),
        f1_jump_threshold=CONFIG.f1_jump_threshold,
        k_sparse_probe_l1_decay=CONFIG.k_sparse_probe_l1_decay,
        k_sparse_probe_batch_size=CONFIG.k_sparse_probe_batch_size,
        k_sparse_probe_num_epochs=CONFIG.k_sparse_probe_num_epochs,
        eval_batch_size=CONFIG.eval_k_sparse_probe_batch_size,
        precalc_k_sparse_probe_sae_acts=True,
    )
    words = run_feature_absortion_experiment(
        **settings,
        experiment_dir=Path("absorption"),
        sparse_probing_experiment_dir=Path("k_sparse"),
        feature_split_f1_jump_threshold=CONFIG.f1_jump_threshold,
        batch_size=CONFIG.llm_batch_size,
    )
    letters = _aggregate_results_df(words).set_index("letter")
    return {
        row["letter"]: {
            "probe_f1": row["f1_probe"],
            "ranked": row[f"sparse_sae_k_{CONFIG.max_k_value}_feats"].tolist(),
            "f1": [row[f"f1_sparse_sae_{k}"] for k in range(1, CONFIG.max_k_value + 1)],
            "own": list(row["split_feats"]),
            "fraction": float(letters.loc[row["letter"], "mean_absorption_fraction"]),
            "full": float(letters.loc[row["letter"], "full_absorption_rate"]),
            "words": of_words(words[words["letter"] == row["letter"]]),
        }
        for _, row in probing.iterrows()
        if row["f1_probe"] > CONFIG.min_GT_probe_f1
    }


def of_words(words: pd.DataFrame) -> dict[str, tuple[float, bool]]:
    """Return the absorption fraction of each word, and whether it is fully absorbed."""
    figures = zip(words["token"], words["absorption_fraction"], words["is_full_absorption"], strict=True)
    return {word: (float(fraction), bool(full)) for word, fraction, full in figures}


def main(folders: list[str]) -> None:
    """Evaluate each SAE twice: with latents in the size of the activations, and with those of the scaled ones."""
    random.seed(CONFIG.random_seed)
    torch.manual_seed(CONFIG.random_seed)
    model = Table(json.loads(Path("words.json").read_text()), load_file("acts.safetensors")["acts"])
    found: dict[str, Any] = {}
    for folder in folders:
        for raw in (True, False):
            name = Path(folder).name + ("" if raw else "-scaled")
            found[name] = evaluated(saebench_sae(folder, raw_latents=raw), name, model)
    probe = torch.load(Path("probes") / MODEL / f"layer_{LAYER}" / "probe.pth", weights_only=False)
    save_file({"weights": probe.weights.data, "biases": probe.biases.data}, "probes.safetensors")
    test = pd.read_csv(Path("probes") / MODEL / f"layer_{LAYER}" / "test_df.csv", keep_default_na=False)
    versions = {name: version(name) for name in ("sae-bench", "sae-lens", "scikit-learn", "torch")}
    answers = {"versions": versions, "test_words": test["token"].tolist(), "saes": found}
    Path("answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1:])
