"""Named hooks of a transformers model: where they lie, how activations are read and replaced there, how blocks are
skipped.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The names of the parts of a transformer block in one model architecture, and its kind of normalisation."""

    blocks: str
    """The module path of the list of transformer blocks."""
    attn_out: str
    """The path, within a block, of the module whose output is added to the residual stream after attention."""
    mlp_out: str
    """The path, within a block, of the module whose output is added to the residual stream after the MLP."""
    layer_norm: bool = False
    """Whether the model uses LayerNorm, which removes the mean of what it reads; RMSNorm does not."""


_LLAMA = Architecture(blocks="model.layers", attn_out="self_attn", mlp_out="mlp")

# Gemma 2 normalises once more before it adds to the residual stream, so that is where its hooks read.
_GEMMA2 = Architecture(blocks="model.layers", attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")

# Gemma 3 from 4B on reads images too; its language model is one of two parts.
_GEMMA3 = replace(_GEMMA2, blocks="model.language_model.layers")

ARCHITECTURES = {
    "gpt2": Architecture(blocks="transformer.h", attn_out="attn", mlp_out="mlp", layer_norm=True),
    "gpt_neo": Architecture(blocks="transformer.h", attn_out="attn", mlp_out="mlp", layer_norm=True),
    "gpt_neox": Architecture(blocks="gpt_neox.layers", attn_out="attention", mlp_out="mlp", layer_norm=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA2,
}
"""The known architectures by the `model_type` of their Hugging Face config."""

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
"""The values of SITE in `blocks.L.hook_SITE`; they are TransformerLens's names."""


@dataclass(frozen=True)
class Site:
    """A place in the forward pass: the input or the output of a module."""

    path: str
    """The path of the module in the model."""
    side: Literal["input", "output"]


class Location(NamedTuple):
    """Where a hook lies in a model, and which part of the forward pass a splice at the hook makes unnecessary."""

    site: Site
    """Where the activations are read and replaced."""
    blocks_below: list[torch.nn.Module]
    """The transformer blocks that compute nothing but what the splice replaces, or what the restart site restores."""
    restart: Site | None
    """The input of the hook's own block, which must be restored if the blocks below are skipped; None if the splice
    itself restores all that is needed."""


def architecture_of(model: Any) -> Architecture | None:
    """Return the architecture of a transformers model, or None if it is not one of `ARCHITECTURES`."""
    return ARCHITECTURES.get(model.config.model_type)


def reads_centred(model: Any) -> bool:
    """Return whether whatever reads the residual stream of a transformers model first removes its mean."""
    architecture = architecture_of(model)
    return architecture is not None and architecture.layer_norm


def locate(model: Any, hook: str) -> Location:
    """Return where a hook lies in a transformers model.

    Raises:
        ValueError: the model has no such hook.
    """
    named = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", hook)
    if named is None:
        # Which blocks only feed an arbitrary module is not known, so all of them run.
        return Location(_by_module_path(model, hook), [], None)
    architecture = architecture_of(model)
    if architecture is None:
        raise ValueError(
            f"hook {hook!r}: the architecture {model.config.model_type!r} is not one of {', '.join(ARCHITECTURES)}; "
            "name a module and its side instead, as in 'model.layers.3.output'"
        )
    layer = int(named[1])
    site = named[2]
    blocks = list(model.get_submodule(architecture.blocks))
    if site not in SITES:
        raise ValueError(f"hook {hook!r}: the site must be one of {', '.join('hook_' + s for s in SITES)}")
    if layer >= len(blocks):
        raise ValueError(f"hook {hook!r}: this model has blocks 0-{len(blocks) - 1}")
    path = f"{architecture.blocks}.{layer}"
    entrance = Site(path, "input")
    if site == "resid_pre":
        return Location(entrance, blocks[:layer], None)
    if site == "resid_post":
        return Location(Site(path, "output"), blocks[: layer + 1], None)
    # The outputs of attention and MLP are added to a residual stream that comes from below, so a splice there does not
    # replace everything that the blocks below compute: the input of this block is needed as well.
    return Location(Site(f"{path}.{getattr(architecture, site)}", "output"), blocks[:layer], entrance)


def _by_module_path(model: Any, hook: str) -> Site:
    path, _, side = hook.rpartition(".")
    if side in ("input", "output"):
        try:
            model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"hook {hook!r}: the model has no module {path!r}{_similar(model, path)}") from None
        return Site(path, side)
    raise ValueError(
        f"hook {hook!r}: write blocks.L.hook_SITE with SITE one of {', '.join(SITES)}, "
        "or a module's path followed by .input or .output"
    )


def _similar(model: Any, path: str) -> str:
    """Return a hint at the modules whose paths end as one that does not exist; empty if there are none."""
    tail = path.rpartition("layers.")[2] or path
    named = [name for name, _ in model.named_modules() if name.endswith(f".{tail}")]
    return f"; there is {' and '.join(named[:3])}" if named else ""


@contextmanager
def hooked(model: Any, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass the tensor at a site of the model through `change` in every forward pass within this context."""
    module = model.get_submodule(site.path)

    def on_input(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # Some architectures call their blocks with hidden_states by name.
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def on_output(_: Any, args: tuple, output: Any) -> Any:
        # Attention modules return their weights, and older blocks their cache, after the hidden states.
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if site.side == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


_RETURNS_TUPLE: dict[type, bool] = {}
"""Whether a class of transformer blocks returns a tuple, as GPT-2's did up to transformers 5.0; filled as they run."""


@contextmanager
def skipped(blocks: list[torch.nn.Module]) -> Iterator[None]:
    """Make these transformer blocks return their input unchanged within this context.

    The first block of each class runs once, because only its result tells whether the model expects a tuple.
    """

    def skipping(block: torch.nn.Module) -> Callable[..., Any]:
        own_forward = block.forward
        kind = type(block)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if kind not in _RETURNS_TUPLE:
                _RETURNS_TUPLE[kind] = isinstance(own_forward(hidden_states, *args, **kwargs), tuple)
            return (hidden_states,) if _RETURNS_TUPLE[kind] else hidden_states

        return forward

    for block in blocks:
        block.forward = skipping(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the instance's attribute, so that the method of the class shows again
