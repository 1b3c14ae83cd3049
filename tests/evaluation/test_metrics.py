"""The laws that every figure obeys."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prolu.evaluation.metrics import CodeSums, ReconstructionSums, cross_entropy_figures


def reconstruction(x, recon, parts=1):
    sums = ReconstructionSums(x.shape[1])
    for a, b in zip(x.chunk(parts), recon.chunk(parts), strict=True):
        sums.update(a, b)
    return sums


def data(seed, n=1024, d=7):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) + torch.arange(d)
    return x, x + 0.3 * torch.randn(n, d, generator=g, dtype=torch.float64)


@given(st.integers(0, 99), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_scaling_and_shifting_leave_fvu_alone_and_scaling_squares_mse(seed, scale, shift):
    x, recon = data(seed)
    plain = reconstruction(x, recon)
    assert reconstruction(scale * x, scale * recon).fvu == pytest.approx(plain.fvu, rel=1e-9)
    assert reconstruction(scale * x, scale * recon).mse == pytest.approx(scale**2 * plain.mse, rel=1e-9)
    assert reconstruction(x + shift, recon + shift).fvu == pytest.approx(plain.fvu, rel=1e-9)


def test_batching_changes_nothing():
    x, recon = data(0)
    one, four, odd = (reconstruction(x, recon, parts) for parts in (1, 4, 7))
    assert four.fvu == pytest.approx(one.fvu, rel=1e-13)
    assert odd.mse == pytest.approx(one.mse, rel=1e-13)
    latents = torch.relu(x)
    whole, split = CodeSums(7), CodeSums(7)
    whole.update(latents)
    for part in latents.split(256):
        split.update(part)
    assert split.figures() == pytest.approx(whole.figures(), rel=1e-13)


def test_perfect_mean_and_biased_reconstructions():
    x, _ = data(1)
    assert reconstruction(x, x).fvu == 0
    assert reconstruction(x, x).mse == 0
    assert reconstruction(x, x.mean(0).expand_as(x), 4).fvu == pytest.approx(1, rel=1e-12)
    assert reconstruction(x, x + 2).mse == pytest.approx(4, rel=1e-12)
    assert reconstruction(x, x + 2).fvu > 0


def test_a_large_mean_costs_no_digits():
    x, recon = data(2)
    far = reconstruction(x + 1e6, recon + 1e6, 4)
    assert far.fvu == pytest.approx(reconstruction(x, recon).fvu, rel=1e-7)


def test_constant_data():
    x = torch.ones(10, 3)
    assert reconstruction(x, x).fvu == 0
    assert reconstruction(x, x + 1).fvu == math.inf


def test_code_figures_are_means_per_token():
    sums = CodeSums(3)
    sums.update(torch.tensor([[0.0, 4.0, 0.0], [1.0, 9.0, 0.0]]))
    means = {"l0": 1.5, "l1": 7.0, "sqrt_l1": 3.0, "dead_fraction": 1 / 3, "dense_fraction": 2 / 3}
    means["frequent_fraction"] = 2 / 3
    assert sums.figures() == pytest.approx(means)


def test_cross_entropy_figures():
    figures = cross_entropy_figures(2.0, 2.5, 6.0)
    assert figures["degradation"] == 0.5
    assert figures["recovered"] == 0.875
    assert figures["degradation_bits"] == pytest.approx(0.5 / math.log(2))
    assert math.isnan(cross_entropy_figures(2.0, 2.0, 2.0)["recovered"])


def test_shrinkage():
    x, recon = data(3)
    assert reconstruction(x, 0.8 * x).norm_ratio == pytest.approx(0.8)
    assert reconstruction(x, 0.8 * x).relative_bias == pytest.approx(0.8)
    assert reconstruction(5 * x, 5 * recon, 4).relative_bias == pytest.approx(reconstruction(x, recon).relative_bias)
    gamma = reconstruction(x, 0.7 * recon).relative_bias
    loss = [(0.7 * recon / g - x).square().sum().item() for g in (gamma * 0.999, gamma, gamma * 1.001)]
    assert loss[1] < min(loss[0], loss[2])
    assert reconstruction(x, recon, 4).norm_ratio == pytest.approx(reconstruction(x, recon).norm_ratio, rel=1e-13)
    assert math.isnan(reconstruction(x, 0 * x).relative_bias)
    assert math.isnan(reconstruction(0 * x, x).norm_ratio)
