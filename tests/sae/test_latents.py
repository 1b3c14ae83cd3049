"""Tests that latents are decoded with the scale and mean of their own rows, or not at all."""

import copy

import numpy as np
import pytest
import torch

from prolu import SAE, SAEConfig
from prolu.sae.latents import Latents
from prolu.training.starting_weights import initial_weights

D_IN = 16


def some_sae(normalisation="per_token", centred=True, dtype=torch.float64):
    config = SAEConfig(d_in=D_IN, d_sae=40, nonlinearity="prolu_ste", normalisation=normalisation)
    sae = SAE(config, initial_weights(config, 0, initial_bias=-0.1), {"centred": centred}).to(dtype)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    return sae


def raw(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    scales = 1 + 9 * torch.rand(*shape, 1, generator=generator, dtype=dtype)
    return 2 + scales * torch.randn(*shape, D_IN, generator=generator, dtype=dtype)


def by_hand(sae, x):
    """The latents, and the reconstruction, written out."""
    mean = x.mean(-1, keepdim=True) if sae.centred else 0
    scale = (x - mean).norm(dim=-1, keepdim=True) / D_IN**0.5 if sae.config.normalisation == "per_token" else 1
    m = ((x - mean) / scale - sae.b_dec) @ sae.W_enc
    f = torch.where((m > 0) & (m + sae.b_enc > 0), m, 0)
    return f, (f @ sae.W_dec + sae.b_dec) * scale + mean


@pytest.mark.parametrize("normalisation", ["per_token", "none"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1, 2, 3)])
def test_decode_gives_back_the_space_of_the_input(normalisation, centred, shape):
    sae, x = some_sae(normalisation, centred), raw(*shape)
    latents, recon = by_hand(sae, x)
    torch.testing.assert_close(sae.encode(x).as_subclass(torch.Tensor), latents)
    torch.testing.assert_close(sae.decode(sae.encode(x)), recon)
    torch.testing.assert_close(sae(x), recon)
    torch.testing.assert_close(sae.decode(latents, like=x), recon)


KEEPING = {
    "mul": lambda f: f * 2,
    "rmul": lambda f: 2 * f,
    "mask": lambda f: f * torch.ones(40, dtype=f.dtype),
    "add": lambda f: f + f,
    "where": lambda f: torch.where(f > 0.5, f, 0.0),
    "clamp": lambda f: f.clamp(max=1),
    "clone": lambda f: f.clone(),
    "detach": lambda f: f.detach(),
    "masked_fill": lambda f: f.masked_fill(f < 0.5, 0),
    "double": lambda f: f.double(),
    "cpu": lambda f: f.cpu(),
    "relu": torch.relu,
}

MOVING = {
    "permuted": lambda f: f[torch.tensor([2, 0, 1])],
    "sliced": lambda f: f[:2],
    "flipped": lambda f: f.flip(0),
    "rolled": lambda f: f.roll(1, 0),
    "sorted": lambda f: f.sort(dim=0).values,
    "mean of rows": lambda f: f.mean(0, keepdim=True).expand_as(f),
    "two rows swapped": lambda f: torch.stack([f[1], f[0], f[2]]),
    "gathered": lambda f: f.index_select(0, torch.tensor([1, 1, 0])),
    "permuted, and converted like them": lambda f: f[torch.tensor([2, 0, 1])].to(f),
    "product": lambda f: torch.eye(3, dtype=f.dtype) @ f,
}


@pytest.mark.parametrize("edit", KEEPING.values(), ids=KEEPING)
def test_what_leaves_rows_in_their_places_can_be_decoded(edit):
    sae, x = some_sae(), raw(3)
    edited = edit(sae.encode(x))
    assert isinstance(edited, Latents)
    torch.testing.assert_close(sae.decode(edited), sae.decode(edit(by_hand(sae, x)[0]), like=x))


@pytest.mark.parametrize("edit", MOVING.values(), ids=MOVING)
def test_what_may_move_rows_is_not_decoded_with_their_scales(edit):
    sae, x = some_sae(), raw(3)
    edited = edit(sae.encode(x))
    assert not isinstance(edited, Latents)
    with pytest.raises(ValueError, match=r"like=acts, or use decode_normalised"):
        sae.decode(edited)


def test_latents_of_other_rows_are_not_mixed():
    sae = some_sae()
    mixed = sae.encode(raw(3)) + sae.encode(2 * raw(3) + 1)
    into = sae.encode(raw(3))
    into += sae.encode(2 * raw(3) + 1)
    set_from = sae.encode(raw(3)).detach()
    set_from[:] = sae.encode(2 * raw(3) + 1).detach()
    copied = sae.encode(raw(3)).detach().copy_(sae.encode(2 * raw(3) + 1).detach())
    for latents in (mixed, into, set_from, copied, torch.add(sae.encode(raw(3)), other=sae.encode(raw(3)))):
        with pytest.raises(ValueError, match="like=acts"):
            sae.decode(latents)
    with pytest.raises(ValueError, match="must be activations of the same rows"):
        sae.decode(torch.zeros(2, 40, dtype=torch.float64), like=raw(3))


def test_a_latent_is_ablated_in_place():
    sae, x = some_sae(), raw(5)
    latents = sae.encode(x)
    latent = int(latents.sum(0).argmax())
    before = sae.decode(latents)
    values = latents[:, latent].clone()
    latents[:, latent] = 0
    scale = (x - x.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True) / D_IN**0.5
    torch.testing.assert_close(before - sae.decode(latents), scale * values[:, None] * sae.W_dec[latent])


def test_an_sae_that_does_not_scale_decodes_any_latents():
    sae = some_sae("none", centred=False)
    latents = torch.rand(3, 40, dtype=torch.float64)
    torch.testing.assert_close(sae.decode(latents), latents @ sae.W_dec + sae.b_dec)


def test_gradients_flow_through_both_ways():
    sae, x = some_sae(), raw(4).requires_grad_()
    sae.decode(sae.encode(x) * 1.0).square().sum().backward()
    found = x.grad.clone()
    x.grad = None
    sae(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_latents_can_be_copied_and_converted():
    latents = some_sae().encode(raw(3)).detach()
    torch.testing.assert_close(copy.deepcopy(latents).as_subclass(torch.Tensor), latents.as_subclass(torch.Tensor))
    assert latents.numpy().shape == (3, 40)
    assert (latents > 0).sum().item() == int((latents.numpy() > 0).sum())


def test_arrays_and_lists_are_taken():
    sae, x = some_sae(dtype=torch.float32), raw(3, dtype=torch.float32)
    expected = sae.encode(x).as_subclass(torch.Tensor)
    assert torch.equal(sae.encode(x.numpy()).as_subclass(torch.Tensor), expected)
    assert torch.equal(sae.encode(x.tolist()).as_subclass(torch.Tensor), expected)
    assert torch.equal(sae(x.numpy()), sae(x))
    assert torch.equal(sae.encode(x.numpy()[::-1]).as_subclass(torch.Tensor), expected.flip(0))
    assert torch.equal(sae.decode(expected.tolist(), like=x), sae(x))


@pytest.mark.parametrize(
    ("acts", "words"),
    [
        (np.zeros((3, D_IN)), "acts are torch.float64, the SAE is torch.float32"),
        (np.zeros((3, D_IN + 1), np.float32), "the last dimension must be d_in = 16"),
        ([[1.0] * D_IN, [1.0]], "acts: must be a tensor, an array of numbers, or lists of one length"),
        (["a text"], "acts: must be a tensor"),
        (np.array([["a"] * D_IN]), "acts: must be a tensor"),
        (np.array([[None] * D_IN]), "acts: must be a tensor"),
        (np.ones((2, D_IN), int), "acts are torch.int64"),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_a_sentence(acts, words):
    with pytest.raises(ValueError, match=words):
        some_sae(dtype=torch.float32).encode(acts)


def test_an_sae_knows_where_it_comes_from(tmp_path):
    sae = some_sae(dtype=torch.float32)
    sae.save(tmp_path, {"lm": "gpt2", "hook": "blocks.6.hook_resid_pre", "centred": True})
    loaded = SAE.load(tmp_path)
    assert (loaded.lm, loaded.hook, loaded.centred) == ("gpt2", "blocks.6.hook_resid_pre", True)
    assert (loaded.d_in, loaded.d_sae, loaded.dtype, loaded.device) == (16, 40, torch.float32, torch.device("cpu"))
    assert repr(loaded) == "SAE(prolu_ste, 16 -> 40, blocks.6.hook_resid_pre of gpt2)"
    loaded.save(tmp_path / "again")
    assert SAE.load(tmp_path / "again").provenance == loaded.provenance
    loaded.save(tmp_path / "noted", {"note": "mine"})
    assert SAE.load(tmp_path / "noted").provenance == loaded.provenance | {"note": "mine"}
    assert not some_sae(centred=False).centred
