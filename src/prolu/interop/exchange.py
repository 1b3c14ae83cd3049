"""SAEs read from and written to the folders of other libraries: the table of formats, and what it is used for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prolu.interop.format_names import ExportFormat, ImportFormat
from prolu.interop.formats import circuit_tracer, dictionary_learning, gemma_scope, own_format, saelens, sparsify
from prolu.interop.formats.round_trip import PARAMETERS_FILE
from prolu.runtime.checks import one_of
from prolu.runtime.files import check_can_be_folder, write_atomically
from prolu.runtime.hub import MAIN, Place, fetch, place_of
from prolu.sae.autoencoder import SAE
from prolu.sae.saved_sae import read_provenance

__all__ = [
    "FORMATS",
    "ExportFormat",
    "ImportFormat",
    "check_new",
    "export_files",
    "import_sae",
    "write_folder",
]


ON_THE_HUB = "hf://"
"""What the name of a folder on the Hugging Face hub begins with."""


class Format(NamedTuple):
    """How one library keeps an SAE in a folder."""

    files: tuple[str, ...]
    """The files by which a folder of this format is recognised."""
    from_folder: Callable[[Path], tuple[SAE, dict[str, Any]]] | None
    """Reads a folder: the SAE and its provenance. It raises ValueError if the folder is damaged, or if an SAE of this
    library cannot compute what its SAE computes. None where the format is written only."""
    to_files: Callable[[SAE, Mapping[str, Any]], dict[str, bytes]] | None = None
    """Writes an SAE with its provenance as the files of a folder, by name. It raises ValueError if the format cannot
    describe the SAE. None where the format is read only."""
    undescribed_preparation: Callable[[SAE, Mapping[str, Any]], list[str]] = lambda sae, provenance: []
    """Returns in words which preparation of its inputs an SAE needs and the format cannot describe."""


FORMATS: dict[str, Format] = {
    "prolu": Format(own_format.FILES, own_format.from_folder, own_format.to_files),
    "saelens": Format(saelens.FILES, saelens.from_folder, saelens.to_files, saelens.undescribed_preparation),
    "dictionary_learning": Format(
        dictionary_learning.FILES,
        dictionary_learning.from_folder,
        dictionary_learning.to_files,
        dictionary_learning.undescribed_preparation,
    ),
    "sparsify": Format(sparsify.FILES, sparsify.from_folder),
    "gemma_scope": Format((gemma_scope.NPZ_FILE,), gemma_scope.from_npz),
    "gemma_scope_2": Format((gemma_scope.SAFETENSORS_FILE,), gemma_scope.from_safetensors),
    "circuit_tracer": Format(
        circuit_tracer.FILES, None, circuit_tracer.to_files, circuit_tracer.undescribed_preparation
    ),
}
"""The formats, by the names that the command line uses. A new format is a file in `formats`, a line here and its name
in one of the types of `format_names`."""

READERS = {name: one for name, one in FORMATS.items() if one.from_folder is not None}
"""The formats that can be read."""


def export_files(run: str | Path, format: str, *, inputs_normalised: bool = False) -> dict[str, bytes]:
    """Return a saved SAE as the files of another library's folder, by name.

    Args:
        run: The folder of a run.
        format: saelens, dictionary_learning, circuit_tracer or prolu.
        inputs_normalised: Whether to export an SAE even if the format cannot describe how its inputs must be prepared
            (centred, scaled per token). The export then records what must be done.

    Raises:
        ValueError: There is no SAE in the folder or no such format, the format cannot describe the SAE, or
            `inputs_normalised` is given where the format can describe everything.
    """
    writers = {name: one.to_files for name, one in FORMATS.items() if one.to_files}
    to_files = writers[one_of("format", format, writers)]
    sae = SAE.load(run)
    provenance = read_provenance(run)
    undescribed = FORMATS[format].undescribed_preparation(sae, provenance)
    if undescribed and not inputs_normalised:
        raise ValueError(
            f"format {format!r}: it cannot describe that inputs must be {' and '.join(undescribed)} first; with "
            "--inputs-normalised the SAE is exported all the same, with a record of what must be done"
        )
    if inputs_normalised and not undescribed:
        raise ValueError(
            f"inputs_normalised: {format!r} describes everything that must be done to inputs of this SAE; leave it out"
        )
    return to_files(sae, provenance)


def import_sae(folder: str | Path, format: str = "auto", *, revision: str = MAIN) -> tuple[SAE, dict[str, Any]]:
    """Return an SAE that another library saved, and its provenance as far as its folder tells.

    Args:
        folder: The other library's folder, on this machine or on the Hugging Face hub: hf://user/repo/FOLDER.
        format: A name in `FORMATS`, or auto to recognise the format by the folder's files.
        revision: The branch, tag or commit on the hub.

    Raises:
        ValueError: The folder is not of that format, is damaged, or its SAE computes something that ours cannot; or the
            hub has no such folder.
        ConnectionError: The hub does not answer.
    """
    if str(folder).startswith(ON_THE_HUB):
        return _from_hub(place_of(str(folder)), format, revision)
    if revision != MAIN:
        raise ValueError(f"revision {revision!r}: only folders on the hub have one; write {ON_THE_HUB}user/repo/FOLDER")
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder here; one on the hub is written {ON_THE_HUB}user/repo/FOLDER")
    chosen = READERS[_recognised(folder) if format == "auto" else _checked(folder, format)]
    assert chosen.from_folder is not None
    sae, provenance = chosen.from_folder(folder)
    # So that it knows its hook, and whether its input must be centred, before it is saved as well.
    sae.provenance = dict(provenance)
    return sae, provenance


def _from_hub(place: Place, format: str, revision: str) -> tuple[SAE, dict[str, Any]]:
    files = {file for one in READERS.values() for file in (*one.files, PARAMETERS_FILE)}
    root = fetch(place, revision, sorted(files))
    if not root.is_dir():
        raise ValueError(f"{place}: no SAE there in a format that is known here, at revision {revision!r}")
    try:
        sae, provenance = import_sae(root, format)
    except ValueError as problem:
        # The user named a place on the hub, so the message names it too, and not its path in the cache on this disk.
        raise ValueError(str(problem).replace(str(root), str(place))) from None
    if "origin" in provenance:  # our own format has none: its provenance is that of the run
        provenance["origin"] |= {"hub": str(place), "revision": revision}
    sae.provenance = dict(provenance)
    return sae, provenance


def _recognised(folder: Path) -> str:
    """Return the name of the format whose files a folder has, such as saelens.

    Raises:
        ValueError: The folder is of no format, or of several.
    """
    found = [name for name, one in READERS.items() if not _missing(folder, one)]
    if not found:
        known = "; ".join(f"{name}: {' and '.join(one.files)}" for name, one in READERS.items())
        raise ValueError(f"{folder}: no SAE in a format that is known here, which have these files: {known}")
    if len(found) > 1:
        raise ValueError(f"{folder}: has the files of {' and of '.join(found)}; choose one with --format")
    return found[0]


def _checked(folder: Path, format: str) -> str:
    """Return the name of a format, if it exists and the folder has its files.

    Raises:
        ValueError: It does not, or a file is missing.
    """
    one_of("format", format, ["auto", *READERS])
    if missing := _missing(folder, READERS[format]):
        raise ValueError(f"{folder}: has no {' and no '.join(missing)}, which a folder of {format} has")
    return format


def _missing(folder: Path, format: Format) -> list[str]:
    return [file for file in format.files if not (folder / file).is_file()]


def check_new(out: Path) -> None:
    """Raise ValueError unless a folder does not exist yet or is empty."""
    check_can_be_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out {str(out)!r}: not empty; choose another folder")


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, each atomically and in the given order.

    Formats list their config last, so that a folder with a config is complete even if writing was interrupted.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
