"""Where activations come from, as requests say it, and the streams that these come to."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from prolu.activations.harvesting import Harvest
from prolu.activations.language_model import DTYPES, LanguageModel
from prolu.activations.packing import load_blocks
from prolu.activations.store import ActivationStore
from prolu.activations.stream import ActivationStream
from prolu.runtime.mesh import ALONE, Mesh


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which activations."""

    lm: str = "builtin"
    """Language model: a Hugging Face folder or hub name; `builtin` ships with the package."""
    lm_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the language model's arithmetic."""
    hook: tuple[str, ...] = ("blocks.2.hook_resid_pre",)
    """blocks.L.hook_resid_pre, _resid_post, _attn_out or _mlp_out; or a module's path and .input or .output. Several
    are trained at side by side, from one pass of the language model; each is a study of its own in OUT/HOOK."""
    data: str = "builtin"
    """Text: a .txt, .jsonl, .parquet or .arrow file, a folder of them, a hub dataset, or `builtin`
    (the Python standard library's own source)."""
    text_column: str = "text"
    """Column that holds the text, or token ids already made, where there are columns; the paper's: input_ids."""
    split: str = "train"
    """Rows to train on: a split, or a slice of one, as in 'train[0:40%]', which is the paper's."""
    eval_split: str = ""
    """Rows to score on, as in 'train[90:95%]', the paper's; empty: a tenth of the documents of the split."""
    ctx: int = 128
    """Tokens per block."""
    tokens: Path | None = None
    """Folder for the text as token blocks: written there, gone on with, or read, so that it is tokenised once.
    As --data, such a folder is taken as it is."""
    store: Path | None = None
    """Activations that `prolu harvest` wrote. Its model, text, ctx and number format then stand in place of --lm,
    --data, --ctx and the like; --hook is among its hooks, and need not be said if it has one only."""
    acts_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format that activations are rounded to before they are normalised, as a store of them would."""
    train_on_bos: bool = True
    """Whether the first position of every block is trained on. Scored are always both."""
    stream_seed: int = 0
    """Seed of the order of activations."""
    window_tokens: int = 262_144
    """Tokens that are shuffled together; their activations are held in memory."""
    eval_tokens: int = 32_768
    """Held-out tokens to score on."""
    checkpoint_minutes: float | None = None
    """Between two checkpoints; by default one or more, so that writing them takes less than 3% of the time."""
    keep_state: bool = False
    """Keep Adam's moments of finished runs (twice the size of their weights), so that they can be extended."""
    tracker: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Also write training curves there, one or both; pip install 'prolu[wandb]', 'prolu[tensorboard]'."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """CPU threads, of all processes on this machine; part of what decides the last bits."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the language model runs and SAEs are trained."""
    mesh: str = ""
    """data=D,latent=L: one SAE on the D x L processes that torchrun started; latents split L ways, batches D ways."""


@dataclass(frozen=True, kw_only=True)
class HarvestSource:
    """Which activations to keep."""

    lm: str = "builtin"
    """Language model: a Hugging Face folder or hub name; `builtin` ships with the package."""
    lm_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the language model's arithmetic."""
    hook: tuple[str, ...] = ("blocks.2.hook_resid_pre",)
    """One or several, read in one pass: blocks.L.hook_resid_pre, _resid_post, _attn_out or _mlp_out; or a module's
    path and .input or .output."""
    data: str = "builtin"
    """Text, as `prolu train` takes it, or a folder of token blocks."""
    text_column: str = "text"
    """Column that holds the text, or token ids already made."""
    split: str = "train"
    """Rows to train on: a split, or a slice of one, as in 'train[0:40%]'."""
    eval_split: str = ""
    """Rows to score on; empty: a tenth of the documents of the split."""
    ctx: int = 128
    """Tokens per block."""
    n_tokens: int = 10_000_000
    """Tokens to harvest, if the text has so many."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Number format on the disk."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """CPU threads."""


def streams_of(source: Source, n_tokens: int, batch_size: int, mesh: Mesh = ALONE) -> list[ActivationStream]:
    """The activations that a source describes, hook by hook, from one place."""
    device = _device(source.device)
    order = {
        "window_tokens": source.window_tokens, "train_on_bos": source.train_on_bos, "device": device, "mesh": mesh,
    }  # fmt: skip
    if source.store is not None:
        shared = ActivationStore(source.store)
        hooks = shared.hooks if len(shared.hooks) == 1 else source.hook
        made = shared.made
        if made["lm_dtype"] not in DTYPES:
            raise ValueError(
                f"store {str(source.store)!r}: made by a model in {made['lm_dtype']}; train from it in Python"
            )
        lm_dtype, batch_tokens = DTYPES[made["lm_dtype"]], made["lm_batch_tokens"]
        lm = LanguageModel(made["lm"], hooks[0], dtype=lm_dtype, batch_tokens=batch_tokens, device=device)
        blocks = shared.blocks()
    else:
        hooks = source.hook
        lm = LanguageModel(source.lm, first_hook(hooks), dtype=DTYPES[source.lm_dtype], device=device)
        blocks = load_blocks(
            source.data, lm.tokenizer, source.ctx, max_train_tokens=n_tokens, text_column=source.text_column,
            split=source.split, eval_split=source.eval_split, folder=source.tokens, progress=True,
        )  # fmt: skip
        shared = Harvest(lm, blocks, hooks, source.acts_dtype)
    return [
        ActivationStream(lm.at(hook), blocks, batch_size, source.stream_seed, source=shared, **order) for hook in hooks
    ]


def at_least_1(name: str, value: int) -> int:
    """The value; ValueError if it is less."""
    if value < 1:
        raise ValueError(f"{name} {value}: must be at least 1")
    return value


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': PyTorch sees none here; choose cpu")
    return name


def first_hook(hooks: Sequence[str]) -> str:
    """The first; ValueError if there is none."""
    if not hooks:
        raise ValueError("hook: name at least one")
    return hooks[0]
