"""Reading other libraries' files without trusting them.

A folder that somebody downloaded may be damaged, may be of another version than the one this package was written
against, or may describe an SAE that this library cannot represent. A reader that did not check every field could then
build an SAE that computes something else than the original, and nobody would notice. So each format reads every field
and every tensor through a function of this module, which checks it and raises ValueError with one sentence that names
the file, the field, the value found and the values supported. No function here executes anything that a file contains.
"""

import io
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prolu.runtime.files import first_line

REQUIRED = object()
"""The default that marks a field as required. None cannot, since a config may hold null."""

LONGEST_REASON = 200
"""The number of characters of another library's error message that are repeated."""


def field(file: Path, config: Mapping[str, Any], name: str, kind: type, default: Any = REQUIRED) -> Any:
    """Return one field of a config, which must be of the given type.

    Raises:
        ValueError: The field is missing and has no default, or is of another type.
    """
    value = config.get(name, default)
    if value is REQUIRED:
        raise ValueError(f"{file}: the field {name} is missing")
    # Not isinstance: a bool is an int in Python, and `"d_sae": true` must not pass as 1.
    if value is not default and type(value) is not kind:
        raise ValueError(f"{file}: {name} is {value!r}, but must be of type {kind.__name__}")
    return value


def positive_integer(file: Path, config: Mapping[str, Any], name: str) -> int:
    """Return a field that must be an integer of at least 1.

    Raises:
        ValueError: It is not.
    """
    value = field(file, config, name, int)
    if value < 1:
        raise ValueError(f"{file}: {name} is {value}, but must be at least 1")
    return value


def latents_per_token(file: Path, config: Mapping[str, Any], d_sae: int) -> int:
    """Return the field `k`, the number of latents that a TopK SAE keeps on each token.

    Raises:
        ValueError: It is not an integer from 1 to d_sae.
    """
    k = positive_integer(file, config, "k")
    if k > d_sae:
        raise ValueError(f"{file}: k is {k}, but the SAE has only {d_sae} latents")
    return k


def check_supported(
    file: Path, config: Mapping[str, Any], name: str, supported: tuple[Any, ...], reason: str = ""
) -> None:
    """Raise ValueError unless a field is missing or has one of the supported values.

    Args:
        file: The file that holds the config, for the message.
        config: The config.
        name: The name of the field.
        supported: The values that are accepted. The first is the other library's default: it is what a missing field
            means.
        reason: Why other values are refused, added to the message.
    """
    value = config.get(name, supported[0])
    # The types are compared too, because False == 0 and True == 1.
    if not any(type(value) is type(one) and value == one for one in supported):
        values = " or ".join(map(repr, supported))
        raise ValueError(f"{file}: {name} is {value!r}, supported is {values}{f'; {reason}' if reason else ''}")


def known_fields(config: Mapping[str, Any], wanted: Mapping[str, tuple[str, type]]) -> dict[str, Any]:
    """Return those fields that are present and of the wanted type, under our names.

    Provenance is read this way: a field that is missing or odd is left out, since a guess would be worse than nothing.

    Args:
        config: The other library's config.
        wanted: For each of our names, the other library's name and the type.
    """
    found = {}
    for our_name, (their_name, kind) in wanted.items():
        value = config.get(their_name)
        if type(value) is kind:
            found[our_name] = value
    return found


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        ValueError: The file is missing or damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError, struct.error, ValueError) as problem:
        raise ValueError(f"{file}: not a readable safetensors file ({first_line(problem)[:LONGEST_REASON]})") from None


def read_torch_zip(file: Path) -> dict[str, Tensor]:
    """Read named tensors that `torch.save` wrote, through torch's restricted reader.

    Such a file is a pickle, and loading a pickle can run any code. With `weights_only=True` torch builds tensors and
    nothing else. This is the only pickle that the package opens.

    Raises:
        ValueError: The file is damaged, or holds anything else than plain tensors by name.
    """
    # Read before the `try`: an error of the disk does not mean that the file is damaged.
    data = file.read_bytes()
    check_sizes(file, data)
    content = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about files of its old formats
            found = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as problem:  # a damaged file makes torch raise many kinds, EOFError and KeyError among them
        raise ValueError(f"{file}: not a file of plain tensors ({first_line(problem)[:LONGEST_REASON]})") from None
    if not isinstance(found, dict) or not all(_is_named_tensor(name, value) for name, value in found.items()):
        raise ValueError(f"{file}: not a file of plain tensors by name")
    for name, t in found.items():
        # A tensor can be a view that repeats what the file has once, and would fill the memory when it is copied.
        if t.numel() * t.element_size() > len(data):
            raise ValueError(f"{file}: {name} has shape {tuple(t.shape)}, which is more than the file holds")
    # Parameters arrive with requires_grad set.
    return {name: t.detach() for name, t in found.items()}


def check_sizes(file: Path, data: bytes) -> None:
    """Raise ValueError unless a file is an archive whose entries have the sizes that they claim.

    torch and NumPy unpack an entry before they look at it, so a small archive could fill the memory. `torch.save` and
    `numpy.savez` compress nothing: what they write is as large as the file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError):
        raise ValueError(f"{file}: not a file of plain tensors (not an archive of arrays)") from None
    claimed = sum(entry.file_size for entry in entries)
    if claimed > len(data) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"{file}: unpacks from {len(data):,} to {claimed:,} bytes, but such files hold nothing compressed"
        )


def _is_named_tensor(name: Any, value: Any) -> bool:
    """Say whether an entry is a dense tensor under a text name; sparse and quantised tensors would fail later."""
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return isinstance(name, str) and is_plain


def checked_tensors(
    file: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Return the tensors that `shapes` names, all in one number format: fp32, or fp64 if any of them is fp64.

    fp16 and bf16 become fp32, which holds their values exactly.

    Args:
        file: The file that holds the tensors, for messages.
        tensors: Everything that the file holds.
        shapes: The shape that each tensor must have.
        ignored: The names of tensors that may be there too and are left out.

    Raises:
        ValueError: A tensor is missing, has another shape, holds no floats or a value that is not finite, or the file
            holds a tensor of another name.
    """
    # An unknown tensor is refused, not dropped: it may change what the SAE computes.
    if tensors.keys() - set(ignored) != shapes.keys():
        raise ValueError(f"{file}: holds the tensors {sorted(tensors)}, but must hold {sorted(shapes)}")
    dtype = torch.float32
    for name, shape in shapes.items():
        t = tensors[name]
        if tuple(t.shape) != shape or not t.is_floating_point():
            raise ValueError(f"{file}: {name} is {t.dtype} {tuple(t.shape)}, but must be floats of shape {shape}")
        dtype = torch.promote_types(dtype, t.dtype)
    found = {name: tensors[name].to(dtype).clone() for name in shapes}
    for name, t in found.items():
        if not t.isfinite().all():
            raise ValueError(f"{file}: {name} holds values that are not finite")
    return found


def matrix_shape(file: Path, tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Return the shape of a matrix, from which a format without d_in or d_sae in its config learns the widths.

    Raises:
        ValueError: The tensor is missing, is not a matrix, or is empty.
    """
    shape = tuple(tensors[name].shape) if name in tensors else ()
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{file}: {name} is {shape or 'missing'}, but must be a matrix")
    return shape
