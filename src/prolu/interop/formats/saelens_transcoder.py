"""Transcoders as SAELens saves them: its four classes `transcoder`, `skip_transcoder` and theirs with a JumpReLU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from prolu.interop.formats.checked_reading import check_supported, checked_tensors, positive_integer, read_safetensors
from prolu.interop.formats.common_form import PARAMETERS, CommonForm
from prolu.interop.formats.round_trip import CENTRED, RECORD_KEY, record_of, recorded_preparation, scaled
from prolu.interop.formats.transcoder_form import TranscoderForm, as_saved, transcoder_form_of, transcoder_of
from prolu.runtime.files import json_text
from prolu.sae.autoencoder import SAE

CONFIG_FILE = "cfg.json"
TENSORS_FILE = "sae_weights.safetensors"

ARCHITECTURES = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}
"""SAELens's class by the architecture in the common form, and by whether there is a skip connection."""


def undescribed_preparation(sae: SAE, provenance: Mapping[str, Any]) -> list[str]:
    """Return what must be done to a transcoder's inputs and cannot be described in SAELens's config."""
    # SAELens can scale the inputs of a transcoder, but it does not scale the output back.
    scaling = [scaled(sae.d_in)] if sae.config.normalisation == "per_token" else []
    return scaling + ([CENTRED] if provenance.get("centred") else [])


def to_files(sae: SAE, provenance: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a folder that `sae_lens.SAE.load_from_disk` accepts.

    Args:
        sae: The transcoder.
        provenance: Where it comes from.
        metadata: The same in SAELens's terms, as an SAE has it.

    Raises:
        ValueError: SAELens has no transcoder with its nonlinearity.
    """
    found = transcoder_form_of(sae)
    form = found.form
    name = ARCHITECTURES.get((form.architecture, sae.config.skip))
    if name is None:
        raise ValueError(f"nonlinearity {sae.config.nonlinearity!r}: SAELens has no {form.architecture} transcoders")
    tensors = found.tensors() | found.skip()
    if form.architecture == "jumprelu":
        tensors["threshold"] = form.own["threshold"]
    record = record_of(sae, provenance, undescribed_preparation(sae, provenance))
    config: dict[str, Any] = {
        "architecture": name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "d_out": sae.d_out,
        "dtype": str(form.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": dict(metadata) | {"hook_name_out": sae.hook_out or None, RECORD_KEY: record},
    }
    content = (json_text(config, indent=1) + "\n").encode()
    # The config comes last: a folder that has one is complete.
    return {TENSORS_FILE: save(as_saved(tensors)), CONFIG_FILE: content}


def read(folder: Path, config: Mapping[str, Any]) -> SAE:
    """Return the transcoder in a folder of SAELens.

    Its latents and outputs are those of SAELens to the bit. If it is an export from this library, its b_dec and the
    nonlinearity that it was trained with are not in SAELens's files.

    Args:
        folder: The folder.
        config: Its config, as of version 6, whose architecture is one of `ARCHITECTURES`.

    Raises:
        ValueError: The folder is damaged, or its transcoder computes something that ours cannot.
    """
    file = folder / CONFIG_FILE
    check_supported(file, config, "normalize_activations", ("none",), "it would scale inputs and not outputs back")
    check_supported(file, config, "apply_b_dec_to_input", (False,), "a transcoder's b_dec belongs to its output")
    architecture, has_skip = next(kind for kind, name in ARCHITECTURES.items() if name == config["architecture"])
    d_in, d_sae, d_out = (positive_integer(file, config, name) for name in ("d_in", "d_sae", "d_out"))
    own = PARAMETERS[architecture]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(own, (d_sae,)) | ({"W_skip": (d_out, d_in)} if has_skip else {})
    tensors = checked_tensors(folder / TENSORS_FILE, read_safetensors(folder / TENSORS_FILE), shapes)
    no_bias = tensors["W_enc"].new_zeros(d_in)
    form = CommonForm(architecture, tensors["W_enc"], tensors["W_dec"], no_bias, {name: tensors[name] for name in own})
    W_skip = tensors["W_skip"].T if has_skip else None
    is_scaled, _ = recorded_preparation(file, config["metadata"].get(RECORD_KEY), d_in)
    return transcoder_of(TranscoderForm(form, tensors["b_dec"], W_skip), "per_token" if is_scaled else "none")
