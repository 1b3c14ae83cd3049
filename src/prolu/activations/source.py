"""The options that describe a source of activations, and how a described source is opened."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from prolu.activations.harvesting import Harvest
from prolu.activations.language_model import BATCH_TOKENS, DTYPES, LanguageModel
from prolu.activations.packing import load_blocks
from prolu.activations.store import ActivationStore
from prolu.activations.stream import ActivationStream
from prolu.activations.token_blocks import LATER_FACTS, TokenBlocks
from prolu.runtime.mesh import ALONE, Mesh


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The language model whose activations are read."""

    lm: str = "builtin"
    """The language model: a folder in the Hugging Face layout, a name on the hub, or `builtin`, the small model that
    ships with the package."""
    revision: str = ""
    """The branch, tag or commit of a language model on the hub, such as Pythia's step3000. Empty: its main branch."""
    lm_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The number format of the language model's arithmetic."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The text that the language model reads."""

    data: str = "builtin"
    """The text: a .txt, .jsonl, .parquet or .arrow file, a folder of such files, a dataset on the Hugging Face hub, a
    folder of token blocks, or `builtin` (the source code of Python's standard library)."""
    text_column: str = "text"
    """The column that holds the text or, for data that is already tokenised, the token ids, as `input_ids` often
    does."""
    data_config: str = ""
    """The configuration of a dataset that has several, such as 'en'; its card lists them."""
    split: str = "train"
    """The rows to train on: a split, or a slice of one in rows or percent, such as 'train[:1000]' or 'train[0%:40%]'.
    All rows of a plain file are its split 'train'."""
    eval_split: str = ""
    """The rows to score on, such as 'validation' or 'train[90%:95%]'. If empty, a tenth of the documents of the
    training split is held out."""
    special_tokens: Literal["text", "parsed"] = "text"
    """What becomes of the name of a special token, such as <|endoftext|>, inside a text: it is text like all else, or
    is parsed into that token."""
    ctx: int = 128
    """The number of tokens per block."""


@dataclass(frozen=True, kw_only=True)
class Source(TextOptions, ModelOptions):
    """The activations to train on."""

    hook: tuple[str, ...] = ("blocks.2.hook_resid_pre",)
    """The hooks to train at: blocks.L.hook_SITE, where L counts from 0 and SITE is resid_pre, resid_post, attn_out or
    mlp_out; or the path of a module followed by .input or .output, as in model.layers.3.mlp.output. Several hooks share
    one pass of the language model; each gives a study of its own in OUT/HOOK."""
    tokens: Path | None = None
    """A folder that keeps the text as token blocks, so that it is tokenised only once: it is written, resumed or read
    as needed. Such a folder can also be given as --data."""
    store: Path | None = None
    """A store of activations written by `prolu harvest`, to train on. Its language model and text are used, and the
    options about them (--lm, --lm-dtype, --data, --text-column, --split, --eval-split, --ctx, --acts-dtype) are
    ignored. --hook must name hooks of the store and may be left out if the store has only one."""
    acts_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The number format to which activations are rounded before they are normalised, as if they came from a store."""
    train_on_bos: bool = True
    """Whether to train on the first position of every token block, which holds BOS unless the text was tokenised
    without it. SAEs are always scored both with and without it."""
    stream_seed: int = 0
    """The seed of the order of activations."""
    window_tokens: int = 262_144
    """The number of tokens that are shuffled together; their activations are held in memory."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """The number of CPU threads of all processes on this machine together. Another number may change the last bits of
    results."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The device on which the language model runs and SAEs are trained."""
    mesh: str = ""
    """Train each SAE on several processes started by torchrun: data=D,latent=L divides every batch among D groups of
    processes, and the latents among the L processes of each group."""


@dataclass(frozen=True, kw_only=True)
class HarvestSource(TextOptions, ModelOptions):
    """The activations to write to a store."""

    hook: tuple[str, ...] = ("blocks.2.hook_resid_pre",)
    """The hooks to read, all in one pass of the language model: blocks.L.hook_SITE, where L counts from 0 and SITE is
    resid_pre, resid_post, attn_out or mlp_out; or the path of a module followed by .input or .output, as in
    model.layers.3.mlp.output."""
    n_tokens: int = 10_000_000
    """The number of tokens to harvest; fewer if the text has fewer."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp16"
    """The number format of the stored activations."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """The number of CPU threads."""


def describe_options(options: Source | HarvestSource, n_tokens: int) -> dict[str, Any]:
    """Return the language model and text of some options in the words of a study's `stream`, for `open_source`.

    Args:
        options: what the command line asks for.
        n_tokens: the number of training tokens to read.
    """
    return {
        "lm": options.lm,
        "lm_revision": options.revision,
        "lm_dtype": options.lm_dtype,
        "hook": first_hook(options.hook),
        "data": options.data,
        "text_column": options.text_column,
        "data_config": options.data_config,
        "split": options.split,
        "eval_split": options.eval_split,
        "special_tokens": options.special_tokens,
        "max_train_tokens": n_tokens,
        "ctx": options.ctx,
    }


def open_source(
    description: Mapping[str, Any],
    *,
    described_by: str = "its description",
    device: str | torch.device = "cpu",
    folder: Path | None = None,
    held_out_only: bool = False,
) -> tuple[LanguageModel, TokenBlocks]:
    """Open the language model and the text that a description names.

    Args:
        description: the `stream` part of a study's config.json; see `open_language_model` and `open_text`.
        described_by: where the description was found, for error messages, such as "the study runs/a".
        device: where the language model runs.
        folder: where to keep the token blocks; by default they are held in memory.
        held_out_only: whether only the held-out blocks will be used.

    Raises:
        ValueError: the model or the text cannot be read, or is not the one described.
        KeyError: the description lacks a field.
    """
    lm = open_language_model(description, described_by=described_by, device=device)
    blocks = open_text(description, lm, described_by=described_by, folder=folder, held_out_only=held_out_only)
    return lm, blocks


def open_language_model(
    description: Mapping[str, Any], *, described_by: str = "its description", device: str | torch.device = "cpu"
) -> LanguageModel:
    """Open the language model of a description at its hook.

    The fields `lm`, `hook` and `lm_dtype` are needed; `lm_revision`, `lm_batch_tokens`, `centred` and `lm_digest` are
    respected where they are given.

    Raises:
        ValueError: the model cannot be read, or its weights are not those described.
        KeyError: the description lacks a field.
    """
    name = description["lm_dtype"]
    if name not in DTYPES:
        raise ValueError(f"lm_dtype {name!r}: choose one of {', '.join(DTYPES)}, or open the model in Python")
    lm = LanguageModel(
        description["lm"],
        description["hook"],
        device=device,
        dtype=DTYPES[name],
        batch_tokens=description.get("lm_batch_tokens", BATCH_TOKENS),
        revision=description.get("lm_revision", ""),
    )
    # The model itself knows whether its activations are centred by default; a description can only turn that off.
    if description.get("centred") is False:
        lm = lm.uncentred()
    digest = description.get("lm_digest")
    if digest is not None and lm.digest() != digest:
        raise ValueError(f"lm {description['lm']!r}: its weights are not those of {described_by}")
    return lm


def open_text(
    description: Mapping[str, Any],
    lm: LanguageModel,
    *,
    described_by: str = "its description",
    folder: Path | None = None,
    held_out_only: bool = False,
) -> TokenBlocks:
    """Read the text of a description as token blocks for a language model.

    The fields `data`, `ctx`, `text_column`, `split`, `eval_split` and `max_train_tokens` are needed; `special_tokens`
    and `data_config` are as in version 0.1.0 where they are missing, and `data_digest` is respected where it is given,
    unless only the held-out blocks will be used.

    Raises:
        ValueError: the text cannot be read, or its tokens are not those described.
        KeyError: the description lacks a field.
    """
    max_train_tokens = description["max_train_tokens"]
    if held_out_only and description["eval_split"]:
        # A split for evaluation stays the same however little is read of the training split. Without one, documents
        # are held out as the training text is read, so all of that must be read again.
        max_train_tokens = description["ctx"]
    blocks = load_blocks(
        description["data"],
        lm.tokenizer,
        description["ctx"],
        max_train_tokens=max_train_tokens,
        text_column=description["text_column"],
        split=description["split"],
        eval_split=description["eval_split"],
        **{name: description.get(name, usual) for name, usual in LATER_FACTS.items()},
        folder=folder,
        progress=True,
    )
    digest = None if held_out_only else description.get("data_digest")
    if digest is not None and blocks.digest() != digest:
        raise ValueError(f"data {description['data']!r}: its tokens are not those of {described_by}")
    return blocks


def open_streams(source: Source, n_tokens: int, batch_size: int, mesh: Mesh = ALONE) -> list[ActivationStream]:
    """Return one stream for each hook of a source; all of them share one harvest or one store.

    Args:
        source: what the command line asks for.
        n_tokens: the number of training tokens to read.
        batch_size: the number of tokens per batch.
        mesh: the processes that train together on each stream.

    Raises:
        ValueError: the source cannot be opened, or a batch does not fit into a window.
    """
    device = _device(source.device)
    if source.store is None:
        hooks = source.hook
        lm, blocks = open_source(describe_options(source, n_tokens), device=device, folder=source.tokens)
        activations = Harvest(lm, blocks, hooks, source.acts_dtype)
    else:
        activations = ActivationStore(source.store)
        hooks = activations.hooks if len(activations.hooks) == 1 else source.hook
        description = activations.made | {"hook": first_hook(hooks)}
        lm = open_language_model(description, described_by=f"the store {source.store}", device=device)
        blocks = activations.blocks()
    return [
        ActivationStream(
            lm.at(hook),
            blocks,
            batch_size,
            seed=source.stream_seed,
            window_tokens=source.window_tokens,
            train_on_bos=source.train_on_bos,
            source=activations,
            device=device,
            mesh=mesh,
        )
        for hook in hooks
    ]


def first_hook(hooks: Sequence[str]) -> str:
    """Return the first hook, or raise ValueError if there is none."""
    if not hooks:
        raise ValueError("hook: name at least one hook")
    return hooks[0]


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': PyTorch finds no CUDA GPU on this machine; choose cpu")
    return name
