"""The pages of one SAE's latents: a folder that opens from the disk and loads the details of latents when needed.

index.html             the page, with its style and script
data/list.js           a row per latent
data/tokens.js         the texts of tokens; all other files name a token by its place in this list
data/text.js           the held-out text, token block after token block
data/images/N.png      of rows that belong to images: those of the examples
data/ids.js            of text: the vocabulary's number of each entry of tokens.js, and of the tokens called otherwise
data/search.js         per latent, the positions of its examples, and the tokens that it promotes
data/details-N.js      histogram, examples, promoted tokens, neighbours and companions of 256 latents
made.json              everything that decides the pages; written last

Each data file is a script that calls `put(NAME, VALUE)`, because a page opened from the disk may load scripts but may
not fetch other files.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prolu.activations.language_model import LanguageModel
from prolu.activations.token_texts import TokenTexts
from prolu.evaluation.latents import encoder_decoder_cosine
from prolu.report.assets import render
from prolu.report.latents.directions import LogitEffect, Unembedding, logit_effects, neighbours, unembedding_of
from prolu.report.latents.firings import (
    BEFORE,
    N_BANDS,
    SAMPLE,
    WIDTH,
    Advance,
    Example,
    Examples,
    Firings,
    HeldOutText,
    collect,
)
from prolu.report.latents.row_examples import RowExamples, RowTexts
from prolu.runtime.files import json_text, read_json_object, remove, through_json, write_atomically
from prolu.sae.autoencoder import SAE

FEATURES_FOLDER = "features"
"""The folder of the pages inside a run's folder. It keeps the name that it had in older versions."""
INDEX_FILE = "index.html"
MADE_FILE = "made.json"

SHARD = 256
"""The number of latents in one file of details: some 600 kB, which a browser reads without a noticeable wait."""
N_TOKENS = 10
"""How many promoted, and how many suppressed, tokens of a latent are shown."""
N_NEIGHBOURS = 8
"""How many neighbours of a latent are shown."""


class PageSource(NamedTuple):
    """What the pages of an SAE's latents are made from."""

    sae: SAE
    text: HeldOutText
    lm: LanguageModel | RowExamples
    """The language model whose tokens the text consists of, or how rows that come from none are shown."""
    n_examples: int
    """The number of strongest examples per latent."""
    facts: Mapping[str, Any]
    """What is shown at the top: `name`, `figures` (numbers by their names) and `config`."""


def write_browser(folder: Path, source: PageSource, made: Mapping[str, Any], advance: Advance = lambda n: None) -> None:
    """Write the pages of an SAE's latents.

    Args:
        folder: the folder of these pages; what was in it is removed.
        source: what the pages are made from.
        made: everything that decides the pages, which `was_made` compares later.
        advance: called with numbers of tokens, which add up to three times the text: twice as it passes through the
            SAE, once more as pages are written.
    """
    remove(folder)
    (folder / "data").mkdir(parents=True)
    firings = collect(source.sae, source.text, source.n_examples, advance)
    row_examples = source.lm if isinstance(source.lm, RowExamples) else None
    unembedding = unembedding_of(source.lm) if isinstance(source.lm, LanguageModel) else None
    names = TokenTexts(source.lm.tokenizer) if isinstance(source.lm, LanguageModel) else RowTexts(source.lm)
    shown: list[int] = []
    texts: list[int] = []
    for ids in source.text.tokens.tolist():
        row = names.places_of(ids)
        shown += row.shown
        texts += row.named
    n_latents = len(firings.n_active)
    index: dict[str, list[list[int]]] = {"examples": [], "promoted": []}
    for start in range(0, n_latents, SHARD):
        ids = range(start, min(start + SHARD, n_latents))
        near = neighbours(source.sae, ids, N_NEIGHBOURS)
        effects = _effects(source.sae, ids, unembedding)
        rows = [_details(firings, i, near[i - start], effects[i - start], names) for i in ids]
        _put(folder, f"details-{start // SHARD}", rows)
        index["examples"] += [_positions(firings.examples[i]) for i in ids]
        index["promoted"] += [[token for token, _ in row["promoted"]] for row in rows]
        # Differences of rounded sums, so that all files together advance by the size of the text exactly.
        advance(len(texts) * ids.stop // n_latents - len(texts) * ids.start // n_latents)
    _put(folder, "search", index)
    text: dict[str, Any] = {"ctx": source.text.ctx, "tokens": shown}
    if row_examples is not None:
        text["rows"] = source.text.tokens.ravel().tolist()
        examples = [e for latent in firings.examples for part in (latent.strongest, *latent.bands) for e in part]
        row_examples.write_images({text["rows"][e.position] for e in examples}, folder / "data" / "images")
    _put(folder, "text", text)
    _put(folder, "list", _list(source.sae, firings, texts))
    # After the details, because promoted tokens that are not in the text get their places there.
    _put(folder, "tokens", names.texts)
    if isinstance(names, TokenTexts):
        _put(folder, "ids", _ids(names, shown, source.text.tokens))
    write_atomically(folder / INDEX_FILE, _page(source, firings, unembedding))
    # Last of all: a folder without this file was not finished, and is made anew.
    write_atomically(folder / MADE_FILE, json_text(made) + "\n")


def was_made(folder: Path, made: Mapping[str, Any]) -> bool:
    """Return whether a folder holds finished pages that were made from exactly this.

    Pages of an older format count too: they need nothing but themselves, and the text that they show may be gone.
    """
    try:
        held = read_json_object(folder / MADE_FILE, "pages")
    except ValueError:
        return False
    return {**held, "format": None} == {**through_json(made), "format": None}


def _effects(sae: SAE, ids: range, unembedding: Unembedding | None) -> list[LogitEffect]:
    if unembedding is None:
        return [LogitEffect([], [])] * len(ids)
    return logit_effects(sae.W_dec[list(ids)], unembedding, N_TOKENS)


def _details(
    firings: Firings, i: int, near: list[tuple[int, float]], effect: LogitEffect, names: TokenTexts | RowTexts
) -> dict[str, Any]:
    """Return what is shown of one latent."""

    def named(pairs: list[tuple[int, float]]) -> list[Any]:
        return [[names.place_of(token_id), _short(value)] for token_id, value in pairs]

    strongest, bands = firings.examples[i]
    return {
        "on": int(firings.n_active[i]),
        "reach": float(firings.reach[i]),
        "histogram": firings.histogram[i].tolist(),
        "top": [_example(e) for e in strongest],
        "bands": [[_example(e) for e in band] for band in bands],
        "promoted": named(effect.promoted),
        "suppressed": named(effect.suppressed),
        "near": [[other, _short(cosine)] for other, cosine in near],
        "together": [[c.other, _short(c.jaccard), _short(c.share)] for c in firings.together[i]],
    }


def _example(example: Example) -> list[Any]:
    """Return position, first position of the window, its length, and [offset, value, offset, value ...].

    Only the tokens on which the latent is active are listed; they are a few of the window's.
    """
    offsets = np.flatnonzero(example.activations)
    pairs: list[Any] = []
    for offset, value in zip(offsets.tolist(), example.activations[offsets].tolist(), strict=True):
        pairs += [offset, _short(value)]
    return [example.position, example.start, len(example.activations), pairs]


def _positions(examples: Examples) -> list[int]:
    """Return the positions of a latent's examples, each once."""
    return sorted({e.position for part in (examples.strongest, *examples.bands) for e in part})


def _ids(names: TokenTexts, shown: list[int], tokens: np.ndarray) -> dict[str, list[int]]:
    """Return the numbers in the vocabulary of the tokens of a text.

    `of` has the number of each entry of `names.texts`, -1 for a character over several tokens; `parts` lists position,
    number, position, number ... of the tokens that do not show their own entry, which are parts of such characters.
    """
    parts: list[int] = []
    for position, (place, token_id) in enumerate(zip(shown, tokens.ravel().tolist(), strict=True)):
        if names.ids[place] != token_id:
            parts += [position, token_id]
    return {"of": names.ids, "parts": parts}


def _list(sae: SAE, firings: Firings, texts: list[int]) -> dict[str, Any]:
    """Return what the list of latents shows: a column per quantity, which is smaller than a row per latent."""
    peaks = [examples.strongest[0].position if examples.strongest else None for examples in firings.examples]
    return {
        "density": [_short(n / firings.n_tokens) for n in firings.n_active.tolist()],
        "mean": [_short(v) for v in firings.mean.tolist()],
        "max": [_short(v) for v in firings.max.tolist()],
        "own": {name: [_short(v) for v in t.float().tolist()] for name, t in sae.weights.own.items()},
        # The encoder and decoder of a transcoder are directions in two different spaces, so they have no cosine.
        **({} if sae.is_transcoder else {"cosine": [_short(v) for v in encoder_decoder_cosine(sae).tolist()]}),
        "token": [-1 if peak is None else texts[peak] for peak in peaks],
    }


def _short(value: float) -> float:
    """Return a number with four digits, which is more than the page shows and keeps its files small."""
    return float(f"{value:.4g}")


def _put(folder: Path, name: str, value: Any) -> None:
    data = json.dumps(value, separators=(",", ":"), allow_nan=False)
    write_atomically(folder / "data" / f"{name}.js", f"put({json.dumps(name)}, {data})\n")


def _row_facts(rows: RowExamples) -> dict[str, Any]:
    return {
        "labels": rows.labels is not None,
        "images": rows.images is not None,
        "per_image": rows.rows_per_image,
    }


def _page(source: PageSource, firings: Firings, unembedding: Unembedding | None) -> str:
    sae = source.sae
    hooks = {"reads": sae.hook, "writes": sae.hook_out, "skip": sae.config.skip} if sae.is_transcoder else None
    shown = dict(source.facts) | {
        "n_latents": len(firings.n_active),
        "n_alive": int((firings.n_active > 0).sum()),
        "n_tokens": firings.n_tokens,
        "shard": SHARD,
        "n_bands": N_BANDS,
        "sample": SAMPLE,
        "before": BEFORE,
        "width": min(WIDTH, source.text.ctx),
        "together_share": firings.together_share,
        "transcoder": hooks,
        "rows": _row_facts(source.lm) if isinstance(source.lm, RowExamples) else None,
        "unembedding": None if unembedding is None else {"removes_mean": unembedding.removes_mean},
    }
    unit = "token" if shown["rows"] is None else "label" if shown["rows"]["labels"] else "row"
    return render("latents/browser.html", name=source.facts["name"], facts=shown, unit=unit)
