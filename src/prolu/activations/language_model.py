"""A Hugging Face causal language model with named hooks: read activations there, splice others in at one."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prolu.activations import builtin
from prolu.activations.hooks import Site, _passed_through, centre, family_of, hooked, locate, reads_centred
from prolu.activations.token_blocks import bos_token_id


class _StopError(Exception):
    """Ends a forward pass at the hook: nothing above it is computed."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats by name: of a model's arithmetic, and of activations that are kept."""

BATCH_TOKENS = 8192
"""Tokens per forward pass."""


class Predictions(NamedTuple):
    """What the model predicts in one forward pass over a few blocks."""

    tokens: Int[Tensor, "rows ctx"]
    """Token ids of these blocks."""
    rows: slice
    """Which of all blocks these are."""
    last_hidden: Float[Tensor, "rows ctx_minus_1 d_model"] | None
    """Input of the unembedding at every position but the last; None if the logits are not linear in it."""
    logits: Float[Tensor, "rows ctx n_vocabulary"]
    """Logits at every position, in the model's number format."""


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
        passes = self.predictions(tokens, splice, restart_points)
        return torch.cat([next_token_loss(p.logits.float(), p.tokens)[0] for p in passes])

    def logits(
        self,
        tokens: np.ndarray | Int[Tensor, "n ctx"],
        splice: Float[Tensor, "n ctx d_in"] | None = None,
        restart_points: Tensor | None = None,
    ) -> Float[Tensor, "n ctx n_vocabulary"]:
        """Of every position, in the model's number format; arguments as `cross_entropy` has them."""
        return torch.cat([p.logits for p in self.predictions(tokens, splice, restart_points)])

    def predictions(
        self,
        tokens: np.ndarray | Int[Tensor, "n ctx"],
        splice: Float[Tensor, "n ctx d_in"] | None = None,
        restart_points: Tensor | None = None,
    ) -> Iterator[Predictions]:
        """Yield the model's predictions for a few blocks at a time; arguments as `cross_entropy` has them."""
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
            yield Predictions(part, rows, hidden[:, :-1].float() if linear else None, logits)

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


def next_token_loss(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token after the first, and the log of the softmax's denominator there, [n, ctx - 1]."""
    # All positions, so that nothing is copied; what the last one predicts is dropped.
    following = tokens.roll(-1, dims=1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    loss = loss.view(tokens.shape)
    chosen = logits.gather(-1, following[..., None])[..., 0]
    return loss[:, :-1], (loss + chosen)[:, :-1]


def _digest(model: Any) -> str:
    total = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


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
