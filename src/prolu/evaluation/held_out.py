"""Held-out text or rows, and everything about them that does not depend on an SAE, computed once."""

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.kept_tokens import kept_of_scored
from prolu.activations.language_model import DTYPES, LanguageModel
from prolu.activations.rows import ActivationRows
from prolu.activations.stream import ActivationStream
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.token_mask import NO_MASK, TokenMask
from prolu.evaluation.predictions import clean_predictions
from prolu.evaluation.truth import TruthFigures, truth_figures
from prolu.runtime.checks import at_least_1
from prolu.runtime.files import json_text
from prolu.runtime.progress import Meter
from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE

MOST_BLOCKS = 1000
"""The most blocks into which held-out rows are divided, each of which counts as a document."""


def choose_blocks(blocks: TokenBlocks | ActivationRows, n_tokens: int) -> np.ndarray:
    """Return the numbers, in ascending order, of the held-out blocks that hold `n_tokens` tokens (or all there are).

    They are chosen among the first `held_out_pool` tokens, or the first `n_tokens` if that is more: so the choice does
    not depend on how much was read, and all SAEs that are scored on one text are scored on the same tokens. Fewer
    tokens are a subset of more.
    """
    n_blocks = math.ceil(n_tokens / blocks.ctx)
    n_in_pool = len(blocks.held_out)
    if blocks.held_out_pool:
        n_in_pool = min(n_in_pool, max(n_blocks, math.ceil(blocks.held_out_pool / blocks.ctx)))
    # The same key wherever held-out blocks are chosen: the pages of latents show the text that the scores are of.
    order = torch.randperm(n_in_pool, generator=keyed_generator("held-out"))
    return order[:n_blocks].sort().values.numpy()


def held_out_digest(blocks: TokenBlocks | ActivationRows, n_tokens: int, mask: TokenMask = NO_MASK) -> str:
    """Return SHA-256 of the tokens, or rows, that are scored when `n_tokens` are asked for.

    Of tokens it is also one of how blocks divide them, and of what a mask leaves out.

    Two studies may be compared if it is the same: `data_digest` is of the training text as well, so it differs between
    studies that were trained on more or less text and scored on the same.
    """
    chosen = choose_blocks(blocks, n_tokens)
    if isinstance(blocks, ActivationRows):
        return blocks.digest_of_held_out(chosen)
    tokens = blocks.held_out[chosen]
    # One width of ids, whatever the width in which they are kept.
    digest = hashlib.sha256(repr(tokens.shape).encode())
    digest.update(np.ascontiguousarray(tokens, "<u4").data)
    if left_out := mask.describe():
        digest.update(json_text(left_out).encode())
    return digest.hexdigest()


class NotFiniteError(ValueError, FloatingPointError):
    """The language model's own predictions are not finite, so no SAE in it can be scored.

    It is a ValueError where a request is checked, and a FloatingPointError where its work has begun.
    """


class HeldOutRows:
    """Held-out rows: all that is needed to score an SAE on activations that come from no language model.

    Rows in the order of their numbers are divided into blocks, which take the place of documents: rows that lie
    together, as those of one recording, are often alike, and so they are drawn together.
    """

    hook_out = ""
    """Rows have no second hook."""
    unit = "block"
    """What `documents` counts."""
    first_apart = False
    """All positions of a block are alike."""
    kept = None
    """Rows are all scored."""

    def __init__(self, rows: ActivationRows, n_tokens: int = 32_768):
        """Choose the rows and read them.

        Args:
            rows: the rows; the choice depends on them alone.
            n_tokens: how many held-out rows to use; all there are if it is more.

        Raises:
            ValueError: `n_tokens` is less than 1.
        """
        at_least_1("eval_tokens", n_tokens)
        chosen = choose_blocks(rows, n_tokens)
        self.acts: Float[Tensor, "n ctx d_in"] = rows.held_out[chosen].float()
        self.target: Float[Tensor, "n ctx d_in"] = self.acts
        self._truth = rows.truth
        self._codes = None if rows.truth is None else rows.truth.codes(chosen).flatten(0, 1)
        n = self.n_tokens
        self.documents = np.arange(min(n, MOST_BLOCKS))
        self.document_rows = (np.arange(n) * len(self.documents) // n).reshape(self.acts.shape[:2])
        """For each row, the block that it counts for, [n, ctx]."""

    @property
    def n_tokens(self) -> int:
        """The number of rows scored."""
        return self.acts.shape[0] * self.acts.shape[1]

    def check(self, sae: SAE) -> None:
        """Raise ValueError unless an SAE has the width of these rows, and is no transcoder."""
        _check_fits(sae, self)

    def truth(self, sae: SAE) -> TruthFigures | None:
        """Return the scores of an SAE against the true features of synthetic rows, or None for all other rows."""
        if self._truth is None or self._codes is None:
            return None
        return truth_figures(sae, self.acts.flatten(0, 1), self._codes, self._truth.directions)


class HeldOut:
    """Held-out token blocks, with everything about them that does not depend on an SAE, computed once."""

    first_apart = True
    """Whether figures are also taken without position 0 of each block, where BOS stands."""

    def __init__(
        self,
        lm: LanguageModel,
        blocks: TokenBlocks,
        n_tokens: int = 32_768,
        *,
        hook_out: str = "",
        mask: TokenMask = NO_MASK,
        progress: bool = False,
    ):
        """Choose the blocks and run the language model on them.

        What a mask leaves out is not replaced by reconstructions, and counts in no figure. A prediction counts if it is
        made at a token that is kept, whichever token comes next.

        Args:
            lm: the language model, at the hook whose activations are reconstructed.
            blocks: the text; the choice of held-out blocks depends on it alone.
            n_tokens: how many held-out tokens to use; all there are if it is more.
            hook_out: the hook that transcoders write at, whose activations their outputs replace; empty for SAEs.
            mask: what is left out, as in the `mask` of a stream, which knows the norm above which activations are.
            progress: whether to show how far the passes of the language model have come.

        Raises:
            ValueError: `n_tokens` is less than 1, no block is held out, or the mask leaves nothing or lacks `max_norm`.
            NotFiniteError: the language model's cross-entropy on these blocks is not finite.
        """
        at_least_1("eval_tokens", n_tokens)
        if not len(blocks.held_out):
            raise ValueError("these token blocks hold out none for evaluation; at least 1 is needed")
        chosen = choose_blocks(blocks, n_tokens)
        numbers = blocks.held_out_documents
        self.lm = lm.at(hook_out) if hook_out else lm
        """The language model at the hook whose activations are replaced."""
        self.hook_out = hook_out
        self.tokens = blocks.held_out[chosen]
        self.unit = "block" if numbers is None else "document"
        """What `documents` counts: documents, or blocks where it is not known which token belongs to which document."""
        numbers = np.repeat(chosen[:, None], blocks.ctx, 1) if numbers is None else numbers[chosen]
        self.documents, rows = np.unique(numbers, return_inverse=True)
        self.document_rows = rows.reshape(numbers.shape)
        """For each token, the row of its document in `documents`, [n, ctx]."""
        self.mask = mask
        """What is left out."""
        # Passes over the activations, without an SAE, without all positions, and without all but the first.
        n_passes = 5 if hook_out else 4
        with Meter("scoring the language model", n_passes * self.tokens.size, shown=progress) as meter:
            self._read(lm, blocks, chosen, lambda: meter.advance(self.tokens.size))

    def _read(self, lm: LanguageModel, blocks: TokenBlocks, chosen: np.ndarray, passed: Callable[[], None]) -> None:
        """Run the language model on the tokens, and call `passed` after each pass."""
        self.acts: Float[Tensor, "n ctx d_in"] = lm.activations(self.tokens)
        passed()
        self.target: Float[Tensor, "n ctx d_out"] = self.acts
        """What is reconstructed, and replaced: the activations themselves, or for transcoders those at `hook_out`."""
        if self.hook_out:
            self.target = self.lm.activations(self.tokens)
            passed()
        self.kept = kept_of_scored(self.mask, lm, blocks, chosen, self.acts)
        """Which tokens are scored, [n, ctx]; None if all are."""
        self.restart_points = self.lm.restart_points(self.tokens)
        self.clean = clean_predictions(self.lm, self.tokens)
        passed()
        self.ce_clean = self.of_counted(self.clean.ce).double().mean().item()
        if not math.isfinite(self.ce_clean):
            raise _not_finite(lm, self.tokens[(~self.clean.ce.isfinite()).any(1).cpu().numpy()][:1])
        zeros = self.pass_through_(torch.zeros_like(self.target))
        self.ce_zero = self.spliced_ce(zeros)
        passed()
        zeros[:, 0] = self.target[:, 0]
        self.ce_zero_no_bos = self.spliced_ce(zeros)
        passed()

    @property
    def n_tokens(self) -> int:
        """The number of tokens scored."""
        return self.tokens.size if self.kept is None else int(self.kept.sum())

    def pass_through_(self, recon: Float[Tensor, "n ctx d_out"]) -> Float[Tensor, "n ctx d_out"]:
        """Overwrite the reconstructions of masked tokens with their true activations, in place, and return the tensor.

        So the language model sees a change only at the tokens that are scored.
        """
        if self.kept is not None:
            recon[~self.kept] = self.target[~self.kept]
        return recon

    def of_counted(self, values: Float[Tensor, "n ctx_minus_1"]) -> Tensor:
        """Return the values of the predictions that count, of those of every token after the first of a block."""
        return values if self.kept is None else values[self.kept[:, :-1]]

    def check(self, sae: SAE) -> None:
        """Raise ValueError unless an SAE has the widths of these activations, and is a transcoder if need be."""
        _check_fits(sae, self)

    def spliced_ce(self, recon: Float[Tensor, "n ctx d_out"]) -> float:
        """Return the mean cross-entropy with `recon` in place of the activations, in nats per predicted token."""
        return self.of_counted(self.lm.cross_entropy(self.tokens, recon, self.restart_points)).double().mean().item()


AnyHeldOut = HeldOut | HeldOutRows
"""What an SAE is scored on."""


def held_out_of(stream: ActivationStream, n_tokens: int, *, progress: bool = False) -> AnyHeldOut:
    """Return what SAEs that are trained on a stream are scored on, about `n_tokens` tokens or rows.

    With `progress`, what the language model needs for that is shown.
    """
    if isinstance(stream.blocks, ActivationRows):
        return HeldOutRows(stream.blocks, n_tokens)
    return HeldOut(stream.lm, stream.blocks, n_tokens, hook_out=stream.hook_out, mask=stream.mask, progress=progress)


def _check_fits(sae: SAE, held_out: AnyHeldOut) -> None:
    if sae.is_transcoder != bool(held_out.hook_out):
        needs = "needs a hook_out" if sae.is_transcoder else "has none"
        kind = "a transcoder" if sae.is_transcoder else "an SAE"
        raise ValueError(f"hook_out {held_out.hook_out!r}: {kind} {needs}")
    widths = (held_out.acts.shape[-1], held_out.target.shape[-1])
    if (sae.d_in, sae.d_out) != widths:
        raise ValueError(f"the SAE has widths {(sae.d_in, sae.d_out)}, and the activations have {widths}")


@torch.no_grad()
def _not_finite(lm: LanguageModel, tokens: np.ndarray) -> NotFiniteError:
    """Return the error for a token block on which the model's predictions are not finite: where, and what to try."""
    ids = torch.from_numpy(tokens.astype(np.int64)).to(lm.device)
    hidden = lm.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states or ()
    # The embedding's output comes first, then that of each transformer block.
    first = next((i for i, values in enumerate(hidden) if not values.isfinite().all()), None)
    where = "in the logits" if first is None else f"in block {first - 1}" if first else "in the embedding"
    name = next((name for name, dtype in DTYPES.items() if dtype == lm.dtype), str(lm.dtype))
    # fp16 ends at 65,504; the other formats reach 3e38, where not the format but the weights are wrong.
    advice = "use --lm-dtype bf16 or fp32" if name == "fp16" else "its weights may be damaged"
    return NotFiniteError(
        f"lm_dtype {name}: the predictions of {lm.name} on held-out text are not finite, from values {where} on; "
        f"{advice}"
    )
