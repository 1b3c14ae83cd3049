"""The laws of the scores against known features."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from prolu import SAE, RunConfig, SAEConfig, run_sweep
from prolu.activations.stream import ActivationStream
from prolu.activations.synthetic import SyntheticFeatures
from prolu.evaluation.truth import RESPONSE_EDGES, matched_latents, read_truth, truth_figures
from prolu.training.starting_weights import initial_weights

FEATURES = SyntheticFeatures(d_in=10, n_features=14, l0=2.0, zipf=0.3, magnitude_spread=0.6)


def rows_of(features, n_blocks=20):
    train = features.rows(256 * n_blocks).train
    chosen = np.arange(n_blocks)
    return train[chosen].flatten(0, 1), train.codes(chosen).flatten(0, 1)


def sae_with(decoder, encoder=None, bias=0.0, nonlinearity="relu", scales=None):
    """An SAE without scaling whose latents read along `encoder`, by default the decoder's rows."""
    d_sae, d_in = decoder.shape
    config = SAEConfig(d_in=d_in, d_sae=d_sae, nonlinearity=nonlinearity, normalisation="none")
    weights = initial_weights(config, 0)
    weights.decoder.copy_(decoder)
    weights.encoder.copy_(decoder if encoder is None else encoder)
    weights.own["b_enc"].fill_(bias)
    weights.b_dec.zero_()
    return SAE(config, weights)


def orthonormal(d_in, n, seed=0):
    drawn = torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q[:n].float()


def separate_rows(n=4000, n_features=6, seed=0):
    """Rows of orthonormal features, which an SAE can read exactly."""
    g = torch.Generator().manual_seed(seed)
    codes = (torch.rand(n, n_features, generator=g) < 0.2) * (torch.rand(n, n_features, generator=g) + 0.5)
    directions = orthonormal(8, n_features)
    return codes @ directions, codes, directions


def test_the_true_dictionary_itself_is_perfect():
    x, codes, directions = separate_rows()
    found = truth_figures(sae_with(directions, bias=-1e-4), x, codes, directions)
    assert found.summary() == pytest.approx(
        {
            "truth_l0": (codes > 0).double().sum(1).mean().item(),
            "truth_cosine": 1.0,
            "truth_found": 1.0,
            "truth_precision": 1.0,
            "truth_recall": 1.0,
            "truth_f1": 1.0,
            "truth_slope": 1.0,
            "truth_suppression": 0.0,
        },
        abs=2e-4,
    )
    assert found.latent.tolist() == list(range(6))


def test_the_scale_of_a_row_is_no_suppression():
    x, codes, directions = separate_rows()
    raw = sae_with(directions, bias=-1e-4)
    scaled = SAE(replace(raw.config, normalisation="per_token"), raw.weights)
    wanted = truth_figures(raw, x, codes, directions).summary()
    assert truth_figures(scaled, x, codes, directions).summary() == pytest.approx(wanted, abs=1e-3)
    assert wanted["truth_slope"] == pytest.approx(1.0, abs=1e-3)


def test_a_threshold_that_shifts_suppresses_and_one_that_gates_does_not():
    x, codes, directions = separate_rows()
    relu = truth_figures(sae_with(directions, bias=-0.3), x, codes, directions)
    gate = truth_figures(sae_with(directions, bias=-0.3, nonlinearity="prolu_ste"), x, codes, directions)
    assert relu.slope == pytest.approx(np.ones(6), abs=1e-4)
    expected = 0.3 * (codes > 0).sum(0) / codes.sum(0)  # every latent lacks 0.3 of its magnitude
    assert relu.suppression.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert gate.suppression == pytest.approx(np.zeros(6), abs=1e-4)
    assert gate.slope == pytest.approx(np.ones(6), abs=1e-4)
    halved = truth_figures(sae_with(directions, encoder=0.5 * directions, bias=-1e-4), x, codes, directions)
    assert halved.slope == pytest.approx(0.5 * np.ones(6), abs=1e-4)
    assert halved.suppression == pytest.approx(0.5 * np.ones(6), abs=1e-3)


def plain_figures(f, c, cosines, norms):
    """The definitions, feature by feature, with a matching found by trying all of them."""
    n_features, d_sae = cosines.shape
    best = max(
        itertools.permutations(range(d_sae), n_features), key=lambda p: sum(cosines[i, j] for i, j in enumerate(p))
    )
    figures = []
    for i, j in enumerate(best):
        on, read, both = c[:, i] > 0, f[:, j] > 0, (c[:, i] > 0) & (f[:, j] > 0)
        value, true = (f[both, j] * norms[j]).astype(float), c[both, i].astype(float)
        slope = np.polyfit(true, value, 1)[0] if both.sum() >= 10 else math.nan
        suppression = 1 - value.sum() / true.sum() if both.sum() >= 10 else math.nan
        precision = both.sum() / read.sum() if read.any() else 0.0
        f1 = 2 * both.sum() / (on.sum() + read.sum())
        figures.append((j, cosines[i, j], precision, both.sum() / on.sum(), f1, slope, suppression))
    return np.array(figures)


def test_figures_are_what_their_definitions_say():
    features = replace(FEATURES, n_features=5)
    x, codes = rows_of(features)
    decoder = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
    encoder = decoder + 0.3 * torch.randn(7, 10, generator=torch.Generator().manual_seed(2))
    sae = sae_with(decoder, encoder, bias=-0.5)
    found = truth_figures(sae, x, codes, features.truth.directions)
    unit = decoder / decoder.norm(dim=1, keepdim=True)
    cosines = (features.truth.directions @ unit.T).numpy()
    plain = plain_figures(sae.encode(x).detach().numpy(), codes.numpy(), cosines, decoder.norm(dim=1).numpy())
    names = ("latent", "cosine", "precision", "recall", "f1", "slope", "suppression")
    for i, name in enumerate(names):
        assert getattr(found, name).tolist() == pytest.approx(plain[:, i].tolist(), rel=1e-5, abs=1e-6), name


def test_permuted_latents_have_the_same_figures():
    x, codes = rows_of(FEATURES)
    decoder = torch.randn(20, 10, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    plain = truth_figures(sae_with(decoder, bias=-0.4), x, codes, FEATURES.truth.directions)
    permuted = truth_figures(sae_with(decoder[order], bias=-0.4), x, codes, FEATURES.truth.directions)
    assert permuted.summary() == pytest.approx(plain.summary(), rel=1e-6, nan_ok=True)
    assert torch.equal(order[permuted.latent], plain.latent)
    torch.testing.assert_close(permuted.response, plain.response)


def test_a_latent_may_be_scaled_against_its_decoder_row():
    x, codes = rows_of(FEATURES)
    decoder = torch.randn(20, 10, generator=torch.Generator().manual_seed(1))
    k = torch.rand(20, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    plain = truth_figures(sae_with(decoder), x, codes, FEATURES.truth.directions)
    scaled = truth_figures(sae_with(decoder * k, encoder=decoder / k), x, codes, FEATURES.truth.directions)
    assert scaled.summary() == pytest.approx(plain.summary(), rel=1e-5, nan_ok=True)


def test_latents_that_know_nothing_have_the_rates_of_chance():
    """Of independent events, precision is the feature's frequency, and recall the latent's."""
    features = replace(FEATURES, n_features=8)
    _, codes = rows_of(features, 400)
    noise = torch.randn(len(codes), 10, generator=torch.Generator().manual_seed(3))
    decoder = orthonormal(10, 8, seed=5)
    found = truth_figures(sae_with(decoder, bias=-0.6), noise, codes, features.truth.directions)
    rate = 1 - 0.5 * (1 + math.erf(0.6 / math.sqrt(2)))
    error = 4 / math.sqrt(len(codes) * 0.1)
    assert found.precision.tolist() == pytest.approx(found.frequency.tolist(), abs=error)
    assert found.recall.tolist() == pytest.approx([rate] * 8, abs=error)


def test_a_random_dictionary_is_as_far_as_chance_has_it():
    """A single direction is matched with the best of n random ones, whose cosine has a known mean."""
    n, d = 32, 12
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        decoder = torch.randn(n, d, generator=g)
        latent, cosine = matched_latents(decoder, torch.randn(1, d, generator=g))
        assert latent.item() in range(n)
        found.append(cosine.item())
    # (1 + cosine) / 2 of two random unit vectors is Beta((d-1)/2, (d-1)/2).
    from scipy.stats import beta

    quantiles = (np.arange(20_000) + 0.5) / 20_000
    expected = (2 * beta.ppf(quantiles ** (1 / n), (d - 1) / 2, (d - 1) / 2) - 1).mean()
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / math.sqrt(len(found)))


def test_features_without_a_latent_count_as_never_found():
    x, codes, directions = separate_rows()
    found = truth_figures(sae_with(directions[:2], bias=-1e-4), x, codes, directions)
    assert found.latent.tolist() == [0, 1, -1, -1, -1, -1]
    assert found.summary()["truth_cosine"] == pytest.approx(2 / 6)
    assert found.summary()["truth_f1"] == pytest.approx(2 / 6, abs=1e-3)
    assert found.precision[2:].tolist() == [0.0] * 4
    assert found.recall[2:].tolist() == [0.0] * 4
    assert found.suppression[2:].isnan().all()


def test_the_response_sums_over_bins_of_magnitude():
    x, codes, directions = separate_rows()
    found = truth_figures(sae_with(directions, bias=-0.6), x, codes, directions)
    n, active, true, read = found.response.T
    assert n.sum() == (codes > 0).sum()
    assert active.sum() == (codes > 0.6).sum()
    mean = codes.sum(0) / (codes > 0).sum(0)
    relative = (codes / mean)[codes > 0]
    counts = torch.histogram(relative.double(), torch.tensor([0, *RESPONSE_EDGES, 1e9], dtype=torch.float64)).hist
    assert torch.equal(n, counts)
    assert true.sum().item() == pytest.approx(relative.sum().item(), rel=1e-5)
    assert read.sum().item() == pytest.approx(((codes - 0.6).clamp(min=0) / mean).sum().item(), rel=1e-4)


def test_what_cannot_be_known_is_nan():
    x, codes, directions = separate_rows(n=40)
    codes[:, 0] = 0
    found = truth_figures(sae_with(directions, bias=-1e3), x, codes, directions)
    assert found.recall[0].isnan()
    assert found.f1[0].isnan()
    assert found.slope.isnan().all()
    assert found.summary()["truth_f1"] == 0
    assert math.isnan(found.summary()["truth_slope"])
    even = (codes > 0).float()
    assert truth_figures(sae_with(directions), even @ directions, even, directions).slope.isnan().all()


def test_a_run_keeps_its_figures_and_says_them(tmp_path):
    stream = ActivationStream.from_rows(FEATURES.rows(20_000, 1000), batch_size=64, window_tokens=4096)
    run = RunConfig(d_sae=16, n_tokens=6400, lr=5e-3, coeff=0.02, normalisation="none")
    results = run_sweep([run], stream, tmp_path / "study", eval_tokens=1000, progress=False)
    kept = read_truth(results.runs[0].folder)
    chosen = np.arange(4)
    x, codes = (part(chosen).flatten(0, 1) for part in (stream.blocks.held_out.__getitem__, stream.blocks.truth.codes))
    again = truth_figures(results.runs[0].load(), x, codes, FEATURES.truth.directions)
    torch.testing.assert_close(kept.f1, again.f1)
    said = {name: value for name, value in results.records[0].items() if name.startswith("truth_")}
    assert said == pytest.approx(kept.summary())
    assert len(said) == 8
    assert read_truth(tmp_path) is None
    (results.runs[0].folder / "truth.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"truth\.safetensors: not a readable file of true features"):
        read_truth(results.runs[0].folder)


@pytest.mark.slow
def test_an_easy_case_is_recovered(tmp_path):
    """Fewer features than dimensions, seldom together: the SAE finds them all, and is active where they are."""
    features = SyntheticFeatures(d_in=32, n_features=40, l0=2.0, zipf=0.0, magnitude_spread=0.25, noise=0.01)
    stream = ActivationStream.from_rows(features.rows(200_000, 8192), batch_size=128, window_tokens=16_384)
    base = RunConfig(d_sae=80, n_tokens=192_000, lr=1e-2, normalisation="none", aux_dead_tokens=20_000)
    run = replace(base, nonlinearity="batchtopk(2)", penalty="none", decay_start_fraction=0.5, lr_floor=0.02)
    random = replace(run, freeze="decoder")
    results = run_sweep([run, random], stream, tmp_path / "easy", eval_tokens=8192, progress=False)
    found, by_chance = results.records
    assert found["truth_f1"] > 0.95
    assert found["truth_cosine"] > 0.99
    assert found["truth_found"] == 1
    assert abs(found["truth_suppression"]) < 0.1
    assert by_chance["truth_f1"] < 0.6
    assert by_chance["truth_found"] < 0.5
