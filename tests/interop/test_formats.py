"""SAEs of other libraries; what theirs compute is written out here from their code, which `make interop` runs."""

import json
import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prolu import SAE, SAEConfig
from prolu.cli.entry_point import main
from prolu.interop import FORMATS, ExportFormat, ImportFormat, check_new, export_files, import_sae, write_folder
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.nonlinearities.base import activate
from prolu.sae.saved_sae import read_provenance
from prolu.training.starting_weights import initial_weights
from support.foreign_saes import BROKEN, D_IN, D_SAE, write_dictionary_learning, write_saelens, write_sparsify

CODES = [
    "relu",
    "prolu_relu",
    "prolu_ste",
    "jumprelu",
    "jumprelu_plain",
    "jumprelu_ste",
    "gated",
    "topk(5)",
    "batchtopk(5)",
    "thresholded",
]
MADE = {
    "lm": "gpt2", "hook": "blocks.3.hook_resid_post", "data": "some/text", "ctx": 64, "centred": True,
    "run": {"nonlinearity": "prolu_ste"},
}  # fmt: skip
BARE = {name: value for name, value in MADE.items() if name != "centred"}


def make(code, normalisation="per_token", seed=0):
    """An SAE in which every parameter does something; decoder rows have norm 1."""
    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, nonlinearity=code, normalisation=normalisation)
    weights, g = initial_weights(config, seed), torch.Generator().manual_seed(seed)
    weights.encoder.copy_(torch.randn(D_SAE, D_IN, generator=g))
    for t in (weights.b_dec, *weights.own.values()):
        t.add_(0.3 * torch.randn(t.shape, generator=g))
    if code.startswith("batchtopk"):
        weights.own["threshold"].fill_(0.7)
    return SAE(config, weights)


def acts(n=500):
    return 3 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(9)) + 0.5


def centred_acts(n=500):
    """Rows whose mean is 0 without rounding, so that an SAE of centred activations leaves them as they are."""
    x = (192 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(9))).round() / 64
    x[:, -1] = -x[:, :-1].sum(1)
    return x


def saelens(folder, x):
    """SAELens 6.54.12's encode and forward, from the files of a folder."""
    cfg, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    scale = torch.ones(len(x), 1)
    if cfg["normalize_activations"] == "constant_norm_rescale":
        scale = cfg["d_in"] ** 0.5 / x.norm(dim=-1, keepdim=True)
    inner = x * scale - t["b_dec"] * cfg["apply_b_dec_to_input"]
    if cfg["architecture"] == "gated":
        gate = inner @ t["W_enc"] + t["b_gate"] > 0
        f = gate * torch.relu(inner @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
    else:
        pre = inner @ t["W_enc"] + t["b_enc"]
        f = pre.relu()
        if cfg["architecture"] == "jumprelu":
            f = f * (pre > t["threshold"])
        if cfg["architecture"] == "topk":
            if cfg["rescale_acts_by_decoder_norm"]:
                pre = pre * t["W_dec"].norm(dim=-1)
            values, places = pre.topk(cfg["k"], dim=-1)
            f = torch.zeros_like(pre).scatter_(-1, places, values.relu())
    inside = f / t["W_dec"].norm(dim=-1) if cfg.get("rescale_acts_by_decoder_norm") else f
    return f, (inside @ t["W_dec"] + t["b_dec"]) / scale


def dictionary_learning(folder, x):
    """The encode and decode of dictionary_learning 0.1.0's classes, from the files of a folder."""
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    t = torch.load(folder / "ae.pt", weights_only=True)
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        pre = (x if name[0] == "J" else x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
        f = torch.relu(pre) * (pre > t["threshold"])
        return f, f @ t["W_dec"] + t["b_dec"]
    bias = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias", "AutoEncoderNew": "decoder.bias"}
    bias = t[bias.get(name, "b_dec")]
    if name == "AutoEncoder":  # its `from_pretrained` does so
        norms = t["decoder.weight"].norm(dim=0)
        t["decoder.weight"], t["encoder.weight"] = t["decoder.weight"] / norms, t["encoder.weight"] * norms[:, None]
        t["encoder.bias"] = t["encoder.bias"] * norms
    inner = (x if name == "AutoEncoderNew" else x - bias) @ t["encoder.weight"].T
    if name == "GatedAutoEncoder":
        f = (inner + t["gate_bias"] > 0) * torch.relu(t["r_mag"].exp() * inner + t["mag_bias"])
    else:
        f = torch.relu(inner + t["encoder.bias"])
    if name == "AutoEncoderTopK":
        values, places = f.topk(int(t["k"]), dim=-1)
        f = torch.zeros_like(f).scatter_(-1, places, values)
    if name == "BatchTopKSAE":
        f = f * (f > t["threshold"])
    return f, f @ t["decoder.weight"].T + bias


THEIRS = {"saelens": saelens, "dictionary_learning": dictionary_learning}


def exported(sae, format, folder, made=MADE, **flags):
    sae.save(folder / "run", made)
    write_folder(folder / format, export_files(folder / "run", format, **flags))
    return folder / format


def differences(ours, theirs):
    """Gates that differ, and the largest difference over the largest number."""
    gates = ((ours > 0) != (theirs > 0)).sum().item()
    return gates, ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("normalisation", ["per_token", "none"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("format", THEIRS)
def test_their_code_computes_what_ours_does_and_the_way_back_gives_the_bits(tmp_path, format, code, normalisation):
    sae, x = make(code, normalisation), centred_acts()
    scaled = format == "dictionary_learning" and normalisation == "per_token"
    made = BARE if format == "dictionary_learning" and normalisation == "none" else MADE
    folder = exported(sae, format, tmp_path, made, inputs_normalised=scaled)
    prepared = x * (D_IN**0.5 / x.norm(dim=-1, keepdim=True)) if scaled else x
    latents, recon = THEIRS[format](folder, prepared)
    gates, apart = differences(sae.encode(x), latents)
    assert gates == 0
    assert apart < 1e-6
    ours = sae.decode_normalised(sae.encode(x)) if scaled else sae(x)
    assert differences(ours, recon)[1] < 2e-6
    back, provenance = import_sae(folder)
    assert back.config == sae.config
    assert provenance == made
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in sae.state_dict().items())
    assert torch.equal(back.encode(x), sae.encode(x))
    assert torch.equal(back(x), sae(x))


@pytest.mark.parametrize("code", CODES)
def test_without_the_file_beside_the_latents_are_the_same(tmp_path, code):
    sae, x = make(code), centred_acts()
    folder = exported(sae, "saelens", tmp_path)
    (folder / "prolu.safetensors").unlink()
    back, made = import_sae(folder)
    assert torch.equal(back.encode(x), sae.encode(x))
    assert torch.equal(back(x), sae(x))
    if code.startswith("prolu"):  # the metadata says so: b = -threshold
        assert back.config.nonlinearity == code
        assert torch.equal(back.b_enc, -torch.relu(-sae.b_enc))
        assert made == MADE
    if code in ("jumprelu", "batchtopk(5)"):
        assert back.config.nonlinearity == "thresholded"
        assert made["origin"]["architecture"] == "jumprelu"
        assert (made["lm"], made["hook"], made["ctx"], made["centred"]) == ("gpt2", MADE["hook"], 64, True)


@pytest.mark.parametrize("flag", [False, True, None])
def test_old_factors_of_one_are_left_out_and_others_refused(tmp_path, flag):
    config = {"metadata": {}, "sae_lens_version": "3.5.0", "finetuning_scaling_factor": flag}
    folder = write_saelens(tmp_path / "theirs", config)
    without, _ = import_sae(write_saelens(tmp_path / "without", config | {"finetuning_scaling_factor": False}))
    tensors = load_file(folder / "sae_weights.safetensors")
    for factors in (torch.ones(D_SAE), torch.ones(D_SAE) + 1e-7):
        save_file(tensors | {"scaling_factor": factors}, folder / "sae_weights.safetensors")
        assert torch.equal(import_sae(folder)[0].W_dec, without.W_dec)
    for factors in (torch.ones(D_SAE) * 1.1, torch.zeros(D_SAE), torch.ones(D_SAE, dtype=torch.int64)):
        save_file(tensors | {"scaling_factor": factors}, folder / "sae_weights.safetensors")
        with pytest.raises(ValueError, match="scaling_factor is not 1"):
            import_sae(folder)


@pytest.mark.parametrize("code", ["prolu_ste", "jumprelu"])
def test_what_was_changed_there_is_not_taken_for_ours(tmp_path, code):
    folder, x = exported(make(code), "saelens", tmp_path), centred_acts()
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"b_enc": tensors["b_enc"] + 0.25}, folder / "sae_weights.safetensors")
    back, made = import_sae(folder)
    assert back.config.nonlinearity == "thresholded"
    assert "origin" in made
    assert differences(back.encode(x), saelens(folder, x)[0]) == (0, 0.0)


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "topk", "gated"])
@pytest.mark.parametrize("change", [{}, {"apply_b_dec_to_input": False}, {"rescale_acts_by_decoder_norm": True},
                                    {"normalize_activations": "constant_norm_rescale"}])  # fmt: skip
def test_anyones_saelens_folder(tmp_path, architecture, change):
    if "rescale_acts_by_decoder_norm" in change and architecture != "topk":
        return
    folder, x = write_saelens(tmp_path / "theirs", change, architecture=architecture), acts()
    if "rescale_acts_by_decoder_norm" not in change:
        change = {"rescale_acts_by_decoder_norm": False} | change
    sae, made = import_sae(folder)
    latents, recon = saelens(folder, x)
    exact = (
        architecture != "gated" and not any(change[k] is True for k in change) and change.get("apply_b_dec_to_input", 1)
    )
    gates, apart = differences(sae.encode(x), latents)
    assert gates == 0
    assert apart == 0 if exact else apart < 1e-6
    assert differences(sae(x), recon)[1] < 2e-6
    assert (made["lm"], made["centred"], made["origin"]["format"]) == ("gpt2-small", False, "saelens")


def test_negative_and_zero_thresholds_are_kept(tmp_path):
    threshold = torch.linspace(-1, 1, D_SAE)
    folder, x = write_saelens(tmp_path / "theirs", tensors={"threshold": threshold}), acts()
    sae, _ = import_sae(folder)
    assert torch.equal(sae.threshold, threshold)
    assert differences(sae.encode(x), saelens(folder, x)[0]) == (0, 0.0)
    sae(x).square().sum().backward()
    assert sae.W_enc.grad.abs().sum() > 0
    assert sae.threshold.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_lose_nothing(tmp_path, dtype):
    folder = write_saelens(tmp_path / "theirs")
    tensors = {n: t.to(dtype) for n, t in load_file(folder / "sae_weights.safetensors").items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    sae, _ = import_sae(folder)
    assert all(torch.equal(tensors[n].double(), t.double()) for n, t in sae.state_dict().items())
    assert sae.W_dec.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_config_before_version_6(tmp_path):
    old = {
        "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "model_name": "gpt2-small", "hook_point": "blocks.1.hook_resid_pre",
        "hook_point_head_index": None, "context_size": 128, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5},
        "normalize_activations": False,
    }  # fmt: skip
    folder = write_saelens(tmp_path / "theirs", architecture="topk")
    (folder / "cfg.json").write_text(json.dumps(old))
    sae, made = import_sae(folder)
    assert sae.config.nonlinearity == "topk(5)"
    assert made["hook"] == "blocks.1.hook_resid_pre"
    assert "centred" not in made  # it does not say how its model was loaded


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder",
                                  "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])  # fmt: skip
def test_anyones_dictionary_learning_folder(tmp_path, name):
    folder, x = write_dictionary_learning(tmp_path / "trainer_0", name), acts()
    sae, made = import_sae(folder)
    latents, recon = dictionary_learning(folder, x)
    gates, apart = differences(sae.encode(x), latents)
    assert gates == 0
    assert apart < 1e-6
    assert differences(sae(x), recon)[1] < 2e-6
    assert made["hook"] == "blocks.1.hook_resid_post"
    assert (made["lm"], made["ctx"], made["centred"]) == ("EleutherAI/pythia-70m", 128, False)


def test_anyones_sparsify_folder(tmp_path):
    folder, x = write_sparsify(tmp_path / "run" / "layers.3.mlp"), acts()
    t = load_file(folder / "sae.safetensors")
    pre = torch.relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    values, places = pre.topk(5, dim=-1)
    latents = torch.zeros_like(pre).scatter_(-1, places, values)
    sae, made = import_sae(folder)
    assert differences(sae.encode(x), latents)[0] == 0
    assert differences(sae.encode(x), latents)[1] < 1e-6
    assert differences(sae(x), latents @ t["W_dec"] + t["b_dec"])[1] < 2e-6
    assert made["hook"] == "blocks.3.hook_mlp_out"
    assert (made["lm"], made["data"], made["ctx"], made["centred"]) == ("m", "x/y", 256, False)
    (tmp_path / "mine").symlink_to(folder)
    assert import_sae(tmp_path / "mine")[1] == made
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere/0f3a")
    folder.symlink_to(tmp_path / "elsewhere/0f3a")
    assert import_sae(folder)[1] == made


def test_our_own_format_is_a_copy(tmp_path):
    folder = exported(make("gated"), "prolu", tmp_path)
    assert (folder / "sae.safetensors").read_bytes() == (tmp_path / "run" / "sae.safetensors").read_bytes()
    assert import_sae(folder)[1] == MADE


def test_saelens_is_told_that_writing_weights_are_centred(tmp_path):
    folder = exported(make("prolu_ste"), "saelens", tmp_path)
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    assert metadata["model_class_name"] == "HookedTransformer"
    assert metadata["prolu"]["provenance"] == MADE
    plain = exported(make("prolu_ste"), "saelens", tmp_path / "b", BARE)
    assert json.loads((plain / "cfg.json").read_text())["metadata"]["model_from_pretrained_kwargs"] == {}


@pytest.mark.parametrize(
    ("code", "normalisation", "made", "format", "flag", "words"),
    [
        ("prolu_ste", "per_token", BARE, "dictionary_learning", False, r"scaled per token to norm sqrt\(12\) first"),
        ("prolu_ste", "none", MADE, "dictionary_learning", False, "must be centred"),
        ("relu", "none", MADE | {"hook": "transformer.h.1.output"}, "saelens", False, "must be centred"),
        ("relu", "none", BARE, "dictionary_learning", True, "leave it out"),
        ("relu", "per_token", MADE, "saelens", True, "leave it out"),
        ("relu", "none", BARE, "sparsify", False, "choose one of prolu, saelens, dictionary_learning"),
        ("relu", "none", BARE, "onnx", False, "choose one of prolu, saelens, dictionary_learning"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused(tmp_path, code, normalisation, made, format, flag, words):
    make(code, normalisation).save(tmp_path, made)
    with pytest.raises(ValueError, match=words):
        export_files(tmp_path, format, inputs_normalised=flag)


def test_longer_decoder_rows_are_refused_where_they_would_be_rescaled(tmp_path):
    sae = make("relu", "none")
    sae.W_dec.data.mul_(2)
    sae.save(tmp_path, BARE)
    with pytest.raises(ValueError, match="scales decoder rows to norm 1 when it is loaded"):
        export_files(tmp_path, "dictionary_learning")
    assert export_files(tmp_path, "saelens")


def test_prepared_inputs_are_recorded(tmp_path):
    folder = exported(make("prolu_ste"), "dictionary_learning", tmp_path, inputs_normalised=True)
    said = json.loads((folder / "config.json").read_text())["prolu"]["inputs_must_be"]
    assert said == ["centred (their mean over d_model removed)", "scaled per token to norm sqrt(12)"]


@pytest.mark.parametrize("code", CODES)
def test_prepared_inputs_are_not_forgotten_where_the_rest_is(tmp_path, code):
    sae, x = make(code), centred_acts()
    folder = exported(sae, "dictionary_learning", tmp_path, inputs_normalised=True)
    (folder / "prolu.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["prolu"]["sae"]
    (folder / "config.json").write_text(json.dumps(config))
    back, made = import_sae(folder)
    assert back.config.normalisation == "per_token"
    assert made["centred"] is True
    gates, apart = differences(back.encode(x), sae.encode(x))
    assert gates == 0
    assert apart < 1e-6
    assert differences(back(x), sae(x))[1] < 2e-6
    config["prolu"]["inputs_must_be"] = ["whitened"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="inputs_must_be is"):
        import_sae(folder)


def test_centring_at_a_module_path_is_not_forgotten_either(tmp_path):
    made = MADE | {"hook": "transformer.h.1.output"}
    folder = exported(make("jumprelu"), "saelens", tmp_path, made, inputs_normalised=True)
    (folder / "prolu.safetensors").unlink()
    back, found = import_sae(folder)
    assert back.config.nonlinearity == "thresholded"
    assert (found["hook"], found["centred"]) == (made["hook"], True)


@pytest.mark.parametrize("case", BROKEN)
def test_folders_that_are_damaged_or_say_too_much(tmp_path, capsys, case):
    write, words = BROKEN[case]
    folder = write(tmp_path / "run" / "theirs")
    before = sorted(tmp_path.rglob("*"))
    assert main(["import", str(folder), "--out", str(tmp_path / "ours")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("prolu: ")
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_two_formats_needs_the_flag(tmp_path, capsys):
    folder = write_saelens(tmp_path / "theirs")
    for file in write_sparsify(tmp_path / "run" / "other").iterdir():
        if file.name == "sae.safetensors":
            shutil.copy(file, folder)
    command = ["import", str(folder), "--out", str(tmp_path / "ours")]
    assert main(command) == 2
    assert "files of saelens and of sparsify; choose one with --format" in capsys.readouterr().err
    assert main([*command, "--format", "dictionary_learning"]) == 2
    assert "has no config.json and no ae.pt, which a folder of dictionary_learning has" in capsys.readouterr().err
    assert main([*command, "--format", "saelens"]) == 0
    assert SAE.load(tmp_path / "ours").config.nonlinearity == "thresholded"
    assert main([*command, "--format", "saelens"]) == 2  # not into a folder that has something
    assert "not empty" in capsys.readouterr().err


def test_export_and_import_by_command(tmp_path, capsys):
    make("prolu_ste").save(tmp_path / "run", MADE)
    export = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "theirs"), "--format"]
    assert main([*export, "dictionary_learning"]) == 2
    assert "--inputs-normalised" in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()
    assert main([*export, "saelens"]) == 0
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "back")]) == 0
    for file in ("sae.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_new(tmp_path / "file" / "x")


def test_every_format_is_recognised_by_its_files():
    assert len({one.files for one in FORMATS.values()}) == len(FORMATS)


def test_the_command_line_offers_the_formats_of_the_table():
    assert set(get_args(ImportFormat)) == {name for name, one in FORMATS.items() if one.from_folder}
    assert set(get_args(ExportFormat)) == {name for name, one in FORMATS.items() if one.to_files}


def test_thresholded_is_its_equation_with_the_gradient_through_the_gate():
    g = torch.Generator().manual_seed(0)
    m, b, threshold = (torch.randn(300, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    upstream = torch.randn(300, generator=g, dtype=torch.float64)
    out = activate(nonlinearity_named("thresholded"), m, {"b_enc": b, "threshold": threshold})
    out.backward(upstream)
    z = m + b
    gate = (z > threshold) & (z > 0)
    assert torch.equal(out, torch.relu(z) * (z > threshold))
    assert torch.equal(m.grad, torch.where(gate, upstream, 0))
    assert torch.equal(b.grad, m.grad)
    assert torch.equal(threshold.grad, torch.zeros_like(threshold))
    edge = torch.tensor([0.5, np.nextafter(np.float32(0.5), np.float32(1))])
    at = activate(
        nonlinearity_named("thresholded"), edge, {"b_enc": torch.zeros(2), "threshold": torch.full((2,), 0.5)}
    )
    assert at.tolist() == [0.0, edge[1].item()]


def test_provenance_of_a_run_without_any(tmp_path):
    make("relu", "none").save(tmp_path / "run")
    write_folder(tmp_path / "theirs", export_files(tmp_path / "run", "saelens"))
    assert import_sae(tmp_path / "theirs")[1] == read_provenance(tmp_path / "run") == {}


def bomb(file, how):
    """Replace the tensors of an ae.pt by something that claims more than the file holds."""
    import zipfile

    if how == "expanded":
        there = torch.load(file, weights_only=True)
        torch.save(there | {"encoder.weight": torch.zeros(1).expand(50_000, 50_000)}, file)
    elif how == "old format":
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    else:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        largest = max(entries, key=lambda name: len(entries[name]))
        if how == "a gigabyte of zeros":
            entries[largest] = bytes(2**30)
        method = zipfile.ZIP_BZIP2 if how == "bzip2" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)


@pytest.mark.parametrize("how", ["a gigabyte of zeros", "deflated", "bzip2", "expanded", "old format"])
def test_an_archive_is_not_unpacked_before_its_sizes_are_known(tmp_path, monkeypatch, how):
    from support.foreign_saes import write_dictionary_learning

    folder = write_dictionary_learning(tmp_path / "theirs", "AutoEncoder")
    import_sae(folder)
    bomb(folder / "ae.pt", how)
    assert (folder / "ae.pt").stat().st_size < 2**21
    if how != "expanded":  # which is a few bytes until it is copied

        def unpacked(*_, **__):
            raise AssertionError("torch has unpacked it")

        monkeypatch.setattr(torch, "load", unpacked)
    with pytest.raises(
        ValueError, match=r"ae\.pt: (unpacks from|encoder.weight has shape|not a file of plain tensors)"
    ):
        import_sae(folder)
