"""A Hugging Face causal language model with named hooks: read activations there, splice others in at one."""

import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prolu import builtin
from prolu.data import bos_token_id
from prolu.divergence import CleanPredictions, kl_from_means, kl_of_logits, mean_rows


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


class _StopError(Exception):
    """Ends a forward pass at the hook: nothing above it is computed."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats by name: of a model's arithmetic, and of activations that are kept."""

BATCH_TOKENS = 8192
"""Tokens per forward pass."""


class LanguageModel:
    """A frozen causal language model, read and spliced at one hook.

    Activations of LayerNorm models (GPT-2, GPT-NeoX) have their mean over d_model removed, per token: every
    reader of the residual stream removes it too, so nothing is lost, and it is what TransformerLens's
    default processing gives.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        hook: str,
        *,
        device: str | torch.device = "cpu",
        device_map: str | dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        batch_tokens: int = BATCH_TOKENS,
    ):
        """Loads weights (safetensors only) and tokenizer from a folder or from the hub.

        Args:
            name_or_path: folder in the hub's layout, name on the hub, or `builtin`.
            hook: `blocks.L.hook_resid_pre`, `_resid_post`, `_attn_out` or `_mlp_out`; or any module's
                path followed by `.input` or `.output`, as in `model.layers.3.mlp.output`.
            device: where the model runs.
            device_map: its parts over several devices, as transformers takes it (needs accelerate); `device` is
                then where its input goes.
            dtype: of the model's arithmetic; activations come out in float32.
            batch_tokens: tokens per forward pass.

        Raises:
            ValueError: no such model, or no such hook in it.
        """
        path = Path(name_or_path).expanduser()
        self.name = str(path.resolve()) if path.is_dir() and name_or_path != "builtin" else str(name_or_path)
        self.batch_tokens, self.device, self.hook = batch_tokens, torch.device(device), hook
        folder = str(builtin.MODEL_DIR) if self.name == "builtin" else self.name
        self._model, self.tokenizer = _load(folder, self.device, device_map, dtype)
        self.dtype = dtype
        self._family = family_of(self._model)
        self.centred = reads_centred(self._model)
        self.bos = bos_token_id(self.tokenizer)
        self._digests: list[str] = []  # one at most; the same list at all hooks of the model
        self._locate(hook)

    def _locate(self, hook: str) -> None:
        self.hook = hook
        self._site, self._skipped, self._restart = locate(self._model, self._family, hook)
        self.d_in = self._read(torch.tensor([[self.bos]]), [self._site])[0].shape[-1]

    def at(self, hook: str) -> "LanguageModel":
        """The same model, weights shared, at another hook.

        Raises:
            ValueError: no such hook.
        """
        other = copy.copy(self)
        other._locate(hook)
        return other

    def uncentred(self) -> "LanguageModel":
        """The same model, weights shared, whose activations keep their mean over d_model."""
        other = copy.copy(self)
        other.centred = False
        return other

    @property
    def model(self) -> Any:
        """The transformers model itself, frozen."""
        return self._model

    @property
    def max_ctx(self) -> int:
        """Longest block the model takes."""
        return getattr(self._model.config, "max_position_embeddings", 2**31)

    def digest(self) -> str:
        """What names the weights: the hub's commit, or SHA-256 over all parameters."""
        if not self._digests:
            self._digests.append(getattr(self._model.config, "_commit_hash", None) or _digest(self._model))
        return self._digests[0]

    def activations(self, tokens: str | np.ndarray | Int[Tensor, "n ctx"]) -> Float[Tensor, "*n ctx d_in"]:
        """Activations at the hook, float32; the pass stops there.

        Args:
            tokens: token ids [n, ctx], or a text (BOS is put before it; the result is [ctx, d_in]).
        """
        if isinstance(tokens, str):
            ids = self.tokenizer(tokens, add_special_tokens=False)["input_ids"]
            return self.activations(torch.tensor([[self.bos, *ids]]))[0]
        return torch.cat([self.activations_at([self.hook], part)[0] for part in self._batches(tokens)])

    def activations_at(self, hooks: Sequence[str], tokens: Int[Tensor, "n ctx"]) -> list[Float[Tensor, "n ctx d_in"]]:
        """Activations at several hooks, float32, in one pass that stops at the last of them."""
        sites = [locate(self._model, self._family, hook)[0] for hook in hooks]
        return [self._centre(acts) for acts in self._read(tokens, sites)]

    def restart_points(self, tokens: np.ndarray | Int[Tensor, "n ctx"]) -> Tensor | None:
        """What lets `cross_entropy` skip the blocks below the hook, where the splice itself does not: the
        input of the hook's block [n, ctx, d_model]; None if it is not needed.
        """
        if self._restart is None:
            return None
        return torch.cat([self._read(part, [self._restart])[0] for part in self._batches(tokens)])

    def cross_entropy(
        self,
        tokens: np.ndarray | Int[Tensor, "n ctx"],
        splice: Float[Tensor, "n ctx d_in"] | None = None,
        restart_points: Tensor | None = None,
    ) -> Float[Tensor, "n ctx_minus_1"]:
        """Next-token cross-entropy in nats of every token after the first.

        Args:
            splice: put in place of the activations at the hook; only what lies above runs then.
            restart_points: from the method of that name, of the same tokens.
        """
        passes = self._predictions(tokens, splice, restart_points)
        return torch.cat([_next_token_loss(logits.float(), part)[0] for part, _, _, logits in passes])

    def clean_predictions(self, tokens: np.ndarray | Int[Tensor, "n ctx"]) -> CleanPredictions:
        """What `spliced_losses` compares with."""
        head = self._model.get_output_embeddings()
        found = []
        for part, _, hidden, raw in self._predictions(tokens):
            logits = raw.float()
            ce, log_partition = _next_token_loss(logits, part)
            rows, own = None, torch.zeros_like(ce, dtype=torch.float64)
            if hidden is not None:
                rows = mean_rows(logits[:, :-1].flatten(0, 1), head.weight).view(*ce.shape, -1)
                own = (rows.double() * hidden.double()).sum(-1)
            found.append(CleanPredictions(ce, log_partition, rows, own))
        ce, log_partition, rows, own = zip(*found, strict=True)
        linear = all(r is not None for r in rows)
        return CleanPredictions(
            torch.cat(ce), torch.cat(log_partition), torch.cat(rows) if linear else None, torch.cat(own)
        )

    def spliced_losses(
        self,
        tokens: np.ndarray | Int[Tensor, "n ctx"],
        splice: Float[Tensor, "n ctx d_in"],
        restart_points: Tensor | None,
        clean: CleanPredictions,
    ) -> tuple[Float[Tensor, "n ctx_minus_1"], Float[Tensor, "n ctx_minus_1"]]:
        """Cross-entropy, as `cross_entropy` gives it, and KL(clean || spliced), nats, in one pass.

        Where logits are not linear in what the last layer gives, the clean pass is repeated for the KL.
        """
        losses, divergences = [], []
        for part, rows, hidden, raw in self._predictions(tokens, splice, restart_points):
            logits = raw.float()
            ce, log_partition = _next_token_loss(logits, part)
            here = CleanPredictions(*(None if t is None else t[rows] for t in clean))  # pyright: ignore[reportArgumentType]
            if hidden is not None and here.mean_row is not None:
                kl = kl_from_means(here, log_partition, hidden)
            else:
                _, _, _, unperturbed = next(self._predictions(part))
                kl = kl_of_logits(unperturbed[:, :-1].float().flatten(0, 1), logits[:, :-1].flatten(0, 1)).view(
                    ce.shape
                )
            losses.append(ce)
            divergences.append(kl)
        return torch.cat(losses), torch.cat(divergences)

    def logits(
        self,
        tokens: np.ndarray | Int[Tensor, "n ctx"],
        splice: Float[Tensor, "n ctx d_in"] | None = None,
        restart_points: Tensor | None = None,
    ) -> Float[Tensor, "n ctx n_vocabulary"]:
        """Of every position, in the model's number format; arguments as `cross_entropy` has them."""
        return torch.cat([logits for *_, logits in self._predictions(tokens, splice, restart_points)])

    def _predictions(
        self,
        tokens: np.ndarray | Tensor,
        splice: Tensor | None = None,
        restart_points: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, slice, Tensor | None, Tensor]]:
        """Some blocks at a time: tokens, which rows of all they are, what logits are linear in, and logits.

        The third leaves the last position out, and is None if the model does more to its logits.
        """
        start = 0
        for part in self._batches(tokens):
            rows = slice(start, start + len(part))
            start += len(part)
            seen: list[tuple[Tensor, Tensor]] = []
            with torch.no_grad(), ExitStack() as hooks:
                head = self._model.get_output_embeddings()
                note = head.register_forward_hook(lambda _, args, output, seen=seen: seen.append((args[0], output)))
                hooks.callback(note.remove)
                if splice is not None:
                    if self._restart is None or restart_points is not None:
                        hooks.enter_context(_passed_through(self._skipped))
                    if self._restart is not None and restart_points is not None:
                        hooks.enter_context(self._replaced(self._restart, restart_points[rows]))
                    hooks.enter_context(self._replaced(self._site, splice[rows]))
                logits = self._model(input_ids=part, use_cache=False).logits
            ((hidden, output),) = seen
            linear = logits is output or torch.equal(logits, output)
            yield part, rows, hidden[:, :-1].float() if linear else None, logits

    def _batches(self, tokens: np.ndarray | Tensor) -> Iterator[Tensor]:
        if isinstance(tokens, np.ndarray):
            tokens = torch.from_numpy(tokens.astype(np.int64))
        if tokens.shape[1] > self.max_ctx:
            raise ValueError(f"ctx {tokens.shape[1]}: {self.name} takes at most {self.max_ctx} tokens")
        rows = max(1, self.batch_tokens // tokens.shape[1])
        return (part.to(self.device) for part in tokens.split(rows))

    def _centre(self, acts: Tensor) -> Tensor:
        return centre(acts) if self.centred else acts

    @torch.no_grad()
    def _read(self, tokens: Tensor, sites: Sequence[Site]) -> list[Tensor]:
        seen: dict[Site, Tensor] = {}

        def note(site: Site, value: Tensor) -> Tensor:
            seen[site] = value
            if len(seen) == len(set(sites)):
                raise _StopError
            return value

        with ExitStack() as hooks:
            for site in dict.fromkeys(sites):
                hooks.enter_context(hooked(self._model, site, partial(note, site)))
            try:
                self._model.base_model(input_ids=tokens.to(self.device), use_cache=False)
            except _StopError:
                return [seen[site].float() for site in sites]
        raise ValueError(f"hook {self.hook!r}: the model's forward pass never reaches it")

    def _replaced(self, site: Site, by: Tensor) -> Any:
        return hooked(self._model, site, by.to)


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


def _next_token_loss(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token after the first, and the log of the softmax's denominator there, [n, ctx - 1]."""
    # All positions, so that nothing is copied; what the last one predicts is dropped.
    following = tokens.roll(-1, dims=1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    loss = loss.view(tokens.shape)
    chosen = logits.gather(-1, following[..., None])[..., 0]
    return loss[:, :-1], (loss + chosen)[:, :-1]


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


def _digest(model: Any) -> str:
    total = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


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


def _load(
    name: str, device: torch.device, device_map: str | dict[str, Any] | None, dtype: torch.dtype
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    is_path = Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not (Path(name) / "config.json").is_file():
        raise ValueError(f"lm {name!r}: no such folder with a config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, device_map=device_map
        )
    except Exception as problem:  # the libraries raise many kinds; each means: cannot be loaded
        reason = str(problem).strip().split("\n")[0]
        raise ValueError(f"lm {name!r}: cannot be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"lm {name!r}: its tokenizer has no fast version, which is needed to read text at speed")
    if device_map is None:
        torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False), tokenizer
