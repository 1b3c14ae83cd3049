"""Tests that the penalty follows the nonlinearity unless it is named."""

import shlex
from dataclasses import replace

import pytest
import torch

from prolu import RunConfig, SAEConfig, Trainer, grid
from prolu.cli.entry_point import main
from prolu.sae.scaling import normalise
from support.sweeps import sweep

USUAL = {
    "relu": "l1", "prolu_relu": "l1", "prolu_ste": "l1", "prolu(0.5,1,0)": "l1", "gated": "l1", "jumprelu": "l0",
    "jumprelu(0.03)": "l0", "jumprelu_plain": "l0", "jumprelu_ste(1)": "tanh",
    "topk(4)": "none", "batchtopk(4)": "none",
}  # fmt: skip


@pytest.mark.parametrize("nonlinearity", USUAL)
def test_it_is_what_suits_the_nonlinearity(nonlinearity):
    silent = RunConfig(nonlinearity=nonlinearity, d_sae=16, n_tokens=64)
    named = replace(silent, penalty=USUAL[nonlinearity])
    assert silent.describe() == named.describe()
    assert (silent.run_id, silent.family) == (named.run_id, named.family)
    acts = normalise(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))[0]
    stats = [Trainer(run, 8, 64).step(acts).stats for run in (silent, named)]
    assert stats[0].penalty == stats[1].penalty
    assert stats[0].mse == stats[1].mse


def test_it_follows_where_a_grid_changes_the_nonlinearity():
    runs = grid(RunConfig(d_sae=16), nonlinearity=list(USUAL))
    assert [run.describe()["penalty"] for run in runs] == list(USUAL.values())
    with_target = grid(RunConfig(d_sae=16, target_l0=4.0), nonlinearity=["relu", "jumprelu", "topk", "batchtopk"])
    assert [run.resolved_penalty for run in with_target] == ["l1", "l0", "none", "none"]


def test_a_named_penalty_stays():
    beside_k = RunConfig(nonlinearity="topk(4)", penalty="l1", d_sae=16)
    assert beside_k.describe()["penalty"] == "l1"
    assert beside_k.family == "topk + l1"
    with pytest.raises(ValueError, match="penalty 'l0'"):
        RunConfig(nonlinearity="relu", penalty="l0", d_sae=16)


@pytest.mark.parametrize("nonlinearity", ["topk(17)", "batchtopk(17)"])
def test_more_latents_than_there_are_cannot_be_selected(nonlinearity):
    for config in (RunConfig, SAEConfig):
        sizes = {"d_sae": 16} | ({"d_in": 8} if config is SAEConfig else {})
        with pytest.raises(ValueError, match="k 17: must be at most d_sae, which is 16"):
            config(nonlinearity=nonlinearity, **sizes)
        config(nonlinearity=nonlinearity.replace("17", "16"), **sizes)


@pytest.mark.parametrize(
    "words", ["topk(4)", "batchtopk(4)", "topk --k 4", "relu --penalty none", "prolu_ste --penalty none"]
)
def test_a_coefficient_without_a_penalty_is_refused(words, tmp_path, capsys):
    nonlinearity = shlex.split(words)[0]
    out = tmp_path / "out"
    size = ["--d-sae", "16", "--out", str(out), "--coeff", "0.01"]
    command = ["train", "--nonlinearity", nonlinearity, *words.split()[1:], *size]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"prolu: coeff 0.01: {nonlinearity} is trained without a penalty, so this has no effect; leave --coeff out, or "
        "name a --penalty\n"
    )
    assert not out.exists()


def test_the_default_coefficient_is_none_that_was_given():
    usual = RunConfig(nonlinearity="topk(4)", d_sae=16)
    assert not usual.ignores_coeff
    assert usual.run_id == "topk_4-none-0.0012-lr0.001-d16-s0"
    assert replace(usual, coeff=0.01).ignores_coeff
    assert not replace(usual, coeff=0.01, penalty="l1").ignores_coeff


def test_in_a_grid_it_is_told_once_and_the_study_is_resumed(tiny_stream, tmp_path, caplog):
    base = RunConfig(d_sae=32, n_tokens=10 * tiny_stream.batch_size)
    runs = grid(base, nonlinearity=["relu", "topk(4)"], coeff=[0.01, 0.02])
    before = sweep(runs, tiny_stream, tmp_path / "study").records
    assert (
        "coeff: 2 of 4 runs are trained without a penalty, and their coefficients (0.01, 0.02) do nothing"
        in caplog.text
    )
    assert before[2]["mse"] == before[3]["mse"]
    caplog.clear()
    assert sweep(runs, tiny_stream, tmp_path / "study").records == before
    assert "coeff" not in caplog.text
