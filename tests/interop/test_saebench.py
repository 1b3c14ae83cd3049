"""The adapter for SAEBench: on raw activations it does what the SAE does; SAEBench's own code agrees."""

import ast
import json
from pathlib import Path

import pytest
import torch

import saebench_core
from prolu import SAE, SAEConfig
from prolu.interop import saebench
from prolu.interop.saebench import SAEBenchSAE
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.training.starting_weights import initial_weights

PROVENANCE = {"lm": "gpt2", "hook": "blocks.1.hook_resid_pre", "ctx": 32, "data": "stories", "centred": True}
ASKED = [
    "model_name", "d_in", "d_sae", "hook_layer", "hook_name", "hook_head_index", "context_size", "architecture",
    "dtype", "device", "model_from_pretrained_kwargs", "prepend_bos", "normalize_activations", "dataset_path",
    "dataset_trust_remote_code", "seqpos_slice", "training_tokens", "sae_lens_training_version", "neuronpedia_id",
    "activation_fn_str", "activation_fn_kwargs", "apply_b_dec_to_input", "finetuning_scaling_factor",
]  # fmt: skip


def saved(folder, provenance=PROVENANCE, **config):
    config = SAEConfig(d_in=16, d_sae=40, **config)
    sae = SAE(config, initial_weights(config, 0, initial_bias=-0.1))
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    sae.save(folder, provenance)
    return SAE.load(folder)


def raw(*shape):
    return 3 * torch.randn(*shape, 16, generator=torch.Generator().manual_seed(0)) + 1


@pytest.mark.parametrize("nonlinearity", ["prolu_ste", "relu", "gated", "jumprelu", "topk(4)", "batchtopk(4)"])
@pytest.mark.parametrize("normalisation", ["per_token", "none"])
@pytest.mark.parametrize("centred", [True, False])
def test_on_raw_activations_it_does_what_the_sae_does(tmp_path, nonlinearity, normalisation, centred):
    sae = saved(tmp_path, PROVENANCE | {"centred": centred}, nonlinearity=nonlinearity, normalisation=normalisation)
    theirs, x = SAEBenchSAE.load(tmp_path), raw(3, 5)
    assert torch.equal(theirs.encode(x), sae.encode(x))
    assert torch.equal(theirs(x), sae(x))
    assert torch.equal(theirs(x), theirs.decode(theirs.encode(x)))
    torch.testing.assert_close(theirs(x.flatten(0, 1)), theirs(x).flatten(0, 1))


def test_changed_latents_are_decoded_in_the_scale_of_their_tokens(tmp_path):
    saved(tmp_path)
    theirs, x = SAEBenchSAE.load(tmp_path), raw(3, 5)
    latents = theirs.encode(x)
    latent = latents.sum((0, 1)).argmax()
    without = latents.clone()
    without[..., latent] = 0
    direction = (theirs.decode(latents) - theirs.decode(without)) / (x - x.mean(-1, keepdim=True)).norm(dim=-1)[
        ..., None
    ]
    torch.testing.assert_close(direction, latents[..., latent, None] * theirs.W_dec[latent] / 4)


@pytest.mark.parametrize("normalisation", ["per_token", "none"])
def test_raw_latents_times_decoder_rows_are_the_raw_reconstruction(tmp_path, normalisation):
    sae = saved(tmp_path, PROVENANCE | {"centred": False}, normalisation=normalisation)
    theirs, x = SAEBenchSAE.load(tmp_path, raw_latents=True), raw(3, 5)
    scale = sae.encode(x).row_scale.scale
    torch.testing.assert_close(theirs.encode(x) @ sae.W_dec + scale * sae.b_dec, sae(x))
    torch.testing.assert_close(theirs(x), sae(x))
    in_bf16 = theirs.to(dtype=torch.bfloat16)
    assert in_bf16.encode(x).dtype == in_bf16(x).dtype == torch.bfloat16


def test_latents_of_other_tokens_are_refused(tmp_path):
    saved(tmp_path)
    theirs = SAEBenchSAE.load(tmp_path)
    latents = theirs.encode(raw(3, 5))
    theirs.encode(raw(2, 5))
    with pytest.raises(ValueError, match=r"the last encode was of \(2, 5\) tokens"):
        theirs.decode(latents)


def test_in_a_layer_norm_model_the_mean_that_is_put_back_changes_nothing(tiny_lm, tmp_path):
    sae, tokens = saved(tmp_path), torch.randint(1, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    x = tiny_lm._read(tokens, [tiny_lm._site])[0]
    with torch.no_grad():
        ours, theirs = (
            tiny_lm.logits(tokens, s) for s in (sae(tiny_lm.activations(tokens)), SAEBenchSAE.load(tmp_path)(x))
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nonlinearity", ["prolu_ste", "gated"])
def test_it_has_all_that_saebench_asks_for(tmp_path, nonlinearity):
    sae = saved(tmp_path, PROVENANCE | {"run": {"n_tokens": 1000}}, nonlinearity=nonlinearity)
    theirs = SAEBenchSAE.load(tmp_path, "gpt2-small")
    theirs.cfg.metadata = object()  # SAEBench adds it
    facts = json.loads(json.dumps(theirs.cfg.to_dict()))
    assert sorted(facts) == sorted(ASKED)
    expected = {"model_name": "gpt2-small", "hook_layer": 1, "context_size": 32, "training_tokens": 1000, "d_sae": 40}
    assert facts.items() >= (expected | {"architecture": nonlinearity, "dtype": "float32"}).items()
    bias = {"prolu_ste": "b_enc", "gated": "b_mag"}
    for name in {"W_enc", "W_dec", "b_dec", bias[nonlinearity]}:
        assert torch.equal(getattr(theirs, name), getattr(sae, name))
    assert hasattr(theirs, "b_enc") == ("b_enc" in nonlinearity_named(nonlinearity).parameter_names)
    assert (theirs.dtype, theirs.device) == (torch.float32, torch.device("cpu"))
    theirs = theirs.to(device="cpu", dtype=torch.bfloat16)
    assert theirs.dtype == theirs(raw(2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("provenance", "message"),
    [({}, "lacks centred, ctx, data, hook, lm"), ({"hook": "model.layers.3.output"}, "blocks.L.hook_SITE")],
)
def test_what_saebench_cannot_know_is_named(tmp_path, provenance, message):
    saved(tmp_path, provenance and PROVENANCE | provenance)
    with pytest.raises(ValueError, match=message):
        SAEBenchSAE.load(tmp_path)


def test_a_decoder_of_other_norms_is_refused(tmp_path):
    sae = saved(tmp_path)
    sae.W_dec.data[3] *= 1.01
    sae.save(tmp_path, PROVENANCE)
    with pytest.raises(ValueError, match=r"W_dec: rows have norms .* to 1\.01, SAEBench needs norm 1"):
        SAEBenchSAE.load(tmp_path)


def test_it_imports_nothing_of_theirs():
    found = [
        node for node in ast.walk(ast.parse(Path(saebench.__file__).read_text())) if isinstance(node, ast.ImportFrom)
    ]
    assert {node.module.split(".")[0] for node in found} == {
        "dataclasses",
        "pathlib",
        "typing",
        "jaxtyping",
        "torch",
        "prolu",
    }


@pytest.mark.slow  # makes an environment once (minutes), trains three SAEs, runs SAEBench
def test_its_core_evaluation_says_of_our_saes_what_we_say_by_its_definitions(tmp_path):
    try:
        saebench_core.environment()
    except LookupError as reason:
        pytest.skip(str(reason))
    assert saebench_core.unexplained(saebench_core.compare(tmp_path)) < saebench_core.TOLERANCE
