"""The sizes of a language model, from its config alone: the dry run of a command downloads and loads no weights."""

from typing import Any, NamedTuple

import torch

from prolu.activations.builtin import MODEL_DIR
from prolu.activations.hooks import architecture_of, locate
from prolu.activations.model_loading import place_of
from prolu.runtime.files import first_line
from prolu.runtime.hub import is_reachable


class Outline(NamedTuple):
    """The sizes of a language model that decide what it costs to read it at a hook and to run it on from there."""

    d_model: int
    """The width of the residual stream, and of the activations."""
    n_parameters: int
    """The number of parameters."""
    n_vocabulary: int
    """The number of tokens in the vocabulary."""
    n_per_block: int
    """The number of parameters of one transformer block."""
    blocks_below: int
    """The number of blocks that run before the hook is reached."""
    blocks_above: int
    """The number of blocks that run after it."""


def outline_of_rows(width: int) -> Outline:
    """Return the sizes for rows, which come from no language model."""
    return Outline(width, n_parameters=0, n_vocabulary=0, n_per_block=0, blocks_below=0, blocks_above=0)


def outline(name: str, hook: str, revision: str = "") -> Outline:
    """Return the sizes of a language model, from its config alone, without reading its weights.

    The name of an architecture stands for its default config: `gpt2` is GPT-2 small. The hub is asked only if the
    model is neither on this disk nor such a name.

    Args:
        name: The language model: a folder, a GGUF file, a name on the hub, or builtin.
        hook: The hook, as blocks.L.hook_SITE.
        revision: The branch, tag or commit of a model on the hub; empty for its main branch.

    Raises:
        ValueError: There is no such model, or no such hook in it.
    """
    from transformers import AutoModelForCausalLM

    config = _config(str(MODEL_DIR) if name == "builtin" else name, revision)
    with torch.device("meta"):  # tensors with a shape and no memory
        model = AutoModelForCausalLM.from_config(config)
    architecture = architecture_of(model)
    below = locate(model, hook).blocks_below
    if architecture is None or not hook.startswith("blocks."):
        raise ValueError(f"hook {hook!r}: a dry run knows the width at blocks.L.hook_SITE of known architectures only")
    blocks = list(model.get_submodule(architecture.blocks))
    text = config.get_text_config()  # of a model that reads images too, the language model's part
    return Outline(
        d_model=text.hidden_size,
        n_parameters=_n_parameters(model),
        n_vocabulary=text.vocab_size,
        n_per_block=_n_parameters(blocks[0]),
        blocks_below=len(below),
        blocks_above=len(blocks) - len(below),
    )


def _config(name: str, revision: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    folder, place = place_of(name)
    if place:
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **place)
        except Exception as problem:  # transformers raises many kinds, and each means that the file cannot be read
            raise ValueError(f"lm {name!r}: its config cannot be read ({first_line(problem)})") from None
    place = {"revision": revision} if revision else {}
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False, **place)
    except Exception:  # transformers raises many kinds, and each means that the config is not on this disk
        if name in CONFIG_MAPPING:
            return AutoConfig.for_model(name)
    if not is_reachable():
        raise ValueError(f"lm {name!r}: its config is not on this machine, and the hub does not answer")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **place)
    except Exception as problem:  # likewise: that the hub does not have it, or does not answer
        reason = first_line(problem)
        raise ValueError(f"lm {name!r}: its config cannot be loaded ({reason})") from None


def _n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
