"""Encode, decode, save, load."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prolu import SAE, SAEConfig
from prolu.sae.scaling import normalise
from prolu.training.starting_weights import initial_weights


def make(nonlinearity="prolu_ste", normalisation="per_token"):
    config = SAEConfig(d_in=6, d_sae=20, nonlinearity=nonlinearity, normalisation=normalisation)
    weights = initial_weights(config, 0)
    weights.own["b_enc"].uniform_(-0.3, 0.1)
    weights.b_dec.uniform_(-0.1, 0.1)
    return SAE(config, weights)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
def test_forward_is_the_equation_in_raw_scale(shape):
    sae, acts = make(), 7 * torch.randn(shape)
    x, norms = normalise(acts)
    m = (x - sae.b_dec) @ sae.W_enc
    f = torch.where((m > 0) & (m + sae.b_enc > 0), m, 0)
    expected = (f @ sae.W_dec + sae.b_dec) * (norms / 6**0.5)[..., None]
    torch.testing.assert_close(sae(acts), expected)
    torch.testing.assert_close(sae.encode(acts), f)


def test_scale_of_the_input_does_not_reach_the_latents():
    sae, acts = make(), torch.randn(9, 6)
    torch.testing.assert_close(sae.encode(5 * acts), sae.encode(acts))
    torch.testing.assert_close(sae(5 * acts), 5 * sae(acts))
    plain = make(normalisation="none")
    assert not torch.allclose(plain.encode(5 * acts), plain.encode(acts))


def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path):
    for nonlinearity in ("relu", "prolu_relu", "prolu_ste"):
        sae, acts = make(nonlinearity), torch.randn(50, 6)
        sae.save(tmp_path, {"hook": "somewhere"})
        loaded = SAE.load(tmp_path)
        assert loaded.config == sae.config
        assert torch.equal(loaded(acts), sae(acts))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "sae.safetensors"]


def test_saes_train_by_autograd_too():
    sae = make()
    sae(torch.randn(30, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sae.parameters())


def corrupt(folder: Path, how: str) -> None:
    tensors = {name: t.detach().contiguous() for name, t in make().state_dict().items()}
    weights, config = folder / "sae.safetensors", folder / "config.json"
    facts = json.loads(config.read_text())
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-40])
        case "empty":
            weights.write_bytes(b"")
        case "huge header":
            weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
        case "pickle":
            torch.save(tensors, weights)
        case "missing tensor":
            save_file({k: v for k, v in tensors.items() if k != "b_enc"}, weights)
        case "extra tensor":
            save_file(tensors | {"x": torch.zeros(1)}, weights)
        case "wrong shape":
            save_file(tensors | {"b_dec": torch.zeros(7)}, weights)
        case "wrong dtype":
            save_file(tensors | {"b_dec": torch.zeros(6, dtype=torch.int32)}, weights)
        case "nan":
            save_file(tensors | {"b_dec": torch.full((6,), torch.nan)}, weights)
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "not json":
            config.write_text("{")
        case "deep json":
            config.write_text("[" * 100_000)
        case "unknown field":
            config.write_text(json.dumps({"sae": facts["sae"] | {"colour": 1}}))
        case "missing field":
            config.write_text(json.dumps({"sae": {"d_in": 6}}))
        case "wrong type":
            config.write_text(json.dumps({"sae": facts["sae"] | {"d_in": "6"}}))
        case "unknown nonlinearity":
            config.write_text(json.dumps({"sae": facts["sae"] | {"nonlinearity": "gelu"}}))


@pytest.mark.parametrize(
    "how",
    ["truncated", "empty", "huge header", "pickle", "missing tensor", "extra tensor", "wrong shape", "wrong dtype",
     "nan", "no weights", "no config", "not json", "deep json", "unknown field", "missing field", "wrong type",
     "unknown nonlinearity"],
)  # fmt: skip
def test_broken_files_are_refused_in_one_sentence(tmp_path, how):
    make().save(tmp_path)
    corrupt(tmp_path, how)
    with pytest.raises(ValueError, match=str(tmp_path)) as problem:
        SAE.load(tmp_path)
    assert "\n" not in str(problem.value).strip()


def test_activations_of_another_width_are_refused():
    with pytest.raises(ValueError, match="must be d_in = 6"):
        make()(torch.zeros(3, 5))
