"""Files of other libraries, read with suspicion: each complaint is one sentence that names file and field."""

import io
import json
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

ABSENT = object()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: not JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a JSON object")
    return found


def field(file: Path, facts: Mapping[str, Any], name: str, kind: type, default: Any = ABSENT) -> Any:
    """One field of a config, of that kind; true is no number.

    Raises:
        ValueError: it is missing and has no default, or is of another kind.
    """
    value = facts.get(name, default)
    if value is ABSENT:
        raise ValueError(f"{file}: lacks {name}")
    if value is not default and type(value) is not kind:
        raise ValueError(f"{file}: {name} is {value!r}, needs {kind.__name__}")
    return value


def only(file: Path, facts: Mapping[str, Any], name: str, supported: tuple[Any, ...], reason: str = "") -> None:
    """Raises ValueError unless a field is missing, or one of the supported values (the first is the usual one)."""
    value = facts.get(name, supported[0])
    if not any(type(value) is type(one) and value == one for one in supported):
        said = " or ".join(map(repr, supported))
        raise ValueError(f"{file}: {name} is {value!r}, supported is {said}{f'; {reason}' if reason else ''}")


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        ValueError: it is none of that format.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError, struct.error, ValueError) as problem:
        raise ValueError(f"{file}: not a readable safetensors file ({_first_line(problem)})") from None


def read_torch_zip(file: Path) -> dict[str, Tensor]:
    """Plain tensors by name that `torch.save` wrote, through the restricted reader, which runs no code of the file's.

    Raises:
        ValueError: it holds anything else.
    """
    content = io.BytesIO(file.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how old the file is
            found = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as problem:  # a damaged file makes it raise many kinds
        raise ValueError(f"{file}: not a file of plain tensors ({_first_line(problem)})") from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided and not t.is_quantized
        for name, t in found.items()
    ):
        raise ValueError(f"{file}: not a file of plain tensors by name")
    return {name: t.detach() for name, t in found.items()}


def checked(
    file: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], others: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors of these names and shapes, all of one number format: fp16 and bf16 become fp32, which holds them.

    Raises:
        ValueError: one is missing, or of another shape or kind, or not finite; or there is one more, not of `others`.
    """
    if tensors.keys() - set(others) != shapes.keys():
        raise ValueError(f"{file}: holds {sorted(tensors)}, needs {sorted(shapes)}")
    dtype = torch.float32
    for name, shape in shapes.items():
        t = tensors[name]
        if tuple(t.shape) != shape or not t.is_floating_point():
            raise ValueError(f"{file}: {name} is {t.dtype} {tuple(t.shape)}, needs floats {shape}")
        dtype = torch.promote_types(dtype, t.dtype)
    found = {name: tensors[name].to(dtype).clone() for name in shapes}
    for name, t in found.items():
        if not t.isfinite().all():
            raise ValueError(f"{file}: {name} holds values that are not finite")
    return found


def widths(file: Path, tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """The shape of a matrix, neither side 0.

    Raises:
        ValueError: it is missing, or no matrix.
    """
    shape = tuple(tensors[name].shape) if name in tensors else ()
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{file}: {name} is {shape or 'missing'}, needs a matrix")
    return shape


def count(file: Path, facts: Mapping[str, Any], name: str) -> int:
    """A field that is a whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    value = field(file, facts, name, int)
    if value < 1:
        raise ValueError(f"{file}: {name} is {value}, needs at least 1")
    return value


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).split("\n")[0][:200]
