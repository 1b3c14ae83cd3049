"""Scores with a mask are those of a plain computation over the tokens that are kept."""

import numpy as np
import pytest
import torch

from prolu import ActivationStream, HeldOut, SAEConfig, TokenMask
from prolu.evaluation.held_out import choose_blocks, held_out_digest, held_out_of
from prolu.evaluation.scoring import probe, score, score_prefix
from prolu.report.latents.firings import HeldOutText, collect
from prolu.sae.autoencoder import SAE
from prolu.training.starting_weights import initial_weights


@pytest.fixture(scope="module")
def sae():
    config = SAEConfig(d_in=16, d_sae=48, nonlinearity="relu")
    return SAE(config, initial_weights(config, 0, initial_bias=-0.1))


@pytest.fixture(params=["special", "positions", "norm", "all"])
def mask(request, tiny_lm, tiny_blocks, monkeypatch):
    ids, counts = np.unique(tiny_blocks.held_out[:, 1:], return_counts=True)
    frequent = int(ids[counts.argmax()])
    monkeypatch.setattr("prolu.activations.kept_tokens.special_token_ids", lambda _: np.array([0, frequent]))
    norm = tiny_lm.activations(tiny_blocks.held_out).norm(dim=-1).quantile(0.9).item()
    special, positions, large = {"exclude_special_tokens": True}, {"exclude_positions": 3}, {"max_norm": norm}
    found = {"special": special, "positions": positions, "norm": large, "all": special | positions | large}
    return TokenMask(**found[request.param]), frequent


def kept_by_hand(mask, frequent, tokens, acts):
    kept = np.ones(tokens.shape, bool)
    for i, row in enumerate(tokens):
        for j, token in enumerate(row):
            if mask.exclude_special_tokens and token in (0, frequent):
                kept[i, j] = False
            if j < mask.exclude_positions:
                kept[i, j] = False
            if mask.max_norm is not None and acts[i, j].norm() > mask.max_norm:
                kept[i, j] = False
    return kept


def by_hand(sae, held_out, kept):
    """Figures in float64 from per-token values: every token is reconstructed by itself."""
    acts = held_out.acts
    recon = sae(acts.reshape(-1, 16)).reshape(acts.shape)
    x = (acts * 4 / acts.norm(dim=-1, keepdim=True)).double()
    error = (x - (recon * 4 / acts.norm(dim=-1, keepdim=True)).double()).square().sum(-1)
    latents = sae.encode(acts.reshape(-1, 16)).reshape(*acts.shape[:2], -1).double()
    seen = torch.from_numpy(kept)
    figures = {}
    for suffix, first in (("", 0), ("_no_bos", 1)):
        here = seen.clone()
        here[:, :first] = False
        counted = seen[:, :-1]
        put, zeros = (torch.where(here[..., None], t, acts) for t in (recon, torch.zeros_like(acts)))
        clean, with_recon, with_zeros = (
            held_out.lm.cross_entropy(held_out.tokens, t).double()[counted].mean().item() for t in (acts, put, zeros)
        )
        spread = (x[here] - x[here].mean(0)).square().sum()
        figures |= {
            "l0": (latents[here] > 0).double().sum(1).mean().item(),
            "l1": latents[here].sum(1).mean().item(),
            "dead_fraction": (latents[here] > 0).any(0).logical_not().double().mean().item(),
            "mse": error[here].mean().item() / 16,
            "fvu": (error[here].sum() / spread).item(),
            "ce_clean": clean,
            "degradation": with_recon - clean,
            "recovered": (with_zeros - with_recon) / (with_zeros - clean),
        } if not suffix else {
            "l0_no_bos": (latents[here] > 0).double().sum(1).mean().item(),
            "mse_no_bos": error[here].mean().item() / 16,
            "degradation_no_bos": with_recon - clean,
            "recovered_no_bos": (with_zeros - with_recon) / (with_zeros - clean),
        }  # fmt: skip
    return figures


@torch.no_grad()
def test_figures_are_those_of_a_plain_computation(mask, sae, tiny_lm, tiny_blocks):
    mask, frequent = mask
    held_out = HeldOut(tiny_lm, tiny_blocks, 640, mask=mask)
    kept = kept_by_hand(mask, frequent, held_out.tokens, held_out.acts)
    assert 0.05 < (~kept).mean() < 0.6
    assert held_out.n_tokens == kept.sum()
    scores = score(sae, held_out)
    for name, value in by_hand(sae, held_out, kept).items():
        assert scores.figures[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert probe(sae, held_out) == {name: scores.figures[name] for name in ("l0", "mse")}
    assert score_prefix(sae, held_out, 48)["degradation"] == scores.figures["degradation"]
    documents = scores.documents
    assert documents.n_tokens.sum() == kept.sum()
    assert documents.n_predicted.sum() == kept[:, :-1].sum()
    assert documents.l0.sum() / documents.n_tokens.sum() == pytest.approx(scores.figures["l0"])
    for name in ("ce_clean", "ce_recon", "kl"):
        assert getattr(documents, name).sum() / documents.n_predicted.sum() == pytest.approx(
            scores.figures[name], rel=1e-6
        )


def test_a_mask_that_leaves_nothing_out_gives_the_same_bits(sae, tiny_lm, tiny_blocks):
    plain, masked = HeldOut(tiny_lm, tiny_blocks, 640), HeldOut(tiny_lm, tiny_blocks, 640, mask=TokenMask(max_norm=1e9))
    assert score(sae, plain).figures == score(sae, masked).figures


def test_without_the_first_position_both_kinds_of_figures_are_one(sae, tiny_lm, tiny_blocks):
    figures = score(sae, HeldOut(tiny_lm, tiny_blocks, 640, mask=TokenMask(exclude_positions=1))).figures
    plain = score(sae, HeldOut(tiny_lm, tiny_blocks, 640)).figures
    for name in ("l0", "mse", "fvu", "norm_ratio", "degradation"):
        assert figures[name] == figures[f"{name}_no_bos"]
    for name in ("l0", "mse", "fvu", "scale_gain_half", "decoder_projection_half"):
        wanted = plain[f"{name}_no_bos"] if f"{name}_no_bos" in plain else plain[name]
        assert figures[name] == pytest.approx(wanted, rel=1e-12)


def test_the_digest_of_what_is_scored_knows_the_mask(tiny_blocks):
    masks = [TokenMask(), TokenMask(exclude_positions=1), TokenMask(exclude_special_tokens=True), TokenMask(max_norm=2)]
    assert len({held_out_digest(tiny_blocks, 640, mask) for mask in masks}) == 4
    assert held_out_digest(tiny_blocks, 640, masks[0]) == held_out_digest(tiny_blocks, 640)


def test_a_stream_and_what_it_is_scored_on_have_one_mask(tiny_lm, tiny_blocks):
    stream = ActivationStream(tiny_lm, tiny_blocks, 64, mask=TokenMask(max_norm_multiple=1.2))
    held_out = held_out_of(stream, 640)
    assert held_out.mask == stream.mask
    assert torch.equal(held_out.kept, held_out.acts.norm(dim=-1) <= stream.mask.max_norm)
    with pytest.raises(ValueError, match=r"max_norm_multiple 1.2: the norm that it stands for is not known"):
        HeldOut(tiny_lm, tiny_blocks, 640, mask=TokenMask(max_norm_multiple=1.2))
    with pytest.raises(ValueError, match=r"leaves out activations of a norm above 1e-06, and so all held-out tokens"):
        HeldOut(tiny_lm, tiny_blocks, 640, mask=TokenMask(max_norm=1e-6))


def test_pages_of_latents_show_no_token_that_is_left_out(mask, sae, tiny_lm, tiny_blocks):
    mask, frequent = mask
    text = HeldOutText.read(tiny_lm, tiny_blocks, 640, lambda n: None, mask)
    kept = kept_by_hand(mask, frequent, tiny_blocks.held_out[choose_blocks(tiny_blocks, 640)], text.acts)
    kept[:, 0] = False
    firings = collect(sae, text, 4)
    latents = sae.encode(text.acts.flatten(0, 1))[torch.from_numpy(kept.ravel())]
    assert firings.n_tokens == kept.sum()
    assert firings.n_active.tolist() == (latents > 0).sum(0).tolist()
    shown = [e.position for latent in firings.examples for some in (latent.strongest, *latent.bands) for e in some]
    assert kept.ravel()[shown].all()
