"""A Hugging Face causal language model with named hooks: read activations there, splice others in at one hook."""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prolu.activations import builtin
from prolu.activations.hooks import Site, hooked, locate, reads_centred, skipped
from prolu.activations.model_loading import load_model, model_digest
from prolu.activations.tokenizers import as_token_ids, bos_token_id, n_token_ids, token_strings
from prolu.runtime.devices import numbered
from prolu.sae.scaling import centre

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The number formats by name: of a model's arithmetic, and of activations that are kept."""

BATCH_TOKENS = 8192
"""The number of tokens per forward pass."""

LOGITS_AT_ONCE = 2**20
"""The number of logits of which losses are computed at once on CPUs: 4 MB in float32, which stay in the cache."""


class Predictions(NamedTuple):
    """What the model predicts in one forward pass over a few token blocks."""

    tokens: Int[Tensor, "rows ctx"]
    """The token ids of these blocks."""
    rows: slice
    """The position of these blocks among all blocks."""
    last_hidden: Float[Tensor, "rows ctx_minus_1 d_model"] | None
    """The input of the unembedding at every position but the last; None if the logits are not linear in it."""
    logits: Float[Tensor, "rows ctx n_vocabulary"]
    """The logits at every position, in the model's number format."""


TokenIds = Int[Tensor, "n ctx"] | Int[Tensor, " ctx"] | np.ndarray | Sequence[int] | Sequence[Sequence[int]]
"""Token ids of several rows of one length, or of one row."""


class _StopError(Exception):
    """Ends a forward pass as soon as everything that is wanted has been read."""


class LanguageModel:
    """A frozen causal language model, read and spliced at one hook.

    Activations of LayerNorm models (GPT-2, GPT-NeoX) have their mean over d_model removed, per token. Every reader of
    the residual stream removes it too, so nothing is lost, and it is what TransformerLens's default processing gives.
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
        revision: str = "",
    ):
        """Load the weights (safetensors or GGUF only) and the tokenizer from a folder or from the hub.

        Args:
            name_or_path: a folder in the hub's layout, a GGUF file, a name on the hub, or `builtin`.
            hook: `blocks.L.hook_resid_pre`, `_resid_post`, `_attn_out` or `_mlp_out`; or the path of any module
                followed by `.input` or `.output`, as in `model.layers.3.mlp.output`.
            device: where the model runs.
            device_map: how transformers distributes the model over several devices (this needs accelerate); `device`
                is then where its input goes.
            dtype: the number format of the model's arithmetic; activations come out in float32.
            batch_tokens: the number of tokens per forward pass.
            revision: the branch, tag or commit of a model on the hub, such as Pythia's step3000; empty for its main
                branch.

        Raises:
            ValueError: there is no such model, a parameter is not in its files, or it has no such hook.
        """
        path = Path(name_or_path).expanduser()
        is_local = path.is_dir() or path.suffix.lower() == ".gguf"
        # The absolute path of a folder or file, so that a study that records it can be resumed from any directory.
        # Links are not followed, because the target of a link may change its name later, as in the hub's cache.
        self.name = str(path.absolute()) if is_local and name_or_path != "builtin" else str(name_or_path)
        self.batch_tokens = batch_tokens
        self.device = numbered(device)
        self.dtype = dtype
        folder = str(builtin.MODEL_DIR) if self.name == "builtin" else self.name
        self._model, self.tokenizer = load_model(folder, self.device, device_map, dtype, revision)
        self.revision = revision
        self.centred = reads_centred(self._model)
        self.bos = bos_token_id(self.tokenizer)
        # Empty until the digest is asked for, then a list of one. A list, because the copies that `at` and `uncentred`
        # make share it: however many hooks there are, the weights are hashed once.
        self._digests: list[str] = []
        # Shared in the same way. A pass puts hooks on the model itself, and a splice takes blocks out of it, so a pass
        # in another thread (a stream that reads ahead) must not run meanwhile.
        self._alone = threading.RLock()
        self._move_to(hook)

    def _move_to(self, hook: str) -> None:
        self.hook = hook
        self._site, self._blocks_below, self._restart = locate(self._model, hook)
        # No config names the width of an arbitrary module's output, so one token is passed through the model.
        self.d_in = self._read(torch.tensor([[self.bos]]), [self._site])[0].shape[-1]

    def at(self, hook: str) -> "LanguageModel":
        """Return the same model, with shared weights, at another hook.

        Raises:
            ValueError: the model has no such hook.
        """
        other = copy.copy(self)
        other._move_to(hook)
        return other

    def uncentred(self) -> "LanguageModel":
        """Return the same model, with shared weights, whose activations keep their mean over d_model."""
        other = copy.copy(self)
        other.centred = False
        return other

    @property
    def model(self) -> Any:
        """The transformers model itself, frozen."""
        return self._model

    @property
    def max_ctx(self) -> int:
        """The number of tokens in the longest block that the model takes."""
        return getattr(self._text_config, "max_position_embeddings", 2**31)

    @property
    def n_token_ids(self) -> int:
        """The number of token ids that the model takes, from 0 on: the rows of its embedding."""
        # Not the tokenizer's number: tokens may be added to a tokenizer without the model, and models are padded to a
        # round number of rows.
        return self._model.get_input_embeddings().weight.shape[0]

    @property
    def _text_config(self) -> Any:
        # Models that also read images keep the config of their language model one level below.
        return self._model.config.get_text_config()

    def check_tokens(self, tokens: np.ndarray | Tensor) -> None:
        """Raise ValueError if the model does not take all of these token ids."""
        # On a GPU, a wrong id would end in an error of the device, which names nothing and leaves it unusable.
        if len(tokens) == 0:
            return
        smallest = int(tokens.min())
        largest = int(tokens.max())
        if smallest < 0 or largest >= self.n_token_ids:
            wrong = smallest if smallest < 0 else largest
            text = self.tokenizer.convert_ids_to_tokens(wrong) if 0 <= wrong < n_token_ids(self.tokenizer) else None
            known_as = f", its tokenizer's {text!r}," if text else ""
            raise ValueError(
                f"token id {wrong}{known_as} is not one of {self.name}, whose embedding has the rows "
                f"0-{self.n_token_ids - 1}"
            )

    def digest(self) -> str:
        """Return SHA-256 over all parameters, which names the weights."""
        if not self._digests:
            self._digests.append(model_digest(self._model))
        return self._digests[0]

    @overload
    def activations(self, tokens: str | TokenIds) -> Tensor: ...
    @overload
    def activations(self, tokens: Sequence[str]) -> list[Tensor]: ...
    def activations(self, tokens: str | TokenIds | Sequence[str]) -> Tensor | list[Tensor]:
        """Return the activations at the hook in float32; the forward pass stops there.

        Args:
            tokens: token ids [n, ctx] or [ctx], as a tensor, an array or lists of numbers; or a text, before which BOS
                is put (`tokens` returns the strings beside its activations); or a list of texts.

        Returns:
            A tensor [n, ctx, d_in], or [ctx, d_in] for one row or one text; for a list of texts a list of such
            tensors, because texts differ in length.

        Raises:
            ValueError: they are not token ids of this model, or there are more than it takes.
        """
        if isinstance(tokens, str):
            return self.activations(self.token_ids(tokens))
        if isinstance(tokens, list | tuple):
            texts = [text for text in tokens if isinstance(text, str)]
            if texts and len(texts) == len(tokens):
                return [self.activations(self.token_ids(text)) for text in texts]
        ids = as_token_ids(tokens)
        found = torch.cat([self.activations_at([self.hook], part)[0] for part in self._batches(torch.atleast_2d(ids))])
        return found if ids.ndim == 2 else found[0]

    def tokens(self, text: str) -> list[str]:
        """Return the strings of the tokens of a text, BOS included: one for each row of `activations(text)`.

        Where a character is spread over several tokens, the last of them has it and the others are empty, so that the
        strings joined are the text behind BOS.
        """
        return token_strings(self.tokenizer, self.token_ids(text).tolist())

    def token_ids(self, text: str) -> Int[Tensor, " ctx"]:
        """Return the token ids of a text, with BOS before them."""
        return torch.tensor([self.bos, *self.tokenizer(text, add_special_tokens=False)["input_ids"]])

    def activations_at(self, hooks: Sequence[str], tokens: Int[Tensor, "n ctx"]) -> list[Float[Tensor, "n ctx d_in"]]:
        """Return the activations at several hooks in float32, from one pass that stops at the last of them."""
        sites = [locate(self._model, hook).site for hook in hooks]
        found = self._read(tokens, sites)
        return [centre(acts) for acts in found] if self.centred else found

    def restart_points(self, tokens: np.ndarray | Int[Tensor, "n ctx"]) -> Tensor | None:
        """Return the input of the hook's own block, so that `cross_entropy` need not run the blocks below it.

        A hook at the output of attention or of an MLP needs this, [n, ctx, d_model], since the block adds its input to
        what is spliced in there. At other hooks what is spliced in is all that the blocks above need, and this returns
        None.
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
        """Return the next-token cross-entropy, in nats, of every token after the first.

        Args:
            tokens: the token ids.
            splice: what replaces the activations at the hook; only what lies above the hook runs then.
            restart_points: what `restart_points` returned for the same tokens.
        """
        passes = self.predictions(tokens, splice, restart_points)
        return torch.cat([next_token_loss(p.logits, p.tokens)[0] for p in passes])

    def logits(
        self,
        tokens: np.ndarray | Int[Tensor, "n ctx"],
        splice: Float[Tensor, "n ctx d_in"] | None = None,
        restart_points: Tensor | None = None,
    ) -> Float[Tensor, "n ctx n_vocabulary"]:
        """Return the logits of every position in the model's number format; arguments as for `cross_entropy`."""
        return torch.cat([p.logits for p in self.predictions(tokens, splice, restart_points)])

    def predictions(
        self,
        tokens: np.ndarray | Int[Tensor, "n ctx"],
        splice: Float[Tensor, "n ctx d_in"] | None = None,
        restart_points: Tensor | None = None,
    ) -> Iterator[Predictions]:
        """Yield the model's predictions for a few blocks at a time; arguments as for `cross_entropy`."""
        start = 0
        for part in self._batches(tokens):
            rows = slice(start, start + len(part))
            start = rows.stop
            restart = None if restart_points is None else restart_points[rows]
            with self._alone, torch.no_grad(), self._unembedding_seen() as seen, ExitStack() as replacements:
                if splice is not None:
                    replacements.enter_context(self._spliced(splice[rows], restart))
                logits = self._model(input_ids=part, use_cache=False).logits
            ((hidden, unembedded),) = seen
            # Gemma 2 caps its logits after the unembedding, and then the KL divergence cannot be found from hidden
            # states (evaluation/predictions.py).
            linear = logits is unembedded or torch.equal(logits, unembedded)
            yield Predictions(part, rows, hidden[:, :-1].float() if linear else None, logits)

    def _batches(self, tokens: np.ndarray | Tensor) -> Iterator[Tensor]:
        if isinstance(tokens, np.ndarray):
            tokens = torch.from_numpy(tokens.astype(np.int64))
        self.check_tokens(tokens)
        if tokens.shape[1] > self.max_ctx:
            raise ValueError(f"ctx {tokens.shape[1]}: {self.name} takes at most {self.max_ctx} tokens")
        rows = max(1, self.batch_tokens // tokens.shape[1])
        return (part.to(self.device) for part in tokens.split(rows))

    @torch.no_grad()
    def _read(self, tokens: Tensor, sites: Sequence[Site]) -> list[Tensor]:
        """Return the tensors at some sites in float32, from one pass that stops as soon as all have been seen."""
        seen: dict[Site, Tensor] = {}

        def note(site: Site, value: Tensor) -> Tensor:
            seen[site] = value
            if len(seen) == len(set(sites)):
                raise _StopError
            return value

        with self._alone, ExitStack() as hooks:
            for site in dict.fromkeys(sites):  # each site once, though two hooks may name the same one
                hooks.enter_context(hooked(self._model, site, partial(note, site)))
            try:
                self._model.base_model(input_ids=tokens.to(self.device), use_cache=False)
            except _StopError:
                return [seen[site].float() for site in sites]
        raise ValueError(f"hook {self.hook!r}: the model's forward pass never reaches it")

    @contextmanager
    def _unembedding_seen(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Collect the input and output of the unembedding in every forward pass within this context."""
        seen: list[tuple[Tensor, Tensor]] = []
        head = self._model.get_output_embeddings()
        handle = head.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def _spliced(self, acts: Tensor, restart: Tensor | None) -> Iterator[None]:
        """Put activations in place of the model's at the hook, and skip all blocks that need not run.

        Without the restart points of a hook that needs them, the blocks below run.
        """
        with ExitStack() as changes:
            if self._restart is None or restart is not None:
                changes.enter_context(skipped(self._blocks_below))
            if self._restart is not None and restart is not None:
                changes.enter_context(hooked(self._model, self._restart, restart.to))
            # `acts.to` takes the model's tensor and returns `acts` in that tensor's number format and on its device.
            changes.enter_context(hooked(self._model, self._site, acts.to))
            yield


def next_token_loss(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for every token after the first, its cross-entropy and the log of the softmax's denominator.

    Both are [n, ctx - 1], in nats, and computed in float32 from logits in any number format.
    """
    # All positions are computed, so that the logits need not be copied; what the last one predicts is dropped.
    following = tokens.roll(-1, dims=1).flatten()
    rows = logits.flatten(0, 1)
    n = max(1, LOGITS_AT_ONCE // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    parts = [_loss_of_rows(part, after) for part, after in zip(rows.split(n), following.split(n), strict=True)]
    loss, log_denominator = (torch.cat(part).view(tokens.shape) for part in zip(*parts, strict=True))
    return loss[:, :-1], log_denominator[:, :-1]


def _loss_of_rows(logits: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    # Softmax over a vocabulary needs more digits than bf16 or fp16 logits have.
    logits = logits.float()
    loss = torch.nn.functional.cross_entropy(logits, following, reduction="none")
    # loss = log_denominator - chosen logit
    return loss, loss + logits.gather(1, following[:, None])[:, 0]
