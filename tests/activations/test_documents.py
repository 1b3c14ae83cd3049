"""Rows to documents: masks, padding, labels, and rows without text."""

import copy
import hashlib
import json
import logging
import shutil
import struct

import numpy as np
import pyarrow
import pytest
from datasets import Dataset, Features, IterableDataset, LargeList, Sequence, Value
from pyarrow import parquet
from tokenizers import Tokenizer

from prolu import load_blocks
from prolu.activations import packer
from prolu.activations.documents import Documents, is_held_out
from prolu.activations.text_rows import SplitRows
from support.interruptions import dies_at_disk_operation

CTX = 16


@pytest.fixture
def tokenizer(tiny_lm):
    return tiny_lm.tokenizer


@pytest.fixture
def ids():
    """120 rows of 16 to 48 token ids, none of which is 0 (BOS, EOS and padding) or repeats the one before it."""
    g = np.random.default_rng(0)
    rows = [g.permutation(np.arange(1, 290))[: 16 * g.integers(1, 4)] for _ in range(120)]
    return [row.tolist() for row in rows]


def contents(source, column):
    return [np.asarray(document.content).tolist() for document in Documents(SplitRows(source), column)]


def padded(rows, side="right", pad=0, length=48):
    """The rows filled up to one length, with their masks."""
    filled = []
    masks = []
    for row in rows:
        padding = [pad] * (length - len(row))
        ones = [1] * len(row)
        zeros = [0] * len(padding)
        filled.append(row + padding if side == "right" else padding + row)
        masks.append(ones + zeros if side == "right" else zeros + ones)
    return filled, masks


def as_parquet(folder, columns):
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=50)
    return str(folder / "a.parquet")


def as_json(folder, columns):
    rows = zip(*columns.values(), strict=True)
    (folder / "a.jsonl").write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return str(folder / "a.jsonl")


def as_saved(folder, columns):
    Dataset.from_dict(columns).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def as_dataset(folder, columns):
    return Dataset.from_dict(columns)


def as_stream(folder, columns):
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return IterableDataset.from_generator(lambda: iter(rows))


FORMS = [as_parquet, as_json, as_saved, as_dataset, as_stream]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("form", FORMS)
def test_a_mask_cuts_the_padding_off(tokenizer, ids, tmp_path, form, side):
    filled, masks = padded(ids, side)
    source = form(tmp_path, {"input_ids": filled, "attention_mask": masks})
    assert contents(source, "input_ids") == ids
    plain = load_blocks(Dataset.from_dict({"input_ids": ids}), tokenizer, CTX, text_column="input_ids")
    masked = load_blocks(source, tokenizer, CTX, text_column="input_ids")
    assert masked.digest() == plain.digest()
    assert (masked.train[:, 1:] != 0).all()
    assert (masked.held_out[:, 1:] != 0).all()


@pytest.mark.parametrize("kind", ["bool", "int8", "uint64", "float32"])
def test_a_mask_may_have_any_type(ids, kind):
    filled, masks = padded(ids)
    features = Features({"input_ids": Sequence(Value("int32"), length=48), "attention_mask": Sequence(Value(kind))})
    dataset = Dataset.from_dict({"input_ids": filled, "attention_mask": masks}, features=features)
    assert contents(dataset, "input_ids") == ids


def test_the_mask_of_a_column_has_its_name(ids):
    filled, masks = padded(ids)
    columns = {"chosen_input_ids": filled, "chosen_attention_mask": masks, "attention_mask": [[0] * 48] * len(ids)}
    assert contents(Dataset.from_dict(columns), "chosen_input_ids") == ids
    tokens = {"tokens": filled, "attention_mask": masks, "token_type_ids": [[0] * 48] * len(ids)}
    assert contents(Dataset.from_dict(tokens), "tokens") == ids


def test_a_mask_with_numbers_of_documents_keeps_all_of_them():
    columns = {"input_ids": [[5, 6, 7, 8, 9, 0]], "attention_mask": [[1, 1, 2, 2, 3, 0]]}
    assert contents(Dataset.from_dict(columns), "input_ids") == [[5, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([0, 0, 0, 0], "attention_mask that is 0 at all of its 4 token ids"),
        ([0.0, 0.0, -1e9, -1e9], "an attention_mask that does not fit"),
        ([0.5, 1.0, 0.0, 0.0], "an attention_mask that does not fit"),
        ([float("nan"), 1.0, 1.0, 1.0], "an attention_mask that does not fit"),
        ([-1, 1, 1, 1], "an attention_mask that does not fit"),
    ],
)
def test_what_is_no_mask_of_padding_leaves_its_row_out(mask, words):
    """A mask that is added to scores of attention says the opposite of one that is multiplied."""
    columns = {"input_ids": [[5, 6, 7, 8]], "attention_mask": [mask]}
    with pytest.raises(ValueError, match=f"no text or token ids in column 'input_ids'; a row has .*{words}"):
        list(Documents(SplitRows(Dataset.from_dict(columns)), "input_ids"))


def test_a_mask_with_holes_leaves_out_what_it_masks():
    columns = {"input_ids": [[5, 6, 7, 8, 9]], "attention_mask": [[1, 0, 1, 0, 1]]}
    (document,) = Documents(SplitRows(Dataset.from_dict(columns)), "input_ids")
    assert document.content.tolist() == [5, 7, 9]


@pytest.mark.parametrize("first", ["texts", "token ids"])
@pytest.mark.parametrize("ending", ["arrow", "parquet", "jsonl"])
def test_texts_and_token_ids_in_one_column_are_refused(tokenizer, tmp_path, first, ending):
    rows = {"texts": [{"text": "One. Two. Three."}] * 5, "token ids": [{"text": [5, 6, 7, 8]}] * 5}
    files = (first, *(rows.keys() - {first}))
    for i, kind in enumerate(files):
        if ending == "jsonl":
            (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
        elif ending == "parquet":
            Dataset.from_list(rows[kind]).to_parquet(tmp_path / f"{i}.parquet")
        else:
            Dataset.from_list(rows[kind]).save_to_disk(tmp_path / "saved")
            next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / f"{i}.arrow")
            shutil.rmtree(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"column 'text' holds {first} in some rows and {files[1]} in others"):
        load_blocks(tmp_path, tokenizer, 4, folder=tmp_path / "blocks")
    assert not (tmp_path / "blocks").exists()


def test_a_mask_of_another_length_leaves_its_row_out(ids):
    filled, masks = padded(ids)
    masks[3] = masks[3][:-1]
    filled[7] = ids[7]
    masks[7] = None
    documents = Documents(SplitRows(Dataset.from_dict({"input_ids": filled, "attention_mask": masks})), "input_ids")
    assert [d.content.tolist() for d in documents] == ids[:3] + ids[4:]
    assert documents.n_left_out == 1
    assert "48 token ids, and an attention_mask that does not fit" in documents.first_reason


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("side", "pad", "words"), [("right", 0, "end with token id 0"), ("left", 299, "begin with token id 299")]
)
def test_padding_without_a_mask_is_refused(tokenizer, ids, tmp_path, form, side, pad, words):
    source = form(tmp_path, {"input_ids": padded(ids, side, pad)[0]})
    with pytest.raises(ValueError, match=f"rows {words} several times, which looks like padding.*attention_mask"):
        load_blocks(source, tokenizer, CTX, text_column="input_ids", folder=tmp_path / "blocks")
    assert not (tmp_path / "blocks").exists()


def test_padding_that_begins_late_is_refused_too(tokenizer, ids):
    rows = ids[:60] + padded(ids * 2)[0]
    with pytest.raises(ValueError, match="looks like padding"):
        load_blocks(Dataset.from_dict({"input_ids": rows}), tokenizer, CTX, text_column="input_ids")


def test_rows_that_end_with_one_eos_or_with_different_runs_are_not_padded(tokenizer, ids):
    rows = [[*row[:-1], 0] for row in ids]
    assert len(contents(Dataset.from_dict({"input_ids": rows}), "input_ids")) == len(ids)
    runs = [[*row[:-2], 1 + i % 9, 1 + i % 9] for i, row in enumerate(ids)]
    assert len(contents(Dataset.from_dict({"input_ids": runs}), "input_ids")) == len(ids)


def test_a_mask_of_ones_says_that_repeated_ids_are_text(ids):
    filled, _ = padded(ids)
    ones = [[1] * 48] * len(ids)
    assert contents(Dataset.from_dict({"input_ids": filled, "attention_mask": ones}), "input_ids") == filled


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_named(tokenizer, ids, tmp_path, form):
    labels = [[-100] * 5 + row[5:] for row in ids]
    source = form(tmp_path, {"labels": labels, "input_ids": ids})
    with pytest.raises(ValueError, match=r"column 'labels' holds -100, so it holds labels.*input_ids"):
        load_blocks(source, tokenizer, CTX, text_column="labels")


def test_the_side_of_a_row_does_not_depend_on_the_integer_type(tokenizer, ids, tmp_path):
    """By hand: SHA-256 of the ids as 8-byte integers, whose first 8 bytes are a number below a tenth of 2^64."""
    rule = [int(hashlib.sha256(struct.pack(f"<{len(row)}q", *row)).hexdigest()[:16], 16) < 2**64 / 10 for row in ids]
    assert 3 < sum(rule) < 40
    digests = set()
    for kind in ("int16", "uint16", "int32", "uint32", "int64", "uint64"):
        for form in (Sequence(Value(kind)), LargeList(Value(kind))):
            dataset = Dataset.from_dict({"input_ids": ids}, features=Features({"input_ids": form}))
            sides = [is_held_out(document.key) for document in Documents(SplitRows(dataset), "input_ids")]
            assert sides == rule
            digests.add(load_blocks(dataset, tokenizer, CTX, text_column="input_ids").digest())
    source = as_json(tmp_path, {"input_ids": ids})
    digests.add(load_blocks(source, tokenizer, CTX, text_column="input_ids").digest())
    filled, masks = padded(ids)
    masked = Dataset.from_dict({"input_ids": filled, "attention_mask": masks})
    digests.add(load_blocks(masked, tokenizer, CTX, text_column="input_ids").digest())
    assert len(digests) == 1


TEXTS = [f"{i} a ball went up the tree " * 9 for i in range(300)]
BAD_ROWS = {
    "null": b'{"text": null}',
    "missing": b'{"id": 7}',
    "surrogate": b'{"text": "half an emoji \\ud83d here"}',
    "cut": b'{"text": "torn',
    "bytes": b'{"text": "\xff"}',
    "number": b'{"text": 3}',
    "object": b'{"text": {"a": 1}}',
    "fractions": b'{"text": [1.5, 2]}',
    "null among ids": b'{"text": [1, null]}',
    "array": b"[1, 2]",
    "empty": b'{"text": ""}',
    "blank": b'{"text": " \\n"}',
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("at", [0, 150, 300])
def test_a_row_without_text_is_left_out_and_counted(tokenizer, tmp_path, caplog, bad, at):
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    lines = [*good[:at], BAD_ROWS[bad], *good[at:]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    expected = load_blocks(Dataset.from_dict({"text": TEXTS}), tokenizer, CTX)
    caplog.set_level(logging.WARNING)
    for folder in (None, tmp_path / "blocks"):
        blocks = load_blocks(str(tmp_path / "a.jsonl"), tokenizer, CTX, folder=folder)
        assert blocks.digest() == expected.digest()
        assert (blocks.n_documents, blocks.n_rows_left_out) == (300, 1)
    assert "1 of the 301 rows read have no text and are left out" in caplog.text


def test_nulls_and_missing_columns_of_parquet_are_left_out(tokenizer, tmp_path):
    (tmp_path / "data").mkdir()
    texts = [None if i % 50 == 0 else text for i, text in enumerate(TEXTS)]
    parquet.write_table(pyarrow.table({"text": texts, "id": range(300)}), tmp_path / "data/a.parquet")
    parquet.write_table(pyarrow.table({"rows": [300, 6]}), tmp_path / "data/b.parquet")
    blocks = load_blocks(str(tmp_path), tokenizer, CTX)
    assert (blocks.n_documents, blocks.n_rows_left_out) == (294, 8)


def test_a_text_file_with_a_bad_byte_loses_its_document_only(tokenizer, tmp_path):
    documents = [text.encode() for text in TEXTS]
    documents[9] += b" caf\xe9"
    (tmp_path / "a.txt").write_bytes(b"\n<|endoftext|>\n".join(documents))
    blocks = load_blocks(str(tmp_path / "a.txt"), tokenizer, CTX)
    assert (blocks.n_documents, blocks.n_rows_left_out) == (299, 1)


def test_without_any_text_the_reason_is_named_early(tokenizer, tmp_path, monkeypatch):
    read = []

    def rows():
        for i in range(100_000):
            read.append(i)
            yield {"text": None}

    with pytest.raises(ValueError, match="no text or token ids in column 'text'; a row holds nothing there"):
        load_blocks(IterableDataset.from_generator(rows), tokenizer, CTX)
    assert len(read) < 20_000


@pytest.mark.parametrize("other", ["changes", "missing", "null at first"])
def test_a_column_that_nobody_asked_for_does_not_matter(tokenizer, other):
    def rows():
        for i, text in enumerate(TEXTS * 5):
            row = {"text": text, "meta": i if i < 1200 else f"id-{i}"}
            if other == "missing" and i % 2:
                del row["meta"]
            if other == "null at first":
                row["meta"] = None if i < 1200 else 0.5
            yield row

    blocks = load_blocks(IterableDataset.from_generator(rows), tokenizer, CTX)
    assert blocks.n_documents == 1500
    assert blocks.digest() == load_blocks(Dataset.from_dict({"text": TEXTS * 5}), tokenizer, CTX).digest()


def test_only_columns_asked_for_are_read(tokenizer, tmp_path, monkeypatch):
    from pyarrow.parquet import ParquetFile

    wide = {"text": TEXTS} | {f"c{i}": [[0.5] * 8] * 300 for i in range(20)}
    source = as_parquet(tmp_path, wide)
    read = []
    plain = ParquetFile.iter_batches
    monkeypatch.setattr(ParquetFile, "iter_batches", lambda f, **k: read.append(k["columns"]) or plain(f, **k))
    load_blocks(source, tokenizer, CTX)
    assert set(map(tuple, read)) == {("text",)}
    for form in (as_saved, as_dataset):
        rows = list(SplitRows(form(tmp_path, wide)).read(["text", "attention_mask"]))
        assert all(row.keys() == {"text"} for row in rows)


MENTIONS = [f"{i} the token <|endoftext|> ends a text, <|pad|> fills it up. " * 5 for i in range(60)]


@pytest.fixture
def chatty(tokenizer):
    """A tokenizer with special tokens, one of them added, and with an added token that is not special."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["the token"])
    own.add_special_tokens({"pad_token": "<|pad|>"})
    return own


def test_names_of_special_tokens_are_text_unless_they_are_to_be_parsed(chatty):
    dataset = Dataset.from_dict({"text": MENTIONS})
    as_text = load_blocks(dataset, chatty, CTX)
    joined = [i for text in MENTIONS if not is_held_out(text) for i in [0, *_plain_ids(chatty, text)]]
    expected = np.array(joined[: len(joined) // CTX * CTX]).reshape(-1, CTX)
    expected[:, 0] = 0
    assert np.array_equal(as_text.train, expected)
    assert chatty.convert_tokens_to_ids("the token") in expected
    assert not (expected == chatty.pad_token_id).any()

    parsed = load_blocks(dataset, chatty, CTX, special_tokens="parsed")
    joined = [i for t in MENTIONS if not is_held_out(t) for i in [0, *chatty(t, add_special_tokens=False)["input_ids"]]]
    expected = np.array(joined[: len(joined) // CTX * CTX]).reshape(-1, CTX)
    expected[:, 0] = 0
    assert np.array_equal(parsed.train, expected)
    assert (expected == chatty.pad_token_id).any()
    assert (as_text.special_tokens, parsed.special_tokens) == ("text", "parsed")


def _plain_ids(tokenizer, text):
    """The ids of a text by the backend alone, from which special tokens were taken away."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
    return Tokenizer.from_str(json.dumps(state)).encode(text, add_special_tokens=False).ids


def test_text_without_special_names_is_the_same_either_way(tokenizer):
    dataset = Dataset.from_dict({"text": TEXTS})
    digests = {load_blocks(dataset, tokenizer, CTX, special_tokens=how).digest() for how in ("text", "parsed")}
    assert len(digests) == 1
    with pytest.raises(ValueError, match="special_tokens 'bos': choose one of text, parsed"):
        load_blocks(dataset, tokenizer, CTX, special_tokens="bos")


def test_a_folder_of_an_earlier_version_is_finished_as_it_was_begun(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packer, "TOKENS_BETWEEN_SAVES", 500)
    monkeypatch.setattr(packer, "DOCUMENTS_PER_CALL", 8)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in MENTIONS))
    source = str(tmp_path / "a.jsonl")
    parsed = load_blocks(source, tokenizer, CTX, special_tokens="parsed")
    dies_at_disk_operation(
        12, lambda: load_blocks(source, tokenizer, CTX, special_tokens="parsed", folder=tmp_path / "b")
    )
    index = json.loads((tmp_path / "b/blocks.json").read_text())
    assert index["sha256"] is None
    assert 0 < index["progress"]["n_documents"] < 60
    del index["made"]["special_tokens"], index["progress"]["n_rows_left_out"]
    (tmp_path / "b/blocks.json").write_text(json.dumps(index))
    for _ in range(2):  # first it is finished, then read
        blocks = load_blocks(source, tokenizer, CTX, folder=tmp_path / "b")
        assert blocks.digest() == parsed.digest()
        assert blocks.special_tokens == "parsed"
    load_blocks(source, tokenizer, CTX, special_tokens="parsed", folder=tmp_path / "c")
    with pytest.raises(ValueError, match="special_tokens is 'parsed' there, 'text' here"):
        load_blocks(source, tokenizer, CTX, folder=tmp_path / "c")
