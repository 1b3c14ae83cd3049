"""The texts of tokens as they are shown and searched for; a character that is spread over several tokens is kept
whole.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

NO_CHARACTER = "\ufffd"
"""What bytes decode to that are not a whole character."""

PART = "\u25ab"
"""The text of a token that is only a part of a character; the last token of the character shows all of it."""

MOST_PARTS = 4
"""The number of tokens over which a character may be spread: UTF-8 has at most four bytes."""


class Places(NamedTuple):
    """The texts of a row of tokens, as places in `TokenTexts.texts`."""

    shown: list[int]
    """The text that each token shows in running text. Of the tokens of one character, the last shows the character and
    the others show `PART`."""
    named: list[int]
    """The text by which each token is named and found. Each of the tokens of one character is named by the
    character."""


class TokenTexts:
    """The texts of tokens, each kept once; the files of a page name a token by its place in `texts`."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._places: dict[int | str, int] = {}
        self._decoded: dict[tuple[int, ...], str] = {}
        self.texts: list[str] = []
        self.ids: list[int] = []
        """The token id that each of `texts` belongs to; -1 for a character that is spread over several tokens, and for
        `PART`."""
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][:1]

    def place_of(self, token_id: int) -> int:
        """Return the place of a token's own text in `texts`, where it is put at the first call."""
        if token_id not in self._places:
            text = self._text((token_id,))
            # A token that is not a whole character is named as in the tokenizer's vocabulary.
            text = self._tokenizer.convert_ids_to_tokens(token_id) if NO_CHARACTER in text else text
            self._places[token_id] = self._put(text, token_id)
        return self._places[token_id]

    def places_of(self, ids: Sequence[int]) -> "Places":
        """Return the places of the texts of the tokens of a row, with characters that are spread over several whole."""
        row = Places([], [])
        parts: list[int] = []
        for token_id in ids:
            # This text is replaced once it is known which character the token belongs to.
            row.shown.append(self.place_of(token_id))
            row.named.append(self.place_of(token_id))
            if NO_CHARACTER not in self._text((token_id,)):
                parts = []
                continue
            parts = [*parts, token_id][-MOST_PARTS:]
            for n in range(2, len(parts) + 1):
                whole = self._text(tuple(parts[-n:]))
                if NO_CHARACTER not in whole:
                    row.named[-n:] = [self._place_of_text(whole)] * n
                    row.shown[-n:] = [self._place_of_text(PART)] * (n - 1) + [self._place_of_text(whole)]
                    parts = []
                    break
        return row

    def _place_of_text(self, text: str) -> int:
        if text not in self._places:
            self._places[text] = self._put(text, -1)
        return self._places[text]

    def _put(self, text: str, token_id: int) -> int:
        self.texts.append(text)
        self.ids.append(token_id)
        return len(self.texts) - 1

    def _text(self, ids: tuple[int, ...]) -> str:
        if ids not in self._decoded:
            # Decoded after another token, because some tokenizers drop the space at the beginning of a text.
            before = self._decode(self._anchor)
            both = self._decode([*self._anchor, *ids])
            self._decoded[ids] = both[len(before) :]
        return self._decoded[ids]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
