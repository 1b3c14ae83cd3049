"""The rows of activations that `--activations` opens: files, and synthetic rows, which have a name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from prolu.activations.rows import ActivationRows, Array, rows_of_arrays
from prolu.activations.synthetic import NAMED
from prolu.runtime.files import first_line

ENDINGS = (".npy", ".safetensors")
"""The endings of files of rows."""

HELD_OUT = "held_out"
"""The prefix of the names of those files in a folder that are scored on."""

SYNTHETIC = "synthetic:"
"""The prefix of the names of synthetic rows, which are sums of known features."""


def open_rows(name: str, n_train: int, n_held_out: int) -> ActivationRows:
    """Open the rows that `--activations` names.

    Args:
        name: a file [n_rows, d_in] that ends in .npy or .safetensors, which is mapped into memory and not read as a
            whole; a folder of such files, in the order of their names, in which those whose names begin with
            `held_out` are scored on; or `synthetic:` and the name of features.
        n_train: about how many synthetic rows to train on. Files are used as they are.
        n_held_out: about how many synthetic rows to score on.

    Raises:
        ValueError: there is no such file, or it does not hold rows that can be used.
    """
    if name.startswith(SYNTHETIC):
        chosen = name.removeprefix(SYNTHETIC)
        if chosen not in NAMED:
            choices = ", ".join(SYNTHETIC + known for known in NAMED)
            raise ValueError(f"activations {name!r}: choose one of {choices}, or a file or folder of rows")
        # A little more than is trained on, since the rows at the end of a window that fill no batch are dropped.
        rows = NAMED[chosen].rows(n_train + n_train // 16 + 2**16, n_held_out, name=name)
        # Kept, so that a study that is extended keeps the rows that it was begun with.
        return replace(rows, facts={**rows.facts, "max_train_tokens": n_train, "held_out_pool": n_held_out})
    train, held_out = _files(name)
    return rows_of_arrays(
        [_array(file) for file in train],
        [_array(file) for file in held_out] or None,
        # An absolute path, so that a study that records it can be resumed from any directory.
        name=str(Path(name).expanduser().absolute()),
    )


def width_of_rows(name: str) -> int:
    """Return the width of the rows that `--activations` names, without reading them.

    Raises:
        ValueError: as in `open_rows`.
    """
    if name.startswith(SYNTHETIC):
        return open_rows(name, 1, 1).d_in
    array = _array(_files(name)[0][0])
    if array.ndim != 2:
        raise ValueError(f"activations {name!r}: must be an array [n_rows, d_in], but its shape is {list(array.shape)}")
    return array.shape[1]


def _files(name: str) -> tuple[list[Path], list[Path]]:
    """Return the files of rows to train on and those of rows to score on; raise ValueError if there are none."""
    place = Path(name).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix in ENDINGS)
        held_out = [file for file in files if file.name.startswith(HELD_OUT)]
        train = [file for file in files if file not in held_out]
    else:
        train = [place] if place.is_file() else []
        held_out = []
    if not train:
        raise ValueError(f"activations {name!r}: no file or folder of rows to train on (.npy, .safetensors)")
    return train, held_out


def _array(file: Path) -> Array:
    """Return the array in a file.

    Raises:
        ValueError: the file is none of the kinds that are known, or damaged, or holds several tensors.
    """
    if file.suffix not in ENDINGS:
        raise ValueError(f"activations {str(file)!r}: must end in {' or '.join(ENDINGS)}")
    try:
        if file.suffix == ".npy":
            # Without pickle, which could run whatever code is in the file.
            return np.load(file, mmap_mode="r", allow_pickle=False)
        from safetensors.torch import load_file

        tensors = load_file(file)
    except (OSError, ValueError, EOFError, SafetensorError) as problem:
        raise ValueError(f"activations {str(file)!r}: cannot be read ({first_line(problem)})") from None
    if len(tensors) != 1:
        raise ValueError(f"activations {str(file)!r}: must hold one tensor, but holds {', '.join(tensors) or 'none'}")
    return next(iter(tensors.values()))
