"""Chats: lists of messages, which a tokenizer's chat template turns into text, and which token is of which role."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NO_ROLE = 0
"""The number of the role of tokens that are in no message: markers, headers, and what a template adds."""

MOST_ROLES = 255
"""The most roles that a text can have, so that a token's role fits into a byte."""


class Span(NamedTuple):
    """Where the content of a message stands in the text of a chat."""

    start: int
    stop: int
    role: str


class Chat(NamedTuple):
    """A chat as text."""

    text: str
    """The chat as the template writes it, with markers, which are parsed into special tokens."""
    spans: Sequence[Span]
    """The spans of the messages, in ascending order; empty if they cannot be found."""


class NotAChatError(ValueError):
    """A row looks like a chat, but the chat template rejects it."""


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        self.digest = hashlib.sha256(template.encode()).hexdigest() if template else ""
        """SHA-256 of the template, which names it; empty if there is none."""

    def check(self, digest: str, what: str) -> None:
        """Raise ValueError if chats were rendered with another template than this one."""
        if digest and digest != self.digest:
            raise ValueError(
                f"{what}: holds chats in another chat template than this tokenizer's; choose another folder"
            )

    def render(self, messages: Sequence[Mapping[str, Any]]) -> Chat:
        """Return a chat as text.

        The positions of the messages are found by rendering the chat a second time with placeholders as contents. Some
        templates change contents, for example by leaving out earlier reasoning; the result then has no spans.

        Raises:
            ValueError: The tokenizer has no chat template.
            NotAChatError: The template does not take these messages, or a content is no text.
        """
        if not self.digest:
            raise ValueError(
                "the text is chats, lists of messages, and the tokenizer has no chat template that turns them into "
                "text; choose an instruct model, or a column of texts"
            )
        plain = [_plain(message) for message in messages]
        text = self._rendered(plain)
        return Chat(text, self._spans(plain, text))

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, KeyError, ValueError) as problem:
            raise NotAChatError(f"the chat template does not take a row: {problem}") from None

    def _spans(self, messages: Sequence[dict[str, Any]], text: str) -> Sequence[Span]:
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        try:
            marked = self._rendered([m | {"content": mark} for m, mark in zip(messages, marks, strict=True)])
        except NotAChatError:
            return ()
        spans = []
        at = 0
        for message, mark in zip(messages, marks, strict=True):
            before, found, marked = marked.partition(mark)
            if not found or not text.startswith(before, at):
                return ()
            at += len(before)
            content = message["content"]
            # Most templates trim what they write.
            written = next((some for some in (content, content.strip()) if text.startswith(some, at)), None)
            if written is None:
                return ()
            spans.append(Span(at, at + len(written), message["role"]))
            at += len(written)
        return spans if text[at:] == marked else ()


def is_chat(content: Any) -> bool:
    """Return whether the content of a row is a list of messages."""
    return (
        isinstance(content, list | tuple | np.ndarray)
        and len(content) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in content)
    )


def key_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return what names a chat: its messages, whatever else its row holds."""
    return json.dumps([[message["role"], message.get("content")] for message in messages], default=str)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without the fields that its row lacks, or raise NotAChatError if it has no text."""
    role, content = message["role"], message.get("content")
    if not isinstance(role, str):
        raise NotAChatError(f"a message has the role {role!r}, which must be a name")
    if content is not None and not isinstance(content, str):
        raise NotAChatError(f"a message holds a {type(content).__name__}, where its text should be")
    # Files of columns have every field in every message, and None where a message has none.
    return {name: value for name, value in message.items() if value is not None} | {"content": content or ""}


class RoleNumbers:
    """The numbers of roles, in the order in which they were first seen; 0 is none."""

    def __init__(self, names: Sequence[str] = ()):
        self.names = list(names)
        """The name of each role, of which the first has the number 1."""

    def of_tokens(self, chat: Chat, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return the number of the role of each token, [n_tokens].

        A token has the role of a message if it begins in its content.

        Raises:
            ValueError: There are more roles than numbers.
        """
        starts = np.array([start for start, _ in offsets], np.int64)
        roles = np.full(len(starts), NO_ROLE, np.uint8)
        for span in chat.spans:
            roles[(starts >= span.start) & (starts < span.stop)] = self._number(span.role)
        return roles

    def _number(self, role: str) -> int:
        if role not in self.names:
            if len(self.names) == MOST_ROLES:
                raise ValueError(f"role {role!r}: the text has more than {MOST_ROLES} roles")
            self.names.append(role)
        return self.names.index(role) + 1
