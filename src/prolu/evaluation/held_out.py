"""Held-out scores: the only place where an SAE and a language model meet."""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.language_model import LanguageModel
from prolu.activations.token_blocks import TokenBlocks
from prolu.evaluation.document_sums import DocumentSums, summed_by_document
from prolu.evaluation.latents import LatentFigures, latent_figures, scale_response
from prolu.evaluation.metrics import CodeSums, ReconstructionSums, cross_entropy_figures
from prolu.evaluation.predictions import clean_predictions, spliced_losses
from prolu.runtime.checks import at_least_1
from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE
from prolu.sae.scaling import normalise

ENTRIES_PER_PASS = 2**21
"""Latents held at once: 8 MB in fp32, which stays in the cache."""

WITHOUT_BOS = "_no_bos"
"""Suffix of the figures that leave position 0 alone: not counted, and in the splice its true activation."""


def choose_blocks(blocks: TokenBlocks, n_tokens: int) -> np.ndarray:
    """Return the numbers, in ascending order, of the held-out blocks that hold `n_tokens` tokens (or all there are).

    The choice depends on the blocks alone, so all SAEs that are scored on them are scored on the same tokens. Fewer
    tokens are a subset of more.
    """
    # The same key wherever held-out blocks are chosen: the pages of latents show the text that the scores are of.
    order = torch.randperm(len(blocks.held_out), generator=keyed_generator("held-out"))
    n_blocks = min(math.ceil(n_tokens / blocks.ctx), len(order))
    return order[:n_blocks].sort().values.numpy()


class HeldOut:
    """A fixed choice of held-out blocks with everything that no SAE changes, computed once."""

    def __init__(self, lm: LanguageModel, blocks: TokenBlocks, n_tokens: int = 32_768):
        """Args: `n_tokens` is cut to what there is; the choice depends on the blocks alone."""
        at_least_1("eval_tokens", n_tokens)
        if not len(blocks.held_out):
            raise ValueError("these token blocks hold out none for evaluation; at least 1 is needed")
        self.lm = lm
        chosen = choose_blocks(blocks, n_tokens)
        self.tokens = blocks.held_out[chosen]
        numbers = blocks.held_out_documents
        self.unit = "block" if numbers is None else "document"
        """What `documents` counts: documents, or blocks where it is not known which token is of which."""
        numbers = np.repeat(chosen[:, None], blocks.ctx, 1) if numbers is None else numbers[chosen]
        self.documents, places = np.unique(numbers, return_inverse=True)
        self.places = places.reshape(numbers.shape)
        """Of every token, the row of its document."""
        self.acts: Float[Tensor, "n ctx d_in"] = lm.activations(self.tokens)
        self.restart_points = lm.restart_points(self.tokens)
        zeros = torch.zeros_like(self.acts)
        self.clean = clean_predictions(lm, self.tokens)
        self.ce_clean = self.clean.ce.double().mean().item()
        self.ce_zero = self.spliced_ce(zeros)
        zeros[:, 0] = self.acts[:, 0]
        self.ce_zero_no_bos = self.spliced_ce(zeros)

    @property
    def n_tokens(self) -> int:
        """Tokens scored."""
        return self.tokens.size

    def spliced_ce(self, recon: Float[Tensor, "n ctx d_in"]) -> float:
        """Mean cross-entropy in nats with `recon` in place of the activations."""
        return self.lm.cross_entropy(self.tokens, recon, self.restart_points).double().mean().item()


class Scores(NamedTuple):
    """All that is found of one SAE."""

    figures: dict[str, float]
    """A line of results, but for its settings."""
    documents: DocumentSums
    latents: LatentFigures


def evaluate(sae: SAE, held_out: HeldOut) -> dict[str, float]:
    """All figures of section 4, each with all positions and, under `_no_bos`, without position 0.

    l0, l1, sqrt_l1, mse and fvu in the space the SAE works in; fvu_raw in the model's own; ce_*, degradation and
    kl in nats per token.
    """
    return score(sae, held_out).figures


@torch.no_grad()
def score(sae: SAE, held_out: HeldOut) -> Scores:
    """The figures of `evaluate`, with sums by document and vectors by latent."""
    found = _reconstruct(sae, held_out)
    figures, recon = found.figures(), found.recon
    ce, kl = spliced_losses(held_out.lm, held_out.tokens, recon, held_out.restart_points, held_out.clean)
    figures |= cross_entropy_figures(held_out.ce_clean, ce.double().mean().item(), held_out.ce_zero)
    figures["kl"] = kl.mean().item()
    recon[:, 0] = held_out.acts[:, 0]
    ce_kept, kl_kept = spliced_losses(held_out.lm, held_out.tokens, recon, held_out.restart_points, held_out.clean)
    kept = cross_entropy_figures(held_out.ce_clean, ce_kept.double().mean().item(), held_out.ce_zero_no_bos)
    kept["kl"] = kl_kept.mean().item()
    figures |= {name + WITHOUT_BOS: value for name, value in kept.items()}
    latents = latent_figures(sae, found.all.code)
    figures |= latents.summary()
    by_scale = scale_response(sae, held_out.acts, [0.5, 2.0])
    for name, response in (("half", by_scale[0.5]), ("double", by_scale[2.0])):
        figures |= {f"scale_gain_{name}": response.gain, f"scale_on_{name}": response.still_active}
    return Scores(figures, _by_document(held_out, found, ce, kl), latents)


def _by_document(held_out: HeldOut, found: "_Reconstruction", ce: Tensor, kl: Tensor) -> DocumentSums:
    n, ones = len(held_out.documents), np.ones(held_out.places.shape)
    everywhere = {"n_tokens": ones, "l0": found.l0.numpy(), "squared_error": found.squared_error.numpy()}
    predicted = {"n_predicted": ones[:, 1:], "ce_clean": held_out.clean.ce, "ce_recon": ce, "kl": kl}
    predicted = {name: np.asarray(torch.as_tensor(value).cpu()) for name, value in predicted.items()}
    sums = summed_by_document(held_out.places, n, everywhere)
    sums |= summed_by_document(held_out.places[:, 1:], n, predicted)
    return DocumentSums(document=held_out.documents.astype(np.uint32), **sums)


@torch.no_grad()
def probe(sae: SAE, held_out: HeldOut) -> dict[str, float]:
    """The figures that need no language model: what the convergence rule looks at, and more."""
    return _reconstruct(sae, held_out).figures()


def _reconstruct(sae: SAE, held_out: HeldOut) -> "_Reconstruction":
    d_in, d_sae, scaled = sae.config.d_in, sae.config.d_sae, sae.config.normalisation == "per_token"
    device = sae.W_dec.device
    position_0, rest = _Sums(d_in, d_sae), _Sums(d_in, d_sae)
    recon = torch.empty_like(held_out.acts)
    per_token = torch.empty(2, *held_out.tokens.shape)
    blocks = max(1, ENTRIES_PER_PASS // (held_out.acts.shape[1] * d_sae))
    for start in range(0, len(recon), blocks):
        rows = slice(start, start + blocks)
        raw = held_out.acts[rows].to(device=device, dtype=sae.W_dec.dtype)
        x, norms = normalise(raw) if scaled else (raw, raw.new_full(raw.shape[:-1], math.sqrt(d_in)))
        latents = sae.encode_normalised(x)
        out = sae.decode(latents)
        raw_out = out * (norms / math.sqrt(d_in))[..., None]
        recon[rows] = raw_out
        per_token[0, rows] = torch.gt(latents, 0, out=torch.empty_like(latents)).sum(-1).cpu()
        per_token[1, rows] = (x - out).square().sum(-1).cpu()
        for sums, positions in ((position_0, slice(0, 1)), (rest, slice(1, None))):
            sums.update(*(t[:, positions].flatten(0, 1) for t in (latents, x, out, raw, raw_out)))
    position_0.merge(rest)
    return _Reconstruction(recon, per_token[0], per_token[1], position_0, rest)


class _Sums:
    """All that needs no language model, over some of the tokens."""

    def __init__(self, d_in: int, d_sae: int):
        self.code, self._scaled, self._raw = CodeSums(d_sae), ReconstructionSums(d_in), ReconstructionSums(d_in)

    def update(self, latents: Tensor, x: Tensor, out: Tensor, raw: Tensor, raw_out: Tensor) -> None:
        self.code.update(latents)
        self._scaled.update(x, out)
        self._raw.update(raw, raw_out)

    def merge(self, other: "_Sums") -> None:
        self.code.merge(other.code)
        self._scaled.merge(other._scaled)
        self._raw.merge(other._raw)

    def figures(self) -> dict[str, float]:
        scores = {name: getattr(self._scaled, name) for name in ("mse", "fvu", "norm_ratio", "relative_bias")}
        return self.code.figures() | scores | {"fvu_raw": self._raw.fvu}


class _Reconstruction(NamedTuple):
    """What an SAE makes of the held-out activations."""

    recon: Float[Tensor, "n ctx d_in"]
    """In the model's own scale."""
    l0: Float[Tensor, "n ctx"]
    squared_error: Float[Tensor, "n ctx"]
    """Normalised space."""
    all: _Sums
    without_bos: _Sums

    def figures(self) -> dict[str, float]:
        without = {name + WITHOUT_BOS: value for name, value in self.without_bos.figures().items()}
        return self.all.figures() | without
