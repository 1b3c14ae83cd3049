"""dictionary_learning: config.json and ae.pt (of its version 0.1.0). How inputs are prepared it cannot say."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prolu.activations.hooks import SITES
from prolu.interop.formats.checked_reading import checked, count, field, read_json, read_torch_zip, widths
from prolu.interop.formats.common_form import Plain, has_unit_rows, plain_of, sae_of, tied, untied, with_unit_rows
from prolu.interop.formats.round_trip import CENTRED, MARK, check_inputs, mark, own_file, prepared, remembered, scaled
from prolu.sae.autoencoder import SAE
from prolu.sae.nonlinearities import BatchTopK, nonlinearity_named

FILES = CONFIG, TENSORS = "config.json", "ae.pt"


class Layout(NamedTuple):
    """How one of its classes holds an SAE."""

    architecture: str
    names: dict[str, str]
    """Our name of each tensor, and its; a name with `.weight` is a Linear's, transposed."""
    scalars: tuple[str, ...] = ()
    """Tensors of one number."""
    others: tuple[str, ...] = ()
    """Tensors that its `encode` and `decode` do not look at."""
    is_tied: bool = True
    """Whether its encoder subtracts the decoder's bias."""


LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
BIASED = LINEAR | {"b_enc": "encoder.bias"}
MATRICES = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
CLASSES = {
    "AutoEncoder": Layout("standard", BIASED | {"b_dec": "bias"}),
    "AutoEncoderNew": Layout("standard", BIASED | {"b_dec": "decoder.bias"}, is_tied=False),
    "GatedAutoEncoder": Layout(
        "gated", LINEAR | {"b_dec": "decoder_bias", "r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias"}
    ),
    "JumpReluAutoEncoder": Layout("jumprelu", MATRICES | {"threshold": "threshold"}, is_tied=False),
    "AutoEncoderTopK": Layout("topk", BIASED | {"b_dec": "b_dec"}, ("k",), ("threshold",)),
    "BatchTopKSAE": Layout("jumprelu", BIASED | {"b_dec": "b_dec"}, ("threshold", "k")),
    "MatryoshkaBatchTopKSAE": Layout("jumprelu", MATRICES, ("threshold", "k"), ("group_sizes",)),
}
"""By its `dict_class`; of the Matryoshka class with all its groups, as it is loaded."""


def to_files(sae: SAE, made: Mapping[str, Any], *, inputs_normalised: bool) -> dict[str, bytes]:
    """A folder that `dictionary_learning.utils.load_dictionary` takes."""
    unsaid = [CENTRED] if made.get("centred") else []
    unsaid += [scaled(sae.config.d_in)] if sae.config.normalisation == "per_token" else []
    check_inputs("dictionary_learning", unsaid, inputs_normalised=inputs_normalised)
    tensors, written = io.BytesIO(), _tensors(sae)
    torch.save(written, tensors)
    hook = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", str(made.get("hook")))
    trainer: dict[str, Any] = {
        "trainer_class": None,
        "dict_class": _class_of(sae),
        "activation_dim": sae.config.d_in,
        "dict_size": sae.config.d_sae,
        "layer": int(hook[1]) if hook else None,
        "lm_name": Path(str(made.get("lm", ""))).name or None,
        "submodule_name": f"{hook[2]}_layer_{hook[1]}" if hook else made.get("hook"),
    }
    if "k" in written:
        trainer["k"] = int(written["k"])
    buffer = {"d_submodule": sae.config.d_in, "ctx_len": made.get("ctx")}
    config = {"trainer": trainer, "buffer": buffer, MARK: mark(sae, made, unsaid)}
    content = (json.dumps(config, indent=1) + "\n").encode()
    return {TENSORS: tensors.getvalue()} | own_file(sae) | {CONFIG: content}


def _class_of(sae: SAE) -> str:
    if isinstance(nonlinearity_named(sae.config.nonlinearity), BatchTopK):
        return "BatchTopKSAE"
    names = {"standard": "AutoEncoder", "gated": "GatedAutoEncoder", "topk": "AutoEncoderTopK"}
    return names.get(plain_of(sae).architecture, "JumpReluAutoEncoder")


def _tensors(sae: SAE) -> dict[str, Tensor]:
    plain, name = plain_of(sae), _class_of(sae)
    layout = CLASSES[name]
    if name == "AutoEncoder" and not has_unit_rows(plain):
        raise ValueError(
            "format 'dictionary_learning': its AutoEncoder is rescaled to decoder rows of norm 1 when it is loaded, "
            "which would change the latents of this SAE, whose rows are longer or shorter"
        )
    if not layout.is_tied:
        plain = untied(plain)
    matrices = {"W_enc": plain.W_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    found = {layout.names[ours]: t for ours, t in (matrices | plain.own).items() if ours in layout.names}
    found = {theirs: t.T if theirs.endswith(".weight") else t for theirs, t in found.items()}
    if "k" in layout.scalars:
        k = plain.k if plain.k is not None else nonlinearity_named(sae.config.nonlinearity).k  # pyright: ignore[reportAttributeAccessIssue]
        threshold = plain.own["threshold"][0] if "threshold" in plain.own else torch.tensor(-1.0)
        found |= {"k": torch.tensor(k, dtype=torch.int32), "threshold": threshold.to(torch.float32)}
    return {theirs: t.detach().cpu().clone(memory_format=torch.contiguous_format) for theirs, t in found.items()}


def from_folder(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """The SAE, and where it comes from."""
    file = folder / CONFIG
    config = read_json(file)
    trainer = field(file, config, "trainer", dict)
    name = field(file, trainer, "dict_class", str)
    if name not in CLASSES:
        raise ValueError(f"{file}: dict_class is {name!r}, supported are {', '.join(CLASSES)}")
    layout = CLASSES[name]
    plain = _read(folder, trainer, layout, read_torch_zip(folder / TENSORS))
    is_scaled, is_centred = prepared(file, config.get(MARK), plain.d_in)
    found = remembered(folder, config.get(MARK), plain, (lambda p: p) if layout.is_tied else untied)
    if found is not None:
        return found
    plain = plain if layout.is_tied else tied(plain)
    if name == "AutoEncoder" and not has_unit_rows(plain):
        plain = with_unit_rows(plain)  # as it is when it is loaded there
    made = _provenance(config, trainer, name) | {"centred": is_centred}
    return sae_of(plain, "per_token" if is_scaled else "none"), made


def _read(folder: Path, trainer: Mapping[str, Any], layout: Layout, there: Mapping[str, Tensor]) -> Plain:
    file, names = folder / TENSORS, layout.names
    shape = widths(file, there, names["W_enc"])
    d_in, d_sae = shape if names["W_enc"] == "W_enc" else shape[::-1]
    for said, found in (("activation_dim", d_in), ("dict_size", d_sae)):
        if count(folder / CONFIG, trainer, said) != found:
            raise ValueError(f"{folder / CONFIG}: {said} is {trainer[said]}, {file.name} has {found}")
    ours: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes = {theirs: ours.get(own, (d_sae,)) for own, theirs in names.items()}
    shapes = {theirs: s[::-1] if theirs.endswith(".weight") else s for theirs, s in shapes.items()}
    scalars = {name: _number(file, there, name) for name in layout.scalars}
    t = checked(file, there, shapes, (*layout.scalars, *layout.others))
    found = {own: t[theirs].T if theirs.endswith(".weight") else t[theirs] for own, theirs in names.items()}
    W_enc, W_dec, b_dec = (found.pop(own) for own in ours)
    if "threshold" in scalars:
        found["threshold"] = scalars["threshold"].to(W_dec.dtype).repeat(d_sae)
    plain = Plain(layout.architecture, W_enc, W_dec, b_dec, found)
    if layout.architecture == "topk":
        plain = replace(plain, k=_k(folder, trainer, scalars["k"], d_sae))
    return plain


def _number(file: Path, there: Mapping[str, Tensor], name: str) -> Tensor:
    t = there.get(name)
    if t is None or t.dim() != 0 or t.is_complex() or not t.isfinite():
        raise ValueError(f"{file}: {name} is {'missing' if t is None else 'no single finite number'}")
    return t


def _k(folder: Path, trainer: Mapping[str, Any], held: Tensor, d_sae: int) -> int:
    k = count(folder / CONFIG, trainer, "k")
    if held.is_floating_point() or k != int(held) or k > d_sae:
        raise ValueError(f"{folder / CONFIG}: k is {k}, {TENSORS} has {held.item()} and {d_sae} latents")
    return k


def _provenance(config: Mapping[str, Any], trainer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What is known of where it comes from; nothing is guessed."""
    buffer = config.get("buffer")
    found = {"lm": trainer.get("lm_name"), "ctx": buffer.get("ctx_len") if isinstance(buffer, dict) else None}
    kinds = {"lm": str, "ctx": int}
    made: dict[str, Any] = {key: value for key, value in found.items() if type(value) is kinds[key]}
    hook = re.fullmatch(r"(\w+)_layer_(\d+)", str(trainer.get("submodule_name")))
    if hook and hook[1] in SITES:
        made["hook"] = f"blocks.{hook[2]}.hook_{hook[1]}"
    kept = {key: value for key, value in config.items() if key != MARK}
    return made | {"origin": {"format": "dictionary_learning", "architecture": name, "config": kept}}
