"""Readers of text and JSON files, and the table of all formats by the endings of files."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from prolu.activations.arrow_files import ArrowFile, ParquetFile
from prolu.activations.builtin import stdlib_documents
from prolu.activations.shards import BROKEN, KEY, NoRow, Row, Shard, ending_of, lacking, unreadable

SEPARATOR = "<|endoftext|>"
"""The line between two documents of a .txt file."""

PASSAGE_CHARACTERS = 4000
"""The length of the passages into which a .txt file without separators is cut."""


LONGEST_LINE = 100_000
"""The number of characters in which the end of a line is looked for, before a passage is cut within a line."""


class StandardLibrary(Shard):
    """The source code of the interpreter's own standard library, one row per file."""

    def rows(self, columns: Sequence[str], low: int = 0, high: int | None = None) -> Iterator[Row | NoRow]:
        """Yield files low .. high - 1 in the order of their paths."""
        documents = ({KEY: key, "text": text} for key, text in stdlib_documents())
        return islice(documents, low, high)


class Texts(Shard):
    """Texts given as a list of strings, named by their digest."""

    def __init__(self, texts: Sequence[str]):
        digest = hashlib.sha256()
        for text in texts:
            digest.update(f"{len(text)} ".encode() + text.encode("utf-8", "surrogatepass"))
        super().__init__(f"{len(texts)} texts {digest.hexdigest()[:16]}")
        self._texts = texts

    def rows(self, columns: Sequence[str], low: int = 0, high: int | None = None) -> Iterator[Row | NoRow]:
        """Yield texts low .. high - 1, whatever their column is called."""
        return ({columns[0]: text} for text in self._texts[low:high])


class _TextFile(Shard):
    """A text file: documents between lines that hold `SEPARATOR` only, or passages if there is no such line."""

    def rows(self, columns: Sequence[str], low: int = 0, high: int | None = None) -> Iterator[Row | NoRow]:
        try:
            with self._open() as file:
                # Bytes that are not UTF-8 become lone surrogates, so that only the document that holds them cannot be
                # used.
                text = file.read().decode("utf-8", "surrogateescape").replace("\r\n", "\n")
        except BROKEN as problem:
            raise unreadable(self.file, problem) from None
        return islice(({"text": t} for t in _documents(text) if t.strip()), low, high)


def _documents(text: str) -> Iterator[str]:
    """Yield the texts between lines that hold `SEPARATOR` only, or passages if there is no such line."""
    start = 0
    is_separated = False
    at = text.find(SEPARATOR)
    while at >= 0:
        end = at + len(SEPARATOR)
        # A text that mentions the separator within a line is not cut there.
        if text[at - 1 : at] in ("", "\n") and text[end : end + 1] in ("", "\n"):
            yield text[start : max(at - 1, start)]
            start = end + 1
            is_separated = True
        at = text.find(SEPARATOR, end)
    yield from [text[start:]] if is_separated else _passages(text)


def _passages(text: str) -> Iterator[str]:
    """Yield a text in passages of about `PASSAGE_CHARACTERS`, cut at the ends of lines.

    Where no line ends for a long time, they are cut at a space and, where there is none, within a word. Otherwise a
    text without line ends would be one document, all of it on one side of the held-out split.
    """
    start = 0
    while start < len(text):
        least = start + PASSAGE_CHARACTERS
        newline = text.find("\n", least, least + LONGEST_LINE)
        if newline >= 0:
            end = newline + 1
        elif len(text) < least + PASSAGE_CHARACTERS:
            end = len(text)
        else:
            space = re.compile(r"\s").search(text, least, least + PASSAGE_CHARACTERS)
            end = least if space is None else space.end()
        yield text[start:end]
        start = end


class _JsonFile(Shard):
    """A file with one JSON value per line, or one array of values; a value is an object, or a text by itself."""

    def rows(self, columns: Sequence[str], low: int = 0, high: int | None = None) -> Iterator[Row | NoRow]:
        try:
            whole = self._whole()
            yield from islice(self._lines(columns[0]) if whole is None else _entries(whole, columns[0]), low, high)
        except BROKEN as problem:
            raise unreadable(self.file, problem) from None

    def _whole(self) -> list[Any] | None:
        """Return the values of a file that is one array, or one object over several lines; None if it has lines."""
        with self._open() as file:
            first = next(filter(None, (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)), b"")
            # Only a file that begins like an array or object is read at once, since a file of lines may exceed the
            # memory.
            if first != b"{" and not first.startswith(b"["):
                return None
        with self._open() as file:
            try:
                value = json.loads(file.read())
            except (ValueError, RecursionError):
                return None
        return value if isinstance(value, list) else [value]

    def _lines(self, column: str) -> Iterator[Row | NoRow]:
        with self._open() as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    yield NoRow(f"line {number} is not JSON")
                else:
                    yield _row_of(value, column)


def _entries(values: list[Any], column: str) -> Iterator[Row | NoRow]:
    return (_row_of(value, column) for value in values)


def _row_of(value: Any, column: str) -> Row | NoRow:
    """Return the row that a JSON value is: an object, or a text without a name, whose column `datasets` calls text."""
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        return lacking([])
    return value if column in value else lacking(list(value))


FILE_FORMATS: dict[str, type[Shard]] = {
    ".txt": _TextFile,
    ".jsonl": _JsonFile,
    ".json": _JsonFile,
    ".parquet": ParquetFile,
    ".arrow": ArrowFile,
}
"""The readers by the ending of a file's name; text and JSON may be compressed (.gz, .zst ...)."""


def open_file(file: str) -> Shard:
    """Return the reader of a file, local or on the hub.

    Raises:
        ValueError: its format is not known.
    """
    kind = FILE_FORMATS.get(ending_of(file))
    if kind is None:
        raise ValueError(f"data {file!r}: no file of a known kind; known: {', '.join(FILE_FORMATS)}")
    return kind(file)
