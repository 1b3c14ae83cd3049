"""Agreement of two SAEs by its laws, and of the seeds of a study with its interval."""

import importlib.util
import io
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.optimize import linear_sum_assignment
from scipy.special import betainc

from prolu import SAE, RunConfig, SAEConfig, grid, seed_agreement, with_seeds
from prolu.evaluation import agreement
from prolu.evaluation.agreement import agreement_of, direction_agreement
from prolu.evaluation.comparison.intervals import mean_over_pairs, t_quantile
from prolu.evaluation.comparison.seed_agreement import FIGURES, figures_of, seed_pairs
from prolu.evaluation.latents import LatentFigures
from prolu.report.agreement import compare_seeds, note_of, print_agreement
from prolu.report.writer import write_report
from prolu.training.starting_weights import initial_weights
from support.made_studies import Made, record
from support.sweeps import stream_over, sweep

file = Path(__file__).parents[2] / "benchmarks" / "agreement_intervals.py"
spec = importlib.util.spec_from_file_location("agreement_intervals_benchmark", file)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def rows(n, d=12, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def order(n, seed=5):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["exact", "near"])
def _either_assignment(request, monkeypatch):
    """The best assignment, and that among near pairs, which few latents would not take."""
    if request.param == "near":
        monkeypatch.setattr(agreement, "MOST_EXACT", 0)
    monkeypatch.setattr(agreement, "ROWS_PER_PASS", 16)


@pytest.mark.usefixtures("_either_assignment")
def test_the_same_directions_agree_wholly_whatever_their_order_and_lengths():
    a = rows(50)
    found = direction_agreement(a, (a * (0.1 + rows(50, 1, 2).abs()))[order(50)])
    assert found == pytest.approx((1, 1, 1, 1), abs=1e-6)


@pytest.mark.usefixtures("_either_assignment")
def test_order_lengths_and_which_is_first_change_nothing():
    a, b = rows(40), torch.cat([rows(40)[:25] + 0.3 * rows(25, seed=1), rows(8, seed=2)])
    found = direction_agreement(a, b)
    assert found.found_again_09 < found.found_again_07 < 1
    moved = direction_agreement((b * (0.1 + rows(33, 1, 2).abs()))[order(33)], a[order(40)])
    assert moved == pytest.approx(found, rel=1e-6)


@pytest.mark.usefixtures("_either_assignment")
def test_opposite_directions_do_not_agree():
    found = direction_agreement(torch.eye(6), -torch.eye(6))
    assert found == pytest.approx((0, 0, 0, 0), abs=1e-7)


@pytest.mark.usefixtures("_either_assignment")
def test_two_latents_do_not_share_a_partner():
    a = torch.eye(3)
    b = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    # Two of a have a partner, and so have two of b, of which the twin is left alone.
    assert direction_agreement(a, b).matched_cosine == pytest.approx(4 / 6)
    assert direction_agreement(a, b).mean_max_cosine == pytest.approx((2 + 3) / 6)


@pytest.mark.usefixtures("_either_assignment")
def test_a_matching_is_the_best_of_all():
    a, b = rows(6, 3), rows(6, 3, 1)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1).double().clamp(min=0).numpy()
    best = max(sum(cosines[i, j] for i, j in enumerate(to)) for to in permutations(range(6)))
    assert direction_agreement(a, b).matched_cosine == pytest.approx(best / 6)


def test_the_matching_among_near_latents_is_nearly_the_best(monkeypatch):
    monkeypatch.setattr(agreement, "MOST_EXACT", 0)
    a = rows(400, 24)
    b = torch.cat([a[:200] + 0.5 * rows(200, 24, 1), rows(180, 24, 2)])
    found = direction_agreement(a, b).matched_cosine
    unit = [torch.nn.functional.normalize(m, dim=1) for m in (a, b)]
    cosines = (unit[0] @ unit[1].T).double().clamp(min=0).numpy()
    best = 2 * cosines[linear_sum_assignment(cosines, maximize=True)].sum() / 780
    assert best - 0.002 < found <= best + 1e-6


@pytest.mark.parametrize(("n", "d"), [(300, 8), (700, 32)])
def test_random_directions_agree_as_much_as_chance_does(n, d):
    """The largest of n cosines with random directions has the distribution F^n, and F follows from the beta's."""
    x = np.linspace(-1, 1, 20_001)
    below = np.where(x < 0, betainc((d - 1) / 2, 0.5, 1 - x**2) / 2, 1 - betainc((d - 1) / 2, 0.5, 1 - x**2) / 2)
    expected = 1 - np.trapezoid(below**n, x)
    found = direction_agreement(rows(n, d, 1), rows(n, d, 2))
    assert found.mean_max_cosine == pytest.approx(expected, rel=0.01)
    assert found.matched_cosine < found.mean_max_cosine
    assert found.found_again_09 == pytest.approx(1 - below[np.searchsorted(x, 0.9)] ** n, abs=0.02)


def sae_of(d_in=8, d_sae=20, seed=0, d_out=None):
    config = SAEConfig(d_in=d_in, d_sae=d_sae, nonlinearity="relu", d_out=d_out)
    return SAE(config, initial_weights(config, seed))


def test_encoders_and_decoders_are_compared_by_themselves():
    a, b = sae_of(), sae_of()
    b.W_dec.data = rows(20, 8, 3)
    found = agreement_of(a, b)
    assert found.encoder == pytest.approx((1, 1, 1, 1), abs=1e-6)
    assert found.decoder == direction_agreement(a.W_dec, b.W_dec)
    assert found.decoder.matched_cosine < 0.9


def test_saes_of_other_activations_are_refused():
    with pytest.raises(ValueError, match=r"widths \(8, 8\) and \(9, 9\), but must have the same"):
        agreement_of(sae_of(), sae_of(d_in=9))


def test_dead_latents_do_not_count():
    a, b = sae_of(), sae_of()
    b.W_dec.data[10:] = rows(10, 8, 3)
    live = torch.arange(20) < 10
    assert agreement_of(a, b).decoder.found_again_09 < 1
    assert agreement_of(a, b, live, live).decoder == pytest.approx((1, 1, 1, 1), abs=1e-6)
    # Those of one SAE only are looked for among all live ones of the other; the ten without a partner count 0.
    assert agreement_of(a, b, None, live).decoder.matched_cosine == pytest.approx(2 * 10 / 30, abs=1e-6)
    dead = torch.zeros(20, dtype=torch.bool)
    assert all(map(math.isnan, agreement_of(a, b, dead, live).decoder))


def test_the_mean_over_pairs_is_a_jackknife_over_seeds():
    values = np.array([[9, 0.2, 0.4, 0.5], [9, 9, 0.3, 0.7], [9, 9, 9, 0.1], [9, 9, 9, 9]])
    found = mean_over_pairs(values)
    without = np.array([0.3 + 0.7 + 0.1, 0.4 + 0.5 + 0.1, 0.2 + 0.5 + 0.7, 0.2 + 0.4 + 0.3]) / 3
    half = t_quantile(3) * math.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
    assert found == pytest.approx((2.2 / 6, half, 4))
    assert mean_over_pairs(values[:2, :2])[0] == pytest.approx(0.2)
    assert math.isnan(mean_over_pairs(values[:2, :2]).half_width)


@pytest.fixture(scope="module")
def study(tiny_lm, tiny_blocks, tmp_path_factory):
    """Two families with three seeds, and one more run alone."""
    base = RunConfig(d_sae=48, n_tokens=1280, coeff=0.01, step="dense")
    runs = with_seeds(grid(base, nonlinearity=["relu", "prolu_ste"]), [0, 1, 2])
    runs += grid(base, nonlinearity=["relu"], coeff=[0.02])
    return sweep(runs, stream_over(tiny_lm, tiny_blocks), tmp_path_factory.mktemp("seeds") / "study")


def test_the_seeds_of_a_setting_are_compared_with_each_other(study):
    pairs = seed_pairs(study)
    assert len(pairs) == 6
    for pair in pairs:
        a, b = pair.records
        assert (a["nonlinearity"], a["coeff"]) == (b["nonlinearity"], b["coeff"])
        assert a["init_seed"] < b["init_seed"]
    found = seed_agreement(study)
    assert [(s.family, s.n_seeds) for s in found] == [("relu + l1", 3), ("prolu_ste + l1", 3)]
    by_hand = [figures_of(pair)["decoder_matched_cosine"] for pair in pairs[:3]]
    mean, half_width, n = found[0].figures["decoder_matched_cosine"]
    assert (mean, n) == (pytest.approx(np.mean(by_hand)), 3)
    # With three seeds, leaving out a seed leaves one pair.
    assert half_width == pytest.approx(t_quantile(2) * math.sqrt(2 / 3 * np.square(np.subtract(by_hand, mean)).sum()))


def test_dead_latents_of_a_run_are_those_without_a_density(study):
    pair = seed_pairs(study)[0]
    whole = figures_of(pair)
    saes = [SAE.load(folder) for folder in pair.folders]
    n = saes[0].d_sae
    kept = [folder.joinpath("latents.safetensors").read_bytes() for folder in pair.folders]
    try:
        density = (torch.arange(n) < 5).double()
        for folder in pair.folders:
            LatentFigures(density, density, density, density).save(folder)
        live = density > 0
        assert list(figures_of(pair).values())[:4] == list(agreement_of(*saes, live, live).decoder)
        for folder in pair.folders:
            folder.joinpath("latents.safetensors").unlink()
        assert figures_of(pair) == dict(zip(FIGURES, [x for part in agreement_of(*saes) for x in part], strict=True))
    finally:
        for folder, content in zip(pair.folders, kept, strict=True):
            folder.joinpath("latents.safetensors").write_bytes(content)
    assert figures_of(pair) == whole


def test_runs_of_two_studies_and_runs_without_weights_are_not_paired(study, tmp_path):
    assert len(seed_pairs([study, study])) == 12
    assert seed_agreement(Made([record("relu + l1", 1, 10, 1, seed) for seed in (0, 1)], tmp_path)) == []


@pytest.mark.parametrize(("case", "bounds"), [("3 seeds, pairs alone", (0.96, 1)), ("5 seeds, found", (0.925, 0.985))])
def test_intervals_hold_the_truth_as_often_as_is_said(case, bounds):
    """1,000 studies: the standard error of a coverage of 95% is 0.7%."""
    found = benchmark.coverage(benchmark.CASES[case], 1000, seed=5)
    assert bounds[0] <= found["jackknife"]["coverage"] <= bounds[1]
    if case == "5 seeds, found":
        assert found["pairs as independent"]["coverage"] < 0.85  # why it is not what is used


def test_a_report_shows_and_writes_it(study, tmp_path, monkeypatch):

    from prolu.report import writer

    monkeypatch.setattr(writer, "save_figure", lambda figure, *files: None)
    drawn = write_report([study], tmp_path)
    page = drawn.page.read_text()
    assert "Agreement between seeds" in page
    shown = seed_agreement(study)[0].figures["decoder_matched_cosine"]
    assert f"{shown.mean:.3f} \u00b1{shown.half_width:.3f}" in page
    lines = (tmp_path / "agreement.csv").read_text().splitlines()
    assert lines[0].startswith("family,setting,l0,n_seeds,decoder_mean_max_cosine,decoder_mean_max_cosine_half_width")
    assert [line.split(",")[0] for line in lines[1:]] == ["relu + l1", "prolu_ste + l1"]
    assert len((tmp_path / "agreement_pairs.csv").read_text().splitlines()) == 7
    for width in (60, 80, 120):
        for in_full in (False, True):
            console = Console(file=io.StringIO(), width=width)
            print_agreement(console, drawn.agreement, in_full=in_full)
            text = console.file.getvalue()
            assert max(map(len, text.splitlines())) <= width
            assert text.count("prolu_ste + l1") == 1
            assert (f"{shown.mean:.3f} \u00b1" in text) is in_full


def test_what_takes_long_is_computed_only_if_asked_for(study, monkeypatch):
    monkeypatch.setattr("prolu.report.agreement.MOST_COMPARED", 6 * 48**2 - 1)
    found = compare_seeds([study])
    assert found.settings == []
    assert note_of(found) == "6 pairs of SAEs were not compared, which takes long; prolu report --agreement does"
    assert len(compare_seeds([study], whatever_it_takes=True).settings) == 2
    monkeypatch.setattr("prolu.report.agreement.MOST_COMPARED", 6 * 48**2)
    assert len(compare_seeds([study]).settings) == 2
