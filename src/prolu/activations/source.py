"""Opens the language model, the text and the streams that command-line options or a study's config describe."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prolu.activations.harvesting import Harvest
from prolu.activations.held_windows import reads_ahead
from prolu.activations.language_model import BATCH_TOKENS, DTYPES, LanguageModel
from prolu.activations.options import HarvestSource, Source
from prolu.activations.packing import HELD_OUT_POOL, load_blocks
from prolu.activations.resolving import check_is_there
from prolu.activations.row_files import open_rows
from prolu.activations.store import ActivationStore
from prolu.activations.stream import ActivationStream
from prolu.activations.token_blocks import LATER_FACTS, TokenBlocks
from prolu.runtime.devices import available_device
from prolu.runtime.mesh import ALONE, Mesh


def describe_options(
    options: Source | HarvestSource, n_tokens: int, held_out_pool: int = HELD_OUT_POOL
) -> dict[str, Any]:
    """Return the language model and text of some options in the words of a study's `stream`, for `open_source`.

    Args:
        options: what the command line asks for.
        n_tokens: the number of training tokens to read.
        held_out_pool: the number of held-out tokens among which those that are scored are chosen.
    """
    return {
        "lm": options.lm,
        "lm_revision": options.revision,
        "lm_dtype": options.lm_dtype,
        "hook": first_hook(options.hook),
        "data": options.data_source,
        "text_column": options.text_column,
        "data_config": options.data_config,
        "split": options.split,
        "eval_split": options.eval_split,
        "special_tokens": options.special_tokens,
        "max_train_tokens": n_tokens,
        "held_out_pool": held_out_pool,
        "ctx": options.ctx,
    }


def open_source(
    description: Mapping[str, Any],
    *,
    described_by: str = "its description",
    device: str | torch.device = "cpu",
    folder: Path | None = None,
    held_out_tokens: int | None = None,
) -> tuple[LanguageModel, TokenBlocks]:
    """Open the language model and the text that a description names.

    Args:
        description: the `stream` part of a study's config.json; see `open_language_model` and `open_text`.
        described_by: where the description was found, for error messages, such as "the study runs/a".
        device: where the language model runs.
        folder: where to keep the token blocks; by default they are held in memory.
        held_out_tokens: as in `open_text`.

    Raises:
        ValueError: the model or the text cannot be read, or is not the one described.
        KeyError: the description lacks a field.
    """
    check_is_there(description["data"])
    lm = open_language_model(description, described_by=described_by, device=device)
    blocks = open_text(description, lm, described_by=described_by, folder=folder, held_out_tokens=held_out_tokens)
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
    held_out_tokens: int | None = None,
) -> TokenBlocks:
    """Read the text of a description as token blocks for a language model.

    The fields `data`, `ctx`, `text_column`, `split`, `eval_split` and `max_train_tokens` are needed; those of
    `LATER_FACTS` are as in version 0.1.0 where they are missing, and `data_digest` is respected where it is given,
    unless only held-out tokens will be used.

    Args:
        description: the `stream` part of a study's config.json.
        lm: the language model that will read the text.
        described_by: where the description was found, for error messages.
        folder: where to keep the token blocks; by default they are held in memory.
        held_out_tokens: the number of held-out tokens that will be looked at, if no training tokens will be used.

    Raises:
        ValueError: the text cannot be read, or its tokens are not those described.
        KeyError: the description lacks a field.
    """
    max_train_tokens = description["max_train_tokens"]
    in_the_pool = held_out_tokens is not None and held_out_tokens <= description.get("held_out_pool", 0)
    if in_the_pool or (held_out_tokens is not None and description["eval_split"]):
        # The pool, and a split for evaluation, stay the same however little is read to train on. Other documents are
        # held out as the training text is read, so all of that must be read again.
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
    digest = None if held_out_tokens is not None else description.get("data_digest")
    if digest is not None and blocks.digest() != digest:
        raise ValueError(f"data {description['data']!r}: its tokens are not those of {described_by}")
    return blocks


def open_streams(
    source: Source,
    n_tokens: int,
    held_out_pool: int,
    batch_size: int,
    mesh: Mesh = ALONE,
    *,
    check_width: Callable[[int], object] = lambda d_in: None,
) -> list[ActivationStream]:
    """Return one stream for each hook of a source; all of them share one harvest or one store.

    Args:
        source: what the command line asks for.
        n_tokens: the number of training tokens to read.
        held_out_pool: the number of held-out tokens among which those that are scored are chosen.
        batch_size: the number of tokens per batch.
        mesh: the processes that train together on each stream.
        check_width: called with the width of the activations at each hook before a text is read, which may take long
            and is written to --tokens; it raises ValueError if what is asked for does not fit.

    Raises:
        ValueError: the source cannot be opened, a device is not there, or a batch does not fit into a window.
    """
    common: dict[str, Any] = {
        "read_ahead": "on" if options_read_ahead(source, mesh.n_ranks) else "off",
        "device": available_device("device", source.device),
        "batch_size": batch_size,
        "seed": source.stream_seed,
        "window_tokens": source.window_tokens,
        "mesh": mesh,
    }
    if source.activations:
        check_rows_alone(source)
        return [ActivationStream.from_rows(open_rows(source.activations, n_tokens, held_out_pool), **common)]
    lm_device = available_device("lm_device", source.lm_device) if source.lm_device else common["device"]
    hooks, outs = source.hook, hooks_out(source)
    if source.store is None:
        activations = _open_harvest(describe_options(source, n_tokens, held_out_pool), source, lm_device, check_width)
        lm, blocks = activations.lm, activations.blocks
    else:
        activations = ActivationStore(source.store)
        hooks = activations.hooks if len(activations.hooks) == 1 else hooks
        description = activations.made | {"hook": first_hook(hooks)}
        lm = open_language_model(description, described_by=f"the store {source.store}", device=lm_device)
        blocks = activations.blocks()
    return [
        ActivationStream(
            lm.at(hook),
            blocks,
            train_on_bos=source.train_on_bos,
            mask=source.mask,
            source=activations,
            hook_out=hook_out,
            **common,
        )
        for hook, hook_out in zip(hooks, outs, strict=True)
    ]


def _open_harvest(
    description: Mapping[str, Any], source: Source, device: torch.device, check_width: Callable[[int], object]
) -> Harvest:
    """Open the language model and the text that a source describes, to be read at all of its hooks."""
    check_is_there(description["data"])
    lm = open_language_model(description, device=device)
    for hook in source.hook:
        check_width(lm.at(hook).d_in)
    blocks = open_text(description, lm, folder=source.tokens)
    # Each hook once: what one transcoder writes, another one may read.
    read = dict.fromkeys(hook for hook in (*source.hook, *source.hook_out) if hook)
    return Harvest(lm, blocks, tuple(read) if any(source.hook_out) else source.hook, source.acts_dtype)


def check_rows_alone(source: Source) -> None:
    """Raise ValueError if rows are asked for together with what only a language model has."""
    for name in ("store", "hook_out"):
        if getattr(source, name):
            raise ValueError(f"{name}: not with --activations, whose rows come from no language model")
    for name in source.mask.describe():
        raise ValueError(f"{name}: not with --activations, whose rows are no tokens of a text")


def hooks_out(source: Source) -> tuple[str, ...]:
    """Return the hook at which transcoders write, for each hook of a source; empty strings for SAEs.

    Raises:
        ValueError: there is neither one for each hook nor none.
    """
    if not source.hook_out:
        return ("",) * len(source.hook)
    if len(source.hook_out) != len(source.hook):
        raise ValueError(
            f"hook_out {' '.join(source.hook_out)}: name one for each hook, which are {' '.join(source.hook)}, or none"
        )
    return source.hook_out


def options_read_ahead(source: Source, n_ranks: int = 1) -> bool:
    """Return whether streams of these options read windows ahead, in the memory of one more window for each hook.

    Raises:
        ValueError: the options ask for reading ahead where it is not possible.
    """
    is_kept = source.store is not None or bool(source.activations)
    return reads_ahead(
        source.read_ahead,
        # Unlike in `Inputs.reads_ahead`, a model on another device counts: only the study uses that model, and it locks
        # it against the thread that reads ahead.
        pays=source.device != "cpu" and (is_kept or source.lm_device not in ("", source.device)),
        n_hooks=1 if is_kept else len(source.hook) + len(source.hook_out),
        n_ranks=n_ranks,
    )


def first_hook(hooks: Sequence[str]) -> str:
    """Return the first hook, or raise ValueError if there is none."""
    if not hooks:
        raise ValueError("hook: name at least one hook")
    return hooks[0]
