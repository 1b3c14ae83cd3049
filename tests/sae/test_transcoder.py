"""A transcoder as an SAE with an output of its own: its equation, its files, its scaling, its skip connection."""

import json

import numpy as np
import pytest
import torch

from prolu import SAE, RunConfig, SAEConfig, Trainer
from support.steps import relative
from support.transcoders import targets_of, transcoder_weights


def transcoder(*, skip=False, nonlinearity="relu", normalisation="per_token", provenance=None):
    config = SAEConfig(d_in=12, d_sae=40, d_out=17, skip=skip, nonlinearity=nonlinearity, normalisation=normalisation)
    return SAE(config, transcoder_weights(nonlinearity, skip=skip), provenance)


def by_hand(sae, x):
    """The equation, in numpy."""
    w = {name: t.detach().numpy() for name, t in sae.named_parameters()}
    x = x.numpy()
    c = np.sqrt(12) / np.linalg.norm(x, axis=-1, keepdims=True) if sae.config.normalisation == "per_token" else 1.0
    f = np.maximum((c * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    y_hat = f @ w["W_dec"] + w["b_out"]
    if sae.config.skip:
        y_hat = y_hat + c * x @ w["W_skip"]
    return y_hat / c


@pytest.mark.parametrize("normalisation", ["per_token", "none"])
@pytest.mark.parametrize("skip", [False, True])
def test_its_output_is_that_of_the_equation(skip, normalisation):
    sae, x = transcoder(skip=skip, normalisation=normalisation), 3 * targets_of(50, 12)
    expected = torch.from_numpy(by_hand(sae, x))
    assert sae(x).shape == (50, 17)
    torch.testing.assert_close(sae(x).detach(), expected, rtol=1e-12, atol=1e-12)
    latents = sae.encode(x)
    torch.testing.assert_close(sae.decode(latents).detach(), expected, rtol=1e-12, atol=1e-12)
    # In any shape, edited, and with the rows' scale from elsewhere.
    cube = sae.decode(sae.encode(x.view(5, 10, 12)) * 1.0)
    torch.testing.assert_close(cube.detach().view(50, 17), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.decode(latents.numpy(force=True), like=x).detach(), expected)
    if skip or normalisation == "per_token":
        with pytest.raises(ValueError, match="like=acts"):
            sae.decode(latents.numpy(force=True))
    else:
        torch.testing.assert_close(sae.decode(latents.numpy(force=True)).detach(), expected)
    # What an intervention adds is what the latent writes, whatever the skip connection does.
    more = sae.decode(latents.index_fill(1, torch.tensor([3]), 0.0), like=x) - sae.decode(latents, like=x)
    scale = x.norm(dim=1, keepdim=True) / 12**0.5 if normalisation == "per_token" else 1.0
    written = -latents[:, 3:4].as_subclass(torch.Tensor) * sae.W_dec[3] * scale
    torch.testing.assert_close(more.detach(), written.detach())


def test_scaled_per_token_it_is_proportional_to_its_input():
    sae, x = transcoder(skip=True), targets_of(20, 12)
    torch.testing.assert_close(sae(7 * x), 7 * sae(x))


def test_one_that_was_trained_on_centred_activations_adds_no_mean_of_its_input():
    plain, x = transcoder(skip=True, normalisation="none"), targets_of(20, 12)
    centred = transcoder(skip=True, normalisation="none", provenance={"centred": True})
    torch.testing.assert_close(centred(x), plain(x - x.mean(1, keepdim=True)))
    torch.testing.assert_close(centred.decode(centred.encode(x)), centred(x))


@pytest.mark.parametrize("skip", [False, True])
def test_saved_and_loaded_it_is_the_same(tmp_path, skip):
    sae = transcoder(skip=skip, provenance={"hook": "a", "hook_out": "b", "lm": "m"})
    sae.save(tmp_path)
    loaded = SAE.load(tmp_path)
    x = targets_of(9, 12)
    assert loaded.config == sae.config
    assert torch.equal(loaded(x), sae(x))
    assert (loaded.hook, loaded.hook_out, loaded.d_out, loaded.is_transcoder) == ("a", "b", 17, True)
    assert repr(loaded) == "SAE(relu, 12 -> 40 -> 17, a to b of m)"
    facts = json.loads((tmp_path / "config.json").read_text())
    del facts["sae"]["skip"]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="for a transcoder also d_out and skip, and no others"):
        SAE.load(tmp_path)


def test_the_files_of_an_sae_are_what_they_were(tmp_path):
    Trainer(RunConfig(d_sae=8, n_tokens=64), 4, 64).sae().save(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["sae"].keys() == {"d_in", "d_sae", "nonlinearity", "normalisation"}
    assert SAE.load(tmp_path).hook_out == ""
    assert not SAE.load(tmp_path).is_transcoder


def test_gradients_flow_through_all_of_it():
    sae, x = transcoder(skip=True), targets_of(9, 12)
    sae(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sae.parameters())
    assert relative(sae.weights.skip, sae.W_skip.detach()) == 0
