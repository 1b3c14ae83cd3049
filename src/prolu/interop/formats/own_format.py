"""Our own format: the folder of a run (docs/reference/format.md)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prolu.sae.autoencoder import SAE
from prolu.sae.saved_sae import CONFIG_FILE, WEIGHTS_FILE, read_provenance

FILES = (CONFIG_FILE, WEIGHTS_FILE)


def to_files(sae: SAE, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a run's folder that a user of the SAE needs."""
    return sae.files(dict(provenance))


def from_folder(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """Read a folder, and return the SAE and its provenance."""
    return SAE.load(folder), read_provenance(folder)
