"""sparsify (EleutherAI): cfg.json and sae.safetensors, read only (from its version 1.3.3)."""

import re
from pathlib import Path
from typing import Any

from prolu.interop.formats.checked_reading import checked, count, field, only, read_json, read_safetensors, widths
from prolu.interop.formats.common_form import Plain, sae_of
from prolu.sae.autoencoder import SAE

FILES = CONFIG, TENSORS = "cfg.json", "sae.safetensors"

MODULES = {"": "resid_post", ".mlp": "mlp_out"}
"""What a hookpoint is named behind its layer, and the site that its output is."""


def from_folder(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """The SAE, and where it comes from."""
    file = folder / CONFIG
    config = read_json(file)
    only(file, config, "activation", ("topk",), "groups of latents are no nonlinearity of ours")
    only(file, config, "transcode", (False,), "it predicts another module's output")
    only(file, config, "skip_connection", (False,), "a linear path beside the latents is no part of an SAE of ours")
    only(file, config, "signed", (False,), "latents of ours are not negative")
    tensors, k = read_safetensors(folder / TENSORS), count(file, config, "k")
    d_sae, d_in = widths(folder / TENSORS, tensors, "encoder.weight")
    if (said := field(file, config, "d_in", int)) != d_in:
        raise ValueError(f"{file}: d_in is {said}, encoder.weight takes {d_in}")
    if k > d_sae:
        raise ValueError(f"{file}: k is {k}, there are {d_sae} latents")
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    t = checked(folder / TENSORS, tensors, shapes)
    # multi_topk and normalize_decoder are of its training: encode and decode do not look at them.
    plain = Plain("topk", t["encoder.weight"].T, t["W_dec"], t["b_dec"], {"b_enc": t["encoder.bias"]}, k)
    return sae_of(plain, "none"), _provenance(folder, config)


def _provenance(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The folder is named after the hookpoint; the one above may hold the config of the training run."""
    run = folder.resolve().parent / "config.json"
    training = read_json(run) if run.is_file() else {}
    names = {"lm": ("model", str), "data": ("dataset", str), "ctx": ("ctx_len", int)}
    made = {ours: training.get(theirs) for ours, (theirs, _) in names.items()}
    made = {name: value for name, value in made.items() if type(value) is names[name][1]}
    hookpoint = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.mlp)?", folder.resolve().name)
    if hookpoint:
        made["hook"] = f"blocks.{hookpoint[1]}.hook_{MODULES[hookpoint[2] or '']}"
    return made | {"centred": False, "origin": {"format": "sparsify", "architecture": "topk", "config": config}}
