"""Transcoders as SAELens saves them: its four classes `transcoder`, `skip_transcoder` and theirs with a JumpReLU."""

from collections.abc import Mapping
from typing import Any

from safetensors.torch import save

from prolu.interop.formats.round_trip import CENTRED, RECORD_KEY, record_of, scaled
from prolu.interop.formats.transcoder_form import as_saved, transcoder_form_of
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
    # SAELens scales the inputs of a transcoder, and not its output back.
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
