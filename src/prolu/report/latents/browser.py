"""The pages of one SAE's latents: a folder that opens from the disk, its details in script files loaded when needed.

index.html             the page, with its style and script
data/list.js           a row per latent
data/tokens.js         the texts of tokens, which all else names by their place in this list
data/text.js           the held-out text, block after block
data/search.js         per latent, tokens that it is on for and tokens that it promotes
data/details-N.js      histogram, examples, effects and neighbours of 256 latents
made.json              what decides all of it; written last
"""

import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prolu.activations.language_model import LanguageModel
from prolu.evaluation.latents import encoder_decoder_cosine
from prolu.report.assets import asset, inlined
from prolu.report.latents.directions import (
    Effect,
    Unembedding,
    effects,
    neighbours,
    unembedding,
)
from prolu.report.latents.firings import N_BANDS, SAMPLE, Advance, Example, HeldText, Latents, collect
from prolu.runtime.files import remove, write_atomically
from prolu.sae.autoencoder import SAE

FEATURES_FOLDER, INDEX_FILE, MADE_FILE = "features", "index.html", "made.json"
SHARD = 256
"""Latents per file of details."""
N_EFFECTS, N_NEIGHBOURS = 10, 8
"""Tokens at either end, and neighbours, of a latent."""


class PageSource(NamedTuple):
    """What the pages of an SAE's latents are made from."""

    sae: SAE
    text: HeldText
    lm: LanguageModel
    n_examples: int
    facts: Mapping[str, Any]
    """Shown on top: `name`, `figures` (names to numbers) and `config`."""


def write_browser(folder: Path, source: PageSource, made: Mapping[str, Any], advance: Advance = lambda n: None) -> None:
    """Writes the pages of an SAE's latents.

    Args:
        folder: theirs alone; what was there is removed.
        source: what they show.
        made: what decides all of it, kept in `made.json`.
        advance: told how many tokens were passed through the SAE, twice the text in all, and as many again as pages
            are written.
    """
    remove(folder)
    (folder / "data").mkdir(parents=True)
    latents, through, names = (
        collect(source.sae, source.text, source.n_examples, advance),
        unembedding(source.lm),
        Names(source.lm.tokenizer),
    )
    own = source.text.tokens.ravel()
    texts = [names.of(token) for token in own.tolist()]
    index: dict[str, list[list[int]]] = {"on": [], "promoted": []}
    for start in range(0, len(latents.n_on), SHARD):
        ids = range(start, min(start + SHARD, len(latents.n_on)))
        near, effect = neighbours(source.sae, ids, N_NEIGHBOURS), _effects(source.sae, ids, through)
        rows = [_details(latents, i, near[i - start], effect[i - start], names) for i in ids]
        _put(folder, f"details-{start // SHARD}", rows)
        advance(own.size * ids.stop // len(latents.n_on) - own.size * ids.start // len(latents.n_on))
        index["on"] += [sorted({texts[p] for p in _on(latents, i)}) for i in ids]
        index["promoted"] += [[token for token, _ in row["promoted"]] for row in rows]
    _put(folder, "search", index)
    _put(folder, "text", {"ctx": source.text.ctx, "tokens": texts})
    _put(folder, "list", _list(source.sae, latents, texts))
    _put(folder, "tokens", names.texts)
    write_atomically(folder / INDEX_FILE, _page(source.facts, latents, through))
    write_atomically(folder / MADE_FILE, json.dumps(made) + "\n")


def was_made(folder: Path, made: Mapping[str, Any]) -> bool:
    """Whether a folder holds just these pages, whole."""
    try:
        return json.loads((folder / MADE_FILE).read_text(encoding="utf-8")) == json.loads(json.dumps(made))
    except (OSError, ValueError):
        return False


class Names:
    """Texts of token ids, each once: `of(id)` is its place in `texts`."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._places = tokenizer, dict[int, int]()
        self.texts: list[str] = []
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][:1]

    def of(self, token_id: int) -> int:
        """Its place; a new one if it was not asked for before."""
        if token_id not in self._places:
            self._places[token_id] = len(self.texts)
            self.texts.append(self._text(token_id))
        return self._places[token_id]

    def _text(self, token_id: int) -> str:
        """Behind another token, because some tokenizers drop the space that a text begins with.

        A token that is a part of a character is spelled as the vocabulary has it.
        """
        before, both = (
            self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (self._anchor, [*self._anchor, token_id])
        )
        text = both[len(before) :]
        return self._tokenizer.convert_ids_to_tokens(token_id) if "\ufffd" in text else text


def _effects(sae: SAE, ids: range, through: Unembedding | None) -> list[Effect]:
    if through is None:
        return [Effect([], [])] * len(ids)
    return effects(sae.W_dec[list(ids)], through, N_EFFECTS)


def _details(latents: Latents, i: int, near: list[tuple[int, float]], effect: Effect, names: Names) -> dict[str, Any]:
    def named(pairs: list[tuple[int, float]]) -> list[Any]:
        return [[names.of(token), _short(value)] for token, value in pairs]

    top, bands = latents.examples[i]
    return {
        "on": int(latents.n_on[i]), "reach": float(latents.reach[i]), "histogram": latents.histogram[i].tolist(),
        "top": [_example(e) for e in top], "bands": [[_example(e) for e in band] for band in bands],
        "promoted": named(effect.promoted), "suppressed": named(effect.suppressed),
        "near": [[other, _short(cosine)] for other, cosine in near],
    }  # fmt: skip


def _example(example: Example) -> list[Any]:
    """Position, start of the window, its size, and offset and value of what is on in it, in turn."""
    on = np.flatnonzero(example.activations)
    values = [_short(value) for value in example.activations[on].tolist()]
    pairs = [part for pair in zip(on.tolist(), values, strict=True) for part in pair]
    return [example.position, example.start, len(example.activations), pairs]


def _on(latents: Latents, i: int) -> Iterator[int]:
    """Positions where a latent is on in its strongest examples."""
    for example in latents.examples[i].top:
        yield from (example.start + np.flatnonzero(example.activations)).tolist()


def _list(sae: SAE, latents: Latents, texts: list[int]) -> dict[str, Any]:
    """One column a quantity."""
    own = {name: [_short(v) for v in t.float().tolist()] for name, t in sae.weights.own.items()}
    tops = [examples.top[0].position if examples.top else None for examples in latents.examples]
    return {
        "density": [_short(n / latents.n_tokens) for n in latents.n_on.tolist()],
        "mean": [_short(v) for v in latents.mean.tolist()], "max": [_short(v) for v in latents.max.tolist()],
        "own": own, "cosine": [_short(v) for v in encoder_decoder_cosine(sae).tolist()],
        "token": [-1 if p is None else texts[p] for p in tops],
    }  # fmt: skip


def _short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def _put(folder: Path, name: str, value: Any) -> None:
    """Writes data as a script that hands it to the page: what is loaded so opens from the disk too."""
    write_atomically(folder / "data" / f"{name}.js", f"put({json.dumps(name)}, {_json(value)})\n")


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _page(facts: Mapping[str, Any], latents: Latents, through: Unembedding | None) -> str:
    shown = dict(facts) | {
        "n_latents": len(latents.n_on), "n_alive": int((latents.n_on > 0).sum()), "n_tokens": latents.n_tokens,
        "shard": SHARD, "n_bands": N_BANDS, "sample": SAMPLE,
        "unembedding": None if through is None else {"removes_mean": through.removes_mean},
    }  # fmt: skip
    return asset("latents/browser.html").format(
        name=html.escape(facts["name"]),
        style=asset("theme.css") + asset("latents/browser.css"),
        facts=inlined(shown),
        script=asset("theme.js") + asset("latents/browser.js"),
    )
