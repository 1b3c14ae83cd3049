"""The latents of an SAE on texts of one's own: which are active on each token, and how strongly."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prolu.activations.language_model import LanguageModel
from prolu.activations.token_texts import TokenTexts
from prolu.evaluation.edits import check_latent
from prolu.runtime.checks import at_least_1
from prolu.runtime.notebooks import ShownRows, data_frame, html_table, html_text
from prolu.runtime.tables import Column
from prolu.sae.autoencoder import SAE

MOST_ENTRIES = 2**28
"""The most entries of the matrix of latents, 1 GB in fp32."""

MOST_TOKENS_IN_NOTEBOOK = 1000
"""The number of tokens that a notebook shows at most; a longer text would push the rest of the page away."""

HEAT = "240,125,30"
"""The colour of active tokens in a notebook, as red, green and blue. It is laid over the page's own, white or black."""


class TextToken(NamedTuple):
    """A token of one of the texts."""

    text: int
    """The number of the text, from 0."""
    position: int
    """The number of the token in its text, from 0; BOS is not counted."""
    token_id: int
    """The token's number in the vocabulary."""
    name: str
    """The token's text. Where several tokens make up one character, each of them has that character as its text."""
    shown: str
    """The text of the token in running text. Where several tokens make up one character, the last shows it and the
    others show a small square."""
    begins_block: bool
    """Whether the language model sees nothing of the text before this token."""


class LatentInTexts(NamedTuple):
    """A latent that is active somewhere in the texts."""

    latent: int
    """The number of the latent."""
    largest: float
    """Its largest activation, in units of the SAE's normalised input."""
    token: str
    """The token on which it is largest."""
    n_tokens: int
    """The number of tokens on which it is active."""

    def cells(self) -> dict[str, str]:
        """Return the texts of its row, by the titles of the columns."""
        return {
            "latent": str(self.latent),
            "largest": f"{self.largest:.3g}",
            "on": repr(self.token),
            "tokens": str(self.n_tokens),
        }


@dataclass(frozen=True, eq=False, repr=False)
class LatentsOnText:
    """The latents of an SAE on each token of one or several texts.

    The first position of every token block, BOS, is left out: its activations are unlike all others, and no text.
    In a notebook it shows itself as the texts, with each token's strongest latent as its shade.
    """

    tokens: list[TextToken]
    """The tokens of all texts, one after the other."""
    latents: Float[Tensor, "n_tokens d_sae"]
    """The activation of every latent on every token, in units of the SAE's normalised input, on the CPU."""
    top: int = 5
    """The number of latents that are shown of each token."""
    among: list[int] = field(default_factory=list)
    """The latents that are shown; if empty, all of them."""

    def strongest_of(self, i: int) -> list[tuple[int, float]]:
        """Return the strongest latents of token `i`, at most `top`: pairs of latent and activation, largest first."""
        return self._strongest[i]

    @property
    def strongest(self) -> ShownRows[LatentInTexts]:
        """The latents that are among the strongest of any token, by their largest activation."""
        which = sorted({latent for pairs in self._strongest for latent, _ in pairs})
        if not which:
            return ShownRows()
        of_those = self.latents[:, which]
        largest, place = of_those.max(0)
        n_tokens = (of_those > 0).sum(0).tolist()
        rows = [
            LatentInTexts(latent, value, self.tokens[at].name, n)
            for latent, value, at, n in zip(which, largest.tolist(), place.tolist(), n_tokens, strict=True)
        ]
        return ShownRows(sorted(rows, key=lambda row: -row.largest))

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with a row for each token and each latent that is active on it.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return data_frame(self._active())

    def _active(self) -> Iterator[dict[str, Any]]:
        which = self.among or range(self.latents.shape[1])
        shown = self.latents[:, list(which)]
        for i, place in shown.nonzero().tolist():
            token = self.tokens[i]
            yield {
                "text": token.text,
                "position": token.position,
                "token": token.name,
                "token_id": token.token_id,
                "latent": which[place],
                "activation": shown[i, place].item(),
            }

    @cached_property
    def _strongest(self) -> list[list[tuple[int, float]]]:
        which = torch.tensor(self.among or range(self.latents.shape[1]))
        values, places = self.latents[:, which].topk(min(self.top, len(which)), dim=1)
        pairs = zip(which[places].tolist(), values.tolist(), strict=True)
        return [[(i, v) for i, v in zip(*both, strict=True) if v > 0] for both in pairs]

    def __repr__(self) -> str:
        strongest = ", ".join(f"{row.latent} ({row.largest:.3g} on {row.token!r})" for row in self.strongest[:3])
        return f"LatentsOnText({len(self.tokens)} tokens; strongest latents: {strongest or 'none'})"

    def _repr_html_(self) -> str:
        strongest = self._strongest
        most = max((pairs[0][1] for pairs in strongest if pairs), default=1.0)
        n = min(len(self.tokens), MOST_TOKENS_IN_NOTEBOOK)
        texts: dict[int, str] = {}
        for token, pairs in zip(self.tokens[:n], strongest, strict=False):
            texts[token.text] = texts.get(token.text, "") + _html_token(token, pairs, most)
        running = "".join(
            f'<div style="font-family:monospace;white-space:pre-wrap;line-height:1.9;margin-bottom:.6em">{text}</div>'
            for text in texts.values()
        )
        rows = [row.cells() for row in self.strongest]
        columns = [Column(title, [row[title] for row in rows], is_text=title == "on") for title in (rows or [{}])[0]]
        below = html_table("The strongest latents", columns)
        left_out = len(self.tokens) - n
        caption = f"{len(self.tokens)} tokens; the shade of a token is the activation of its strongest latent"
        more = f"<div><small>{left_out} more tokens are not shown.</small></div>" if left_out else ""
        return f"<div><div>{caption}</div>{running}{more}{below}</div>"


def _html_token(token: TextToken, pairs: Sequence[tuple[int, float]], most: float) -> str:
    """Return a token as a notebook shows it, with what is said when one points at it."""
    said = "; ".join(f"latent {latent}: {value:.3g}" for latent, value in pairs) or "no active latent"
    title = html_text(f"{token.name!r}, id {token.token_id}: {said}")
    style = ""
    if pairs:
        # Underlined too, so that colour is not all that tells an active token from others.
        strength = 0.1 + 0.6 * pairs[0][1] / most
        style = f' style="background:rgba({HEAT},{strength:.2f});border-bottom:2px solid rgba({HEAT},1)"'
    # A line end is shown as a character, so that it can be seen as a token, and also ends the line.
    written = html_text(token.shown.replace("\n", "\u21b5\n"))
    return f'<span title="{title}"{style}>{written}</span>'


@torch.no_grad()
def latents_on(
    model: LanguageModel,
    sae: SAE,
    text: str | Sequence[str],
    *,
    top: int = 5,
    latents: Sequence[int] = (),
    ctx: int | None = None,
) -> LatentsOnText:
    """Return which latents of an SAE are active on each token of a text, and how strongly.

    A text of more tokens than a block of the training is divided into blocks, each with BOS before it, as in the
    training. The model sees nothing of one block in the next.

    Args:
        model: the language model, at any hook; it is read where the SAE was trained, if the SAE knows that.
        sae: an SAE, or a transcoder.
        text: a text, or several.
        top: the number of strongest latents that are shown of each token.
        latents: the latents that are shown; by default all.
        ctx: the number of tokens per block, BOS included. By default as in the training, or else as many as the model
            takes.

    Raises:
        ValueError: a text has no tokens or all texts together have too many, a latent is out of range, or the
            activations have another width than the SAE.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("text: give at least one")
    at_least_1("top", top)
    for latent in latents:
        check_latent(latent, sae.d_sae)
    lm = model.at(sae.hook) if sae.hook else model
    if lm.d_in != sae.d_in:
        raise ValueError(f"hook {lm.hook!r}: its activations have width {lm.d_in}, but the SAE has d_in = {sae.d_in}")
    if sae.provenance.get("centred") is False:
        lm = lm.uncentred()
    rows = [lm.token_ids(one)[1:] for one in texts]
    if empty := [number for number, row in enumerate(rows) if not len(row)]:
        raise ValueError(f"text {empty[0]}: has no tokens")
    n_tokens = sum(map(len, rows))
    if n_tokens * sae.d_sae > MOST_ENTRIES:
        most = MOST_ENTRIES // sae.d_sae
        raise ValueError(f"text: has {n_tokens:,} tokens; with {sae.d_sae:,} latents at most {most:,} can be looked at")
    size = _block_size(lm, sae, ctx)
    names = TokenTexts(lm.tokenizer)
    tokens = [token for number, row in enumerate(rows) for token in _tokens_of(row, number, names, size)]
    found = torch.cat([_encoded(lm, sae, row, size) for row in rows])
    return LatentsOnText(tokens, found, top, list(latents))


def _block_size(lm: LanguageModel, sae: SAE, ctx: int | None) -> int:
    """Return the number of tokens of a text in a block, BOS not counted."""
    trained = sae.provenance.get("ctx")
    ctx = ctx or (trained if isinstance(trained, int) else lm.max_ctx)
    if not 2 <= ctx <= lm.max_ctx:
        raise ValueError(f"ctx {ctx}: {lm.name} takes 2 to {lm.max_ctx} tokens, BOS included")
    return ctx - 1


def _tokens_of(row: Int[Tensor, " n"], number: int, names: TokenTexts, size: int) -> Iterator[TextToken]:
    ids = row.tolist()
    places = names.places_of(ids)
    for at, (token_id, named, shown) in enumerate(zip(ids, places.named, places.shown, strict=True)):
        yield TextToken(number, at, token_id, names.texts[named], names.texts[shown], at % size == 0)


def _encoded(lm: LanguageModel, sae: SAE, row: Int[Tensor, " n"], size: int) -> Float[Tensor, "n d_sae"]:
    found = []
    for part in row.split(size):
        acts = lm.activations(torch.cat([torch.tensor([lm.bos]), part]))
        found.append(sae.encode(acts.to(sae.W_dec))[1:].as_subclass(Tensor).float().cpu())
    return torch.cat(found)
