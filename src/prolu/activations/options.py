"""The command-line options that describe a source of activations, in a file without PyTorch, as the help needs them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prolu.activations.token_mask import MASK_FIELDS, MaskOptions, TokenMask


def one_or_list(names: Sequence[str]) -> str | list[str]:
    """Return the one name, or a list of several."""
    return names[0] if len(names) == 1 else list(names)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The language model whose activations are read."""

    lm: str = "builtin"
    """The language model: a folder in the Hugging Face layout, a GGUF file (which needs the extra gguf), a name on the
    hub, or `builtin`, the small model that ships with the package."""
    revision: str = ""
    """The branch, tag or commit of a language model on the hub, such as Pythia's step3000. Empty: its main branch."""
    lm_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The number format of the language model's arithmetic."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The text that the language model reads."""

    data: tuple[str, ...] = ("builtin",)
    """The text: a .txt, .jsonl, .parquet or .arrow file, several such files, a folder of them, a dataset on the Hugging
    Face hub, a folder of token blocks, or `builtin` (the source code of Python's standard library)."""
    text_column: str = "text"
    """The column that holds the text or, for data that is already tokenised, the token ids, as `input_ids` often does.
    It may also hold chats, lists of messages, as `messages` often does, which the tokenizer's chat template turns into
    text."""
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

    @property
    def data_source(self) -> str | list[str]:
        """The one name, or the list of files, as `load_blocks` takes it."""
        return one_or_list(self.data)


@dataclass(frozen=True, kw_only=True)
class Source(MaskOptions, TextOptions, ModelOptions):
    """The activations to train on."""

    hook: tuple[str, ...] = ("blocks.2.hook_resid_pre",)
    """The hooks to train at: blocks.L.hook_SITE, where L counts from 0 and SITE is resid_pre, resid_post, attn_out or
    mlp_out; or the path of a module followed by .input or .output, as in model.layers.3.mlp.output. Several hooks share
    one pass of the language model; each gives a study of its own in OUT/HOOK."""
    hook_out: tuple[str, ...] = ()
    """Train transcoders, which read at --hook and write at this hook: an MLP's input and its output, for example, as in
    --hook model.layers.2.mlp.input --hook-out blocks.2.hook_mlp_out. Give one for each --hook. By default SAEs are
    trained."""
    activations: str = ""
    """Rows to train on in place of a language model's activations: a .npy or .safetensors file of an array [n_rows,
    width], a folder of such files (those whose names begin with held_out are scored on; without any, a tenth of the
    rows is), or rows that are sums of known features: synthetic:easy, synthetic:hard or synthetic:even. The options
    about the language model, the hook and the text are ignored, and rows are meant where they say tokens."""
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
    """The number of tokens that are shuffled together; their activations are held in memory, twice if the next ones are
    read ahead."""
    read_ahead: Literal["auto", "on", "off"] = "auto"
    """Whether the next window is read while one is trained on, in the memory of a second window; it changes no number.
    auto: where SAEs are trained on a GPU, from a store or from a language model on another device (--lm-device)."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """The number of CPU threads of all processes on this machine together. Another number may change the last bits of
    results."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The device on which SAEs are trained, and the language model runs unless --lm-device names another."""
    lm_device: str = ""
    """The device on which the language model runs: cpu, cuda, or cuda:N for GPU number N. Empty: that of --device. It
    may be another GPU than the one that trains; on a machine with one GPU, cpu leaves all its memory to training."""
    mesh: str = ""
    """Train each SAE on several processes started by torchrun: data=D,latent=L divides every batch among D groups of
    processes, and the latents among the L processes of each group."""

    @property
    def mask(self) -> TokenMask:
        """What is left out."""
        return TokenMask(**{name: getattr(self, name) for name in MASK_FIELDS})


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
    lm_device: str = "cpu"
    """The device on which the language model runs: cpu, cuda, or cuda:N for GPU number N."""
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """The number of CPU threads."""
