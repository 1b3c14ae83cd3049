"""The catalogue of metrics, held against what is recorded."""

import numpy as np
import pytest

from prolu import SAE, HeldOut, SAEConfig
from prolu.evaluation.comparison.metric_catalog import METRICS, label_of, metric_of
from prolu.evaluation.scoring import score
from prolu.training.starting_weights import initial_weights

NO_METRICS = {"ce_clean", "ce_zero", "ce_clean_no_bos", "ce_zero_no_bos"}
"""Scores of the language model and the text alone, in which SAEs cannot differ."""


@pytest.fixture(scope="module")
def scores(tiny_lm, tiny_blocks):
    config = SAEConfig(d_in=16, d_sae=48, nonlinearity="relu")
    held_out = HeldOut(tiny_lm, tiny_blocks, 640)
    return [score(SAE(config, initial_weights(config, seed, initial_bias=-0.1)), held_out) for seed in (0, 1)]


def test_the_catalogue_has_every_score_that_is_recorded_and_no_other(scores):
    # Of rows of known features only, and added to a study by `prolu probe`.
    elsewhere = {name for name in METRICS if name.startswith(("truth_", "probe_", "absorption_", "sae_probes_"))}
    assert METRICS.keys() - elsewhere == scores[0].figures.keys() - NO_METRICS
    assert all(name == metric.name for name, metric in METRICS.items())


def test_sums_by_document_give_the_metrics(scores):
    summed = [metric for metric in METRICS.values() if metric.by_document]
    assert {m.name for m in summed} == {"l0", "mse", "fvu", "degradation", "degradation_bits", "ce_recon", "kl"}
    for metric in summed:
        found = []
        for one in scores:
            numerator = metric.by_document.numerator(one.documents)
            assert numerator.shape == one.documents.n_tokens.shape
            found.append(numerator.sum() / getattr(one.documents, metric.by_document.denominator).sum())
        recorded = np.array([one.figures[metric.name] for one in scores])
        # A constant factor does not change a ratio: the MSE is a mean over dimensions too, and the FVU is divided
        # by the variance of the activations.
        factor = {"mse": 16, "fvu": found[0] / recorded[0]}.get(metric.name, 1)
        np.testing.assert_allclose(found, recorded * factor, rtol=1e-5)


def test_a_metric_that_may_be_0_or_negative_has_no_logarithm(scores):
    for name, metric in METRICS.items():
        if metric.compared_as == "difference":
            assert metric.scale == "linear"
        assert metric.words
        assert label_of(name) == metric.label
    assert label_of("coeff") == "coeff"


def test_an_unknown_metric_is_refused_with_the_known_ones():
    assert metric_of("fvu").words == "FVU"
    with pytest.raises(ValueError, match=r"metric 'fuv': choose one of l0, l1, .*, kl_no_bos"):
        metric_of("fuv")
