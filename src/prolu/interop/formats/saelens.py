"""SAELens: a folder with cfg.json and sae_weights.safetensors.

Written against version 6.54.12. Configs of versions before 6 are read as SAELens itself reads them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from prolu.activations.hooks import SITES
from prolu.interop.formats import saelens_transcoder
from prolu.interop.formats.checked_reading import (
    check_supported,
    checked_tensors,
    field,
    known_fields,
    latents_per_token,
    positive_integer,
    read_safetensors,
)
from prolu.interop.formats.common_form import PARAMETERS, CommonForm, common_form_of, sae_of, tied, with_unit_rows
from prolu.interop.formats.round_trip import (
    CENTRED,
    RECORD_KEY,
    parameters_file,
    record_of,
    recorded_preparation,
    restored,
)
from prolu.runtime.files import json_text, read_json_object
from prolu.sae.autoencoder import SAE

CONFIG_FILE = saelens_transcoder.CONFIG_FILE
TENSORS_FILE = saelens_transcoder.TENSORS_FILE
FILES = (CONFIG_FILE, TENSORS_FILE)

VERSION = "6.54.12"
"""The version that an export names in its metadata. Without one of 6 or later there, SAELens takes a config for an
older one and drops part of it."""

NORMALISATIONS = {"none": "none", "constant_norm_rescale": "per_token"}
"""Our normalisation for each value of SAELens's `normalize_activations` that is supported."""

RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
"""The fields of configs before version 6 that have another name since."""


def undescribed_preparation(sae: SAE, provenance: Mapping[str, Any]) -> list[str]:
    """Return what must be done to an SAE's inputs and cannot be described in SAELens's config."""
    if sae.is_transcoder:
        return saelens_transcoder.undescribed_preparation(sae, provenance)
    # If TransformerLens loads the model, SAELens centres it because of the kwargs in `_metadata`.
    is_described = _is_transformer_lens_hook(provenance.get("hook"))
    return [CENTRED] if provenance.get("centred") and not is_described else []


def to_files(sae: SAE, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a folder that `sae_lens.SAE.load_from_disk` accepts.

    Raises:
        ValueError: The nonlinearity has no counterpart in SAELens.
    """
    if sae.is_transcoder:
        return saelens_transcoder.to_files(sae, provenance, _metadata(provenance))
    form = common_form_of(sae)
    record = record_of(sae, provenance, undescribed_preparation(sae, provenance))
    config: dict[str, Any] = {
        "architecture": form.architecture,
        "d_in": form.d_in,
        "d_sae": form.d_sae,
        "dtype": str(form.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": {ours: theirs for theirs, ours in NORMALISATIONS.items()}[sae.config.normalisation],
        "reshape_activations": "none",
        # Among the metadata the record survives SAELens's own loading and saving.
        "metadata": _metadata(provenance) | {RECORD_KEY: record},
    }
    if form.k is not None:
        config |= {"k": form.k, "rescale_acts_by_decoder_norm": False}
    content = (json_text(config, indent=1) + "\n").encode()
    tensors = {name: t.detach().contiguous().cpu() for name, t in form.tensors().items()}
    # The config comes last: a folder that has one is complete.
    return {TENSORS_FILE: save(tensors)} | parameters_file(sae) | {CONFIG_FILE: content}


def _metadata(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance in SAELens's terms."""
    lm = str(provenance.get("lm", ""))
    hook = str(provenance.get("hook", ""))
    is_named = _is_transformer_lens_hook(hook)
    is_output = not is_named and hook.endswith(".output")
    # SAELens advises its users to pass these to `from_pretrained_no_processing`, which by itself centres nothing.
    kwargs = {"center_writing_weights": True} if provenance.get("centred") and is_named else {}
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": Path(lm).name or None,
        # With AutoModelForCausalLM a hook is the name of a module, and its output is meant.
        "model_class_name": "AutoModelForCausalLM" if is_output else "HookedTransformer",
        "model_from_pretrained_kwargs": kwargs,
        "hook_name": (hook.removesuffix(".output") if is_output else hook) or None,
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": provenance.get("ctx"),
        "dataset_path": provenance.get("data"),
        "neuronpedia_id": None,
        # SAELens can leave out special tokens in the same way. It has no field for roles and norms.
        **({"exclude_special_tokens": True} if provenance.get("exclude_special_tokens") else {}),
        **({"seqpos_slice": [n, None]} if (n := provenance.get("exclude_positions")) else {}),
    }


def _is_transformer_lens_hook(hook: Any) -> bool:
    """Say whether TransformerLens has a hook of that name."""
    return isinstance(hook, str) and re.fullmatch(rf"blocks\.\d+\.hook_({'|'.join(SITES)})", hook) is not None


def from_folder(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """Read a folder, and return the SAE and its provenance.

    Raises:
        ValueError: The folder is damaged, or its SAE computes something that ours cannot.
    """
    file = folder / CONFIG_FILE
    config = _as_version_6(file, read_json_object(file, "SAE of SAELens"))
    architecture = field(file, config, "architecture", str)
    supported = (*PARAMETERS, *saelens_transcoder.ARCHITECTURES.values())
    if architecture not in supported:
        raise ValueError(f"{file}: architecture is {architecture!r}, supported are {', '.join(supported)}")
    check_supported(
        file, config, "reshape_activations", ("none",), "prolu has no hook whose activations are split by head"
    )
    metadata = config["metadata"]
    check_supported(file, metadata, "hook_head_index", (None,), "prolu has no hook that reads a single head")
    if architecture not in PARAMETERS:
        sae = saelens_transcoder.read(folder, config)
        _, is_centred = recorded_preparation(file, metadata.get(RECORD_KEY), sae.d_in)
        provenance = _provenance(config, architecture) | known_fields(metadata, {"hook_out": ("hook_name_out", str)})
        return sae, provenance | ({"centred": True} if is_centred else {})
    normalisation = _normalisation(file, config)
    form = _read(folder, config, architecture)
    is_tied = field(file, config, "apply_b_dec_to_input", bool, True)
    ranks_by_norm = architecture == "topk" and field(file, config, "rescale_acts_by_decoder_norm", bool, False)
    _, is_centred = recorded_preparation(file, metadata.get(RECORD_KEY), form.d_in)
    # Our exports subtract b_dec and do not rank by norm: in other folders the record is out of date.
    original = restored(folder, metadata.get(RECORD_KEY), form) if is_tied and not ranks_by_norm else None
    if original is not None and original[0].config.normalisation == normalisation:
        return original
    if not is_tied:
        form = tied(form)
    if ranks_by_norm:
        # SAELens ranks latents by |W_dec row| * latent. With rows of unit norm, our TopK chooses the same latents.
        form = with_unit_rows(form)
    provenance = _provenance(config, architecture) | ({"centred": True} if is_centred else {})
    return sae_of(form, normalisation), provenance


def _read(folder: Path, config: Mapping[str, Any], architecture: str) -> CommonForm:
    file = folder / CONFIG_FILE
    d_in = positive_integer(file, config, "d_in")
    d_sae = positive_integer(file, config, "d_sae")
    names = PARAMETERS[architecture]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys(names, (d_sae,))
    tensors = read_safetensors(folder / TENSORS_FILE)
    _check_factors(folder, tensors.pop("scaling_factor", None), config)
    found = checked_tensors(folder / TENSORS_FILE, tensors, shapes)
    own = {name: found[name] for name in names}
    k = latents_per_token(file, config, d_sae) if architecture == "topk" else None
    return CommonForm(architecture, found["W_enc"], found["W_dec"], found["b_dec"], own, k)


def _check_factors(folder: Path, factors: Tensor | None, config: Mapping[str, Any]) -> None:
    """Raise ValueError if an SAE has factors that scale its latents in the decoder.

    Older versions of SAELens wrote a factor for every latent, which is 1 if none was trained. Factors of 1 are ignored,
    as in SAELens itself.
    """
    if factors is None:
        check_supported(
            folder / CONFIG_FILE, config, "finetuning_scaling_factor", (False, None), "its factors are in no file"
        )
    elif not (factors.is_floating_point() and torch.allclose(factors, torch.ones_like(factors))):
        raise ValueError(
            f"{folder / TENSORS_FILE}: scaling_factor is not 1 for all latents; prolu has no factors that scale "
            "latents in the decoder only"
        )


def _normalisation(file: Path, config: Mapping[str, Any]) -> str:
    theirs = config.get("normalize_activations", "none")
    if theirs == "expected_average_only_in":
        raise ValueError(
            f"{file}: normalize_activations is {theirs!r}, but its scaling factor is in no file of the folder; fold it "
            "into the weights first (SAELens: sae.fold_activation_norm_scaling_factor), then supported is 'none'"
        )
    check_supported(
        file, config, "normalize_activations", tuple(NORMALISATIONS), "prolu has no scaling that is exactly the same"
    )
    return NORMALISATIONS[theirs]


def _as_version_6(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the names and the metadata of version 6; of an older one, what SAELens makes of it."""
    metadata = field(file, config, "metadata", dict, {})
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    major = re.match(r"(\d+)\.", version) if isinstance(version, str) else None
    if major and int(major[1]) >= 6:
        return config | {"metadata": metadata}
    old = {RENAMED.get(name, name): value for name, value in config.items()}
    activation = old.get("activation_fn", "relu")
    kwargs = old.get("activation_fn_kwargs") or {}
    architecture = old.get("architecture", "standard")
    # A TopK SAE was of architecture `standard` then, with another activation function.
    if activation == "topk" and isinstance(kwargs, dict) and "k" in kwargs:
        architecture = "topk"
        old["k"] = kwargs["k"]
    elif activation not in ("relu", None):
        raise ValueError(f"{file}: activation_fn is {activation!r}, supported is 'relu', or 'topk' with its k")
    normalise = old.get("normalize_activations")
    if isinstance(normalise, bool) or normalise is None:  # in the first versions it was a flag
        old["normalize_activations"] = "expected_average_only_in" if normalise else "none"
    hook = old.get("hook_name")
    old.setdefault("reshape_activations", "hook_z" if isinstance(hook, str) and "hook_z" in hook else "none")
    return old | {"architecture": architecture, "metadata": {**old, **metadata}}


def _provenance(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Return what the folder says about where the SAE comes from."""
    metadata = config["metadata"]
    hook = metadata.get("hook_name")
    if metadata.get("model_class_name") == "AutoModelForCausalLM" and isinstance(hook, str):
        hook += ".output"
    wanted = {"lm": ("model_name", str), "data": ("dataset_path", str), "ctx": ("context_size", int)}
    provenance = known_fields(metadata, wanted)
    if isinstance(hook, str):
        provenance["hook"] = hook
    # A model that SAELens loads is centred only if the kwargs ask for it. Configs without kwargs do not say how their
    # model was loaded.
    kwargs = metadata.get("model_from_pretrained_kwargs", False)
    if isinstance(kwargs, dict) or kwargs is None:
        provenance["centred"] = bool((kwargs or {}).get("center_writing_weights", False))
    theirs = config | {"metadata": {name: value for name, value in metadata.items() if name != RECORD_KEY}}
    return provenance | {"origin": {"format": "saelens", "architecture": architecture, "config": theirs}}
