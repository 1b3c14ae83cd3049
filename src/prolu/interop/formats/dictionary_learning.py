"""dictionary_learning: a folder with config.json and ae.pt.

Written against version 0.1.0. Its classes take activations as they come: the format cannot describe any preparation of
inputs.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prolu.activations.hooks import SITES
from prolu.interop.formats.checked_reading import (
    checked_tensors,
    field,
    known_fields,
    latents_per_token,
    matrix_shape,
    positive_integer,
    read_torch_zip,
)
from prolu.interop.formats.common_form import (
    CommonForm,
    common_form_of,
    has_unit_rows,
    sae_of,
    tied,
    untied,
    with_unit_rows,
)
from prolu.interop.formats.round_trip import (
    CENTRED,
    RECORD_KEY,
    parameters_file,
    record_of,
    recorded_preparation,
    restored,
    scaled,
)
from prolu.runtime.files import json_text, read_json_object
from prolu.sae.autoencoder import SAE
from prolu.sae.nonlinearities import BatchTopK, nonlinearity_named

CONFIG_FILE = "config.json"
TENSORS_FILE = "ae.pt"
FILES = (CONFIG_FILE, TENSORS_FILE)


class Layout(NamedTuple):
    """How one of dictionary_learning's classes holds an SAE."""

    architecture: str
    """The architecture in the common form."""
    names: dict[str, str]
    """The class's name of each tensor of the common form. A name that ends in `.weight` belongs to a torch Linear,
    which stores its matrix transposed."""
    scalars: tuple[str, ...] = ()
    """The tensors that hold a single number."""
    ignored: tuple[str, ...] = ()
    """The tensors that the class's `encode` and `decode` do not use."""
    is_tied: bool = True
    """Whether the encoder subtracts the decoder bias from its input."""


LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
LINEAR_WITH_BIAS = LINEAR | {"b_enc": "encoder.bias"}
MATRICES = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
CLASSES = {
    "AutoEncoder": Layout("standard", LINEAR_WITH_BIAS | {"b_dec": "bias"}),
    "AutoEncoderNew": Layout("standard", LINEAR_WITH_BIAS | {"b_dec": "decoder.bias"}, is_tied=False),
    "GatedAutoEncoder": Layout(
        "gated", LINEAR | {"b_dec": "decoder_bias", "r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias"}
    ),
    "JumpReluAutoEncoder": Layout("jumprelu", MATRICES | {"threshold": "threshold"}, is_tied=False),
    "AutoEncoderTopK": Layout("topk", LINEAR_WITH_BIAS | {"b_dec": "b_dec"}, scalars=("k",), ignored=("threshold",)),
    "BatchTopKSAE": Layout("jumprelu", LINEAR_WITH_BIAS | {"b_dec": "b_dec"}, scalars=("threshold", "k")),
    "MatryoshkaBatchTopKSAE": Layout("jumprelu", MATRICES, scalars=("threshold", "k"), ignored=("group_sizes",)),
}
"""The layout of each class, by the name that configs give in `dict_class`. The Matryoshka class is read with all of its
groups, as its own loader does."""


def undescribed_preparation(sae: SAE, provenance: Mapping[str, Any]) -> list[str]:
    """Return what must be done to an SAE's inputs, none of which the format can describe."""
    centring = [CENTRED] if provenance.get("centred") else []
    scaling = [scaled(sae.config.d_in)] if sae.config.normalisation == "per_token" else []
    return centring + scaling


def to_files(sae: SAE, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a folder that `dictionary_learning.utils.load_dictionary` accepts.

    Raises:
        ValueError: The nonlinearity has no counterpart there, or loading would change the SAE.
    """
    tensors = _tensors(sae)
    tensors_file = io.BytesIO()
    torch.save(tensors, tensors_file)
    hook = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", str(provenance.get("hook")))
    trainer: dict[str, Any] = {
        "trainer_class": None,
        "dict_class": _class_of(sae),
        "activation_dim": sae.config.d_in,
        "dict_size": sae.config.d_sae,
        "layer": int(hook[1]) if hook else None,
        "lm_name": Path(str(provenance.get("lm", ""))).name or None,
        "submodule_name": f"{hook[2]}_layer_{hook[1]}" if hook else provenance.get("hook"),
    }
    if "k" in tensors:
        trainer["k"] = int(tensors["k"])
    buffer = {"d_submodule": sae.config.d_in, "ctx_len": provenance.get("ctx")}
    record = record_of(sae, provenance, undescribed_preparation(sae, provenance))
    config = {"trainer": trainer, "buffer": buffer, RECORD_KEY: record}
    content = (json_text(config, indent=1) + "\n").encode()
    # The config comes last: a folder that has one is complete.
    return {TENSORS_FILE: tensors_file.getvalue()} | parameters_file(sae) | {CONFIG_FILE: content}


def _class_of(sae: SAE) -> str:
    """Return the name of the class that computes the same as one of our SAEs."""
    if isinstance(nonlinearity_named(sae.config.nonlinearity), BatchTopK):
        # It is a JumpReLU in the common form, but this class also keeps its k, and subtracts b_dec as our SAEs do.
        return "BatchTopKSAE"
    names = {"standard": "AutoEncoder", "gated": "GatedAutoEncoder", "topk": "AutoEncoderTopK"}
    return names.get(common_form_of(sae).architecture, "JumpReluAutoEncoder")


def _tensors(sae: SAE) -> dict[str, Tensor]:
    """Return the tensors of ae.pt."""
    form = common_form_of(sae)
    name = _class_of(sae)
    layout = CLASSES[name]
    if name == "AutoEncoder" and not has_unit_rows(form):
        raise ValueError(
            "format 'dictionary_learning': its class AutoEncoder scales decoder rows to norm 1 when it is loaded, "
            "which would change the latents of this SAE, whose decoder rows have other norms"
        )
    if not layout.is_tied:
        form = untied(form)
    found = {}
    for our_name, t in form.tensors().items():
        if our_name in layout.names:  # the one threshold of BatchTopKSAE follows below
            theirs = layout.names[our_name]
            found[theirs] = _transposed_if_linear(theirs, t)
    if "k" in layout.scalars:
        k = form.k if form.k is not None else nonlinearity_named(sae.config.nonlinearity).k  # pyright: ignore[reportAttributeAccessIssue]
        # -1 is what its TopK class holds before training has set a threshold, and `encode` does not use it.
        threshold = form.own["threshold"][0] if "threshold" in form.own else torch.tensor(-1.0)
        found |= {"k": torch.tensor(k, dtype=torch.int32), "threshold": threshold.to(torch.float32)}
    return {theirs: t.detach().cpu().clone(memory_format=torch.contiguous_format) for theirs, t in found.items()}


def _transposed_if_linear(name: str, t: Tensor) -> Tensor:
    return t.T if name.endswith(".weight") else t


def from_folder(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """Read a folder, and return the SAE and its provenance.

    Raises:
        ValueError: The folder is damaged, or its SAE is of a class that is not supported.
    """
    file = folder / CONFIG_FILE
    config = read_json_object(file, "SAE of dictionary_learning")
    trainer = field(file, config, "trainer", dict)
    name = field(file, trainer, "dict_class", str)
    if name not in CLASSES:
        raise ValueError(f"{file}: dict_class is {name!r}, supported are {', '.join(CLASSES)}")
    layout = CLASSES[name]
    form = _read(folder, trainer, layout)
    is_scaled, is_centred = recorded_preparation(file, config.get(RECORD_KEY), form.d_in)
    as_written = (lambda form: form) if layout.is_tied else untied
    original = restored(folder, config.get(RECORD_KEY), form, as_written)
    if original is not None:
        return original
    if not layout.is_tied:
        form = tied(form)
    if name == "AutoEncoder" and not has_unit_rows(form):
        form = with_unit_rows(form)  # as its own loader does
    provenance = _provenance(config, trainer, name) | {"centred": is_centred}
    return sae_of(form, "per_token" if is_scaled else "none"), provenance


def _read(folder: Path, trainer: Mapping[str, Any], layout: Layout) -> CommonForm:
    file = folder / TENSORS_FILE
    tensors = read_torch_zip(file)
    names = layout.names
    W_enc_shape = matrix_shape(file, tensors, names["W_enc"])
    d_in, d_sae = W_enc_shape if names["W_enc"] == "W_enc" else W_enc_shape[::-1]
    for stated, width in (("activation_dim", d_in), ("dict_size", d_sae)):
        if positive_integer(folder / CONFIG_FILE, trainer, stated) != width:
            raise ValueError(f"{folder / CONFIG_FILE}: {stated} is {trainer[stated]}, but {file.name} has {width}")

    scalars = {name: _scalar(file, tensors, name) for name in layout.scalars}
    shapes_here: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes = {}
    for our_name, theirs in names.items():
        shape = shapes_here.get(our_name, (d_sae,))
        shapes[theirs] = shape[::-1] if theirs.endswith(".weight") else shape
    checked = checked_tensors(file, tensors, shapes, ignored=(*layout.scalars, *layout.ignored))

    own = {our_name: _transposed_if_linear(theirs, checked[theirs]) for our_name, theirs in names.items()}
    W_enc = own.pop("W_enc")
    W_dec = own.pop("W_dec")
    b_dec = own.pop("b_dec")
    if "threshold" in scalars:  # one for all latents
        own["threshold"] = scalars["threshold"].to(W_dec.dtype).repeat(d_sae)
    form = CommonForm(layout.architecture, W_enc, W_dec, b_dec, own)
    if layout.architecture == "topk":
        form = replace(form, k=_k(folder, trainer, scalars["k"], d_sae))
    return form


def _scalar(file: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    t = tensors.get(name)
    if t is None:
        raise ValueError(f"{file}: the tensor {name} is missing")
    if t.dim() != 0 or t.is_complex() or not t.isfinite():
        raise ValueError(f"{file}: {name} is not a single finite number")
    return t


def _k(folder: Path, trainer: Mapping[str, Any], in_tensors: Tensor, d_sae: int) -> int:
    """Return the k of a TopK SAE, which the config and ae.pt both hold and must agree on."""
    k = latents_per_token(folder / CONFIG_FILE, trainer, d_sae)
    if in_tensors.is_floating_point() or k != int(in_tensors):
        raise ValueError(f"{folder / CONFIG_FILE}: k is {k}, but {TENSORS_FILE} has {in_tensors.item()}")
    return k


def _provenance(config: Mapping[str, Any], trainer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what the folder says about where the SAE comes from."""
    buffer = config.get("buffer")
    provenance = known_fields(trainer, {"lm": ("lm_name", str)})
    provenance |= known_fields(buffer if isinstance(buffer, dict) else {}, {"ctx": ("ctx_len", int)})
    hook = re.fullmatch(r"(\w+)_layer_(\d+)", str(trainer.get("submodule_name")))
    if hook and hook[1] in SITES:
        provenance["hook"] = f"blocks.{hook[2]}.hook_{hook[1]}"
    theirs = {key: value for key, value in config.items() if key != RECORD_KEY}
    return provenance | {"origin": {"format": "dictionary_learning", "architecture": name, "config": theirs}}
