"""The page of the latents on a text of one's own: one file that stands alone, with links to the pages of latents."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prolu.evaluation.latents_on_text import LatentsOnText
from prolu.report.assets import render
from prolu.runtime.files import write_atomically

MOST_LATENTS = 500
"""The number of latents whose activations a page holds at most: those with the largest."""


def write_text_page(found: LatentsOnText, file: str | Path, *, name: str = "", pages: str | Path | None = None) -> None:
    """Write a page of the texts, whose tokens are shaded by a latent that the reader chooses.

    Args:
        found: what `latents_on` has returned.
        file: the HTML file, which is replaced if it is there.
        name: what the SAE is called at the top of the page.
        pages: the page of the SAE's latents (`features/index.html` in the folder of a run), to which each latent is
            linked; None if there is none.

    Raises:
        OSError: the file cannot be written.
    """
    place = Path(file)
    # Relative, so that the link holds when both are moved together.
    link = "" if pages is None else quote(Path(os.path.relpath(pages, place.parent)).as_posix())
    strongest = found.strongest
    held = [row.latent for row in strongest[:MOST_LATENTS]]
    write_atomically(
        place,
        render(
            "latents/text.html",
            name=name or "an SAE",
            facts={
                "latents": held,
                "n_left_out": len(strongest) - len(held),
                "top": found.top,
                "link": link,
                "tokens": [
                    [token.text, token.token_id, token.name, token.shown, int(token.begins_block)]
                    for token in found.tokens
                ],
                "values": _values(found, held),
            },
        ),
    )


def _values(found: LatentsOnText, held: Sequence[int]) -> list[list[Any]]:
    """Return for each token [place, value, place, value ...] of the latents in `held`, the largest value first."""
    values: list[list[Any]] = []
    for row in found.latents[:, list(held)]:
        order = row.argsort(descending=True, stable=True)[: int((row > 0).sum())]
        pairs = zip(order.tolist(), row[order].tolist(), strict=True)
        values.append([part for place, value in pairs for part in (place, float(f"{value:.4g}"))])
    return values
