"""Formats of text files, and how plain text is cut into documents."""

import bz2
import gzip
import json
import lzma
import shutil
import subprocess
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset

from prolu import ActivationStream, RunConfig, load_blocks, run_sweep
from prolu.activations.documents import Documents
from prolu.activations.text_rows import SplitRows
from prolu.cli.entry_point import main

TEXTS = [f"{i} a ball went up the tree, and so did the café\u2028 " * 6 for i in range(300)]
ROWS = [{"text": text, "meta": {"id": i}} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def tokenizer(tiny_lm):
    return tiny_lm.tokenizer


def texts_of(file):
    return [document.content for document in Documents(SplitRows(str(file)), "text")]


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


HALF = LINES.index(b"\n", len(LINES) // 2) - 7
SKIPPED = b"\x50\x2a\x4d\x18\x04\0\0\0\1\2\3\4"  # a skippable frame, as pzstd writes before each of its own
COMPRESSED = {
    "a.jsonl.zst": zstd(LINES),
    "many.jsonl.zst": zstd(LINES[:HALF]) + zstd(LINES[HALF:]),
    "pzstd.json.ZST": SKIPPED + zstd(LINES[:HALF]) + SKIPPED + zstd(LINES[HALF:]),
    "a.jsonl.gz": gzip.compress(LINES[:HALF]) + gzip.compress(LINES[HALF:]),
    "a.json.xz": lzma.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES[:HALF]) + bz2.compress(LINES[HALF:]),
    "array.json.zst": zstd(json.dumps(ROWS).encode()),
    "a.txt.zst": zstd("\n<|endoftext|>\n".join(TEXTS).encode()),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_files_are_read(tokenizer, tmp_path, name):
    (tmp_path / name).write_bytes(COMPRESSED[name])
    assert texts_of(tmp_path / name) == TEXTS
    sliced = SplitRows(str(tmp_path / name), "train[20:50]").read(["text"])
    assert [row["text"] for row in sliced] == TEXTS[20:50]


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the program zstd is not there")
def test_a_file_of_the_program_zstd_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    subprocess.run(["zstd", "-q", "-19", "--long", str(tmp_path / "a.jsonl")], check=True)
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize("content", [b"no zstandard", COMPRESSED["a.jsonl.zst"][:-9], b""])
def test_damaged_zstandard_is_refused(tokenizer, tmp_path, content):
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.jsonl.zst.*(not a readable .jsonl file|0 documents)"):
        load_blocks(str(tmp_path / "a.jsonl.zst"), tokenizer, ctx=16)


ARRAYS = {
    "one line": json.dumps(ROWS),
    "indented": json.dumps(ROWS, indent=2),
    "one row per line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "BOM and blank lines": "\ufeff\n\n" + json.dumps(ROWS, ensure_ascii=False, indent=1),
    "CRLF": json.dumps(ROWS, indent=1).replace("\n", "\r\n"),
    "texts": json.dumps(TEXTS),
    "lines": LINES.decode(),
    "lines of texts": "\n".join(json.dumps(text) for text in TEXTS),
    "a null and a number among them": json.dumps([None, 3, *ROWS[:5], {"text": None}, [1], *ROWS[5:]]),
}


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("form", ARRAYS)
def test_json_may_be_an_array(tmp_path, form, ending):
    file = tmp_path / f"a{ending}"
    file.write_bytes(ARRAYS[form].encode())
    assert texts_of(file) == TEXTS


def test_one_object_over_several_lines_is_a_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0], indent=2))
    assert texts_of(tmp_path / "a.json") == TEXTS[:1]


@pytest.mark.parametrize("content", ["[", "[1, 2", "[[[", "{", '{"data": [{"text": "a"}]}', "[]", "3", "[3]\n[4]"])
def test_json_without_rows_is_refused(tokenizer, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a.json.*(no text or token ids in column 'text'|0 documents)"):
        load_blocks(str(tmp_path / "a.json"), tokenizer, ctx=16)


WORDS = "the river bank was closed on monday because a flood had taken its door"


@pytest.mark.parametrize(
    ("text", "cuts_words"),
    [
        (" ".join(f"{WORDS} {i}" for i in range(20_000)), False),
        ("\t".join(f"{WORDS} {i}" for i in range(20_000)), False),
        ("\r".join(f"{WORDS} {i}" for i in range(20_000)), False),
        ("".join(chr(0x4E00 + i * i % 20_011) for i in range(360_000)), True),
        ("A heading.\n" + " ".join(f"{WORDS} {i}" for i in range(20_000)) + "\nThe end.", False),
        (f"{WORDS} <|endoftext|> " * 5000, False),
    ],
)
def test_text_without_line_ends_is_cut_into_passages(tokenizer, tmp_path, text, cuts_words):
    (tmp_path / "a.txt").write_text(text, newline="")
    passages = texts_of(tmp_path / "a.txt")
    assert "".join(passages) == text
    # Before the last line end it may be a line of the length that is still a line.
    longest = 104_000 if text.endswith("The end.") else 8000
    assert all(4000 <= len(passage) <= longest for passage in passages[:-1])
    assert len(passages) > 80
    assert cuts_words or all(passage[-1].isspace() for passage in passages[:-1])
    blocks = load_blocks(str(tmp_path / "a.txt"), tokenizer, ctx=16)
    assert 0.02 < blocks.held_out.size / blocks.train.size < 0.3


def test_text_with_line_ends_is_cut_at_them_only(tmp_path):
    """The rule of the first version: a passage ends at the first line end after 4,000 characters."""
    lines = [(WORDS + " ") * (1 + (7 * i) % 900) + "\n" for i in range(150)]
    assert max(map(len, lines)) > 50_000
    text = "".join(lines) + WORDS
    (tmp_path / "a.txt").write_text(text)
    expected = []
    start = 0
    while start < len(text):
        newline = text.find("\n", start + 4000)
        expected.append(text[start : len(text) if newline < 0 else newline + 1])
        start += len(expected[-1])
    assert texts_of(tmp_path / "a.txt") == expected


@pytest.mark.parametrize(
    "text",
    ["a\n<|endoftext|>\nb", "<|endoftext|>\na\n<|endoftext|>\nb\n<|endoftext|>\n", "a\n<|endoftext|>\nb\n<|endoftext|>",
     "a\n<|endoftext|>\n<|endoftext|>\nb", "a\r\n<|endoftext|>\r\nb"],
)  # fmt: skip
def test_lines_that_are_the_separator_belong_to_no_document(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, newline="")
    assert texts_of(tmp_path / "a.txt") == ["a", "b"]


def test_a_separator_within_a_line_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("a <|endoftext|> in a line\n<|endoftext|>\nb<|endoftext|>\nc\n")
    assert texts_of(tmp_path / "a.txt") == ["a <|endoftext|> in a line", "b<|endoftext|>\nc\n"]


def test_a_path_is_taken_as_its_name(tokenizer, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_bytes(LINES)
    wanted = load_blocks(str(tmp_path / "text/a.jsonl"), tokenizer, ctx=16, folder=tmp_path / "blocks")
    for source in (tmp_path / "text/a.jsonl", tmp_path / "text", tmp_path / "blocks"):
        assert load_blocks(source, tokenizer, ctx=16).digest() == wanted.digest()


def test_a_list_of_files_is_read_in_its_order(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "b.jsonl").write_bytes(LINES[: HALF + 7])
    (tmp_path / "a.json").write_text(json.dumps(ROWS[LINES[:HALF].count(b"\n") :][1:]))
    monkeypatch.chdir(tmp_path)
    wanted = load_blocks(TEXTS, tokenizer, ctx=16)
    for files in (["b.jsonl", "a.json"], (tmp_path / "b.jsonl", tmp_path / "a.json"), [tmp_path / "b.jsonl", "a.json"]):
        assert [row["text"] for row in SplitRows(files).read(["text"])] == TEXTS
        blocks = load_blocks(files, tokenizer, ctx=16, folder=tmp_path / "blocks")
        assert blocks.digest() == wanted.digest()
        assert blocks.source == [str(tmp_path / "b.jsonl"), str(tmp_path / "a.json")]
        assert load_blocks(blocks.source, tokenizer, ctx=16).digest() == wanted.digest()
    assert [row["text"] for row in SplitRows(["a.json", "b.jsonl"], "train[0:5]").read(["text"])] != TEXTS[:5]


def test_a_list_of_texts_is_its_texts(tokenizer):
    blocks = load_blocks(TEXTS, tokenizer, ctx=16)
    assert blocks.digest() == load_blocks(Dataset.from_dict({"text": TEXTS}), tokenizer, ctx=16).digest()
    assert blocks.source.startswith("300 texts ")
    assert load_blocks(tuple(TEXTS), tokenizer, ctx=16, text_column="body").digest() == blocks.digest()
    assert load_blocks([*TEXTS, "a.txt", "x" * 5000, "a\0b"], tokenizer, ctx=16).n_documents == 303
    assert load_blocks(TEXTS[1:], tokenizer, ctx=16).source != blocks.source
    sliced = load_blocks(TEXTS, tokenizer, ctx=16, split="train[:50%]", eval_split="train[90%:]")
    assert sliced.n_documents == 180


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "a list of neither files nor texts"), (["a", 3], "a list of neither"), ([["a"]], "a list of neither"),
        (["no.parquet"], "no file 'no.parquet', in a list of files"),
        ([Path("no such file")], "no file 'no such file'"),
        (["no.jsonl", "neither.txt"], "no file 'no.jsonl'"), ("x" * 5000, "neither a file"), ("a\0b", "neither a file"),
    ],
)  # fmt: skip
def test_lists_of_something_else_are_refused(tokenizer, source, words):
    with pytest.raises(ValueError, match=words):
        load_blocks(source, tokenizer)


def test_a_study_of_a_list_of_files_is_resumed_scored_and_reported(tiny_lm, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    blocks = load_blocks([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tiny_lm.tokenizer, ctx=32)
    runs = [RunConfig(d_sae=24, n_tokens=2560, coeff=0.02)]
    for _ in range(2):
        stream = ActivationStream(tiny_lm, blocks, 128)
        results = run_sweep(runs, stream, tmp_path / "study", eval_tokens=640, progress=False)
    assert main(["eval", str(results.runs[0].folder), "--eval-tokens", "320"]) == 0
    assert main(["report", str(tmp_path / "study"), "--latent-pages", "all", "--latent-tokens", "320"]) == 0
