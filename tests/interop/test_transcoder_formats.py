"""Transcoders in the formats of SAELens and circuit-tracer, computed from the files by the libraries' equations.

The libraries' own code runs in `make interop`.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load

from prolu import SAE, SAEConfig
from prolu.cli.entry_point import main
from prolu.interop import export_files, import_sae, write_folder
from support.transcoders import targets_of, transcoder_weights

READ = "model.layers.2.mlp.input"
WRITE = "blocks.2.hook_mlp_out"
FAMILIES = ["relu", "prolu_ste", "jumprelu", "batchtopk(4)"]


def saved(folder, nonlinearity, *, skip=False, d_out=12, normalisation="none", **provenance):
    weights = transcoder_weights(nonlinearity, 12, 40, d_out, skip=skip)
    config = SAEConfig(
        d_in=12, d_sae=40, d_out=d_out, skip=skip, nonlinearity=nonlinearity, normalisation=normalisation
    )
    sae = SAE(config, weights)
    sae.save(folder, {"lm": "a/tiny", "hook": READ, "hook_out": WRITE} | provenance)
    return SAE.load(folder)


def output_of(tensors, x, encoder, threshold):
    """y_hat = f W_dec + b_dec + W_skip x, as both libraries compute it."""
    pre = x @ encoder + tensors["b_enc"]
    f = torch.relu(pre) if threshold is None else pre * (pre > threshold)
    out = f @ tensors["W_dec"] + tensors["b_dec"]
    return f, out + x @ tensors["W_skip"].T if "W_skip" in tensors else out


def check_same(sae, x, f, out):
    torch.testing.assert_close(f, sae.encode(x).detach().as_subclass(torch.Tensor), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out, sae(x).detach(), rtol=1e-9, atol=1e-9)
    assert (f > 0).any()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [12, 7])
@pytest.mark.parametrize("nonlinearity", FAMILIES)
def test_saelens_files_compute_the_same(tmp_path, nonlinearity, d_out, skip):
    sae, x = saved(tmp_path, nonlinearity, skip=skip, d_out=d_out), targets_of(300, 12)
    files = export_files(tmp_path, "saelens")
    config, tensors = json.loads(files["cfg.json"]), load(files["sae_weights.safetensors"])
    kind = "transcoder" if nonlinearity == "relu" else "jumprelu_transcoder"
    assert config["architecture"] == (kind.replace("transcoder", "skip_transcoder") if skip else kind)
    assert (config["d_in"], config["d_sae"], config["d_out"]) == (12, 40, d_out)
    assert (config["metadata"]["hook_name"], config["metadata"]["hook_name_out"]) == (READ, WRITE)
    assert ("threshold" in tensors) == (nonlinearity != "relu")
    assert ("W_skip" in tensors) == skip
    check_same(sae, x, *output_of(tensors, x, tensors["W_enc"], tensors.get("threshold")))


@pytest.mark.parametrize("normalisation", ["none", "per_token"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("nonlinearity", FAMILIES)
def test_what_saelens_was_given_comes_back(tmp_path, nonlinearity, skip, normalisation):
    sae = saved(tmp_path / "run", nonlinearity, skip=skip, d_out=7, normalisation=normalisation)
    is_scaled = normalisation == "per_token"
    write_folder(tmp_path / "theirs", export_files(tmp_path / "run", "saelens", inputs_normalised=is_scaled))
    back, provenance = import_sae(tmp_path / "theirs")
    assert (back.config.d_out, back.config.skip, back.config.normalisation) == (7, skip, normalisation)
    assert (provenance["hook"], provenance["hook_out"], back.hook_out) == (READ, WRITE, WRITE)
    x = targets_of(300, 12)
    check_same(sae, x, back.encode(x).detach(), back(x).detach())
    # Once more out and in: what SAELens's files hold is kept to the bit.
    back.save(tmp_path / "again", provenance)
    write_folder(tmp_path / "theirs again", export_files(tmp_path / "again", "saelens", inputs_normalised=is_scaled))
    twice, _ = import_sae(tmp_path / "theirs again")
    assert all(torch.equal(a, b) for a, b in zip(back.weights.tensors(), twice.weights.tensors(), strict=True))


def test_a_transcoder_of_saelens_that_ours_cannot_be_is_refused(tmp_path):
    saved(tmp_path / "run", "relu")
    write_folder(tmp_path / "theirs", export_files(tmp_path / "run", "saelens"))
    file = tmp_path / "theirs" / "cfg.json"
    config = json.loads(file.read_text())
    for name, value, words in [
        ("normalize_activations", "layer_norm", "supported is 'none'"),
        ("apply_b_dec_to_input", True, "supported is False"),
        ("d_out", 0, "at least 1"),
        ("d_out", 5, "must be floats of shape"),
        ("architecture", "jumprelu_transcoder", "must hold"),
    ]:
        file.write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=words):
            import_sae(tmp_path / "theirs")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("nonlinearity", FAMILIES)
def test_circuit_tracer_files_compute_the_same(tmp_path, nonlinearity, skip):
    sae, x = saved(tmp_path, nonlinearity, skip=skip), targets_of(300, 12)
    files = export_files(tmp_path, "circuit_tracer")
    assert list(files) == ["layer_2.safetensors", "config.yaml"]
    config, tensors = json.loads(files["config.yaml"]), load(files["layer_2.safetensors"])
    assert tensors["W_enc"].shape == (40, 12)
    assert (config["model_kind"], config["model_name"]) == ("transcoder_set", "tiny")
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "hook_mlp_out")
    threshold = tensors.get("activation_function.threshold")
    assert (threshold is None) == (nonlinearity == "relu")
    check_same(sae, x, *output_of(tensors, x, tensors["W_enc"].T, threshold))


def test_what_a_format_cannot_say_is_refused(tmp_path, capsys):
    refusals = {
        ("topk(4)", "saelens"): "SAELens has no topk transcoders",
        ("gated", "saelens"): "SAELens has no gated transcoders",
        ("gated", "circuit_tracer"): "circuit-tracer has no gated transcoders",
        ("topk(4)", "circuit_tracer"): "circuit-tracer has no topk transcoders",
        ("relu", "dictionary_learning"): "this format holds SAEs only",
    }
    for (nonlinearity, format), words in refusals.items():
        if not (tmp_path / nonlinearity).exists():
            saved(tmp_path / nonlinearity, nonlinearity)
        command = ["export", str(tmp_path / nonlinearity), "--format", format, "--out", str(tmp_path / "out")]
        assert main(command) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    saved(tmp_path / "wide", "relu", d_out=7)
    with pytest.raises(ValueError, match="d_in 12 and d_out 7 must be equal"):
        export_files(tmp_path / "wide", "circuit_tracer")
    saved(tmp_path / "far", "relu", hook_out="blocks.3.hook_mlp_out")
    with pytest.raises(ValueError, match="reads at layer 2 and writes at layer 3"):
        export_files(tmp_path / "far", "circuit_tracer")
    saved(tmp_path / "odd", "relu", hook="model.layers.2.self_attn.output")
    with pytest.raises(ValueError, match="must be the input of an MLP"):
        export_files(tmp_path / "odd", "circuit_tracer")
    SAE(SAEConfig(d_in=12, d_sae=40, nonlinearity="relu"), plain_weights()).save(tmp_path / "sae", {})
    with pytest.raises(ValueError, match="it holds transcoders only"):
        export_files(tmp_path / "sae", "circuit_tracer", inputs_normalised=True)


def plain_weights():
    weights = transcoder_weights("relu", 12, 40, 12)
    return replace(weights, b_out=None)


@pytest.mark.parametrize("format", ["saelens", "circuit_tracer"])
def test_scaling_must_be_allowed_and_is_recorded(tmp_path, format):
    sae, x = saved(tmp_path, "relu", normalisation="per_token", centred=True), targets_of(50, 12)
    with pytest.raises(ValueError, match=r"scaled per token to norm sqrt\(12\) and centred"):
        export_files(tmp_path, format)
    files = export_files(tmp_path, format, inputs_normalised=True)
    config = json.loads(files[{"saelens": "cfg.json", "circuit_tracer": "config.yaml"}[format]])
    record = config["metadata"]["prolu"] if format == "saelens" else config
    assert "scaled per token to norm sqrt(12)" in record["inputs_must_be"]
    (weights,) = (load(content) for name, content in files.items() if name.endswith(".safetensors"))
    encoder = weights["W_enc"] if format == "saelens" else weights["W_enc"].T
    x = x - x.mean(1, keepdim=True)
    scale = x.norm(dim=1, keepdim=True) / 12**0.5
    _, out = output_of(weights, x / scale, encoder, None)
    torch.testing.assert_close(out * scale, sae(x).detach(), rtol=1e-9, atol=1e-9)


def test_our_own_format_keeps_all(tmp_path):
    sae = saved(tmp_path / "a", "jumprelu", skip=True, d_out=7)
    assert main(["export", str(tmp_path / "a"), "--format", "prolu", "--out", str(tmp_path / "b")]) == 0
    assert main(["import", str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0
    x = targets_of(9, 12)
    assert torch.equal(SAE.load(tmp_path / "c")(x), sae(x))
