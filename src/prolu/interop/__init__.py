"""SAEs of other libraries: theirs read as runs of ours, ours written as theirs; what cannot be said is refused.

A format is a file here, and a line in the table below.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from prolu.interop.formats import dictionary_learning, own_format, saelens, sparsify
from prolu.runtime.files import check_can_be_folder, write_atomically
from prolu.sae.autoencoder import SAE, read_provenance


class ToFiles(Protocol):
    """What writes an SAE as the files of a folder."""

    def __call__(self, sae: SAE, made: Mapping[str, Any], *, inputs_normalised: bool) -> dict[str, bytes]:
        """Files by name, of an SAE and its provenance; ValueError if the format cannot say something of it."""
        ...


class Format(NamedTuple):
    """One library's way of keeping an SAE."""

    files: tuple[str, ...]
    """A folder that has these is one."""
    from_folder: Callable[[Path], tuple[SAE, dict[str, Any]]]
    """The SAE, and where it comes from; ValueError if the folder is damaged or says what ours cannot."""
    to_files: ToFiles | None = None


FORMATS = {
    "prolu": Format(own_format.FILES, own_format.from_folder, own_format.to_files),
    "saelens": Format(saelens.FILES, saelens.from_folder, saelens.to_files),
    "dictionary_learning": Format(
        dictionary_learning.FILES, dictionary_learning.from_folder, dictionary_learning.to_files
    ),
    "sparsify": Format(sparsify.FILES, sparsify.from_folder),
}
"""By the name that commands use."""


def export_files(run: str | Path, format: str, *, inputs_normalised: bool = False) -> dict[str, bytes]:
    """A saved SAE as the files of another library's folder, by name.

    Args:
        run: folder of a run.
        format: saelens, dictionary_learning or prolu.
        inputs_normalised: export although the format cannot say how inputs are prepared, and record that they must be.

    Raises:
        ValueError: no SAE there, no such format, or it cannot say something of this SAE.
    """
    to_files = FORMATS[format].to_files if format in FORMATS else None
    if to_files is None:
        names = [name for name, one in FORMATS.items() if one.to_files]
        raise ValueError(f"format {format!r}: choose one of {', '.join(names)}")
    return to_files(SAE.load(run), read_provenance(run), inputs_normalised=inputs_normalised)


def import_sae(folder: str | Path, format: str = "auto") -> tuple[SAE, dict[str, Any]]:
    """An SAE that another library saved, and what its folder says of where it comes from.

    Args:
        folder: theirs.
        format: a name of `FORMATS`; auto: recognised by the folder's files.

    Raises:
        ValueError: not such a folder, damaged, or it says what ours cannot.
    """
    folder = Path(folder)
    return FORMATS[recognised(folder) if format == "auto" else _holding(folder, format)].from_folder(folder)


def recognised(folder: Path) -> str:
    """The format of a folder.

    Raises:
        ValueError: it is of none, or of several.
    """
    found = [name for name, one in FORMATS.items() if all((folder / file).is_file() for file in one.files)]
    if not found:
        known = "; ".join(f"{name} {' and '.join(one.files)}" for name, one in FORMATS.items())
        raise ValueError(f"{folder}: no SAE that is known here, by its files: {known}")
    if len(found) > 1:
        raise ValueError(f"{folder}: has the files of {' and of '.join(found)}; say which with --format")
    return found[0]


def _holding(folder: Path, format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: choose one of auto, {', '.join(FORMATS)}")
    if missing := [file for file in FORMATS[format].files if not (folder / file).is_file()]:
        raise ValueError(f"{folder}: lacks {' and '.join(missing)}, which {format} has")
    return format


def check_new(out: Path) -> None:
    """Raises ValueError unless a folder is new, or empty."""
    check_can_be_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out {str(out)!r}: not empty; choose another folder")


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder, each file whole; the config is last, so that a folder with one is whole."""
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
