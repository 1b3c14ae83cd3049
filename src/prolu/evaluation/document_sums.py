"""Sums over the tokens of each held-out document, from which the figures of any resample of documents follow.

A figure is a ratio of two sums over tokens, for example CE increase = (sum ce_recon - sum ce_clean) / sum n_predicted.
Kept as sums by document, it can be computed for every resample without the language model.
"""

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from prolu.runtime.files import write_atomically

DOCUMENTS_FILE = "documents.safetensors"
"""The file's name in a run's folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentSums:
    """One row per held-out document, in ascending order of its number; every array is [n_documents]."""

    document: np.ndarray
    """The document's number in the text that was read, or its block's number where documents are not known."""
    n_tokens: np.ndarray
    """The number of tokens scored, over which `l0` and `squared_error` are sums."""
    n_predicted: np.ndarray
    """The number of tokens predicted, over which `ce_clean`, `ce_recon` and `kl` are sums: the first token of a token
    block is predicted by none. 0 for rows that come from no language model, like the sums of predictions."""
    l0: np.ndarray
    """The sum over tokens of the number of active latents."""
    squared_error: np.ndarray
    """The sum over tokens of ||x - x_hat||^2, in the space the SAE works in."""
    ce_clean: np.ndarray
    """The sum of the language model's next-token cross-entropy, in nats."""
    ce_recon: np.ndarray
    """The sum of its cross-entropy with reconstructions in place of the activations, in nats."""
    kl: np.ndarray
    """The sum of KL(clean predictions || predictions with reconstructions), in nats."""

    def save(self, folder: Path) -> None:
        """Write the file into a run's folder, which is created if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DOCUMENTS_FILE, save(asdict(self)))


def read_documents_of(folder: Path) -> DocumentSums | None:
    """Read what `DocumentSums.save` wrote into a run's folder, or return None if there is none.

    Runs that finished before version 0.1.0 was complete have no such file.

    Raises:
        ValueError: The file is damaged or lacks a tensor.
    """
    file = folder / DOCUMENTS_FILE
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, struct.error) as problem:
        raise ValueError(f"{file}: not a readable safetensors file ({problem})") from None
    names = {field.name for field in fields(DocumentSums)}
    if missing := names - tensors.keys():
        raise ValueError(f"{file}: lacks {', '.join(sorted(missing))}")
    if len({t.shape for t in tensors.values()}) > 1 or tensors["document"].ndim != 1 or not tensors["document"].size:
        raise ValueError(f"{file}: its arrays are not all of one length")
    if not all(np.isfinite(t).all() for t in tensors.values()):
        raise ValueError(f"{file}: holds values that are not finite")
    return DocumentSums(**{name: tensors[name] for name in names})


def summed_by_document(rows: np.ndarray, n_documents: int, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the sums of each value over the positions of each document, [n_documents].

    Args:
        rows: for each position, the row of its document, [...].
        n_documents: the number of documents, also of those without a position.
        values: named values, [...] each.
    """
    # float64, so that the sums over all documents are the run's figures to about 15 digits.
    return {
        name: np.bincount(rows.ravel(), np.asarray(value, np.float64).ravel(), n_documents)
        for name, value in values.items()
    }
