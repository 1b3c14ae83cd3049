"""Our own format: a run's folder (docs/reference/format.md)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prolu.interop.formats.round_trip import check_inputs
from prolu.sae.autoencoder import CONFIG_FILE, SAE, WEIGHTS_FILE, read_provenance

FILES = (CONFIG_FILE, WEIGHTS_FILE)


def to_files(sae: SAE, made: Mapping[str, Any], *, inputs_normalised: bool) -> dict[str, bytes]:
    """A run's folder."""
    check_inputs("prolu", [], inputs_normalised=inputs_normalised)
    return sae.files(dict(made))


def from_folder(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """The SAE, and where it comes from."""
    return SAE.load(folder), read_provenance(folder)
