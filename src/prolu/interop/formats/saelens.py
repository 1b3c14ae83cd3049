"""SAELens: cfg.json and sae_weights.safetensors (of its version 6.54.12; older configs are read as it reads them)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from prolu.activations.hooks import SITES
from prolu.interop.formats.checked_reading import checked, count, field, only, read_json, read_safetensors
from prolu.interop.formats.common_form import OWN, Plain, plain_of, sae_of, tied, with_unit_rows
from prolu.interop.formats.round_trip import CENTRED, MARK, check_inputs, mark, own_file, prepared, remembered
from prolu.sae.autoencoder import SAE

FILES = CONFIG, TENSORS = "cfg.json", "sae_weights.safetensors"

VERSION = "6.54.12"
"""Without one of 6 or later in the metadata, SAELens takes a config for an older one and drops part of it."""

NORMALISATIONS = {"none": "none", "constant_norm_rescale": "per_token"}
"""Theirs, and ours."""

RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
"""Fields of configs before version 6."""


def to_files(sae: SAE, made: Mapping[str, Any], *, inputs_normalised: bool) -> dict[str, bytes]:
    """A folder that `sae_lens.SAE.load_from_disk` takes."""
    named = _is_named(made.get("hook"))
    unsaid = [CENTRED] if made.get("centred") and not named else []
    check_inputs("saelens", unsaid, inputs_normalised=inputs_normalised)
    plain = plain_of(sae)
    config: dict[str, Any] = {
        "architecture": plain.architecture,
        "d_in": plain.d_in,
        "d_sae": plain.d_sae,
        "dtype": str(plain.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": {ours: theirs for theirs, ours in NORMALISATIONS.items()}[sae.config.normalisation],
        "reshape_activations": "none",
        "metadata": _metadata(made, named) | {MARK: mark(sae, made, unsaid)},
    }
    if plain.k is not None:
        config |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    content = (json.dumps(config, indent=1) + "\n").encode()
    tensors = {"W_enc": plain.W_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec} | plain.own
    tensors = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    return {TENSORS: save(tensors)} | own_file(sae) | {CONFIG: content}


def _metadata(made: Mapping[str, Any], named: bool) -> dict[str, Any]:
    """Where it comes from, in their words; the kwargs go to `from_pretrained_no_processing`, which centres nothing."""
    lm, hook = str(made.get("lm", "")), str(made.get("hook", ""))
    is_output = not named and hook.endswith(".output")
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": Path(lm).name or None,
        "model_class_name": "AutoModelForCausalLM" if is_output else "HookedTransformer",
        "model_from_pretrained_kwargs": {"center_writing_weights": True} if made.get("centred") and named else {},
        "hook_name": (hook.removesuffix(".output") if is_output else hook) or None,
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": made.get("ctx"),
        "dataset_path": made.get("data"),
        "neuronpedia_id": None,
    }


def _is_named(hook: Any) -> bool:
    """Whether TransformerLens has a hook of that name."""
    return isinstance(hook, str) and re.fullmatch(rf"blocks\.\d+\.hook_({'|'.join(SITES)})", hook) is not None


def from_folder(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """The SAE, and where it comes from."""
    file = folder / CONFIG
    config = _modern(file, read_json(file))
    architecture = field(file, config, "architecture", str)
    if architecture not in OWN:
        raise ValueError(f"{file}: architecture is {architecture!r}, supported are {', '.join(OWN)}")
    normalisation = _normalisation(file, config)
    only(file, config, "reshape_activations", ("none",), "there is no hook of ours whose activations have heads")
    metadata = config["metadata"]
    only(file, metadata, "hook_head_index", (None,), "no hook of ours reads one head")
    plain = _read(folder, config, architecture)
    is_tied = field(file, config, "apply_b_dec_to_input", bool, True)
    by_norm = architecture == "topk" and field(file, config, "rescale_acts_by_decoder_norm", bool, False)
    _, is_centred = prepared(file, metadata.get(MARK), plain.d_in)
    found = remembered(folder, metadata.get(MARK), plain) if is_tied and not by_norm else None
    if found is not None and found[0].config.normalisation == normalisation:
        return found
    plain = plain if is_tied else tied(plain)
    made = _provenance(config, architecture) | ({"centred": True} if is_centred else {})
    return sae_of(with_unit_rows(plain) if by_norm else plain, normalisation), made


def _read(folder: Path, config: Mapping[str, Any], architecture: str) -> Plain:
    file = folder / CONFIG
    d_in, d_sae = count(file, config, "d_in"), count(file, config, "d_sae")
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys(OWN[architecture], (d_sae,))
    found = checked(folder / TENSORS, read_safetensors(folder / TENSORS), shapes)
    own = {name: found[name] for name in OWN[architecture]}
    k = count(file, config, "k") if architecture == "topk" else None
    if k is not None and k > d_sae:
        raise ValueError(f"{file}: k is {k}, there are {d_sae} latents")
    return Plain(architecture, found["W_enc"], found["W_dec"], found["b_dec"], own, k)


def _normalisation(file: Path, config: Mapping[str, Any]) -> str:
    theirs = config.get("normalize_activations", "none")
    if theirs == "expected_average_only_in":
        raise ValueError(
            f"{file}: normalize_activations is {theirs!r}, whose factor is in no file of the folder; fold it in first "
            "(SAELens: sae.fold_activation_norm_scaling_factor), then supported is 'none'"
        )
    only(file, config, "normalize_activations", tuple(NORMALISATIONS), "ours cannot say it exactly")
    return NORMALISATIONS[theirs]


def _modern(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A config as version 6 has it, with metadata; of an older one what SAELens itself makes of it."""
    metadata = field(file, config, "metadata", dict, {})
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    written = re.match(r"(\d+)\.", version) if isinstance(version, str) else None
    if written and int(written[1]) >= 6:
        return config | {"metadata": metadata}
    old = {RENAMED.get(name, name): value for name, value in config.items()}
    only(file, old, "finetuning_scaling_factor", (False, None), "its factors act on latents at the decoder only")
    activation = old.get("activation_fn", "relu")
    kwargs = old.get("activation_fn_kwargs") or {}
    architecture = old.get("architecture", "standard")
    if activation == "topk" and isinstance(kwargs, dict) and "k" in kwargs:
        architecture, old["k"] = "topk", kwargs["k"]
    elif activation not in ("relu", None):
        raise ValueError(f"{file}: activation_fn is {activation!r}, supported is 'relu', or 'topk' with its k")
    normalise = old.get("normalize_activations")
    if isinstance(normalise, bool) or normalise is None:
        old["normalize_activations"] = "expected_average_only_in" if normalise else "none"
    hook = old.get("hook_name")
    old.setdefault("reshape_activations", "hook_z" if isinstance(hook, str) and "hook_z" in hook else "none")
    return old | {"architecture": architecture, "metadata": {**old, **metadata}}


def _provenance(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What is known of where it comes from; nothing is guessed."""
    metadata = config["metadata"]
    hook = metadata.get("hook_name")
    if metadata.get("model_class_name") == "AutoModelForCausalLM" and isinstance(hook, str):
        hook += ".output"
    names = {"lm": "model_name", "data": "dataset_path", "ctx": "context_size"}
    kinds = {"lm": str, "data": str, "ctx": int}
    made = {ours: metadata.get(theirs) for ours, theirs in names.items()} | {"hook": hook}
    made = {name: value for name, value in made.items() if type(value) is kinds.get(name, str)}
    kwargs = metadata.get("model_from_pretrained_kwargs", False)
    if isinstance(kwargs, dict) or kwargs is None:  # a model loaded by SAELens is centred where this says so, only
        made["centred"] = bool((kwargs or {}).get("center_writing_weights", False))
    kept = config | {"metadata": {name: value for name, value in metadata.items() if name != MARK}}
    return made | {"origin": {"format": "saelens", "architecture": architecture, "config": kept}}
