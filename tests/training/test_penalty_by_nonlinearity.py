"""Tests that the penalty follows the nonlinearity unless it is named."""

from dataclasses import replace

import pytest
import torch

from prolu import RunConfig, SAEConfig, Trainer, grid
from prolu.sae.scaling import normalise

USUAL = {
    "relu": "l1", "prolu_relu": "l1", "prolu_ste": "l1", "prolu(0.5,1,0)": "l1", "gated": "l1", "jumprelu": "l0",
    "jumprelu(0.03)": "l0", "topk(4)": "none", "batchtopk(4)": "none",
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
