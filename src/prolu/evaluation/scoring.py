"""The scores of an SAE on held-out text or rows: the only place where an SAE and a language model meet."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prolu.evaluation.document_sums import DocumentSums, summed_by_document
from prolu.evaluation.held_out import AnyHeldOut, HeldOut, HeldOutRows
from prolu.evaluation.l0_proxies import l0_proxies
from prolu.evaluation.latents import LatentFigures, latent_figures, scale_response
from prolu.evaluation.metrics import CodeSums, ReconstructionSums, active_as_numbers, cross_entropy_figures
from prolu.evaluation.predictions import spliced_losses
from prolu.evaluation.truth import TruthFigures
from prolu.sae.autoencoder import SAE
from prolu.sae.scaling import normalise

ENTRIES_PER_PASS = 2**21
"""The number of latents computed at once: 8 MB in float32, which stays in the cache while the sums are taken."""

WITHOUT_BOS = "_no_bos"
"""The suffix of figures without position 0 of each block, where BOS stands.

Position 0 is not counted in them, and keeps its true activation when the SAE is in place. In GPT-2 its norm is so large
that it would dominate figures of raw activations.
"""

PREFIX_FIGURES = ("l0", "l1", "mse", "fvu", "ce_recon", "degradation", "recovered", "kl")
"""The figures of a prefix of an SAE that was trained with a nested loss."""


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
        # In place, since `recon` is as large as all held-out activations, and its own position 0 is not needed any
        # more.
        recon[:, 0] = held_out.target[:, 0]
        without = _splice(held_out, recon).figures(held_out.ce_clean, held_out.ce_zero_no_bos)
        figures |= {name + WITHOUT_BOS: value for name, value in without.items()}
    else:
        figures = found.figures() | NO_PREDICTIONS
    latents = latent_figures(sae, found.all.code)
    figures |= latents.summary()
    acts, first_too = _rows_without_bos(held_out)
    responses = scale_response(sae, acts, [0.5, 2.0], first_too=first_too)
    for name, response in (("half", responses[0.5]), ("double", responses[2.0])):
        figures |= {f"scale_gain_{name}": response.gain, f"scale_on_{name}": response.still_active}
    figures |= l0_proxies(sae, acts, first_too=first_too)
    truth = held_out.truth(sae) if isinstance(held_out, HeldOutRows) else None
    figures |= truth.summary() if truth is not None else {}
    return Scores(figures, _by_document(held_out, found, spliced), latents, truth)


def _rows_without_bos(held_out: AnyHeldOut) -> tuple[Float[Tensor, "n ctx d_in"], bool]:
    """Return activations, and whether position 0 of each block is among those that are scored."""
    if held_out.kept is None:
        return held_out.acts, not held_out.first_apart
    kept = held_out.kept.clone()
    kept[:, 0] = False
    return held_out.acts[kept][:, None], True


@torch.no_grad()
def probe(sae: SAE, held_out: AnyHeldOut) -> dict[str, float]:
    """Return L0 and MSE as `evaluate` does, to the bit; the convergence rule needs no other figures."""
    # Position 0 and the others are summed apart, and then added, as `_reconstruct` does.
    sides = (slice(0, 1), slice(1, None)) if held_out.first_apart else (slice(None),)
    active = 0.0
    errors = [0.0] * len(sides)
    for part in _passes(sae, held_out):
        active += active_as_numbers(part.at(slice(None), part.latents, held_out.kept)).sum(dtype=torch.float64).item()
        for i, positions in enumerate(sides):
            x, out = (part.at(positions, t, held_out.kept).double().cpu() for t in (part.x, part.out))
            errors[i] += (x - out).square().sum().item()
    n_tokens = held_out.n_tokens
    return {"l0": active / n_tokens, "mse": sum(errors) / (n_tokens * sae.d_out)}


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
    held_out: HeldOut

    def figures(self, ce_clean: float, ce_zero: float) -> dict[str, float]:
        ce, kl = (self.held_out.of_counted(values) for values in (self.ce, self.kl))
        # float64: the CE increase is a small difference of two means of float32 losses.
        return cross_entropy_figures(ce_clean, ce.double().mean().item(), ce_zero) | {"kl": kl.mean().item()}


def _splice(held_out: HeldOut, recon: Float[Tensor, "n ctx d_out"]) -> _Spliced:
    losses = spliced_losses(held_out.lm, held_out.tokens, recon, held_out.restart_points, held_out.clean)
    return _Spliced(*losses, held_out)


class _Sums:
    """Sums over tokens, from which the figures follow that need an SAE and activations but no language model."""

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
    """The reconstructions, in the scale of the language model's activations; at tokens left out, the activations
    themselves."""
    l0: Float[Tensor, "n ctx"]
    """The number of active latents of each token; 0 at those left out."""
    squared_error: Float[Tensor, "n ctx"]
    """||x - x_hat||^2 of each token, in the space the SAE works in; 0 at those left out."""
    all: _Sums
    without_bos: _Sums | None
    """The sums over all positions but 0; None for rows, which have no such position."""

    def figures(self) -> dict[str, float]:
        if self.without_bos is None:
            return self.all.figures()
        without = {name + WITHOUT_BOS: value for name, value in self.without_bos.figures().items()}
        return self.all.figures() | without


class _Pass(NamedTuple):
    """Some blocks of held-out tokens and what an SAE makes of them. Of a transcoder, x is the target y."""

    rows: slice
    """Which blocks."""
    latents: Float[Tensor, "n ctx d_sae"]
    x: Float[Tensor, "n ctx d_out"]
    """In the space that the SAE works in."""
    out: Float[Tensor, "n ctx d_out"]
    """The reconstruction of x."""
    raw: Float[Tensor, "n ctx d_out"]
    """x in the scale of the language model's activations."""
    raw_out: Float[Tensor, "n ctx d_out"]
    """The reconstruction in that scale."""

    def at(
        self, positions: slice, values: Float[Tensor, "n ctx d"], kept: Bool[Tensor, "all_n ctx"] | None
    ) -> Float[Tensor, "tokens d"]:
        """Return the values of the tokens at some positions, without those that are left out."""
        chosen = values[:, positions].flatten(0, 1)
        return chosen if kept is None else chosen[kept[self.rows, positions].flatten().to(chosen.device)]


def _passes(sae: SAE, held_out: AnyHeldOut, n_latents: int | None = None) -> Iterator[_Pass]:
    """Yield what an SAE makes of the held-out activations, pass by pass, from its first `n_latents` latents or all."""
    held_out.check(sae)
    d_in = sae.config.d_in
    d_sae = sae.config.d_sae
    is_scaled = sae.config.normalisation == "per_token"
    n_blocks, ctx = held_out.target.shape[:2]
    blocks_per_pass = max(1, ENTRIES_PER_PASS // (ctx * d_sae))
    for start in range(0, n_blocks, blocks_per_pass):
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
        yield _Pass(rows, latents, x, out, raw, raw_out)


def _reconstruct(sae: SAE, held_out: AnyHeldOut, n_latents: int | None = None) -> _Reconstruction:
    """Return what an SAE makes of the held-out activations, from its first `n_latents` latents or from all."""
    position_0 = _Sums(sae.d_out, sae.config.d_sae)
    rest = _Sums(sae.d_out, sae.config.d_sae)
    recon = torch.empty_like(held_out.target)
    l0 = torch.empty(recon.shape[:2])
    squared_error = torch.empty(recon.shape[:2])
    # Position 0 is summed apart, so that figures with it and without it come from one pass.
    apart = ((position_0, slice(0, 1)), (rest, slice(1, None)))
    sides = apart if held_out.first_apart else ((rest, slice(None)),)
    for part in _passes(sae, held_out, n_latents):
        recon[part.rows] = part.raw_out
        l0[part.rows] = active_as_numbers(part.latents).sum(-1).cpu()
        squared_error[part.rows] = (part.x - part.out).square().sum(-1).cpu()
        for sums, positions in sides:
            chosen = [part.at(positions, t, held_out.kept) for t in part[1:]]
            if len(chosen[0]):  # a mask may leave nothing
                sums.update(*chosen)
    if isinstance(held_out, HeldOut) and held_out.kept is not None:
        held_out.pass_through_(recon)
        l0, squared_error = (t * held_out.kept.cpu() for t in (l0, squared_error))
    if not held_out.first_apart:
        return _Reconstruction(recon, l0, squared_error, all=rest, without_bos=None)
    position_0.merge(rest)
    return _Reconstruction(recon, l0, squared_error, all=position_0, without_bos=rest)


def _by_document(held_out: AnyHeldOut, found: _Reconstruction, spliced: _Spliced | None) -> DocumentSums:
    n = len(held_out.documents)
    ones = np.ones(held_out.document_rows.shape) if held_out.kept is None else held_out.kept.cpu().numpy() * 1.0
    of_tokens = {"n_tokens": ones, "l0": found.l0.numpy(), "squared_error": found.squared_error.numpy()}
    sums = summed_by_document(held_out.document_rows, n, of_tokens)
    if spliced is None or not isinstance(held_out, HeldOut):
        none = {name: np.zeros(n) for name in ("n_predicted", "ce_clean", "ce_recon", "kl")}
        return DocumentSums(document=held_out.documents.astype(np.uint32), **sums, **none)
    counted = ones[:, :-1]
    of_predictions = {
        "n_predicted": counted,
        "ce_clean": held_out.clean.ce.cpu().numpy() * counted,
        "ce_recon": spliced.ce.cpu().numpy() * counted,
        "kl": spliced.kl.cpu().numpy() * counted,
    }
    # A prediction counts for the document of the token that is predicted, the next one.
    sums |= summed_by_document(held_out.document_rows[:, 1:], n, of_predictions)
    return DocumentSums(document=held_out.documents.astype(np.uint32), **sums)
