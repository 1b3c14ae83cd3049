"""Synthetic rows have the features, frequencies and magnitudes that their settings name."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from prolu import ActivationStream
from prolu.activations.synthetic import EASY, HARD, NAMED, SyntheticFeatures, features_named

SOME = SyntheticFeatures(
    d_in=12, n_features=40, l0=4.0, zipf=0.8, correlation=0.6, n_topics=3, children=0.5, magnitude_spread=0.7, noise=0.1
)
N_BLOCKS = 800
N_ROWS = 256 * N_BLOCKS


def codes_of(features, n_blocks=N_BLOCKS):
    return features.rows(256 * n_blocks).train.codes(np.arange(n_blocks)).flatten(0, 1)


def test_a_row_is_a_pure_function_of_settings_and_number():
    rows = SOME.rows(5000).train
    assert rows.shape == (20, 256, 12)
    some = rows[np.array([7, 0, 19])]
    for i, number in enumerate((7, 0, 19)):
        assert torch.equal(SOME.rows(5000).train[np.array([number])][0], some[i])
        # Asking for more rows does not change what comes first.
        assert torch.equal(SOME.rows(90_000).train[np.array([number])][0], some[i])
    assert not torch.equal(some[0], some[1])
    assert not torch.equal(some[0], SOME.rows(5000).held_out[np.array([7])][0])
    assert not torch.equal(some[0], replace(SOME, seed=1).rows(5000).train[np.array([7])][0])


def test_rows_are_the_sums_of_their_codes_and_noise():
    rows = SOME.rows(N_ROWS).train
    chosen = np.arange(200)
    codes = rows.codes(chosen)
    error = (rows[chosen] - codes @ SOME.truth.directions).flatten(0, 1).double()
    assert (codes >= 0).all()
    assert error.mean(0).abs().max() < 5 * 0.1 / math.sqrt(len(error))
    covariance = error.T @ error / len(error)
    torch.testing.assert_close(covariance, 0.01 * torch.eye(12, dtype=torch.float64), atol=4e-4, rtol=0)
    quiet = replace(SOME, noise=0.0).rows(N_ROWS).train
    assert torch.equal(quiet[chosen[:1]][0], quiet.codes(chosen[:1])[0] @ SOME.truth.directions)


def test_directions_are_unit_vectors_and_a_coordinate_has_a_variance_of_about_1():
    assert SOME.truth.directions.norm(dim=1) == pytest.approx(np.ones(40))
    for features in NAMED.values():
        x = features.rows(50_000).train[np.arange(190)]
        assert x.square().mean().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("features", [SOME, EASY, HARD, replace(SOME, zipf=3.0, l0=1.5)])
def test_every_feature_is_active_as_often_as_it_is_meant_to_be(features):
    frequency = features.truth.frequency
    assert frequency.sum().item() == pytest.approx(features.l0)
    assert (frequency.diff() <= 0).all()
    assert frequency.max() <= 0.5
    free = frequency < 0.5
    expected = torch.arange(1, features.n_features + 1, dtype=torch.float64) ** -features.zipf
    ratio = (frequency / expected)[free]
    assert ratio == pytest.approx(ratio[0].item() * np.ones(len(ratio)))
    n = 256 * 200
    counts = (codes_of(features, 200) > 0).sum(0)
    # Rows are independent, so counts are binomial; of some 700 features none is 4.5 standard deviations off.
    deviation = (counts - n * frequency) / (n * frequency * (1 - frequency)).sqrt()
    assert deviation.abs().max() < 4.5


def test_children_are_active_only_where_their_parents_are():
    truth = SOME.truth
    children = (truth.parent >= 0).nonzero()[:, 0]
    assert len(children) > 8
    assert (truth.parent[truth.parent[children]] == -1).all()
    assert (truth.frequency[truth.parent[children]] >= 2 * truth.frequency[children]).all()
    active = codes_of(SOME, 100) > 0
    assert not (active[:, children] & ~active[:, truth.parent[children]]).any()
    assert (replace(SOME, children=0.0).truth.parent == -1).all()


def phi(active):
    """The correlations of being active."""
    return torch.corrcoef(active.T.double())


def test_features_are_active_together_as_their_topics_say():
    features = replace(SOME, children=0.0, zipf=0.0, correlation=0.8)
    shared = 0.8 * features.truth.topics @ features.truth.topics.T
    found = phi(codes_of(features, 200) > 0)
    off = ~torch.eye(40, dtype=bool)
    assert torch.corrcoef(torch.stack([shared[off], found[off]]))[0, 1] > 0.9
    assert found[off].max() > 0.3
    apart = phi(codes_of(replace(features, correlation=0.0), 200) > 0)[off]
    assert apart.abs().max() < 5 / math.sqrt(256 * 200)


def test_magnitudes_are_log_normal_with_the_spread_and_mean_that_were_asked_for():
    codes = codes_of(SOME, 100)
    logs = codes[codes > 0].double().log()
    assert logs.std().item() == pytest.approx(0.7, rel=0.01)
    assert logs.mean().item() == pytest.approx(math.log(SOME.truth.magnitude) - 0.7**2 / 2, abs=0.01)
    assert codes[codes > 0].mean().item() == pytest.approx(SOME.truth.magnitude, rel=0.02)
    even = codes_of(replace(SOME, magnitude_spread=0.0), 10)
    assert set(even.unique().tolist()) == {0.0, np.float32(math.sqrt(12 / 4))}


def test_a_stream_of_them_is_described_by_the_settings_alone():
    described = ActivationStream.from_rows(SOME.rows(5000, 300), batch_size=64).describe()
    assert described["synthetic"]["zipf"] == 0.8
    assert (described["rows"], described["held_out_rows"], described["ctx"]) == (5120, 512, 256)
    digests = {f.rows(5000).digest() for f in (SOME, replace(SOME, seed=1), replace(SOME, zipf=0.9))}
    assert len(digests | {SOME.rows(6000).digest()}) == 4
    assert SOME.rows(5000, name="other").digest() in digests


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"n_features": 0}, "n_features 0: must be at least 1"),
        ({"l0": 200.0}, "l0 200: must be above 0, and at most 128 with 256 features"),
        ({"l0": 0.0}, "l0 0: must be above 0"),
        ({"correlation": 1.0}, "correlation 1: must be at least 0 and less than 1"),
        ({"children": -0.1}, "children -0.1: must be at least 0"),
        ({"zipf": -1.0}, "zipf -1: must be a number of at least 0"),
        ({"noise": math.inf}, "noise inf: must be a number of at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        SyntheticFeatures(**settings)


def test_some_features_have_names():
    assert features_named("hard") is HARD
    assert features_named("even") == replace(HARD, magnitude_spread=0.0)
    with pytest.raises(ValueError, match="synthetic 'soft': choose one of easy, hard, even"):
        features_named("soft")
