"""What happened to each held-out document: sums over its tokens, from which any figure of any resample follows."""

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from prolu.runtime.files import write_atomically

DOCUMENTS_FILE = "documents.safetensors"
"""In a run's folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentSums:
    """One row a document, in order of its number; every array is [n_documents]."""

    document: np.ndarray
    """Its number in the text that was read; where that is not known, the number of the block."""
    n_tokens: np.ndarray
    """Tokens scored: those that the sums of `l0` and `squared_error` run over."""
    n_predicted: np.ndarray
    """Tokens predicted, all but the first of each block: those that the sums of `ce_*` and `kl` run over."""
    l0: np.ndarray
    """Latents on."""
    squared_error: np.ndarray
    """Norm of x - x_hat, squared, normalised space."""
    ce_clean: np.ndarray
    """Cross-entropy in nats, unperturbed."""
    ce_recon: np.ndarray
    """The same with reconstructions in place of the activations."""
    kl: np.ndarray
    """KL divergence in nats of the predictions with reconstructions from those without."""

    def save(self, folder: Path) -> None:
        """Writes the run's file."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DOCUMENTS_FILE, save(asdict(self)))


def read_documents_of(folder: Path) -> DocumentSums | None:
    """What `DocumentSums.save` wrote in a run's folder; None for a run that finished before this was kept.

    Raises:
        ValueError: malformed.
    """
    file, names = folder / DOCUMENTS_FILE, {field.name for field in fields(DocumentSums)}
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, struct.error) as problem:
        raise ValueError(f"{file}: not a readable safetensors file ({problem})") from None
    if missing := names - tensors.keys():
        raise ValueError(f"{file}: lacks {', '.join(sorted(missing))}")
    if len({t.shape for t in tensors.values()}) > 1 or tensors["document"].ndim != 1 or not tensors["document"].size:
        raise ValueError(f"{file}: its arrays are not all of one length")
    if not all(np.isfinite(t).all() for t in tensors.values()):
        raise ValueError(f"{file}: holds values that are not finite")
    return DocumentSums(**{name: tensors[name] for name in names})


def summed_by_document(places: np.ndarray, n_documents: int, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums in float64 of values [n, ...] over the positions of each document; `places` [n, ...] are rows 0, 1, ..."""
    return {
        name: np.bincount(places.ravel(), np.asarray(value, np.float64).ravel(), n_documents)
        for name, value in values.items()
    }
