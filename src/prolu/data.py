"""Text to token blocks: documents go in, rows of `ctx` token ids come out, split by document."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prolu.builtin import stdlib_documents
from prolu.progress import Meter

HELD_OUT_FRACTION = 0.1
"""Share of documents kept for evaluation."""

SEPARATOR = "<|endoftext|>"
"""A line of its own between two documents of a .txt file."""

FILE_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


class Document(NamedTuple):
    """One text. `key` decides on which side of the split it falls."""

    key: str
    text: str


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBlocks:
    """A corpus as two arrays of token ids, [n_blocks, ctx] each; every block begins with BOS."""

    train: np.ndarray
    """Blocks that SAEs train on."""
    held_out: np.ndarray
    """Blocks of other documents, for evaluation only."""
    source: str
    """The name or path that the text came from."""
    text_column: str = "text"
    """The column of the text."""
    max_train_tokens: int
    """Reading stopped when there were so many to train on."""
    n_documents: int
    """Documents read, both sides together."""

    @property
    def ctx(self) -> int:
        """Tokens per block."""
        return self.train.shape[1]

    def digest(self) -> str:
        """SHA-256 of all token ids: names the data of a study."""
        return hashlib.sha256(self.train.tobytes() + self.held_out.tobytes()).hexdigest()


def is_held_out(key: str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether a document is kept for evaluation: by the hash of its key, so for ever the same side."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def load_blocks(
    source: str,
    tokenizer: Any,
    ctx: int = 128,
    *,
    max_train_tokens: int = 100_000_000,
    text_column: str = "text",
    held_out_fraction: float = HELD_OUT_FRACTION,
    progress: bool = False,
) -> TokenBlocks:
    """Reads text, tokenises it and cuts it into blocks of `ctx` tokens.

    Documents are joined with BOS between them, cut into rows of `ctx`, and the first token of each row
    is overwritten with BOS. A tail shorter than a row is dropped.

    Args:
        source: `builtin` (the interpreter's own standard library), a .txt, .jsonl, .parquet or .arrow
            file, a folder of such files, or the name of a dataset on the Hugging Face hub.
        tokenizer: a fast transformers tokenizer.
        ctx: tokens per block.
        max_train_tokens: stop reading when there are so many to train on.
        text_column: the column that holds the text, where there are columns.
        held_out_fraction: share of documents kept for evaluation.
        progress: show the rate and the time left.

    Raises:
        ValueError: nothing there, no such column, or too little text for one block on either side.
    """
    if ctx < 2:
        raise ValueError(f"ctx {ctx}: a block holds at least 2 tokens")
    bos = bos_token_id(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    sides: dict[bool, list[np.ndarray]] = {False: [], True: []}
    n_tokens, n_documents = {False: 0, True: 0}, 0
    documents = iter(read_documents(source, text_column))
    with Meter("reading text", max_train_tokens, shown=progress) as meter:
        while n_tokens[False] < max_train_tokens and (some := list(islice(documents, 64))):
            encoded = tokenizer([d.text for d in some], add_special_tokens=False, verbose=False)["input_ids"]
            before = n_tokens[False]
            for document, ids in zip(some, encoded, strict=True):
                side = is_held_out(document.key, held_out_fraction)
                sides[side].append(np.array([bos, *ids], dtype=dtype))
                n_tokens[side] += len(ids) + 1
            n_documents += len(some)
            meter.advance(n_tokens[False] - before)
    train, held_out = (_cut(sides[side], ctx, bos, dtype) for side in (False, True))
    for name, side, blocks in (("training", False, train), ("held-out", True, held_out)):
        if not len(blocks):
            raise ValueError(
                f"data {source!r}: {n_documents} documents give {n_tokens[side]} {name} tokens, "
                f"fewer than one block of {ctx}; pass more text or a smaller --ctx"
            )
    return TokenBlocks(
        train=train, held_out=held_out, source=str(Path(source).resolve()) if Path(source).exists() else source,
        text_column=text_column, max_train_tokens=max_train_tokens, n_documents=n_documents,
    )  # fmt: skip


def bos_token_id(tokenizer: Any) -> int:
    """The token that begins every block: BOS, or EOS where a tokenizer has no BOS."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a BOS nor an EOS token to begin a block with")


def read_documents(source: str, text_column: str = "text") -> Iterator[Document]:
    """Documents of `source` (see `load_blocks`), in order, read as they are asked for."""
    path = Path(source)
    if source == "builtin":
        return (Document(key, text) for key, text in stdlib_documents())
    if path.is_file() or path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in FILE_FORMATS) if path.is_dir() else [path]
        if not files or files[0].suffix not in FILE_FORMATS:
            raise ValueError(f"data {source!r}: no file of a known kind; known: {', '.join(FILE_FORMATS)}")
        return (document for file in files for document in _read_file(file, text_column))
    return _read_hub(source, text_column)


def _cut(pieces: list[np.ndarray], ctx: int, bos: int, dtype: type) -> np.ndarray:
    tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype)
    blocks = tokens[: len(tokens) // ctx * ctx].reshape(-1, ctx)
    blocks[:, 0] = bos
    return blocks


def _read_file(file: Path, text_column: str) -> Iterator[Document]:
    if file.suffix == ".txt":
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"data {str(file)!r}: not UTF-8 text") from None
        texts = text.split(f"\n{SEPARATOR}\n") if SEPARATOR in text else _passages(text)
        return (Document(t, t) for t in texts if t.strip())
    if file.suffix in (".jsonl", ".json"):
        return _documents(_json_rows(file), text_column, str(file))
    return _documents(_arrow_rows(file), text_column, str(file))


def _passages(text: str, n_characters: int = 4000) -> Iterator[str]:
    """A text without separators as passages of about `n_characters`, cut where a line ends."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + n_characters)
        end = len(text) if newline < 0 else newline + 1
        yield text[start:end]
        start = end


def _json_rows(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    raise ValueError(f"data {str(file)!r}: line {number} is not JSON") from None


def _arrow_rows(file: Path) -> Iterator[Any]:
    import pyarrow
    from datasets import load_dataset

    try:
        yield from load_dataset(FILE_FORMATS[file.suffix], data_files=str(file), split="train", streaming=True)
    except (pyarrow.ArrowException, OSError, ValueError) as problem:
        reason = str(problem).split("\n")[0]
        raise ValueError(f"data {str(file)!r}: not a readable {file.suffix} file ({reason})") from None


def _read_hub(name: str, text_column: str) -> Iterator[Document]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
    except Exception as problem:  # the hub client raises many kinds; each means: not to be had
        reason = str(problem).split("\n")[0]
        raise ValueError(
            f"data {name!r}: neither a file, a folder, 'builtin', nor a dataset the hub gives ({reason})"
        ) from None
    return _documents(rows, text_column, name)


def _documents(rows: Iterable[Any], text_column: str, source: str) -> Iterator[Document]:
    for row in rows:
        text = row.get(text_column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            columns = ", ".join(row) if isinstance(row, dict) else "none"
            raise ValueError(f"data {source!r}: no text in column {text_column!r}; columns: {columns}")
        if text.strip():
            yield Document(text, text)
