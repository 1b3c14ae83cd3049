"""The command `latents`: which latents of a saved SAE are active on a text of the user's own."""

from pathlib import Path
from typing import Any

from rich.console import Console

from prolu.activations.language_model import LanguageModel
from prolu.activations.source import open_language_model
from prolu.cli.job import Job
from prolu.cli.requests import Latents
from prolu.evaluation.latents_on_text import LatentsOnText, latents_on
from prolu.report.console import print_place, print_sentence, print_table
from prolu.report.latents.browser import FEATURES_FOLDER, INDEX_FILE
from prolu.report.latents.text_page import write_text_page
from prolu.runtime.checks import at_least_1
from prolu.runtime.files import json_text
from prolu.runtime.names import folder_name
from prolu.runtime.tables import Column
from prolu.sae.autoencoder import SAE

STRONGEST = 12
"""How many of the text's strongest latents are printed below the tokens."""


def prepare_latents(request: Latents) -> Job:
    """Check the request, and return the work.

    Raises:
        ValueError: there is no SAE in the folder or no text, a file cannot be read as text, the language model is not
            known or is not that of the SAE, or a latent is out of range.
    """
    at_least_1("top", request.top)
    if request.json and request.out is not None:
        raise ValueError("json: not with --out, which writes a page")
    sae = SAE.load(request.run)
    texts = [*request.text, *map(_read, request.file)]
    if not texts:
        raise ValueError("text: give a text with --text, or the file of one with --file")
    if request.out is not None and request.out.is_dir():
        raise ValueError(f"out {str(request.out)!r}: a folder; name the HTML file to write")
    lm = _language_model(request, sae)
    # Done while the request is checked, because only this finds a wrong text or latent; it takes no longer.
    found = latents_on(lm, sae, texts, top=request.top, latents=request.latents, ctx=request.ctx)
    return [lambda: _show(request, found)]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as problem:
        raise ValueError(f"file {str(file)!r}: cannot be read ({problem.strerror})") from None
    except UnicodeDecodeError as problem:
        raise ValueError(
            f"file {str(file)!r}: not a text in UTF-8 ({problem.reason} at byte {problem.start})"
        ) from None


def _language_model(request: Latents, sae: SAE) -> LanguageModel:
    known: dict[str, Any] = {"lm_dtype": "fp32"} | sae.provenance
    if "rows" in known and not (request.lm and request.hook):
        raise ValueError(f"{request.run}: was trained on rows that come from no language model, and takes no text")
    if request.lm:
        # The model that is named may differ from that of the training, so its digest is not compared.
        known |= {"lm": request.lm, "lm_digest": None, "lm_revision": ""}
    if request.hook:
        known["hook"] = request.hook
    if missing := [name for name in ("lm", "hook") if not known.get(name)]:
        flags = " ".join(f"--{name}" for name in missing)
        raise ValueError(f"{request.run}: its config does not say {', '.join(missing)}; give {flags}")
    return open_language_model(known, described_by=f"the training of {request.run}")


def _show(request: Latents, found: LatentsOnText) -> None:
    pages = request.run / FEATURES_FOLDER / INDEX_FILE
    if request.out is not None:
        name = folder_name(request.run)
        write_text_page(found, request.out, name=name, pages=pages if pages.is_file() else None)
    if request.json:
        for i, token in enumerate(found.tokens):
            row = token._asdict() | {"latents": [list(pair) for pair in found.strongest_of(i)]}
            print(json_text({name: row[name] for name in ("text", "position", "token_id", "name", "latents")}))
        return
    console = Console()
    if request.out is None:
        _print_tokens(console, found)
        print()
    _print_strongest(console, found)
    print()
    if request.out is not None:
        print_place(console, "page", str(request.out))
    if pages.is_file():
        print_place(console, "latents", str(pages))
    else:
        study = request.run.parent
        print_sentence(console, "What each latent does elsewhere: make its pages with the command", indent="")
        print_place(console, "pages", f"prolu report {study} --latent-pages {folder_name(request.run)}")


def _print_tokens(console: Console, found: LatentsOnText) -> None:
    """Print a line per token: its text, and its strongest latents with their activations."""
    several = found.tokens[-1].text > 0
    strongest = [found.strongest_of(i) for i in range(len(found.tokens))]
    columns = [
        Column("token", [repr(token.name) for token in found.tokens], is_text=True),
        *(
            Column("latent and activation" if place == 0 else "", [_pair(pairs, place) for pairs in strongest],
                   is_optional=place > 0)
            for place in range(max(map(len, strongest)))
        ),
    ]  # fmt: skip
    if several:
        columns.insert(0, Column("text", [str(token.text) for token in found.tokens]))
    print_table(console, columns)


def _pair(pairs: list[tuple[int, float]], place: int) -> str:
    if place >= len(pairs):
        return ""
    latent, value = pairs[place]
    return f"{latent} {value:#.3g}"


def _print_strongest(console: Console, found: LatentsOnText) -> None:
    rows = found.strongest[:STRONGEST]
    if not rows:
        print_sentence(console, "No latent is active.", indent="")
        return
    print_sentence(console, f"The {len(rows)} strongest latents:", indent="", style="bold")
    cells = [row.cells() for row in rows]
    print_table(console, [Column(title, [row[title] for row in cells], is_text=title == "on") for title in cells[0]])
