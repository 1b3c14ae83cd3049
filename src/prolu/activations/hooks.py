"""Named hooks of a transformers model: where a name lies in the model, and what is read or replaced there."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of a block lie in one family of models, and how it normalises."""

    blocks: str
    """Module path of the list of blocks."""
    attn_out: str
    """Path, within a block, of the module whose output joins the residual stream after attention."""
    mlp_out: str
    """The same for the MLP."""
    layer_norm: bool = False
    """LayerNorm models read the residual stream less its mean; RMSNorm models do not."""


_LLAMA = Family(blocks="model.layers", attn_out="self_attn", mlp_out="mlp")


_GEMMA2 = Family(blocks="model.layers", attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")


FAMILIES = {
    "gpt2": Family(blocks="transformer.h", attn_out="attn", mlp_out="mlp", layer_norm=True),
    "gpt_neox": Family(blocks="gpt_neox.layers", attn_out="attention", mlp_out="mlp", layer_norm=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
}
"""By `model_type` of the Hugging Face config."""


SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
"""`blocks.L.hook_SITE`, named as TransformerLens names them."""


@dataclass(frozen=True)
class Site:
    """A place in the forward pass: what a module takes or gives."""

    path: str
    side: Literal["input", "output"]


@contextmanager
def hooked(model: Any, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For a while, what passes a site of the model goes through `change`."""
    module = model.get_submodule(site.path)

    def on_input(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def on_output(_: Any, args: tuple, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if site.side == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def family_of(model: Any) -> Family | None:
    """The family of a transformers model, if it is one of `FAMILIES`."""
    return FAMILIES.get(model.config.model_type)


def reads_centred(model: Any) -> bool:
    """Whether what reads the residual stream of a transformers model removes its mean."""
    family = family_of(model)
    return bool(family and family.layer_norm)


def centre(acts: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Activations less their mean over d, token by token."""
    return acts - acts.mean(-1, keepdim=True)


_GIVES_TUPLE: dict[type, bool] = {}
"""Of kinds of blocks that have run: whether what they hand on is the first of a tuple, as in older transformers."""


@contextmanager
def _passed_through(blocks: list[torch.nn.Module]) -> Iterator[None]:
    """For a while, these blocks hand on their input; the first of a kind runs once, to see in what form."""

    def forward_of(block: torch.nn.Module) -> Callable[..., Any]:
        own, kind = block.forward, type(block)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if kind not in _GIVES_TUPLE:
                _GIVES_TUPLE[kind] = isinstance(own(hidden_states, *args, **kwargs), tuple)
            return (hidden_states,) if _GIVES_TUPLE[kind] else hidden_states

        return forward

    for block in blocks:
        block.forward = forward_of(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def locate(model: Any, family: Family | None, hook: str) -> tuple[Site, list[torch.nn.Module], Site | None]:
    """The hook's site, the blocks that need not run once it is spliced, and where to restart if not there."""
    named = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", hook)
    if named is None:
        return _by_module_path(model, hook), [], None
    if family is None:
        raise ValueError(
            f"hook {hook!r}: the family {model.config.model_type!r} is not one of {', '.join(FAMILIES)}; "
            "name a module and its side instead, as in 'model.layers.3.output'"
        )
    layer, site = int(named[1]), named[2]
    blocks = list(model.get_submodule(family.blocks))
    if site not in SITES:
        raise ValueError(f"hook {hook!r}: the site is one of {', '.join('hook_' + s for s in SITES)}")
    if layer >= len(blocks):
        raise ValueError(f"hook {hook!r}: this model has blocks 0-{len(blocks) - 1}")
    path = f"{family.blocks}.{layer}"
    entrance = Site(path, "input")
    if site == "resid_pre":
        return entrance, blocks[:layer], None
    if site == "resid_post":
        return Site(path, "output"), blocks[: layer + 1], None
    return Site(f"{path}.{getattr(family, site)}", "output"), blocks[:layer], entrance


def _by_module_path(model: Any, hook: str) -> Site:
    path, _, side = hook.rpartition(".")
    if side in ("input", "output"):
        try:
            model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"hook {hook!r}: the model has no module {path!r}") from None
        return Site(path, side)
    raise ValueError(
        f"hook {hook!r}: write blocks.L.hook_SITE with SITE one of {', '.join(SITES)}, "
        "or a module's path followed by .input or .output"
    )
