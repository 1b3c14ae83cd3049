"""Refitted decoders: gains by least squares against lstsq written out, what stays as it was, and studies with them."""

from dataclasses import replace

import pytest
import torch

from prolu import SAE, HeldOut, RunConfig, Trainer, evaluate
from prolu.evaluation.comparison.frontiers import family
from prolu.evaluation.comparison.styles import look
from prolu.sae.scaling import normalise
from prolu.studies.recipes import RECIPES
from prolu.training.refitting import MOST_LATENTS, GainRefit
from support.sweeps import contents, sweep
from support.synthetic import sparse_activations

D_IN, D_SAE, BATCH = 13, 37, 30


def rows(n, seed):
    return normalise(sparse_activations(n, D_IN, seed=seed))[0]


def trained(d_out=None, **changes):
    config = RunConfig(**({"d_sae": D_SAE, "n_tokens": 200 * BATCH, "lr": 1e-2, "coeff": 0.05} | changes))
    trainer = Trainer(config, D_IN, BATCH, d_out=d_out, dtype=torch.float64)
    for n in range(200):
        x = rows(BATCH, n)
        trainer.step(x, None if d_out is None else x[:, :d_out].contiguous())
    return trainer.sae()


def refitted(sae, x, target=None):
    refit = GainRefit(sae)
    for i in range(0, len(x), 64):
        refit.add_(x[i : i + 64], None if target is None else target[i : i + 64])
    return refit


@pytest.mark.parametrize("nonlinearity", ["relu", "gated", "prolu_ste"])
def test_gains_are_the_least_squares_solution_with_its_prior(nonlinearity):
    sae = trained(nonlinearity=nonlinearity)
    x = rows(500, 900)
    gains = refitted(sae, x).gains()
    latents = sae.encode_normalised(x).detach()
    # One equation for each token and dimension: sum_i g_i f_i W_dec[i, d] = x_d - b_dec_d;
    # and one for each latent: s g_i = s.
    equations = (latents[:, None, :] * sae.W_dec.detach().T[None]).flatten(0, 1)
    wanted = (x - sae.b_dec).detach().flatten()
    s = (wanted - equations.sum(1)).square().mean().sqrt()
    whole = torch.cat([equations, s * torch.eye(D_SAE, dtype=torch.float64)])
    solution = torch.linalg.lstsq(whole, torch.cat([wanted, s * torch.ones(D_SAE, dtype=torch.float64)])).solution
    torch.testing.assert_close(gains, solution, rtol=1e-6, atol=1e-8)
    assert (gains[~(latents > 0).any(0)] == 1).all()


def test_a_latent_that_is_hardly_ever_active_keeps_its_gain():
    sae = trained(nonlinearity="relu", coeff=0.05)
    x = rows(800, 900)
    latents = sae.encode_normalised(x).detach()
    active = (latents > 0).sum(0)
    # A latent that is active on one token, and hardly so: least squares alone would give it any gain.
    rare = int(active.argmin())
    bias = sae.b_enc.detach().clone()
    z = latents[:, rare].max() if active[rare] else ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()[:, rare].max()
    bias[rare] += 1e-6 - z
    own = sae.weights.own | {"b_enc": bias}
    weak = SAE(sae.config, replace(sae.weights, own=own))
    assert ((weak.encode_normalised(x) > 0).sum(0)[rare]) == 1
    assert refitted(weak, x).gains()[rare] == pytest.approx(1, abs=1e-3)


def test_it_takes_suppression_away_and_nothing_else():
    sae = trained(nonlinearity="relu", coeff=0.2)
    x = rows(800, 900)
    better = refitted(sae, x).refitted()
    torch.testing.assert_close(better.encode_normalised(x), sae.encode_normalised(x), rtol=0, atol=0)

    def mse(some):
        return (x - some.decode_normalised(some.encode_normalised(x))).square().mean().item()

    assert mse(better) < 0.95 * mse(sae)
    gains = better.W_dec.norm(dim=-1)
    fires = (sae.encode_normalised(x) > 0).double().mean(0)
    assert (gains * fires).sum() / fires.sum() > 1.05  # an L1 penalty makes latents too small


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_are_fitted_to_their_targets(skip):
    sae = trained(d_out=5, nonlinearity="relu", skip=skip)
    x = rows(600, 900)
    better = refitted(sae, x, x[:, :5]).refitted()

    def mse(some):
        return (x[:, :5] - some.reconstruct_normalised(some.encode_normalised(x), x)).square().mean().item()

    assert mse(better) < mse(sae)


def test_runs_with_it(tiny_stream, tmp_path):
    plain = RunConfig(d_sae=40, n_tokens=1920, nonlinearity="relu", coeff=0.02)
    config = replace(plain, refit_tokens=1000)
    assert "refit_tokens" not in plain.describe()
    assert config.run_id == f"{plain.run_id}-refit"
    results = sweep([plain, config], tiny_stream, tmp_path / "a")
    before, after = results.records
    assert family(after) == "relu + l1, refitted"
    assert look(after) == "refitted"
    assert after["l0"] == before["l0"]
    assert after["mse"] != before["mse"]
    saes = [run.load() for run in results.runs]
    assert torch.equal(saes[0].W_enc, saes[1].W_enc)
    refit = GainRefit(saes[0])
    for batch in tiny_stream.fresh(1000, "refit"):
        refit.add_(batch.acts)
    torch.testing.assert_close(saes[1].W_dec, refit.refitted().W_dec, rtol=1e-5, atol=1e-6)
    figures = evaluate(saes[1], HeldOut(tiny_stream.lm, tiny_stream.blocks, after["eval_tokens"]))
    assert figures["mse"] == pytest.approx(after["mse"], rel=1e-6)
    files = contents(tmp_path / "a")
    sweep([plain, config], tiny_stream, tmp_path / "a")
    assert contents(tmp_path / "a") == files


@pytest.mark.parametrize("changes", [{"refit_tokens": -1}, {"refit_tokens": 5, "d_sae": MOST_LATENTS + 1}])
def test_what_cannot_be_refitted(changes):
    with pytest.raises(ValueError, match=r"refit_tokens .*: must be 0, or more with a d_sae of at most 16,384"):
        RunConfig(**changes)


def test_the_study_of_causes():
    runs = RECIPES["causes"].runs_at(128)
    assert len({run.run_id for run in runs}) == len(runs) == 10 * 4 * 3
    assert {run.family for run in runs if run.refit_tokens} == {"relu + l1, refitted", "relu + sqrt_l1, refitted"}
    assert len({run.family for run in runs}) == 10
