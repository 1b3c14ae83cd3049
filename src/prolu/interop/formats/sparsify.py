"""sparsify (EleutherAI): a folder with cfg.json and sae.safetensors, read only.

Written against version 1.3.3. sparsify has TopK alone, so most SAEs of ours could not be written in its format.
"""

import os
import re
from pathlib import Path
from typing import Any

from prolu.interop.formats.checked_reading import (
    check_supported,
    checked_tensors,
    field,
    known_fields,
    latents_per_token,
    matrix_shape,
    read_safetensors,
)
from prolu.interop.formats.common_form import CommonForm, sae_of
from prolu.runtime.files import read_json_object
from prolu.sae.autoencoder import SAE

CONFIG_FILE = "cfg.json"
TENSORS_FILE = "sae.safetensors"
FILES = (CONFIG_FILE, TENSORS_FILE)

SITES = {"": "resid_post", ".mlp": "mlp_out"}
"""The site that is the output of a module, by the module's name after its layer."""


def from_folder(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """Read a folder, and return the SAE and its provenance.

    Raises:
        ValueError: The folder is damaged, or its SAE computes something that ours cannot.
    """
    file = folder / CONFIG_FILE
    config = read_json_object(file, "SAE of sparsify")
    # `multi_topk` and `normalize_decoder` concern training only: encode and decode do not look at them.
    check_supported(file, config, "activation", ("topk",), "prolu has no nonlinearity over groups of latents")
    check_supported(file, config, "transcode", (False,), "a transcoder predicts another module's output")
    check_supported(file, config, "skip_connection", (False,), "an SAE of prolu has no linear path beside its latents")
    check_supported(file, config, "signed", (False,), "latents of prolu are not negative")
    tensors = read_safetensors(folder / TENSORS_FILE)
    d_sae, d_in = matrix_shape(folder / TENSORS_FILE, tensors, "encoder.weight")
    if (stated := field(file, config, "d_in", int)) != d_in:
        raise ValueError(f"{file}: d_in is {stated}, but encoder.weight takes activations of width {d_in}")
    k = latents_per_token(file, config, d_sae)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    t = checked_tensors(folder / TENSORS_FILE, tensors, shapes)
    form = CommonForm("topk", t["encoder.weight"].T, t["W_dec"], t["b_dec"], {"b_enc": t["encoder.bias"]}, k)
    return sae_of(form, "none"), _provenance(folder, config)


def _provenance(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the model, data, context length and hook of the SAE's training, as far as files and names tell."""
    # sparsify names the folder after the hookpoint, and keeps the config of the training run in the one above.
    # The folder may be a link to one with that name, or a link of that name.
    places = (Path(os.path.abspath(folder)), folder.resolve())
    run_file = next((file for place in places if (file := place.parent / "config.json").is_file()), None)
    training = read_json_object(run_file, "training run of sparsify") if run_file is not None else {}
    provenance = known_fields(training, {"lm": ("model", str), "data": ("dataset", str), "ctx": ("ctx_len", int)})
    matches = [re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.mlp)?", place.name) for place in places]
    if hookpoint := next(filter(None, matches), None):
        provenance["hook"] = f"blocks.{hookpoint[1]}.hook_{SITES[hookpoint[2] or '']}"
    origin = {"format": "sparsify", "architecture": "topk", "config": config}
    return provenance | {"centred": False, "origin": origin}
