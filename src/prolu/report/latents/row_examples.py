"""How examples of rows that come from no language model are shown: by numbers, by the user's labels, or as images."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prolu.activations.rows import ActivationRows, RowArrays
from prolu.activations.token_texts import Places
from prolu.runtime.files import first_line, write_atomically

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
"""What every PNG begins with."""

LONGEST_LABEL = 200
"""The most characters of a label that are shown."""


@dataclass(frozen=True)
class RowExamples:
    """What the pages of latents show for each row. A row has the number that it has in its file."""

    labels: Path | None = None
    """A text file in UTF-8 with a line for each row, in the order of their numbers."""
    images: Path | None = None
    """A folder of PNGs, in the order of their names, or a .npy file [n, h, w] or [n, h, w, 3]. There is an image for
    each row, or for each n rows that follow one another, as the patches of an image do."""
    read_labels: list[str] = field(default_factory=list)
    """The labels, once they are read."""
    rows_per_image: int = 1

    @classmethod
    def open(cls, labels: Path | None, images: Path | None, rows: ActivationRows) -> "RowExamples":
        """Read the labels, and look at the images.

        Raises:
            ValueError: there is not one for each row, or a file cannot be read.
        """
        n = n_rows_of(rows)
        lines: list[str] = []
        if labels is not None:
            try:
                lines = labels.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError:
                raise ValueError(f"labels {str(labels)!r}: not a text in UTF-8") from None
            if len(lines) != n:
                raise ValueError(f"labels {str(labels)!r}: has {len(lines):,} lines, and there are {n:,} rows")
        per_image = 1
        if images is not None:
            n_images = len(_files(images)) if images.is_dir() else len(_array(images))
            if not n_images or n % n_images:
                raise ValueError(
                    f"images {str(images)!r}: has {n_images:,} images; there are {n:,} rows, and each image must have "
                    "equally many"
                )
            per_image = n // n_images
        return cls(labels, images, [line[:LONGEST_LABEL] for line in lines], per_image)

    def text_of(self, row: int) -> str:
        """Return the name of a row: its label, or its number if there are no labels."""
        return self.read_labels[row] if self.read_labels else f"row {row}"

    def write_images(self, rows: Iterable[int], folder: Path) -> None:
        """Write the images of these rows into a folder, each as NUMBER.png; do nothing if there are none."""
        if self.images is None:
            return
        folder.mkdir()
        numbers = sorted({row // self.rows_per_image for row in rows})
        if self.images.is_dir():
            files = _files(self.images)
            for number in numbers:
                write_atomically(folder / f"{number}.png", files[number].read_bytes())
            return
        array = _array(self.images)
        low, high = (0.0, 255.0) if array.dtype == np.uint8 else (float(array.min()), float(array.max()))
        for number in numbers:
            write_atomically(folder / f"{number}.png", _png(array[number], low, high))


class RowTexts:
    """The names of rows, each text kept once, as `TokenTexts` keeps those of tokens."""

    def __init__(self, rows: RowExamples):
        self._rows = rows
        self._places: dict[str, int] = {}
        self.texts: list[str] = []

    def place_of(self, row: int) -> int:
        """Return the place of a row's name in `texts`, to which it is added at the first call."""
        text = self._rows.text_of(row)
        if text not in self._places:
            self._places[text] = len(self.texts)
            self.texts.append(text)
        return self._places[text]

    def places_of(self, rows: Sequence[int]) -> Places:
        """Return the places of the names of some rows."""
        places = [self.place_of(row) for row in rows]
        return Places(places, places)


def digests_of(labels: Path | None, images: Path | None) -> dict[str, str]:
    """Return SHA-256 of the labels and of the images, where there are any. They show whether pages are up to date."""
    made = {}
    for name, path in (("labels", labels), ("images", images)):
        if path is not None:
            total = hashlib.sha256()
            for file in _files(path) if path.is_dir() else [path]:
                total.update(file.read_bytes())
            made[name] = total.hexdigest()
    return made


def n_rows_of(rows: ActivationRows) -> int:
    """Return the number of rows in the files that the held-out rows are in, or of held-out rows that are made."""
    return rows.held_out.n_in_files if isinstance(rows.held_out, RowArrays) else rows.n_held_out_tokens


def _files(folder: Path) -> list[Path]:
    """Return the PNGs of a folder in the order of their names; raise ValueError if one is none."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".png")
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
                raise ValueError(f"images {str(file)!r}: not a PNG")
    return files


def _array(file: Path) -> Any:
    """Return the images of a .npy file; raise ValueError if it holds none."""
    if file.suffix != ".npy":
        raise ValueError(f"images {str(file)!r}: must be a folder of PNGs or a .npy file [n, h, w] or [n, h, w, 3]")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        raise ValueError(f"images {str(file)!r}: cannot be read ({first_line(problem)})") from None
    is_image = array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3)
    if not is_image or array.dtype.kind not in "uif":
        raise ValueError(f"images {str(file)!r}: {array.dtype} of shape {list(array.shape)}; must be [n, h, w] numbers")
    return array


def _png(image: np.ndarray, low: float, high: float) -> bytes:
    from PIL import Image

    scaled = (image.astype(np.float64) - low) / max(high - low, 1e-12) * 255
    made = io.BytesIO()
    Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8)).save(made, "PNG")
    return made.getvalue()
