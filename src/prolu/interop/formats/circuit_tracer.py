"""Transcoders as circuit-tracer loads them: layer_L.safetensors and config.yaml, which one folder has for all layers.

circuit-tracer replaces every MLP of a model, so its folder needs a transcoder for each layer from 0 on: export one of
each layer, and put the files of the layers into one folder, with one config.yaml.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from prolu.interop.formats.round_trip import CENTRED, scaled
from prolu.interop.formats.transcoder_form import as_saved, transcoder_form_of
from prolu.runtime.files import json_text
from prolu.sae.autoencoder import SAE

CONFIG_FILE = "config.yaml"
"""The file that says at which hooks a set of transcoders reads and writes."""

FILES = (CONFIG_FILE,)
"""The files by which a folder of this format is known."""

ARCHITECTURES = ("standard", "jumprelu")
"""The architectures that circuit-tracer has: a ReLU, or a JumpReLU if the file holds thresholds."""


def undescribed_preparation(sae: SAE, provenance: Mapping[str, Any]) -> list[str]:
    """Return what must be done to a transcoder's inputs, none of which can be described in this format."""
    scaling = [scaled(sae.d_in)] if sae.config.normalisation == "per_token" else []
    return scaling + ([CENTRED] if provenance.get("centred") else [])


def to_files(sae: SAE, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a folder for one layer of a set of transcoders.

    Raises:
        ValueError: It is no transcoder, circuit-tracer lacks its activation function, its widths differ, or its hooks
            are not those of one layer.
    """
    if not sae.is_transcoder:
        raise ValueError("format 'circuit_tracer': it holds transcoders only (train one with --hook-out)")
    if sae.d_in != sae.d_out:
        raise ValueError(f"format 'circuit_tracer': d_in {sae.d_in} and d_out {sae.d_out} must be equal")
    layer, read = _place(str(provenance.get("hook", "")))
    layer_out, written = _place(str(provenance.get("hook_out", "")))
    if layer != layer_out:
        raise ValueError(
            f"format 'circuit_tracer': reads at layer {layer} and writes at layer {layer_out}; both must be one"
        )
    found = transcoder_form_of(sae)
    architecture = found.form.architecture
    if architecture not in ARCHITECTURES:
        raise ValueError(f"nonlinearity {sae.config.nonlinearity!r}: circuit-tracer has no {architecture} transcoders")
    tensors = found.tensors() | found.skip()
    # There the encoder lies latent by latent, as ours does.
    tensors["W_enc"] = found.form.W_enc.T
    if architecture == "jumprelu":
        tensors["activation_function.threshold"] = found.form.own["threshold"]
    config: dict[str, Any] = {
        "model_kind": "transcoder_set",
        "model_name": Path(str(provenance.get("lm", ""))).name or None,
        "feature_input_hook": read,
        "feature_output_hook": written,
        "scan": None,
    }
    if undescribed := undescribed_preparation(sae, provenance):
        config["inputs_must_be"] = undescribed
    # JSON is YAML too.
    content = (json_text(config, indent=1) + "\n").encode()
    return {f"layer_{layer}.safetensors": save(as_saved(tensors)), CONFIG_FILE: content}


def _place(hook: str) -> tuple[int, str]:
    """Return the layer of a hook, and circuit-tracer's name of the hook within the layer.

    Raises:
        ValueError: circuit-tracer has no name for it.
    """
    if named := re.fullmatch(r"blocks\.(\d+)\.(hook_(?:resid_pre|mlp_out))", hook):
        return int(named[1]), named[2]
    if named := re.fullmatch(r"[\w.]+\.(\d+)\.mlp\.input", hook):
        return int(named[1]), "mlp.hook_in"
    raise ValueError(
        f"format 'circuit_tracer': hook {hook!r} has no name there; it must be the input of an MLP, as "
        "model.layers.3.mlp.input, blocks.L.hook_mlp_out or blocks.L.hook_resid_pre"
    )
