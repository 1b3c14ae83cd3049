"""SAEs as other libraries write them, whole and broken."""

import io
import json

import torch
from safetensors.torch import save_file


def write_saelens(folder, cfg=(), tensors=(), architecture="jumprelu"):
    """A folder as SAELens would have written it, nothing of ours in it."""
    g = torch.Generator().manual_seed(4)
    own = {
        "jumprelu": ["b_enc", "threshold"],
        "standard": ["b_enc"],
        "topk": ["b_enc"],
        "gated": ["b_gate", "b_mag", "r_mag"],
    }
    there = {"W_enc": torch.randn(D_IN, D_SAE, generator=g), "W_dec": torch.randn(D_SAE, D_IN, generator=g)}
    there |= {"b_dec": torch.randn(D_IN, generator=g)}
    there |= {name: torch.randn(D_SAE, generator=g) for name in own[architecture]}
    config = {
        "architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.3.0", "model_name": "gpt2-small", "hook_name": "blocks.1.hook_resid_pre",
                     "hook_head_index": None, "context_size": 32, "dataset_path": "x/y", "model_from_pretrained_kwargs": {}},
    } | ({"k": 5, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config | dict(cfg)))
    save_file({n: t.contiguous() for n, t in (there | dict(tensors)).items()}, folder / "sae_weights.safetensors")
    return folder


def write_dictionary_learning(folder, name, change=(), tensors=()):
    """A folder as dictionary_learning would have written it."""
    g = torch.Generator().manual_seed(5)
    n, d = D_SAE, D_IN
    linear = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n)}
    matrices = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    shapes = {
        "AutoEncoder": linear | {"bias": (d,)}, "AutoEncoderNew": linear | {"decoder.bias": (d,)},
        "GatedAutoEncoder": {"decoder_bias": (d,), "encoder.weight": (n, d), "decoder.weight": (d, n), "r_mag": (n,),
                             "gate_bias": (n,), "mag_bias": (n,)},
        "JumpReluAutoEncoder": matrices | {"threshold": (n,)}, "MatryoshkaBatchTopKSAE": matrices,
        "AutoEncoderTopK": linear | {"b_dec": (d,)}, "BatchTopKSAE": linear | {"b_dec": (d,)},
    }[name]  # fmt: skip
    there = {key: torch.randn(shape, generator=g) for key, shape in shapes.items()}
    if "TopK" in name:
        there |= {"k": torch.tensor(5, dtype=torch.int32), "threshold": torch.tensor(0.6)}
    if name.startswith("Matryoshka"):
        there["group_sizes"] = torch.tensor([10, 30])
    trainer = {"dict_class": name, "activation_dim": d, "dict_size": n, "layer": 1, "lm_name": "EleutherAI/pythia-70m",
               "submodule_name": "resid_post_layer_1"} | ({"k": 5} if "TopK" in name else {})  # fmt: skip
    folder.mkdir(parents=True)
    torch.save(there | dict(tensors), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer | dict(change), "buffer": {"ctx_len": 128}}))
    return folder


def write_sparsify(folder, cfg=(), tensors=()):
    """A folder as sparsify 1.3.3 would have written it."""
    g = torch.Generator().manual_seed(6)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    there = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()} | dict(tensors)
    folder.mkdir(parents=True)
    save_file(there, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": 5,
              "multi_topk": True, "skip_connection": False, "transcode": False, "d_in": D_IN}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config | dict(cfg)))
    (folder.parent / "config.json").write_text(json.dumps({"model": "m", "dataset": "x/y", "ctx_len": 256}))
    return folder


BROKEN = {
    "SAELens: another architecture": (lambda f: write_saelens(f, {"architecture": "matching_pursuit"}), "architecture is 'matching_pursuit'"),
    "SAELens: layer_norm": (lambda f: write_saelens(f, {"normalize_activations": "layer_norm"}), "normalize_activations is 'layer_norm'"),
    "SAELens: average": (lambda f: write_saelens(f, {"normalize_activations": "expected_average_only_in"}), "in no file of the folder"),
    "SAELens: heads": (lambda f: write_saelens(f, {"reshape_activations": "hook_z"}), "reshape_activations is 'hook_z'"),
    "SAELens: one head": (lambda f: write_saelens(f, {"metadata": {"sae_lens_version": "6.1.0", "hook_head_index": 3}}), "hook_head_index is 3"),
    "SAELens: no d_sae": (lambda f: write_saelens(f, {"d_sae": None}), "d_sae is None"),
    "SAELens: true": (lambda f: write_saelens(f, {"d_sae": True}), "d_sae is True"),
    "SAELens: another width": (lambda f: write_saelens(f, {"d_in": 13}), "must be floats of shape"),
    "SAELens: apply is text": (lambda f: write_saelens(f, {"apply_b_dec_to_input": "yes"}), "apply_b_dec_to_input is 'yes'"),
    "SAELens: k": (lambda f: write_saelens(f, {"k": 99}, architecture="topk"), "k is 99, but the SAE has only 40 latents"),
    "SAELens: k of 0": (lambda f: write_saelens(f, {"k": 0}, architecture="topk"), "must be at least 1"),
    "SAELens: metadata": (lambda f: write_saelens(f, {"metadata": []}), "metadata is"),
    "SAELens: NaN": (lambda f: write_saelens(f, tensors={"threshold": torch.full((D_SAE,), torch.nan)}), "not finite"),
    "SAELens: more": (lambda f: write_saelens(f, tensors={"x": torch.ones(1)}), "holds"),
    "SAELens: integers": (lambda f: write_saelens(f, tensors={"b_dec": torch.ones(D_IN, dtype=torch.int32)}), "must be floats of shape"),
    "SAELens: old scaling": (lambda f: write_saelens(f, {"metadata": {}, "finetuning_scaling_factor": True}), "finetuning_scaling_factor is True"),
    "SAELens: tanh": (lambda f: write_saelens(f, {"metadata": {}, "activation_fn_str": "tanh-relu"}), "activation_fn is 'tanh-relu'"),
    "SAELens: not JSON": (lambda f: rubbish(write_saelens(f), "cfg.json", b"{"), "not JSON"),
    "SAELens: a list": (lambda f: rubbish(write_saelens(f), "cfg.json", b"[]"), "not a JSON object"),
    "SAELens: deep": (lambda f: rubbish(write_saelens(f), "cfg.json", b"[" * 10**5), "not JSON"),
    "SAELens: cut": (lambda f: rubbish(write_saelens(f), "sae_weights.safetensors", b"\x10"), "not a readable safetensors file"),
    "DL: another class": (lambda f: write_dictionary_learning(f, "AutoEncoder", {"dict_class": "IdentityDict"}), "dict_class is 'IdentityDict'"),
    "DL: no class": (lambda f: write_dictionary_learning(f, "AutoEncoder", {"dict_class": 3}), "dict_class is 3"),
    "DL: another width": (lambda f: write_dictionary_learning(f, "AutoEncoder", {"activation_dim": 5}), "activation_dim is 5, but ae.pt has 12"),
    "DL: two k": (lambda f: write_dictionary_learning(f, "AutoEncoderTopK", {"k": 6}), "k is 6, but ae.pt has 5"),
    "DL: threshold": (lambda f: write_dictionary_learning(f, "BatchTopKSAE", (), {"threshold": torch.ones(3)}), "not a single finite number"),
    "DL: more": (lambda f: write_dictionary_learning(f, "AutoEncoder", (), {"x": torch.ones(3)}), "holds"),
    "DL: infinite": (lambda f: write_dictionary_learning(f, "AutoEncoder", (), {"bias": torch.full((D_IN,), torch.inf)}), "not finite"),
    "DL: a pickle": (lambda f: rubbish(write_dictionary_learning(f, "AutoEncoder"), "ae.pt", b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR."), "not a file of plain tensors"),
    "DL: code": (lambda f: rubbish(write_dictionary_learning(f, "AutoEncoder"), "ae.pt", pickled({"bias": Opens()})), "not a file of plain tensors"),
    "DL: a list": (lambda f: rubbish(write_dictionary_learning(f, "AutoEncoder"), "ae.pt", pickled([torch.ones(3)])), "plain tensors by name"),
    "DL: empty": (lambda f: rubbish(write_dictionary_learning(f, "AutoEncoder"), "ae.pt", b""), "not a file of plain tensors"),
    "sparsify: groups": (lambda f: write_sparsify(f, {"activation": "groupmax"}), "activation is 'groupmax'"),
    "sparsify: transcoder": (lambda f: write_sparsify(f, {"transcode": True}), "transcode is True"),
    "sparsify: skip": (lambda f: write_sparsify(f, {"skip_connection": True}), "skip_connection is True"),
    "sparsify: signed": (lambda f: write_sparsify(f, {"signed": True}), "signed is True"),
    "sparsify: d_in": (lambda f: write_sparsify(f, {"d_in": 7}), "d_in is 7, but encoder.weight takes activations of width 12"),
    "sparsify: no matrix": (lambda f: write_sparsify(f, (), {"encoder.weight": torch.ones(3)}), "must be a matrix"),
    "nothing": (lambda f: f.mkdir(parents=True) or f, "no SAE in a format that is known here"),
    "no folder": (lambda f: f, "no such folder here"),
}  # fmt: skip


D_IN, D_SAE = 12, 40


def rubbish(folder, file, content):
    (folder / file).write_bytes(content)
    return folder


class Opens:
    """Something that runs code when it is unpickled."""

    def __reduce__(self):
        return (open, ("/tmp/owned", "w"))


def pickled(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()
