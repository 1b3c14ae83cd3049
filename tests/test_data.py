"""Text to blocks."""

import json

import numpy as np
import pytest
from datasets import Dataset

from prolu import load_blocks
from prolu.builtin import stdlib_documents
from prolu.data import is_held_out, read_documents


@pytest.fixture
def tokenizer(tiny_lm):
    return tiny_lm.tokenizer


def test_blocks_begin_with_bos_and_hold_the_text_in_order(tokenizer, stories_file):
    blocks = load_blocks(str(stories_file), tokenizer, ctx=32)
    assert blocks.train.shape[1] == blocks.ctx == 32
    assert (blocks.train[:, 0] == 0).all()
    assert (blocks.held_out[:, 0] == 0).all()
    assert blocks.train.dtype == np.uint16
    text = tokenizer.decode(blocks.train[0, 1:])
    documents = [d for d in read_documents(str(stories_file)) if not is_held_out(d.key)]
    assert documents[0].text.startswith(text)


def test_no_document_is_on_both_sides(tokenizer, tmp_path):
    file = tmp_path / "letters.jsonl"
    texts = [f"{chr(65 + i % 26) * 40} {i}" for i in range(300)]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    blocks = load_blocks(str(file), tokenizer, ctx=16)
    expected = {side: sum(is_held_out(t) is side for t in texts) for side in (True, False)}
    assert expected[True] > 10
    for side, rows in ((True, blocks.held_out), (False, blocks.train)):
        n_tokens = sum(len(tokenizer(t)["input_ids"]) + 1 for t in texts if is_held_out(t) is side)
        assert rows.size == n_tokens // 16 * 16


def test_every_kind_of_file_gives_the_same_blocks(tokenizer, stories_file, tmp_path):
    texts = [d.text for d in read_documents(str(stories_file))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "b.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "stories.txt").write_text(stories_file.read_text())
    digests = {
        load_blocks(str(source), tokenizer, ctx=32).digest()
        for source in (stories_file, tmp_path / "a.jsonl", tmp_path / "b.parquet", folder)
    }
    assert len(digests) == 1


def test_another_text_column(tokenizer, tmp_path):
    Dataset.from_dict({"body": [f"{i} " * 60 for i in range(100)]}).to_parquet(tmp_path / "b.parquet")
    assert len(load_blocks(str(tmp_path / "b.parquet"), tokenizer, ctx=16, text_column="body").train) > 0
    with pytest.raises(ValueError, match="no text in column 'text'; columns: body"):
        load_blocks(str(tmp_path / "b.parquet"), tokenizer, ctx=16)


def test_a_plain_book_is_split_by_passages(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"Line {i} of the book.\n" for i in range(20_000)))
    blocks = load_blocks(str(tmp_path / "book.txt"), tokenizer, ctx=64)
    assert blocks.n_documents > 50
    assert 0.02 < len(blocks.held_out) / len(blocks.train) < 0.4
    text = "".join(d.text for d in read_documents(str(tmp_path / "book.txt")))
    assert text == (tmp_path / "book.txt").read_text()


def test_reading_stops_when_there_is_enough(tokenizer, stories_file):
    few = load_blocks(str(stories_file), tokenizer, ctx=32, max_train_tokens=2000)
    assert few.n_documents < 200
    assert few.train.size >= 1900


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "0 documents"), ("short.txt", b"Lily", "fewer than one block of 32"),
        ("bytes.txt", b"\xff\xfe\x00", "not UTF-8"), ("bad.jsonl", b"{", "line 1 is not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"), ("list.jsonl", b"[1]", "no text in column"),
        ("torn.parquet", b"PAR1", "not a readable .parquet"), ("zero.arrow", b"", "not a readable .arrow"),
        ("numbers.jsonl", b'{"text": 3}', "no text in column"), ("what.xyz", b"hello", "no file of a known kind"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_their_name(tokenizer, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as problem:
        load_blocks(str(tmp_path / name), tokenizer, ctx=32)
    assert name in str(problem.value)
    assert "\n" not in str(problem.value)


def test_unknown_datasets_are_refused(tokenizer):
    with pytest.raises(ValueError, match="neither a file, a folder, 'builtin', nor a dataset"):
        load_blocks("nobody/no-such-dataset", tokenizer)


def test_the_standard_library_is_read_without_tests_and_tables():
    documents = dict(stdlib_documents())
    assert "json/decoder.py" in documents
    folders = {folder for path in documents for folder in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "encodings", "site-packages"}
    held_out = [path for path in documents if is_held_out(path)]
    assert 0.04 < len(held_out) / len(documents) < 0.2
