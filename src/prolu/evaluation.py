"""Held-out scores: the only place where an SAE and a language model meet."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.blocks import TokenBlocks
from prolu.lm import LanguageModel
from prolu.metrics import CodeSums, ReconstructionSums, cross_entropy_figures
from prolu.rng import keyed_generator
from prolu.sae import SAE, normalise

ENTRIES_PER_PASS = 2**21
"""Latents held at once: 8 MB in fp32, which stays in the cache."""

WITHOUT_BOS = "_no_bos"
"""Suffix of the figures that leave position 0 alone: not counted, and in the splice its true activation."""


class HeldOut:
    """A fixed choice of held-out blocks with everything that no SAE changes, computed once."""

    def __init__(self, lm: LanguageModel, blocks: TokenBlocks, n_tokens: int = 32_768):
        """Args: `n_tokens` is cut to what there is; the choice depends on the blocks alone."""
        n_blocks = min(math.ceil(n_tokens / blocks.ctx), len(blocks.held_out))
        if n_blocks < 1:
            raise ValueError(f"eval_tokens {n_tokens}: must be at least 1")
        order = torch.randperm(len(blocks.held_out), generator=keyed_generator("held-out"))
        self.lm = lm
        self.tokens = blocks.held_out[order[:n_blocks].sort().values.numpy()]
        self.acts: Float[Tensor, "n ctx d_in"] = lm.activations(self.tokens)
        self.restart_points = lm.restart_points(self.tokens)
        zeros = torch.zeros_like(self.acts)
        self.ce_clean = lm.cross_entropy(self.tokens).double().mean().item()
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


@torch.no_grad()
def evaluate(sae: SAE, held_out: HeldOut) -> dict[str, float]:
    """All figures of section 4, each with all positions and, under `_no_bos`, without position 0.

    l0, l1, sqrt_l1, mse and fvu in the space the SAE works in; fvu_raw in the model's own; ce_* and
    degradation in nats per token.
    """
    figures, recon = _reconstruct(sae, held_out)
    figures |= cross_entropy_figures(held_out.ce_clean, held_out.spliced_ce(recon), held_out.ce_zero)
    recon[:, 0] = held_out.acts[:, 0]
    kept = cross_entropy_figures(held_out.ce_clean, held_out.spliced_ce(recon), held_out.ce_zero_no_bos)
    return figures | {name + WITHOUT_BOS: value for name, value in kept.items()}


@torch.no_grad()
def probe(sae: SAE, held_out: HeldOut) -> dict[str, float]:
    """The figures that need no language model: what the convergence rule looks at, and more."""
    return _reconstruct(sae, held_out)[0]


def _reconstruct(sae: SAE, held_out: HeldOut) -> tuple[dict[str, float], Float[Tensor, "n ctx d_in"]]:
    d_in, d_sae, scaled = sae.config.d_in, sae.config.d_sae, sae.config.normalisation == "per_token"
    device = sae.W_dec.device
    position_0, rest = _Sums(d_in, d_sae), _Sums(d_in, d_sae)
    recon = torch.empty_like(held_out.acts)
    blocks = max(1, ENTRIES_PER_PASS // (held_out.acts.shape[1] * d_sae))
    for start in range(0, len(recon), blocks):
        raw = held_out.acts[start : start + blocks].to(device=device, dtype=sae.W_dec.dtype)
        x, norms = normalise(raw) if scaled else (raw, raw.new_full(raw.shape[:-1], math.sqrt(d_in)))
        latents = sae.encode_normalised(x)
        out = sae.decode(latents)
        raw_out = out * (norms / math.sqrt(d_in))[..., None]
        recon[start : start + blocks] = raw_out
        for sums, positions in ((position_0, slice(0, 1)), (rest, slice(1, None))):
            sums.update(*(t[:, positions].flatten(0, 1) for t in (latents, x, out, raw, raw_out)))
    without_bos = {name + WITHOUT_BOS: value for name, value in rest.figures().items()}
    position_0.merge(rest)
    return position_0.figures() | without_bos, recon


class _Sums:
    """All that needs no language model, over some of the tokens."""

    def __init__(self, d_in: int, d_sae: int):
        self._code, self._scaled, self._raw = CodeSums(d_sae), ReconstructionSums(d_in), ReconstructionSums(d_in)

    def update(self, latents: Tensor, x: Tensor, out: Tensor, raw: Tensor, raw_out: Tensor) -> None:
        self._code.update(latents)
        self._scaled.update(x, out)
        self._raw.update(raw, raw_out)

    def merge(self, other: "_Sums") -> None:
        self._code.merge(other._code)
        self._scaled.merge(other._scaled)
        self._raw.merge(other._raw)

    def figures(self) -> dict[str, float]:
        scores = {"mse": self._scaled.mse, "fvu": self._scaled.fvu, "fvu_raw": self._raw.fvu}
        return self._code.figures() | scores
