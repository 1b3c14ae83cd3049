"""One comparison has one answer: laws of the engine, and the same figures wherever they are shown."""

import io
import itertools
import math
import re
import shlex

import numpy as np
import pytest
from rich.console import Console

from prolu.cli import entry_point
from prolu.evaluation.comparison import replicates
from prolu.evaluation.comparison.claims import compare_families, paper_claims, prolu_against_relu
from prolu.evaluation.comparison.comparisons import Comparisons
from prolu.evaluation.comparison.points import hypervolume
from prolu.evaluation.comparison.standings import standings
from prolu.evaluation.comparison.verdicts import Verdict, matched, rows_for_tables, verdict_table
from prolu.evaluation.comparison.wording import percent
from prolu.evaluation.document_sums import DocumentSums
from prolu.report.html_tables import table_of_verdicts
from prolu.report.page import render_page
from prolu.report.page_data import PageContent
from prolu.report.terminal import print_summary
from prolu.report.writer import DrawnReport
from prolu.studies.results import Results
from support.made_studies import SCORED_ON, Made, bent, power_law, record

STE, RELU = "prolu_ste + l1", "relu + l1"


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(replicates, "N_RESAMPLES", 200)


def two(tmp_path, *, seeds=(0, 1, 2), **others):
    return Made(bent(RELU, 4.0, seeds, **others) + bent(STE, 3.0, seeds, (10, 17, 28, 44), **others), tmp_path)


def changed(study, change, *, of=None):
    records = [r | change(r) if of is None or r["run_id"].startswith(of) else r for r in study.records]
    return Made(records, study.folder, study.stream_seed, study.config)


# ---- laws


@pytest.mark.parametrize("l0", [11, 16, 19.5, 26, 39])
def test_a_unit_of_cross_entropy_or_of_l0_cancels(tmp_path, l0):
    study = two(tmp_path)
    found = matched(study, STE, RELU, l0)
    in_bits = changed(study, lambda r: {"degradation": r["degradation"] / math.log(2)})
    for other, at in ((in_bits, l0), (changed(study, lambda r: {"l0": 3 * r["l0"]}), 3 * l0)):
        again = matched(other, STE, RELU, at)
        assert again[3:6] == pytest.approx(found[3:6], rel=1e-9)
        assert again.verdict == found.verdict


@pytest.mark.parametrize("l0", [11, 16, 19.5, 26, 39])
def test_exchanging_the_families_negates_the_log_of_the_ratio(tmp_path, l0):
    study = two(tmp_path)
    one, other = matched(study, STE, RELU, l0), matched(study, RELU, STE, l0)
    assert math.log1p(one.change) == pytest.approx(-math.log1p(other.change))
    assert math.log1p(one.low) == pytest.approx(-math.log1p(other.high))
    assert {one.verdict, other.verdict} == {"lower", "higher"}
    same = matched(study, RELU, RELU, l0)
    assert same.change == 0


@pytest.mark.parametrize("new", [12.0, 19.0, 30.0])
def test_a_run_on_the_curve_changes_little_and_less_than_the_tolerance(tmp_path, new):
    study = two(tmp_path)
    more = Made(study.records + bent(STE, 3.0, (0, 1, 2), (new,)), tmp_path)
    for l0 in (11, 16, 19.5, 26, 39):
        before = matched(study, STE, RELU, l0)
        assert abs(math.log1p(matched(more, STE, RELU, l0).change) - math.log1p(before.change)) < 0.02
    line = Made(power_law(RELU, 1.0, (0, 1)) + power_law(STE, 0.7, (0, 1)), tmp_path)
    on_line = Made(line.records + power_law(STE, 0.7, (0, 1), (new,)), tmp_path)
    assert matched(on_line, STE, RELU, 25).change == pytest.approx(matched(line, STE, RELU, 25).change, abs=1e-12)


def test_a_run_twice_is_that_run_once(tmp_path):
    study = two(tmp_path)
    twice = Made(study.records + [r | {"run_id": f"{r['run_id']}-again"} for r in study.records], tmp_path)
    assert matched(twice, STE, RELU, 19)[:9] == pytest.approx(matched(study, STE, RELU, 19)[:9])


@pytest.mark.parametrize("gap", [(16.0, 40.0), (9.0, 23.0), (20.0, 64.0)])
def test_a_gap_is_refused_with_the_way_to_close_it(tmp_path, gap):
    l0 = 0.98 * math.sqrt(gap[0] * gap[1])
    study = Made(bent(RELU, 4.0, (0, 1), (5, 9, 14, 20, 28, 40, 64)) + bent(STE, 3.0, (0, 1), gap), tmp_path)
    found = matched(study, STE, RELU, l0)
    assert math.isnan(found.change)
    nearest = min(gap, key=lambda x: abs(math.log(x / l0)))
    assert found.reason == (
        f"no run of {STE} within a factor of 1.5 of L0 {l0:.3g}: the nearest is at L0 {nearest:.3g}; "
        f"train one with target_l0={l0:.3g}"
    )
    assert matched(study, STE, RELU, gap[0] * 1.3).verdict == "lower"
    # The table itself looks for places that can be read.
    assert all(math.isfinite(v.change) for v in verdict_table(study))
    closed = Made(study.records + bent(STE, 3.0, (0, 1), (l0,)), tmp_path)
    assert matched(closed, STE, RELU, l0).verdict == "lower"


def test_a_target_that_was_missed_is_not_advised_again(tmp_path):
    asked = [{"target_l0": t} for t in (16.0, 32.0, 64.0)]
    runs = [r | t for seed in (0, 1) for r, t in zip(bent(RELU, 4.0, (seed,), (16, 32, 64)), asked, strict=True)]
    runs += [r | t for seed in (0, 1) for r, t in zip(bent(STE, 3.0, (seed,), (15, 29, 41)), asked, strict=True)]
    found = verdict_table(Made(runs, tmp_path))
    assert [v.verdict for v in found] == ["lower", "lower", "not tested"]
    assert [v.l0 for v in found] == [16, 32, 64]
    assert found[2].reason == (
        f"no run of {STE} within a factor of 1.5 of L0 64: the nearest is at L0 41, although it was a target; "
        "train longer, or start from another coefficient"
    )


def not_above_0(tmp_path):
    """Two families of three targets each, of which one has a negative CE increase at L0 64."""
    runs = [
        r | {"target_l0": float(target), "ce_recon": 3 + r["degradation"], "fvu": r["mse"]}
        for seed in (0, 1)
        for name, level in ((RELU, 4.0), (STE, 3.0))
        for target, r in zip((16, 32, 64), bent(name, level, (seed,), (16.1, 32.1, 63.9)), strict=True)
    ]
    lacks = {r["run_id"] for r in runs if r["penalty"] == "l1" and r["nonlinearity"] == "prolu_ste" and r["l0"] > 60}
    nothing = {"degradation": -0.002, "ce_recon": 2.998, "degradation_bits": -0.003, "fvu": 1e-6}
    return Made([r | nothing if r["run_id"] in lacks else r for r in runs], tmp_path)


def test_a_run_without_a_logarithm_is_not_called_a_missed_target(tmp_path):
    study = not_above_0(tmp_path)
    why = f"the run of {STE} at L0 63.9 has a CE increase of -0.002 nats; a change in percent needs values above 0"
    found = verdict_table(study)
    assert [math.isnan(v.change) for v in found] == [False, False, True]
    assert found[2].reason == f"{why}, so compare by ce_recon, in nats"
    in_nats = matched(study, STE, RELU, 64, y="ce_recon")
    assert in_nats.change == pytest.approx(-0.002 - study.records[2]["degradation"], abs=1e-3)
    without = matched(changed(study, lambda r: {"degradation": None}, of=f"{STE}-{1 / 63.9}"), STE, RELU, 64)
    assert without.reason == f"the run of {STE} at L0 63.9 has no value of CE increase"
    # A run that is too far from the L0 explains nothing.
    assert "train one with target_l0=100" in matched(study, STE, RELU, 100).reason


def test_no_family_is_called_the_best_where_another_is_below_0(tmp_path):
    found = {(s.family, s.metric): s for s in standings(not_above_0(tmp_path), ["degradation", "fvu"], [64])}
    assert "needs values above 0" in found[STE, "degradation"].reason
    assert not found[RELU, "degradation"].is_best
    # In another metric the same runs are read, although they have no place on the curve of the first.
    assert found[STE, "fvu"].value == pytest.approx(1e-6, rel=0.02)
    assert found[STE, "fvu"].is_best
    assert not found[RELU, "fvu"].is_best


@pytest.mark.parametrize("gap", [2.4, 2.9, 4.7])
def test_the_table_reads_where_it_shows(tmp_path, gap):
    l0s = [5.03, 5.03 * gap, 5.03 * gap**2]
    study = Made(bent(RELU, 4.0, (0, 1), l0s) + bent(STE, 3.0, (0, 1), [1.013 * l0 for l0 in l0s]), tmp_path)
    found = verdict_table(study)
    assert len(found) == 3
    assert all(math.isfinite(v.change) and float(f"{v.l0:.3g}") == v.l0 for v in found)


def test_the_middle_run_counts_although_it_had_not_converged(tmp_path):
    """The case that the demo showed: without its middle run, the family seemed twice as good."""
    relu = [record("relu + sqrt_l1", 1 / l0, l0, y) for l0, y in ((10.3, 0.53), (20.4, 0.294), (35.6, 0.166))]
    prolu = [record("prolu_relu + sqrt_l1", 1 / l0, l0, y) for l0, y in ((12.6, 0.36), (23.2, 0.2213), (39.7, 0.1))]
    prolu[1]["converged"] = False
    study = Made(relu + prolu, tmp_path)
    at = relu[1]["l0"] * 1.1372549  # 23.2, where the challenger was measured
    found = matched(study, "prolu_relu + sqrt_l1", "relu + sqrt_l1", at)
    own = Comparisons(study)
    assert found.change == pytest.approx(0.2213 / 0.2581 - 1, abs=0.02)
    assert (found.n_unconverged, found.n_runs, found.verdict) == (1, 6, "not tested")
    assert "1 of 6 runs had not converged" in str(own.verdict("prolu_relu + sqrt_l1", "relu + sqrt_l1", at))


def test_runs_without_a_logarithm_are_left_out_and_it_is_said(tmp_path):
    study = two(tmp_path)
    beyond = [record(STE, 0, l0, y, 1) for l0, y in ((90.0, -0.001), (0.0, 3.0), (95.0, math.nan))]
    found = matched(Made(study.records + beyond, tmp_path), STE, RELU, 19)
    assert found.change == matched(study, STE, RELU, 19).change
    assert f"3 runs of {STE} left out: no L0 and CE increase above 0" in str(found)


def test_equal_budgets_are_compared_and_others_are_said_to_be_other_curves(tmp_path):
    short, long_ = two(tmp_path, n_tokens=1_000_000), two(tmp_path, n_tokens=4_000_000)
    better = [r | {"degradation": r["degradation"] / (2 if r["nonlinearity"] == "relu" else 1)} for r in long_.records]
    both = Made([*short.records, *better], tmp_path)
    found = matched(both, STE, RELU, 19)
    assert found.change == pytest.approx(matched(Made(better, tmp_path), STE, RELU, 19).change)
    assert "runs on 1,000,000 tokens are left out" in str(found)
    assert matched(both, STE, RELU, 19, n_tokens=1_000_000).change == matched(short, STE, RELU, 19).change
    unequal = Made([r for r in both.records if (r["nonlinearity"] == "relu") == (r["n_tokens"] == 1_000_000)], tmp_path)
    assert matched(unequal, STE, RELU, 19).reason == (
        f"trained on different numbers of tokens, {STE} on 4,000,000 and {RELU} on 1,000,000; train both on as many"
    )
    assert "on 7 tokens" in matched(both, STE, RELU, 19, n_tokens=7).reason


def test_an_sae_of_unknown_training_is_compared_and_it_is_said(tmp_path):
    study = two(tmp_path, n_tokens=1_000_000)
    unknown = {"n_tokens": None, "converged": None, "init_seed": None}
    theirs = [r | unknown for r in study.records if r["nonlinearity"] == "relu" and r["init_seed"] == 1]
    ours = [r for r in study.records if r["nonlinearity"] != "relu"]
    found = matched(Made(theirs + ours, tmp_path), STE, RELU, 19)
    assert found.verdict == "not tested"
    assert math.isfinite(found.change)
    assert "how long some were trained is not known" in str(found)
    assert f"whether 4 of {RELU} converged is not known" in str(found)
    assert found.n_unconverged == 0


def test_other_hyperparameters_are_other_curves_of_which_the_best_is_read(tmp_path):
    good, bad = two(tmp_path, lr=1e-3), two(tmp_path, lr=1e-1)
    worse = [r | {"degradation": 1.4 * r["degradation"], "l0": 1.07 * r["l0"]} for r in bad.records]
    found = matched(Made([*worse, *good.records], tmp_path), STE, RELU, 19)
    assert found.change == pytest.approx(matched(good, STE, RELU, 19).change)
    assert f"of {STE}, the best of 2 settings of lr at this L0" in str(found)


@pytest.mark.parametrize("l0", [0, -3, math.inf, math.nan])
def test_an_impossible_l0_is_refused(tmp_path, l0):
    with pytest.raises(ValueError, match=r"^l0 .*: must be a number above 0$"):
        matched(two(tmp_path), STE, RELU, l0)
    with pytest.raises(ValueError, match=r"^l0 .*: must be a number above 0$"):
        verdict_table(two(tmp_path), [20, l0])
    with pytest.raises(ValueError, match=r"^l0 .*: must be a number above 0$"):
        Results(tmp_path, two(tmp_path).records).best(l0)


# ---- seeds


def with_documents(study, monkeypatch, n=40, spread=0.3):
    """Give a study's runs sums by document, such that the documents add up to the records' figures."""
    rng = np.random.default_rng(3)
    shared = rng.gamma(4, 0.25, n)
    found = {}
    for r in study.records:
        n_tokens = np.full(n, 64.0)
        ce = shared * rng.gamma(1 / spread**2, spread**2, n)
        l0 = rng.gamma(100, 0.01, n)
        zeros = np.zeros(n)
        found[r["run_id"]] = DocumentSums(
            document=np.arange(n), n_tokens=n_tokens, n_predicted=n_tokens, l0=r["l0"] * l0 / l0.mean() * n_tokens,
            squared_error=zeros, ce_clean=zeros, ce_recon=r["degradation"] * ce / ce.mean() * n_tokens, kl=zeros,
        )  # fmt: skip
    monkeypatch.setattr(replicates, "read_documents_of", lambda folder: found[folder.name])
    return study


def test_one_seed_gives_an_interval_over_documents_and_no_verdict(tmp_path, monkeypatch):
    study = with_documents(two(tmp_path, seeds=(0,)), monkeypatch)
    found = matched(study, STE, RELU, 19)
    assert found.low < found.change < found.high
    assert (found.verdict, found.reason, found.n_seeds) == ("not tested", "one seed", 1)
    assert found.covers == "held-out documents only, not tested over seeds"
    assert "95% interval over held-out documents" in str(found)
    assert str(found).endswith("not tested over seeds")
    (claim,) = compare_families([study]).against_relu
    assert (found.high < 0, claim.verdict) == (True, "holds (one seed)")
    assert "95% interval over held-out documents" in claim.evidence
    assert claim.evidence.endswith("not tested over seeds.")
    more = with_documents(two(tmp_path), monkeypatch)
    assert matched(more, STE, RELU, 19).covers == "init seeds and held-out documents"


def test_replicates_are_pairs_of_stream_seed_and_init_seed():
    runs = [record(RELU, 1 / l0, l0, 3 / l0, 0, study="a", stream_seed=0) for l0 in (10.0, 20.0)]
    again = [r | {"study": "b", "stream_seed": 1, "degradation": 0.9 * r["degradation"]} for r in runs]
    alone = [hypervolume(some, (40, 0.5))[RELU].mean for some in (runs, again)]
    pooled = hypervolume(runs + again, (40, 0.5))[RELU]
    assert (pooled.n_seeds, pooled.mean) == (2, pytest.approx(sum(alone) / 2))
    assert alone[0] < pooled.mean < alone[1]


# ---- claims


def made_so_that_the_paper_is_right(tmp_path, seeds=(0, 1, 2)):
    low, high = (6, 9, 13, 19, 24), (24, 30, 40, 55)
    runs = bent("relu + l1", 4.0, seeds, (*low, *high)) + bent("relu + sqrt_l1", 3.6, seeds, (*low, *high))
    runs += bent("prolu_ste + l1", 2.4, seeds, low) + bent("prolu_relu + sqrt_l1", 2.8, seeds, (*low, *high))
    longer = {"relu": 1.0, "prolu_ste": 1.5, "prolu_relu": 1.3}
    return Made([r | {"l1": longer[r["nonlinearity"]] * r["l0"], "mse": 1 / r["l0"]} for r in runs], tmp_path)


def test_the_papers_claims_hold_on_a_study_made_so_that_they_do(tmp_path):
    found = compare_families([made_so_that_the_paper_is_right(tmp_path)])
    assert [c.verdict for c in found.paper] == ["holds"] * 4
    assert [c.verdict for c in found.against_relu] == ["holds"] * 2
    below = found.paper[0].evidence
    assert below.startswith(
        "lower than each of relu + l1, relu + sqrt_l1 and prolu_relu + sqrt_l1 at every L0 compared"
    )
    assert "prolu_ste + l1 against prolu_relu + sqrt_l1 at L0" in below


def test_and_fail_on_one_made_so_that_they_do(tmp_path):
    right = made_so_that_the_paper_is_right(tmp_path)
    turn = {"relu": 0.4, "prolu_ste": 1.5, "prolu_relu": 1.5}
    twice = {"relu": 2, "prolu_ste": 1, "prolu_relu": 1}
    wrong = changed(right, lambda r: {
        "degradation": turn[r["nonlinearity"]] * r["degradation"],
        "l1": twice[r["nonlinearity"]] * r["l1"], "mse": twice[r["nonlinearity"]] * r["mse"],
    })  # fmt: skip
    found = compare_families([wrong])
    assert [c.verdict for c in found.paper] == ["does not hold"] * 4
    assert found.paper[0].evidence.startswith("lower is that of relu + l1 and relu + sqrt_l1; ")


def test_without_an_interval_nothing_holds_from_one_seed(tmp_path):
    found = compare_families([made_so_that_the_paper_is_right(tmp_path, seeds=(0,))])
    assert [c.verdict for c in found.paper] == ["not tested", "not tested", "holds (one seed)", "not tested"]
    assert {c.verdict for c in found.against_relu} == {"not tested"}
    assert {v.verdict for v in found.verdicts} == {"not tested"}
    said = [c.evidence for c in (*found.paper, *found.against_relu)]
    assert all("one seed" in text or "not tested over seeds" in text for text in said)
    assert all(text.count("not tested over seeds") <= 2 for text in said)


def test_claims_of_one_seed_are_decided_by_held_out_documents_and_say_so(tmp_path, monkeypatch):
    right = made_so_that_the_paper_is_right(tmp_path, seeds=(0,))
    right = changed(right, lambda r: {"run_id": f"{r['run_id']}-{r['l0']}"})
    found = compare_families([with_documents(right, monkeypatch)])
    # The L1 has no sums by document, so that one seed gives it no interval.
    assert [c.verdict for c in found.paper] == ["holds (one seed)"] * 3 + ["not tested"]
    assert {c.verdict for c in found.against_relu} == {"holds (one seed)"}
    for claim in (*found.paper[:2], *found.against_relu):
        assert "95% interval over held-out documents" in claim.evidence
        assert "not tested over seeds" in claim.evidence
    turn = {"relu": 0.4, "prolu_ste": 1.5, "prolu_relu": 1.5}
    wrong = changed(right, lambda r: {"degradation": turn[r["nonlinearity"]] * r["degradation"]})
    found = compare_families([with_documents(wrong, monkeypatch)])
    assert {c.verdict for c in (*found.paper[:2], *found.against_relu)} == {"does not hold (one seed)"}


def test_one_rival_of_one_seed_makes_a_claim_rest_on_one_seed(tmp_path, monkeypatch):
    right = made_so_that_the_paper_is_right(tmp_path)
    some = [r for r in right.records if r["init_seed"] == 0 or r["penalty"] == "l1" or r["nonlinearity"] != "relu"]
    some = [r | {"run_id": f"{r['run_id']}-{r['l0']}"} for r in some]
    study = with_documents(Made(some, tmp_path), monkeypatch)
    below, above = paper_claims(Comparisons(study))[:2]
    assert (below.verdict, above.verdict) == ("holds (one seed)", "holds (one seed)")
    assert paper_claims(Comparisons(Made(some, tmp_path)))[0].verdict != "holds"


def test_a_claim_that_nobody_can_decide_names_a_command_that_would(tmp_path):
    right = made_so_that_the_paper_is_right(tmp_path)
    settings = {"d_sae": 64, "n_tokens": 2048, "lr": 0.004}
    config = {
        "stream": {
            "lm": "builtin", "hook": "blocks.2.hook_resid_pre", "data": ["a b.txt", "c.txt"], "ctx": 32,
            "batch_size": 256,
        },
        "eval_tokens": 640,
    }  # fmt: skip
    others = [r | settings for r in right.records if r["nonlinearity"] != "prolu_ste"]
    evidence = paper_claims(Comparisons(Made(others, tmp_path, config=config)))[0].evidence
    assert evidence == (
        "there is no run of prolu_ste + l1; train one with a target_l0 below 25, for example by `prolu train "
        "--nonlinearity prolu_ste --penalty l1 --target-l0 19 --d-sae 64 --n-tokens 2048 --lr 0.004 --batch-size 256 "
        "--lm builtin --hook blocks.2.hook_resid_pre --data 'a b.txt' c.txt --ctx 32 --eval-tokens 640 --out NEW`."
    )
    command = re.search("`(.*)`", evidence)[1]
    request = entry_point._parsed(shlex.split(command)[1:])
    assert (request.essential.target_l0, request.essential.n_tokens, request.settings.eval_tokens) == (19, 2048, 640)
    relu_only = [r for r in others if r["nonlinearity"] == "relu"]
    suppression = paper_claims(Comparisons(Made(relu_only, tmp_path, config=config)))[3]
    assert "`prolu train --nonlinearity prolu_ste --penalty l1 --target-l0 24 " in suppression.evidence
    unknown = paper_claims(Comparisons(Made(others, tmp_path)))[0].evidence
    assert unknown == "there is no run of prolu_ste + l1; train one with a target_l0 below 25."


def test_convergence_qualifies_a_claim_and_does_not_replace_it(tmp_path):
    moving = changed(made_so_that_the_paper_is_right(tmp_path), lambda _: {"converged": False})
    found = compare_families([moving])
    assert [c.verdict for c in found.paper] == ["holds"] * 4
    for claim in (*found.paper, *found.against_relu):
        assert re.search(r"(\d+) of \1 runs had not converged", claim.evidence)
        assert claim.evidence.count("had not converged") <= 2  # once, not at every L0


def test_a_range_that_nobody_reached_is_named_with_the_way_there(tmp_path):
    right = made_so_that_the_paper_is_right(tmp_path)
    high_only = [r for r in right.records if r["nonlinearity"] != "prolu_ste" or r["l0"] > 23]
    high_only = [r | {"l0": r["l0"] * 1.3} if r["nonlinearity"] == "prolu_ste" else r for r in high_only]
    claim = paper_claims(Comparisons(Made(high_only, tmp_path)))[0]
    assert claim.verdict == "not tested"
    assert claim.evidence == (
        "prolu_ste + l1 and another family cannot be read at the same L0 below 25: its runs have L0 31.2 to 31.2, "
        "those of others 6 to 55; train both with a target_l0 below 25."
    )
    none = Made([r for r in right.records if r["nonlinearity"] != "prolu_ste"], tmp_path)
    assert paper_claims(Comparisons(none))[0].evidence == (
        "there is no run of prolu_ste + l1; train one with a target_l0 below 25."
    )


def test_relu_is_beaten_in_l1_and_mse_only_by_other_families_of_the_same_seed(tmp_path):
    relu = [record(RELU, l0, l0, 0.1, seed, l1=l1, mse=mse) for seed in (0, 1)
            for l0, l1, mse in ((10.0, 5.0, 0.2), (9.0, 5.5, 0.3))]  # fmt: skip
    other = [record(STE, 1, 10.0, 0.1, seed, l1=9.0, mse=0.4) for seed in (0, 1)]
    better = [r | {"l1": 4.0, "mse": 0.25} for r in other]

    def claim(*runs):
        return paper_claims(Comparisons(Made(list(runs), tmp_path)))[2]

    assert claim(*relu, *other)[1:] == ("holds", "none of its 4 runs is beaten by a run of another family, 2 seeds.")
    assert claim(*relu, *better)[1:] == ("does not hold", "2 of its 4 runs are beaten, by prolu_ste + l1, 2 seeds.")
    assert claim(*relu, better[0], other[1]).verdict == "undecided"
    assert claim(*relu[:2], *other[:1]).verdict == "holds (one seed)"
    assert claim(*relu[:2], *better[:1]).verdict == "does not hold (one seed)"
    assert claim(*relu, *(r | {"n_tokens": 7} for r in better)).verdict == "not tested"


def test_verdicts_that_contradict_each_other_leave_a_claim_undecided():
    less = Verdict(STE, RELU, 20, -0.3, -0.4, -0.2, "lower", 3, 99, "init seeds")
    wide = less._replace(l0=30, low=-0.5, high=0.1, verdict="not distinguishable")
    assert prolu_against_relu([less])[0].verdict == "holds"
    (claim,) = prolu_against_relu([less, wide])
    assert claim.verdict == "undecided"
    assert "at L0 20 -30.0% (95% interval -40.0% to -20.0%, 3 seeds, 99 documents); " in claim.evidence
    more = less._replace(change=0.3, low=0.2, high=0.4, verdict="higher")
    assert prolu_against_relu([more])[0].verdict == "does not hold"
    assert prolu_against_relu([more, less])[0].verdict == "undecided"


# ---- the same figures everywhere


PERCENTAGE = r"[-+]?\d+\.\d%"
QUOTE = re.compile(
    rf"at L0 ([\d.]+) ({PERCENTAGE}) \((?:95% interval(?: over held-out documents)? ({PERCENTAGE}) to ({PERCENTAGE}))?"
)
"""How sentences and claims write a verdict: its L0, its change, and its interval if there is one."""


def figures_of(v):
    return [percent(x) for x in (v.change, v.low, v.high) if math.isfinite(x)]


def noisy(study, *, moving):
    """Whole records, whose figures lie on no smooth curve."""
    rng = np.random.default_rng(11)
    others = {"recovered": 0.9, "dead_fraction": 0.0, "sqrt_l1": 2.0, "eval_tokens": 640, "n_tokens": 1000}
    records = [
        r | others | {
            "run_id": f"{r['run_id']}-{r['l0']}", "degradation": r["degradation"] * math.exp(rng.normal(0, 0.05)),
            "converged": not (moving and r["l0"] > 20),
        }
        for r in study.records
    ]  # fmt: skip
    return Made(records, study.folder, config=SCORED_ON | {"runs": [{}]})


CASES = list(itertools.product([(0,), (0, 1, 2)], [True, False], [True, False]))


@pytest.mark.parametrize(("seeds", "documents", "moving"), CASES)
def test_table_sentences_claims_page_terminal_and_matched_say_the_same(tmp_path, monkeypatch, seeds, documents, moving):
    study = noisy(made_so_that_the_paper_is_right(tmp_path, seeds), moving=moving)
    if documents:
        with_documents(study, monkeypatch)
    found = compare_families([study])
    assert found.verdicts == verdict_table(study)
    measured = {(v.challenger, v.baseline, f"{v.l0:.3g}"): figures_of(v) for v in found.verdicts}

    for v in found.verdicts:
        assert matched(study, v.challenger, v.baseline, v.l0) == v
        assert math.isfinite(v.low) is (documents or len(seeds) > 1)
        # The sentence of a verdict begins like a quotation, but for a few words.
        sentence = str(v).replace(": change of CE increase", "")
        assert [list(filter(None, numbers)) for _, *numbers in QUOTE.findall(sentence)] == [figures_of(v)]

    in_table = {
        (group.challenger, group.baseline, row.l0): [row.change, *re.findall(PERCENTAGE, row.interval)]
        for group in table_of_verdicts(found.verdicts).groups
        for row in group.rows
    }
    assert in_table == measured

    content = PageContent(
        name="s", records=study.records, configs={"s": study.config}, curves={}, comparison=found, failures={},
        pages={}, headline=None,
    )  # fmt: skip
    page = re.sub(r"<[^>]*>|\s+", " ", render_page(content).split("<main>")[1].split("<script>")[0])
    out = io.StringIO()
    results = Results(tmp_path, study.records)
    results.__dict__["_config"] = study.config
    drawn = DrawnReport(tmp_path / "report.html", [results], study.records, found)
    print_summary(drawn, all_verdicts=True, console=Console(file=out, width=2000))
    terminal = re.sub(r"\s+", " ", out.getvalue())
    for (_, _, l0), numbers in measured.items():
        interval = f"{numbers[1]} to {numbers[2]}" if len(numbers) == 3 else ""
        for text, gap in ((page, r"\s*"), (terminal, "[ -]*")):
            assert re.search(gap.join(map(re.escape, (f" {l0} ", numbers[0], interval))), text)

    n_quotes = 0
    for claim in (*found.against_relu, *found.paper[:2]):
        pair = re.search(r"([\w+ ]*) against ([\w+ ]*) at L0", claim.evidence) or re.match(
            r"(.*) has a lower CE increase than (.*) at equal L0", claim.statement
        )
        names = [name.strip() for name in pair.groups()]
        assert claim.evidence in page
        assert claim.evidence in terminal
        for l0, *numbers in QUOTE.findall(claim.evidence):
            assert list(filter(None, numbers)) == figures_of(matched(study, *names, float(l0)))
            assert (*names, l0) not in measured or measured[(*names, l0)] == list(filter(None, numbers))
            n_quotes += 1
    assert n_quotes == 8


def test_rows_without_a_number_say_why_in_the_table_too(tmp_path):
    apart = Made(bent(RELU, 4.0, (0, 1), (5, 7)) + bent(STE, 3.0, (0, 1), (30, 40)), tmp_path)
    (row,) = rows_for_tables(verdict_table(apart))
    assert row.reason == (
        f"the runs of {STE} (L0 30 to 40) and {RELU} (L0 5 to 7) have no L0 in common; train either with a target_l0 "
        "in the range of the other"
    )
    (group,) = table_of_verdicts([row]).groups
    assert (group.rows[0].verdict, group.rows[0].ground) == ("not tested", row.reason)


# ---- the best run


def test_the_best_run_has_converged_unless_another_is_asked_for(tmp_path):
    points = [(20.0, 0.1, False), (21.0, 0.2, True), (22.0, 0.3, None), (60.0, 0.01, True)]
    runs = [record(STE, 1 / l0, l0, y, converged=converged) for l0, y, converged in points]
    results = Results(tmp_path, runs)
    assert results.best(20).record["l0"] == 21
    assert results.best(20, unconverged=True).record["l0"] == 20
    assert Results(tmp_path, runs[::3]).best(20).record["l0"] == 60  # the nearest that has converged
    assert Results(tmp_path, runs[2:3]).best(20).record["l0"] == 22  # another library's: it is not known
    moving = Results(tmp_path, runs[:1])
    for nonlinearity, which in ((None, ""), ("prolu_ste", " with nonlinearity 'prolu_ste'")):
        with pytest.raises(ValueError, match=f"none of the 1 finished runs{which} has converged; .*unconverged=True"):
            moving.best(20, nonlinearity)
    with pytest.raises(ValueError, match="no finished run with nonlinearity 'topk'"):
        moving.best(20, "topk", unconverged=True)
