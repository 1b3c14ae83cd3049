"""The scores of an SAE on held-out text or rows: the only place where an SAE and a language model meet."""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.language_model import DTYPES, LanguageModel
from prolu.activations.rows import Rows
from prolu.activations.stream import ActivationStream
from prolu.activations.token_blocks import TokenBlocks
from prolu.evaluation.document_sums import DocumentSums, summed_by_document
from prolu.evaluation.l0_proxies import l0_proxies
from prolu.evaluation.latents import LatentFigures, latent_figures, scale_response
from prolu.evaluation.metrics import CodeSums, ReconstructionSums, active_as_numbers, cross_entropy_figures
from prolu.evaluation.predictions import clean_predictions, spliced_losses
from prolu.evaluation.truth import TruthFigures, truth_figures
from prolu.runtime.checks import at_least_1
from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE
from prolu.sae.scaling import normalise

ENTRIES_PER_PASS = 2**21
"""The number of latents computed at once: 8 MB in float32, which stays in the cache while the sums are taken."""

WITHOUT_BOS = "_no_bos"
"""The suffix of figures without position 0 of each block, where BOS stands.

Position 0 is not counted in them, and keeps its true activation when the SAE is in place. In GPT-2 its norm is so large
that it would dominate figures of raw activations.
"""

MOST_BLOCKS = 1000
"""The most blocks into which held-out rows are divided, each of which counts as a document."""

PREFIX_FIGURES = ("l0", "l1", "mse", "fvu", "ce_recon", "degradation", "recovered", "kl")
"""The figures of a prefix of an SAE that was trained with a nested loss."""


def choose_blocks(blocks: TokenBlocks | Rows, n_tokens: int) -> np.ndarray:
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


def held_out_digest(blocks: TokenBlocks | Rows, n_tokens: int) -> str:
    """Return SHA-256 of the tokens, or rows, that are scored when `n_tokens` are asked for.

    Of tokens it is also one of how blocks divide them.

    Two studies may be compared if it is the same: `data_digest` is of the training text as well, so it differs between
    studies that were trained on more or less text and scored on the same.
    """
    chosen = choose_blocks(blocks, n_tokens)
    if isinstance(blocks, Rows):
        return blocks.digest_of_held_out(chosen)
    tokens = blocks.held_out[chosen]
    # One width of ids, whatever the width in which they are kept.
    digest = hashlib.sha256(repr(tokens.shape).encode())
    digest.update(np.ascontiguousarray(tokens, "<u4").data)
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

    def __init__(self, rows: Rows, n_tokens: int = 32_768):
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
        """Return how an SAE stands to the features that the rows are made of; None where these are not known."""
        if self._truth is None or self._codes is None:
            return None
        return truth_figures(sae, self.acts.flatten(0, 1), self._codes, self._truth.directions)


class HeldOut:
    """Held-out token blocks, with everything about them that does not depend on an SAE, computed once."""

    first_apart = True
    """Whether figures are also taken without position 0 of each block, where BOS stands."""

    def __init__(self, lm: LanguageModel, blocks: TokenBlocks, n_tokens: int = 32_768, *, hook_out: str = ""):
        """Choose the blocks and run the language model on them.

        Args:
            lm: the language model, at the hook whose activations are reconstructed.
            blocks: the text; the choice of held-out blocks depends on it alone.
            n_tokens: how many held-out tokens to use; all there are if it is more.
            hook_out: the hook that transcoders write at, whose activations their outputs replace; empty for SAEs.

        Raises:
            ValueError: `n_tokens` is less than 1, or no block is held out.
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
        self.acts: Float[Tensor, "n ctx d_in"] = lm.activations(self.tokens)
        self.target: Float[Tensor, "n ctx d_out"] = self.lm.activations(self.tokens) if hook_out else self.acts
        """What is reconstructed, and replaced: the activations themselves, or for transcoders those at `hook_out`."""
        self.restart_points = self.lm.restart_points(self.tokens)
        self.clean = clean_predictions(self.lm, self.tokens)
        self.ce_clean = self.clean.ce.double().mean().item()
        if not math.isfinite(self.ce_clean):
            raise _not_finite(lm, self.tokens[(~self.clean.ce.isfinite()).any(1).cpu().numpy()][:1])
        zeros = torch.zeros_like(self.target)
        self.ce_zero = self.spliced_ce(zeros)
        zeros[:, 0] = self.target[:, 0]
        self.ce_zero_no_bos = self.spliced_ce(zeros)

    @property
    def n_tokens(self) -> int:
        """The number of tokens scored."""
        return self.tokens.size

    def check(self, sae: SAE) -> None:
        """Raise ValueError unless an SAE has the widths of these activations, and is a transcoder if need be."""
        _check_fits(sae, self)

    def spliced_ce(self, recon: Float[Tensor, "n ctx d_out"]) -> float:
        """Return the mean cross-entropy with `recon` in place of the activations, in nats per predicted token."""
        return self.lm.cross_entropy(self.tokens, recon, self.restart_points).double().mean().item()


AnyHeldOut = HeldOut | HeldOutRows
"""What an SAE is scored on."""


def held_out_of(stream: ActivationStream, n_tokens: int) -> AnyHeldOut:
    """Return what SAEs that are trained on a stream are scored on, about `n_tokens` tokens or rows."""
    if isinstance(stream.blocks, Rows):
        return HeldOutRows(stream.blocks, n_tokens)
    return HeldOut(stream.lm, stream.blocks, n_tokens, hook_out=stream.hook_out)


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


class Scores(NamedTuple):
    """The scores of one SAE."""

    figures: dict[str, float]
    """The figures of `evaluate`: a line of results.jsonl without the run's settings."""
    documents: DocumentSums
    latents: LatentFigures
    truth: TruthFigures | None = None
    """How the SAE stands to the features that its rows are made of; None where these are not known."""

    def save(self, folder: Path) -> None:
        """Write all but the figures into a run's folder."""
        self.documents.save(folder)
        self.latents.save(folder)
        if self.truth is not None:
            self.truth.save(folder)


def evaluate(sae: SAE, held_out: AnyHeldOut) -> dict[str, float]:
    """Return all figures of an SAE on held-out text or rows, under the names that results.jsonl has.

    - Of the code: `l0`, `l1`, `sqrt_l1`, `dead_fraction`, `dense_fraction`, `frequent_fraction`
      (`metrics.CodeSums`).
    - Of the reconstruction, in the space that the SAE works in: `mse`, `fvu`, `norm_ratio`, `relative_bias`; in the
      language model's own: `fvu_raw` (`metrics.ReconstructionSums`).
    - Of the language model's predictions: `ce_clean`, `ce_recon`, `ce_zero`, `degradation` (the CE increase),
      `degradation_bits`, `recovered` (`metrics.cross_entropy_figures`), and `kl`, the mean over predicted tokens of
      KL(clean predictions || predictions with reconstructions), in nats, at least 0.
    - Of the latents: `negative_bias_fraction`, `encoder_decoder_cosine` (`latents.LatentFigures`), `scale_gain_half`,
      `scale_on_half`, `scale_gain_double`, `scale_on_double` (`latents.Response` at scales 1/2 and 2).
    - Of whether the L0 is the right one: `decoder_cosine`, `decoder_projection_half`, `decoder_projection_quarter`
      (`l0_proxies`).

    The first three kinds come twice: over all positions, and with the suffix `_no_bos` without position 0 of blocks.
    Rows have no such position, and those of the third kind are nan for them. Rows that are made of known features have
    the figures of `truth.TruthFigures` besides.
    """
    return score(sae, held_out).figures


@torch.no_grad()
def score(sae: SAE, held_out: AnyHeldOut) -> Scores:
    """Return the figures of `evaluate`, together with sums by document and numbers by latent."""
    found = _reconstruct(sae, held_out)
    spliced = None
    if isinstance(held_out, HeldOut):
        recon = found.recon
        spliced = _splice(held_out, recon)
        figures = found.figures() | spliced.figures(held_out.ce_clean, held_out.ce_zero)
        # In place: `recon` is as large as all held-out activations, and needed no more with its position 0.
        recon[:, 0] = held_out.target[:, 0]
        without = _splice(held_out, recon).figures(held_out.ce_clean, held_out.ce_zero_no_bos)
        figures |= {name + WITHOUT_BOS: value for name, value in without.items()}
    else:
        figures = found.figures() | NO_PREDICTIONS
    latents = latent_figures(sae, found.all.code)
    figures |= latents.summary()
    first_too = not held_out.first_apart
    responses = scale_response(sae, held_out.acts, [0.5, 2.0], first_too=first_too)
    for name, response in (("half", responses[0.5]), ("double", responses[2.0])):
        figures |= {f"scale_gain_{name}": response.gain, f"scale_on_{name}": response.still_active}
    figures |= l0_proxies(sae, held_out.acts, first_too=first_too)
    truth = held_out.truth(sae) if isinstance(held_out, HeldOutRows) else None
    figures |= truth.summary() if truth is not None else {}
    return Scores(figures, _by_document(held_out, found, spliced), latents, truth)


@torch.no_grad()
def probe(sae: SAE, held_out: AnyHeldOut) -> dict[str, float]:
    """Return the figures that need no language model, among them the L0 and MSE that the convergence rule looks at."""
    return _reconstruct(sae, held_out).figures()


@torch.no_grad()
def score_prefix(sae: SAE, held_out: AnyHeldOut, n_latents: int) -> dict[str, float]:
    """Return some figures of `evaluate` for the reconstruction from the first latents only, over all positions.

    The latents are those that the SAE gives; the others are left out of the reconstruction and of the counts. So this
    is a shorter SAE of a nested loss, whose selection of latents, where there is one, is made among all of them.

    Returns:
        `l0`, `l1`, `mse`, `fvu`, `ce_recon`, `degradation`, `recovered` and `kl`; of rows, the last four are nan.
    """
    found = _reconstruct(sae, held_out, n_latents)
    if isinstance(held_out, HeldOut):
        predicted = _splice(held_out, found.recon).figures(held_out.ce_clean, held_out.ce_zero)
    else:
        predicted = NO_PREDICTIONS
    figures = found.figures() | predicted
    return {name: figures[name] for name in PREFIX_FIGURES}


NO_PREDICTIONS = cross_entropy_figures(math.nan, math.nan, math.nan) | {"kl": math.nan}
"""The figures of a language model's predictions where there is no language model."""


class _Spliced(NamedTuple):
    """The language model's losses with reconstructions in place of the activations, for each predicted token."""

    ce: Float[Tensor, "n ctx_minus_1"]
    kl: Float[Tensor, "n ctx_minus_1"]

    def figures(self, ce_clean: float, ce_zero: float) -> dict[str, float]:
        # float64: the CE increase is a small difference of two means of float32 losses.
        figures = cross_entropy_figures(ce_clean, self.ce.double().mean().item(), ce_zero)
        return figures | {"kl": self.kl.mean().item()}


def _splice(held_out: HeldOut, recon: Float[Tensor, "n ctx d_out"]) -> _Spliced:
    return _Spliced(*spliced_losses(held_out.lm, held_out.tokens, recon, held_out.restart_points, held_out.clean))


class _Sums:
    """The sums over some of the tokens that need no language model."""

    def __init__(self, d_out: int, d_sae: int):
        self.code = CodeSums(d_sae)
        self._normalised = ReconstructionSums(d_out)
        self._raw = ReconstructionSums(d_out)

    def update(self, latents: Tensor, x: Tensor, out: Tensor, raw: Tensor, raw_out: Tensor) -> None:
        """Add tokens: their latents, and x and x_hat in the SAE's space and in the language model's.

        Of a transcoder x is the target y.
        """
        self.code.update(latents)
        self._normalised.update(x, out)
        self._raw.update(raw, raw_out)

    def merge(self, other: "_Sums") -> None:
        self.code.merge(other.code)
        self._normalised.merge(other._normalised)
        self._raw.merge(other._raw)

    def figures(self) -> dict[str, float]:
        normalised = {name: getattr(self._normalised, name) for name in ("mse", "fvu", "norm_ratio", "relative_bias")}
        return self.code.figures() | normalised | {"fvu_raw": self._raw.fvu}


class _Reconstruction(NamedTuple):
    """What an SAE makes of the held-out activations."""

    recon: Float[Tensor, "n ctx d_out"]
    """The reconstructions, in the scale of the language model's activations."""
    l0: Float[Tensor, "n ctx"]
    """The number of active latents of each token."""
    squared_error: Float[Tensor, "n ctx"]
    """||x - x_hat||^2 of each token, in the space the SAE works in."""
    all: _Sums
    without_bos: _Sums | None
    """The sums over all positions but 0; None for rows, which have no such position."""

    def figures(self) -> dict[str, float]:
        if self.without_bos is None:
            return self.all.figures()
        without = {name + WITHOUT_BOS: value for name, value in self.without_bos.figures().items()}
        return self.all.figures() | without


def _reconstruct(sae: SAE, held_out: AnyHeldOut, n_latents: int | None = None) -> _Reconstruction:
    """Return what an SAE makes of the held-out activations, from its first `n_latents` latents or from all."""
    held_out.check(sae)
    d_in = sae.config.d_in
    d_sae = sae.config.d_sae
    is_scaled = sae.config.normalisation == "per_token"
    position_0 = _Sums(sae.d_out, d_sae)
    rest = _Sums(sae.d_out, d_sae)
    recon = torch.empty_like(held_out.target)
    l0 = torch.empty(recon.shape[:2])
    squared_error = torch.empty(recon.shape[:2])
    # Position 0 is summed apart, so that figures with it and without it come from one pass.
    apart = ((position_0, slice(0, 1)), (rest, slice(1, None)))
    sides = apart if held_out.first_apart else ((rest, slice(None)),)
    blocks_per_pass = max(1, ENTRIES_PER_PASS // (held_out.acts.shape[1] * d_sae))
    for start in range(0, len(recon), blocks_per_pass):
        rows = slice(start, start + blocks_per_pass)
        raw = held_out.acts[rows].to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        # An SAE without per-token scaling gets the factor 1, as a token of norm sqrt(d_in) does.
        x, norms = normalise(raw) if is_scaled else (raw, raw.new_full(raw.shape[:-1], math.sqrt(d_in)))
        latents = sae.encode_normalised(x)
        latents[..., n_latents or d_sae :] = 0
        out = sae.reconstruct_normalised(latents, x)
        scale = (norms / math.sqrt(d_in))[..., None]
        raw_out = out * scale
        if sae.is_transcoder:
            # From here on x is what is reconstructed. It is scaled by the factor of the input, as in training.
            raw = held_out.target[rows].to(raw)
            x = torch.where(scale > 0, raw / scale, 0)
        recon[rows] = raw_out
        l0[rows] = active_as_numbers(latents).sum(-1).cpu()
        squared_error[rows] = (x - out).square().sum(-1).cpu()
        for sums, positions in sides:
            sums.update(*(t[:, positions].flatten(0, 1) for t in (latents, x, out, raw, raw_out)))
    if not held_out.first_apart:
        return _Reconstruction(recon, l0, squared_error, all=rest, without_bos=None)
    position_0.merge(rest)
    return _Reconstruction(recon, l0, squared_error, all=position_0, without_bos=rest)


def _by_document(held_out: AnyHeldOut, found: _Reconstruction, spliced: _Spliced | None) -> DocumentSums:
    n = len(held_out.documents)
    ones = np.ones(held_out.document_rows.shape)
    of_tokens = {"n_tokens": ones, "l0": found.l0.numpy(), "squared_error": found.squared_error.numpy()}
    sums = summed_by_document(held_out.document_rows, n, of_tokens)
    if spliced is None or not isinstance(held_out, HeldOut):
        none = {name: np.zeros(n) for name in ("n_predicted", "ce_clean", "ce_recon", "kl")}
        return DocumentSums(document=held_out.documents.astype(np.uint32), **sums, **none)
    of_predictions = {
        "n_predicted": ones[:, 1:],
        "ce_clean": held_out.clean.ce.cpu().numpy(),
        "ce_recon": spliced.ce.cpu().numpy(),
        "kl": spliced.kl.cpu().numpy(),
    }
    # A prediction counts for the document of the token that is predicted, the next one.
    sums |= summed_by_document(held_out.document_rows[:, 1:], n, of_predictions)
    return DocumentSums(document=held_out.documents.astype(np.uint32), **sums)
