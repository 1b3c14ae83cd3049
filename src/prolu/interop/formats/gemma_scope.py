"""Gemma Scope: the folders of Google's repositories of SAEs for Gemma 2 (params.npz) and Gemma 3 (params.safetensors).

A file holds a JumpReLU, with or without a skip connection, and nothing else. Which model and hook it belongs to is said
by the names of folders only: `google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71` reads the residual stream
after block 20 of Gemma 2 2B, and `google/gemma-scope-2-1b-pt/transcoder_all/layer_13_width_16k_l0_small` is a
transcoder of the MLP of block 13 of Gemma 3 1B.
"""

import io
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prolu.interop.formats.checked_reading import (
    LONGEST_REASON,
    check_sizes,
    checked_tensors,
    matrix_shape,
    read_safetensors,
)
from prolu.interop.formats.common_form import CommonForm, sae_of, tied
from prolu.interop.formats.transcoder_form import TranscoderForm, transcoder_of
from prolu.runtime.files import first_line
from prolu.sae.autoencoder import SAE

NPZ_FILE = "params.npz"
SAFETENSORS_FILE = "params.safetensors"

REPOSITORY = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<kind>pt|it)-(?P<site>res|att|mlp|transcoders)")
"""The name of a repository for Gemma 2, without its owner."""

REPOSITORY_2 = re.compile(r"gemma-scope-2-(?P<size>\d+[bm])-(?P<kind>pt|it)")
"""The name of a repository for Gemma 3, without its owner."""

SITES_2 = {"resid_post": "res", "mlp_out": "mlp", "attn_out": "att", "transcoder": "transcoders"}
"""The site that the name of a folder in such a repository begins with, in the words of the repositories for Gemma 2."""


def from_npz(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """Read a folder for Gemma 2, and return the SAE or transcoder and its provenance.

    An SAE here subtracts b_dec from its input, and one of Gemma Scope does not: b_dec W_enc is added to b_enc, in fp64,
    and rounded. If the name of the folder does not say what it holds, an SAE is assumed.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """
    file = folder / NPZ_FILE
    # Both libraries have written both spellings.
    tensors = {re.sub("^w_", "W_", name): t for name, t in _read_npz(file).items()}
    factors = tensors.pop("scaling_factor", None)
    if "embedding" in folder.absolute().parts or not (
        factors is None or torch.equal(factors, torch.ones_like(factors))
    ):
        raise ValueError(f"{file}: an SAE of embeddings, or with factors that scale its latents; prolu has neither")
    return _from_tensors(file, tensors, _place(folder))


def from_safetensors(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """Read a folder for Gemma 3; otherwise as `from_npz`."""
    file = folder / SAFETENSORS_FILE
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
    tensors = {names.get(name, name): t for name, t in read_safetensors(file).items()}
    return _from_tensors(file, tensors, _place_2(folder))


class _Place(NamedTuple):
    """What the names of the folders say about an SAE."""

    lm: str | None = None
    hook: str | None = None
    hook_out: str | None = None
    is_transcoder: bool = False


def _from_tensors(file: Path, tensors: Mapping[str, Tensor], place: _Place) -> tuple[SAE, dict[str, Any]]:
    d_in, d_sae = matrix_shape(file, tensors, "W_enc")
    d_out = matrix_shape(file, tensors, "W_dec")[1]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= {"b_enc": (d_sae,), "threshold": (d_sae,)} | ({"W_skip": (d_in, d_out)} if "W_skip" in tensors else {})
    found = checked_tensors(file, tensors, shapes)
    own = {name: found[name] for name in ("b_enc", "threshold")}
    known = {"lm": place.lm, "hook": place.hook, "hook_out": place.hook_out}
    provenance = {name: value for name, value in known.items() if value is not None} | {"centred": False}
    provenance |= {"origin": {"format": "gemma_scope", "architecture": "jumprelu", "config": {}}}
    if place.is_transcoder or "W_skip" in found:
        form = CommonForm("jumprelu", found["W_enc"], found["W_dec"], found["W_enc"].new_zeros(d_in), own)
        return transcoder_of(TranscoderForm(form, found["b_dec"], found.get("W_skip")), "none"), provenance
    if d_in != d_out:
        raise ValueError(f"{file}: W_enc reads {d_in} numbers and W_dec writes {d_out}; an SAE writes what it reads")
    form = CommonForm("jumprelu", found["W_enc"], found["W_dec"], found["b_dec"], own)
    return sae_of(tied(form), "none"), provenance


def _place(folder: Path) -> _Place:
    """Return what the names of a folder for Gemma 2, and of those around it, say about the SAE."""
    repository = _last_match(REPOSITORY.fullmatch, folder)
    if repository is None:
        return _Place()
    lm = f"google/gemma-2-{repository['size']}{'-it' if repository['kind'] == 'it' else ''}"
    layer = _last_match(re.compile(r"layer_(\d+)").fullmatch, folder)
    return _at_site(lm, repository["site"], layer, "model.layers")


def _place_2(folder: Path) -> _Place:
    """Return what the names of a folder for Gemma 3, and of those around it, say about the SAE."""
    repository = _last_match(REPOSITORY_2.fullmatch, folder)
    if repository is None:
        return _Place()
    # The smallest is on the hub under a name without the suffix. Those from 4B on also read images, so that their
    # language model is one of two parts.
    is_plain = repository["kind"] == "pt" and repository["size"] == "270m"
    lm = f"google/gemma-3-{repository['size']}{'' if is_plain else '-' + repository['kind']}"
    blocks = "model.layers" if repository["size"] in ("270m", "1b") else "model.language_model.layers"
    layer = _last_match(re.compile(r"layer_(\d+)_.*").fullmatch, folder)
    site = _last_match(re.compile(rf"({'|'.join(SITES_2)}).*").fullmatch, folder)
    return _at_site(lm, SITES_2[site[1]], layer, blocks) if site else _Place(lm)


def _at_site(lm: str, site: str, layer: re.Match[str] | None, blocks: str) -> _Place:
    if layer is None:
        return _Place(lm, is_transcoder=site == "transcoders")
    n = layer[1]
    match site:
        case "res":
            return _Place(lm, f"blocks.{n}.hook_resid_post")
        case "mlp":
            return _Place(lm, f"blocks.{n}.hook_mlp_out")
        case "att":  # what the heads write, one after the other, before the output matrix
            return _Place(lm, f"{blocks}.{n}.self_attn.o_proj.input")
    return _Place(lm, f"{blocks}.{n}.mlp.input", f"blocks.{n}.hook_mlp_out", is_transcoder=True)


def _last_match(match: Callable[[str], re.Match[str] | None], folder: Path) -> re.Match[str] | None:
    """Return the match of the last part of a path that has one; in the hub's cache, a part is the whole name."""
    parts = (part.rsplit("--", 1)[-1] for part in reversed(folder.absolute().parts))
    return next((found for part in parts if (found := match(part))), None)


def _read_npz(file: Path) -> dict[str, Tensor]:
    """Return the arrays of a .npz file, none of which may be a pickle.

    Raises:
        ValueError: The file is damaged, or holds something else than arrays of numbers.
    """
    data = file.read_bytes()
    check_sizes(file, data)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, struct.error, NotImplementedError) as problem:
        raise ValueError(f"{file}: not a file of plain arrays ({first_line(problem)[:LONGEST_REASON]})") from None
