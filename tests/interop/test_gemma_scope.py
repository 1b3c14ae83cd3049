"""Gemma Scope's params.npz, on this machine and in the hub's cache, computed by the equations of its tutorial."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from prolu import SAE
from prolu.cli.entry_point import main
from prolu.interop import import_sae

D_IN, D_SAE = 12, 40


def parameters(d_out=D_IN, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, d_out), "b_enc": D_SAE, "b_dec": d_out, "threshold": D_SAE}
    found = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return found | {"threshold": np.abs(found["threshold"])}


def computed(p, x):
    """f = ReLU(x W_enc + b_enc) where x W_enc + b_enc > threshold, and f W_dec + b_dec; in fp64."""
    p = {name: torch.from_numpy(array).double() for name, array in p.items()}
    pre = x.double() @ p["W_enc"] + p["b_enc"]
    f = torch.relu(pre) * (pre > p["threshold"])
    return f, f @ p["W_dec"] + p["b_dec"]


def written(folder, p):
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **p)
    return folder


def check_same(sae, p):
    x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1))
    f, out = computed(p, x)
    assert (f > 0).any()
    torch.testing.assert_close(sae.encode(x).detach().double().as_subclass(torch.Tensor), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x).detach().double(), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("repository", "lm", "hook"),
    [
        ("gemma-scope-2b-pt-res", "google/gemma-2-2b", "blocks.20.hook_resid_post"),
        ("gemma-scope-9b-it-res", "google/gemma-2-9b-it", "blocks.20.hook_resid_post"),
        ("gemma-scope-9b-pt-mlp", "google/gemma-2-9b", "blocks.20.hook_mlp_out"),
        ("gemma-scope-2b-pt-att", "google/gemma-2-2b", "model.layers.20.self_attn.o_proj.input"),
    ],
)
def test_an_sae_and_what_its_folders_say(tmp_path, repository, lm, hook):
    p = parameters()
    sae, made = import_sae(written(tmp_path / repository / "layer_20" / "width_16k" / "average_l0_71", p))
    check_same(sae, p)
    assert (made["lm"], made["hook"], made["centred"]) == (lm, hook, False)
    assert sae.config.normalisation == "none"
    assert sae.hook == hook


def test_a_transcoder_writes_the_output_of_the_mlp(tmp_path):
    p = parameters(d_out=7)
    folder = written(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_54", p)
    sae, made = import_sae(folder)
    check_same(sae, p)
    assert sae.is_transcoder
    assert (made["hook"], made["hook_out"]) == ("model.layers.3.mlp.input", "blocks.3.hook_mlp_out")


@pytest.mark.parametrize(
    ("place", "lm", "hook", "hook_out"),
    [
        ("gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium", "google/gemma-3-1b-pt",
         "blocks.13.hook_resid_post", None),
        ("gemma-scope-2-270m-pt/attn_out/layer_5_width_16k_l0_small", "google/gemma-3-270m",
         "model.layers.5.self_attn.o_proj.input", None),
        ("gemma-scope-2-4b-it/transcoder_all/layer_9_width_16k_l0_small", "google/gemma-3-4b-it",
         "model.language_model.layers.9.mlp.input", "blocks.9.hook_mlp_out"),
        ("gemma-scope-2-4b-it/transcoder_all/layer_9_width_16k_l0_small_affine", "google/gemma-3-4b-it",
         "model.language_model.layers.9.mlp.input", "blocks.9.hook_mlp_out"),
    ],
)  # fmt: skip
def test_those_for_gemma_3(tmp_path, place, lm, hook, hook_out):
    p = parameters()
    tensors = {name.replace("W_", "w_"): torch.from_numpy(array) for name, array in p.items()}
    skip = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(3))
    if place.endswith("affine"):
        tensors["affine_skip_connection"] = skip
    (tmp_path / place).mkdir(parents=True)
    save_file(tensors, tmp_path / place / "params.safetensors")
    sae, made = import_sae(tmp_path / place)
    assert (made["lm"], made["hook"], made.get("hook_out")) == (lm, hook, hook_out)
    assert (sae.is_transcoder, sae.config.skip) == (hook_out is not None, place.endswith("affine"))
    if not sae.config.skip:
        check_same(sae, p)
    else:
        x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1))
        wanted = computed(p, x)[1] + x.double() @ skip.double()
        torch.testing.assert_close(sae(x).detach().double(), wanted, rtol=1e-5, atol=1e-5)


def test_other_spellings_and_factors(tmp_path):
    p = parameters()
    lower = {name.replace("W_", "w_"): array for name, array in p.items()}
    check_same(import_sae(written(tmp_path / "a", lower | {"scaling_factor": np.ones(D_SAE, np.float32)}))[0], p)
    with pytest.raises(ValueError, match="factors that scale its latents"):
        import_sae(written(tmp_path / "b", p | {"scaling_factor": np.full(D_SAE, 2, np.float32)}))
    with pytest.raises(ValueError, match="an SAE of embeddings"):
        import_sae(written(tmp_path / "embedding" / "c", p))


def test_a_folder_of_any_name_is_an_sae_without_a_hook(tmp_path, capsys):
    p = parameters()
    written(tmp_path / "mine", p)
    assert main(["import", str(tmp_path / "mine"), "--out", str(tmp_path / "run")]) == 0
    sae = SAE.load(tmp_path / "run")
    check_same(sae, p)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["provenance"]["origin"]["format"] == "gemma_scope"
    assert sae.hook == ""


def test_from_the_hub_as_its_cache_holds_it(tmp_path, monkeypatch, capsys):
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "models--google--gemma-scope-2b-pt-res"
    sha = "0123456789abcdef0123456789abcdef01234567"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(sha)
    p = parameters()
    written(place / "snapshots" / sha / "layer_7" / "width_16k" / "average_l0_41", p)
    name = "google/gemma-scope-2b-pt-res/layer_7/width_16k/average_l0_41"
    assert main(["import", f"hf://{name}", "--out", str(tmp_path / "run")]) == 0
    check_same(SAE.load(tmp_path / "run"), p)
    made = json.loads((tmp_path / "run" / "config.json").read_text())["provenance"]
    assert (made["lm"], made["hook"]) == ("google/gemma-2-2b", "blocks.7.hook_resid_post")
    assert (made["origin"]["hub"], made["origin"]["revision"]) == (name, "main")
    for asked, words in [
        (f"hf://{name}0", "no SAE there in a format that is known here"),
        ("hf://google", "not a place on the hub"),
        (name, "one on the hub is written hf://"),
    ]:
        assert main(["import", asked, "--out", str(tmp_path / "none")]) == 2
        assert words in capsys.readouterr().err
    assert main(["import", str(place), "--revision", "v2", "--out", str(tmp_path / "none")]) == 2
    assert "only folders on the hub have one" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def _pickled():
    class Harmful:
        def __reduce__(self):
            return (open, ("harmed", "w"))

    content = io.BytesIO()
    array = np.empty(1, object)
    array[0] = Harmful()
    np.save(content, array, allow_pickle=True)
    assert pickle.PROTO in content.getvalue()
    return content.getvalue()


def test_damaged_files_are_refused_and_no_pickle_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "mine", parameters())
    file = folder / "params.npz"
    whole = file.read_bytes()
    with zipfile.ZipFile(tmp_path / "harmful.npz", "w") as archive:
        archive.writestr("W_enc.npy", _pickled())
    np.savez_compressed(tmp_path / "packed.npz", W_enc=np.zeros((10, 1_000_000), np.float32))
    narrow = {**parameters(), "b_dec": np.zeros(3, np.float32)}
    np.savez(tmp_path / "narrow.npz", **narrow)
    np.savez(tmp_path / "infinite.npz", **{**parameters(), "b_enc": np.full(D_SAE, np.inf, np.float32)})
    np.savez(tmp_path / "wide.npz", **parameters(d_out=7))
    for content, words in [
        (whole[: len(whole) // 2], "not a file of plain tensors"),
        (b"", "not a file of plain tensors"),
        ((tmp_path / "harmful.npz").read_bytes(), "not a file of plain arrays"),
        ((tmp_path / "packed.npz").read_bytes(), "hold nothing compressed"),
        ((tmp_path / "narrow.npz").read_bytes(), "b_dec is torch.float32"),
        ((tmp_path / "infinite.npz").read_bytes(), "not finite"),
        ((tmp_path / "wide.npz").read_bytes(), "an SAE writes what it reads"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            import_sae(folder)
    assert not (tmp_path / "harmed").exists()
