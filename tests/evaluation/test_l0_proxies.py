"""Proxies of the right L0, by their laws and definitions: decoder cosines and projections, and frequent latents."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import normalize

from prolu import SAE, SAEConfig, evaluate
from prolu.evaluation import l0_proxies
from prolu.evaluation.held_out import HeldOut
from prolu.evaluation.l0_proxies import decoder_pairwise_cosine, nth_decoder_projections
from prolu.evaluation.metrics import CodeSums
from prolu.training.starting_weights import initial_weights


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def sae_of(d_sae=37, d_in=11, seed=0, **config):
    made = SAEConfig(d_in=d_in, d_sae=d_sae, nonlinearity="relu", **config)
    sae = SAE(made, initial_weights(made, seed))
    sae.b_dec.data = rows(1, d_in, 7)[0]
    return sae


def plain_cosine(decoder):
    unit = normalize(decoder.double(), dim=1)
    return (unit @ unit.T).abs().triu(1).sum().item() / math.comb(len(decoder), 2)


@pytest.mark.parametrize("n", [2, 63, 64, 65, 129])
def test_decoder_cosine_is_its_equation_however_it_is_cut(n, monkeypatch):
    monkeypatch.setattr(l0_proxies, "ROWS_PER_PASS", 64)
    assert decoder_pairwise_cosine(rows(n, 13)) == pytest.approx(plain_cosine(rows(n, 13)), rel=1e-6)


def test_order_lengths_and_signs_of_rows_leave_the_decoder_cosine_alone():
    decoder = rows(70, 9)
    scales = rows(70, 1, 1) * 3
    assert (scales < 0).any()
    moved = (decoder * scales)[torch.randperm(70, generator=torch.Generator().manual_seed(2))]
    assert decoder_pairwise_cosine(moved) == pytest.approx(decoder_pairwise_cosine(decoder), rel=1e-6)


def test_decoder_cosines_that_are_known():
    assert decoder_pairwise_cosine(torch.eye(8)) == 0
    assert decoder_pairwise_cosine(rows(1, 8).expand(5, 8)) == pytest.approx(1)
    # Rows with zeros only, as another library may leave dead latents, are at right angles to all.
    assert decoder_pairwise_cosine(torch.tensor([[1.0, 0], [2, 0], [0, 0]])) == pytest.approx(1 / 3)
    assert math.isnan(decoder_pairwise_cosine(rows(1, 8)))


@pytest.mark.parametrize("d", [3, 16, 128])
def test_random_rows_have_the_expected_decoder_cosine(d):
    expected = math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
    # 1.1 million pairs, of which those without a common row are independent: the error is below 1%.
    assert decoder_pairwise_cosine(rows(1500, d)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("normalisation", ["per_token", "none"])
@pytest.mark.parametrize("n", [0, 1, 9, 18, 36])
def test_a_projection_is_its_equation(n, normalisation):
    sae = sae_of(normalisation=normalisation)
    sae.W_dec.data *= 1 + rows(37, 1, 3).abs()
    acts = rows(5 * 9, 11, 4).reshape(5, 9, 11) * 2
    x = acts[:, 1:].flatten(0, 1).double()
    if normalisation == "per_token":
        x = x * math.sqrt(11) / x.norm(dim=1, keepdim=True)
    z = (x - sae.b_dec.double()) @ normalize(sae.W_dec.double(), dim=1).T
    expected = z.flatten().sort(descending=True).values[n * len(x)].item()
    assert nth_decoder_projections(sae, acts, [n, 5])[0] == pytest.approx(expected, rel=1e-5)


def test_order_and_lengths_of_rows_leave_a_projection_alone():
    sae, other = sae_of(), sae_of()
    acts = rows(40 * 50, 11, 4).reshape(40, 50, 11)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(2))
    other.W_dec.data = (sae.W_dec * (0.5 + rows(37, 1, 3).abs()))[order]
    assert nth_decoder_projections(sae, acts, [9, 18]) == pytest.approx(nth_decoder_projections(other, acts, [9, 18]))


def test_both_are_lowest_where_rows_are_the_true_features():
    """As in the paper's toy models: independent sparse features, and rows into which others are mixed."""
    features = torch.eye(32)
    firing = rows(64 * 33, 32, 1).reshape(64, 33, 32).gt(1.2).float()
    found = []
    for mixed in (0.0, 0.1, 0.3):
        sae = sae_of(d_sae=32, d_in=32, normalisation="none")
        sae.b_dec.data.zero_()
        sae.W_dec.data = normalize(features + mixed * rows(32, 32, 2), dim=1)
        found.append([decoder_pairwise_cosine(sae.W_dec), *nth_decoder_projections(sae, firing @ features, [8])])
    assert found[0] == [0, 0]
    assert found[0] < found[1] < found[2]
    assert all(low < high for a, b in pairwise(found) for low, high in zip(a, b, strict=True))


def test_frequent_latents_are_those_above_one_percent():
    code = CodeSums(4)
    latents = torch.zeros(200, 4)
    latents[:2, 1] = 1
    latents[:3, 2] = 1
    latents[:, 3] = 1
    code.update(latents)
    assert code.figures()["frequent_fraction"] == 0.5
    assert code.figures()["dense_fraction"] == 0.25


def test_an_evaluation_records_them(tiny_lm, tiny_blocks):
    held_out = HeldOut(tiny_lm, tiny_blocks, 640)
    sae = sae_of(d_sae=40, d_in=16)
    figures = evaluate(sae, held_out)
    assert figures["decoder_cosine"] == pytest.approx(plain_cosine(sae.W_dec.detach()), rel=1e-6)
    half, quarter = nth_decoder_projections(sae, held_out.acts, [20, 10])
    assert (figures["decoder_projection_half"], figures["decoder_projection_quarter"]) == (half, quarter)
    assert half < quarter
    assert figures["dense_fraction"] <= figures["frequent_fraction"] <= 1 - figures["dead_fraction"]
    assert "frequent_fraction_no_bos" in figures
