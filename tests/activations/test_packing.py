"""Text to blocks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk

from prolu import load_blocks
from prolu.activations import packer
from prolu.activations.blocks_folder import copy_blocks
from prolu.activations.builtin import stdlib_documents
from prolu.activations.documents import Documents, is_held_out
from prolu.activations.text_rows import SplitRows
from prolu.activations.token_blocks import read_blocks
from support.interruptions import dies_at_disk_operation, disk_operations


def documents_of(source):
    return list(Documents(SplitRows(str(source)), "text"))


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
    documents = [d for d in documents_of(stories_file) if not is_held_out(d.key)]
    assert documents[0].content.startswith(text)


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
    texts = [d.content for d in documents_of(stories_file)]
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
    with pytest.raises(ValueError, match="no text or token ids in column 'text'; columns: body"):
        load_blocks(str(tmp_path / "b.parquet"), tokenizer, ctx=16)


def test_a_plain_book_is_split_by_passages(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"Line {i} of the book.\n" for i in range(20_000)))
    blocks = load_blocks(str(tmp_path / "book.txt"), tokenizer, ctx=64)
    assert blocks.n_documents > 50
    assert 0.02 < len(blocks.held_out) / len(blocks.train) < 0.4
    text = "".join(d.content for d in documents_of(tmp_path / "book.txt"))
    assert text == (tmp_path / "book.txt").read_text()


def test_reading_stops_when_there_is_enough(tokenizer, stories_file):
    few = load_blocks(str(stories_file), tokenizer, ctx=32, max_train_tokens=2000, held_out_pool=320)
    assert few.n_documents < 200
    assert few.train.size >= 1900


def test_reading_goes_on_until_there_is_a_block_to_evaluate_on(tokenizer):
    texts = [f"{i} a ball went up the tree " * 9 for i in range(2000)]
    train, held_out = ([text for text in texts if is_held_out(text) is side] for side in (False, True))
    rows = Dataset.from_dict({"text": [*train[:500], held_out[0], *train[500:]]})
    for pool in (0, 1):
        blocks = load_blocks(rows, tokenizer, ctx=16, max_train_tokens=2000, held_out_pool=pool)
        assert 500 < blocks.n_documents < 600
        assert 0 < blocks.held_out.size < 200
        # Without a pool, as in earlier versions, all that is read on the way is trained on.
        assert (blocks.train.size > 10_000) is (pool == 0)
    only_train = Dataset.from_dict({"text": train})
    with pytest.raises(ValueError, match="0 held-out tokens"):
        load_blocks(only_train, tokenizer, ctx=16, max_train_tokens=2000)
    with pytest.raises(ValueError, match="documents give 0 held-out tokens"):
        load_blocks(rows, tokenizer, ctx=16, max_train_tokens=2000, held_out_fraction=0.0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "0 documents"), ("short.txt", b"Lily", "fewer than one block of 32"),
        ("bytes.txt", b"\xff\xfe\x00", "not UTF-8"), ("bad.jsonl", b"{", "line 1 is not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"), ("list.jsonl", b"[1]", "no text or token ids in column"),
        ("torn.parquet", b"PAR1", "not a readable .parquet"), ("zero.arrow", b"", "not a readable .arrow"),
        ("numbers.jsonl", b'{"text": 3}', "no text or token ids in column"),
        ("what.xyz", b"hello", "no file of a known kind"),
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
    with pytest.raises(ValueError, match=r"^data '': must be a file"):  # not the working directory
        load_blocks("", tokenizer)


def test_the_standard_library_is_read_without_tests_and_tables():
    documents = dict(stdlib_documents())
    assert "json/decoder.py" in documents
    folders = {folder for path in documents for folder in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "encodings", "site-packages"}
    held_out = [path for path in documents if is_held_out(path)]
    assert 0.04 < len(held_out) / len(documents) < 0.2


@pytest.fixture
def pretokenised(tmp_path):
    """100 rows of 32 token ids and a short one, in two shards, in the hub's layout; a split `test` beside them."""
    folder, g = tmp_path / "pile", np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    rows = [g.integers(1, 300, 32).tolist() for _ in range(100)] + [[5] * 20]
    for i, part in enumerate((rows[:60], rows[60:])):
        Dataset.from_dict({"input_ids": part}).to_parquet(folder / f"data/train-0000{i}-of-00002.parquet", batch_size=7)
    Dataset.from_dict({"input_ids": rows[:3]}).to_parquet(folder / "data/test-00000-of-00001.parquet")
    (folder / "README.md").write_text("a card\n")
    return folder, np.array(rows[:100])


def test_rows_of_token_ids_are_cut_each_by_itself(tokenizer, pretokenised):
    folder, rows = pretokenised
    blocks = load_blocks(
        str(folder), tokenizer, ctx=16, text_column="input_ids", split="train[0:40%]", eval_split="train[90:95%]"
    )
    expected = rows.reshape(-1, 16)
    expected[:, 0] = 0
    assert np.array_equal(blocks.train, expected[:80])
    assert np.array_equal(blocks.held_out, expected[182:192])  # of 101 rows, rounded: 91 to 96
    assert blocks.train.dtype == np.uint16


def test_a_slice_is_the_same_rows_whatever_the_files(tokenizer, pretokenised, tmp_path):
    folder, rows = pretokenised
    data = Dataset.from_dict({"input_ids": [*rows.tolist(), [5] * 20]})
    data.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    data.to_json(tmp_path / "rows.jsonl.gz", compression="gzip")
    data.to_parquet(tmp_path / "rows.parquet", batch_size=9)
    for source in (folder, tmp_path / "saved", tmp_path / "rows.jsonl.gz", tmp_path / "rows.parquet"):
        for split, expected in (
            ("train[0:40%]", rows[:40]),
            ("train[55:65]", rows[55:65]),
            ("train[:-41]", rows[:60]),
            ("train[98:99%]", rows[99:100]),
        ):
            found = [np.asarray(row["input_ids"]) for row in SplitRows(str(source), split).read(["input_ids"])]
            assert np.array_equal(found, expected), (source, split)


def test_slices_of_text_too(tokenizer, stories_file):
    everything = [d.content for d in documents_of(stories_file)]
    rows = SplitRows(str(stories_file), "train[25:75%]")
    assert [d.content for d in Documents(rows, "text")] == everything[50:150]
    blocks = load_blocks(str(stories_file), tokenizer, ctx=32, split="train[:50%]", eval_split="train[90%:]")
    assert tokenizer.decode(blocks.held_out[0, 1:]) in everything[180]


def test_only_row_groups_asked_for_are_read(pretokenised, monkeypatch):
    from pyarrow.parquet import ParquetFile

    read = []
    plain = ParquetFile.iter_batches
    monkeypatch.setattr(ParquetFile, "iter_batches", lambda f, **k: read.append(k["row_groups"]) or plain(f, **k))
    folder, _ = pretokenised
    assert len(list(SplitRows(str(folder), "train[58:70]").read(["input_ids"]))) == 12
    assert read == [[8], [0], [1]]


def test_other_splits_are_named_and_read(tokenizer, pretokenised):
    folder, _ = pretokenised
    blocks = load_blocks(str(folder), tokenizer, ctx=16, text_column="input_ids", eval_split="test")
    assert len(blocks.held_out) == 6
    assert len(blocks.train) == 201


@pytest.mark.parametrize(
    ("split", "eval_split", "words"),
    [
        ("validation", "", "split 'validation': .* has train, test"), ("train[0:40", "", "write a name, or a slice"),
        ("train[0:400%]", "", r"split 'train\[0:400%\]'"), ("train[5:5]", "", "contains none of the 101 rows"),
        ("train[0:40%]", "train[39:60%]", "overlaps"), ("train", "train", "overlaps"),
        ("train[0:40%]", "train", "overlaps"), ("test", "train[0:1%]", None),
    ],
)  # fmt: skip
def test_wrong_splits_are_refused(tokenizer, pretokenised, split, eval_split, words):
    request = {"ctx": 16, "text_column": "input_ids", "split": split, "eval_split": eval_split}
    if words is None:
        assert len(load_blocks(str(pretokenised[0]), tokenizer, **request).train)
        return
    with pytest.raises(ValueError, match=words):
        load_blocks(str(pretokenised[0]), tokenizer, **request)


def test_another_tokenizers_ids_are_refused(tokenizer, tmp_path):
    Dataset.from_dict({"input_ids": [[1, 300, 2, 3]]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="token ids from 1 to 300: the tokenizer has the ids 0-299"):
        load_blocks(str(tmp_path / "a.parquet"), tokenizer, ctx=2, text_column="input_ids")


def test_datasets_at_hand_give_the_blocks_of_their_files(tokenizer, stories_file, pretokenised, tmp_path):
    texts = Dataset.from_dict({"text": [d.content for d in documents_of(stories_file)]})
    texts.save_to_disk(str(tmp_path / "saved"))
    mapped = load_from_disk(str(tmp_path / "saved"))
    expected = load_blocks(str(stories_file), tokenizer, ctx=32)
    for dataset in (texts, mapped, texts.to_iterable_dataset(), mapped.to_iterable_dataset(num_shards=3)):
        blocks = load_blocks(dataset, tokenizer, ctx=32)
        assert blocks.digest() == expected.digest()
        assert blocks.source.startswith(f"datasets.{type(dataset).__name__}")
    assert texts._fingerprint in load_blocks(texts, tokenizer, ctx=32).source

    folder, _ = pretokenised
    request_ = {"ctx": 16, "text_column": "input_ids", "split": "train[0:40%]", "eval_split": "train[90:95%]"}
    expected = load_blocks(str(folder), tokenizer, **request_)
    for streaming in (False, True):
        splits = load_dataset(str(folder), streaming=streaming, cache_dir=tmp_path / "cache")
        for dataset in (splits, splits["train"]):
            assert load_blocks(dataset, tokenizer, **request_).digest() == expected.digest()
        kept = load_blocks(splits, tokenizer, folder=tmp_path / f"blocks-{streaming}", **request_)
        assert kept.digest() == expected.digest()
        shuffled = splits["train"].shuffle(seed=0)
        assert load_blocks(shuffled, tokenizer, **request_).digest() != expected.digest()
        other = {**request_, "split": "train", "eval_split": "test"}
        blocks = load_blocks(splits, tokenizer, **other)
        assert (len(blocks.train), len(blocks.held_out)) == (201, 6)


def test_a_stream_is_read_only_as_far_as_it_is_needed(tokenizer):
    read = []

    def rows():
        for i in range(100_000):
            read.append(i)
            yield {"text": f"{i} a ball went up the tree " * 9}

    stream = IterableDataset.from_generator(rows)
    assert load_blocks(stream, tokenizer, ctx=16, max_train_tokens=5000, held_out_pool=500).train.size >= 4900
    assert len(read) < 3000


@pytest.mark.parametrize("source", [3, None, {}, {"train": [1]}, Dataset])
def test_what_is_no_dataset_is_refused(tokenizer, source):
    with pytest.raises(ValueError, match=r"data: a .*; pass a name, a path, a list of files or texts, or a dataset"):
        load_blocks(source, tokenizer)


def test_datasets_at_hand_name_what_they_lack(tokenizer):
    texts = Dataset.from_dict({"body": ["a"] * 10})
    with pytest.raises(ValueError, match=f"data 'datasets.Dataset {texts._fingerprint}': no text .* columns: body"):
        load_blocks(texts, tokenizer)
    with pytest.raises(ValueError, match=r"split 'test': datasets.Dataset .* has train"):
        load_blocks(texts, tokenizer, split="test")


def test_the_hubs_answer_is_read_as_a_folder_in_its_layout(pretokenised, monkeypatch):
    """The hub cannot be reached here; `datasets` resolves a folder as it does a name, and fsspec opens either."""
    folder, rows = pretokenised
    plain = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: path != folder and plain(path))
    found = [np.asarray(row["input_ids"]) for row in SplitRows(str(folder), "train[55:65]").read(["input_ids"])]
    assert np.array_equal(found, rows[55:65])


def on_disk(source, tokenizer, folder, **request):
    return load_blocks(str(source), tokenizer, ctx=16, folder=folder, **request)


@pytest.mark.parametrize("request_", [{}, {"split": "train[:50%]", "eval_split": "train[90%:]"}])
def test_blocks_in_a_folder_are_those_in_memory(tokenizer, stories_file, tmp_path, request_):
    kept = on_disk(stories_file, tokenizer, tmp_path / "blocks", **request_)
    held = load_blocks(str(stories_file), tokenizer, ctx=16, **request_)
    assert isinstance(kept.train, np.memmap)
    assert kept.digest() == held.digest()
    assert kept.n_documents == held.n_documents
    assert (kept.source, kept.split, kept.eval_split) == (held.source, held.split, held.eval_split)
    again = load_blocks(str(tmp_path / "blocks"), tokenizer, ctx=16)
    assert again.digest() == held.digest()
    raw = np.fromfile(tmp_path / "blocks/train.bin", "<u2").reshape(-1, 16)
    assert np.array_equal(raw, held.train)


@pytest.mark.parametrize("column", ["text", "input_ids"])
def test_reading_that_dies_anywhere_goes_on_to_the_same_bytes(
    tokenizer, stories_file, pretokenised, tmp_path, monkeypatch, column
):
    monkeypatch.setattr(packer, "TOKENS_BETWEEN_SAVES", 2000)
    monkeypatch.setattr(packer, "DOCUMENTS_PER_CALL", 16)
    source = stories_file if column == "text" else pretokenised[0]
    request_ = {"text_column": column, "split": "train[:50%]", "eval_split": "train[70%:]"}
    whole = on_disk(source, tokenizer, tmp_path / "whole", **request_)
    n_operations = len(disk_operations(lambda: on_disk(source, tokenizer, tmp_path / "counted", **request_)))
    assert n_operations > 15
    for at in range(n_operations):
        dies_at_disk_operation(at, lambda: on_disk(source, tokenizer, tmp_path / "killed", **request_))
        assert on_disk(source, tokenizer, tmp_path / "killed", **request_).digest() == whole.digest()
        for name in ("blocks.json", "train.bin", "held_out.bin", "documents.bin"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (at, name)
        shutil.rmtree(tmp_path / "killed")


def test_other_blocks_and_changed_text_are_refused(tokenizer, stories_file, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text(stories_file.read_text())
    folder = tmp_path / "blocks"
    on_disk(text, tokenizer, folder)
    with pytest.raises(ValueError, match="holds other blocks: max_train_tokens is 100000000 there, 2000 here"):
        on_disk(text, tokenizer, folder, max_train_tokens=2000)
    with pytest.raises(ValueError, match=r"ctx 32: the blocks in .* have 16 tokens"):
        load_blocks(str(folder), tokenizer, ctx=32)
    text.write_text(stories_file.read_text() + " more")
    with pytest.raises(ValueError, match="holds other blocks: files"):
        on_disk(text, tokenizer, folder)
    with pytest.raises(ValueError, match="not empty, and no token blocks"):
        on_disk(stories_file, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="fewer than one block"):
        load_blocks(str(stories_file), tokenizer, ctx=10**6, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_damaged_blocks_are_refused(tokenizer, stories_file, tmp_path):
    folder = tmp_path / "blocks"
    on_disk(stories_file, tokenizer, folder)
    whole, index = (folder / "train.bin").read_bytes(), (folder / "blocks.json").read_text()
    for damaged, words in (
        (whole[:-2] + b"\1\2", "not what was written"), (whole[:-2], "not the .* blocks of 16 tokens"),
        (b"", "not the .* blocks"),
    ):  # fmt: skip
        (folder / "train.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            load_blocks(str(folder), tokenizer, ctx=16)
    (folder / "train.bin").write_bytes(whole)
    for broken, words in (
        ("{", "not JSON"), ("{}", "not an index"), ("[]", "not a JSON object"),
        (index.replace('"uint16"', '"object"'), "not the"), (index.replace('"uint16"', '"nonsense"'), "not an index"),
        (index.replace("0,", "-1,"), "not"),
    ):  # fmt: skip
        if broken == index:
            continue
        (folder / "blocks.json").write_text(broken)
        with pytest.raises(ValueError, match=words):
            load_blocks(str(folder), tokenizer, ctx=16)
    unfinished = json.loads(index) | {"sha256": None}
    (folder / "blocks.json").write_text(json.dumps(unfinished))
    with pytest.raises(ValueError, match="interrupted; run the command that began it again"):
        load_blocks(str(folder), tokenizer, ctx=16)


def test_every_token_held_out_knows_its_document(tokenizer, stories_file, tmp_path):
    blocks = load_blocks(str(stories_file), tokenizer, ctx=32)
    texts = [d.content for d in documents_of(stories_file)]
    assert blocks.held_out_documents.shape == blocks.held_out.shape
    tokens, numbers = blocks.held_out.ravel(), blocks.held_out_documents.ravel()
    inside = np.arange(len(tokens)) % 32 > 0  # but for what BOS was written over
    for number in np.unique(numbers)[:-1]:
        ids = np.array([tokenizer.bos_token_id, *tokenizer(texts[number])["input_ids"]])
        own = numbers == number
        assert own.sum() == len(ids)
        assert (tokens[own & inside] == ids[inside[own]]).all()
        assert is_held_out(texts[number])


def test_documents_are_kept_in_a_folder(tokenizer, stories_file, tmp_path):
    plain = load_blocks(str(stories_file), tokenizer, ctx=32)
    kept = load_blocks(str(stories_file), tokenizer, ctx=32, folder=tmp_path / "a")
    assert np.array_equal(kept.held_out_documents, plain.held_out_documents)
    assert kept.digest() == plain.digest()
    copy_blocks(kept, tmp_path / "b")
    assert np.array_equal(read_blocks(tmp_path / "b").held_out_documents, plain.held_out_documents)
    file = tmp_path / "a" / "documents.bin"
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"documents.bin: not what was written"):
        read_blocks(tmp_path / "a")


def test_a_folder_from_before_documents_were_kept_is_read(tokenizer, stories_file, tmp_path):
    load_blocks(str(stories_file), tokenizer, ctx=32, folder=tmp_path / "a")
    (tmp_path / "a" / "documents.bin").unlink()
    index = json.loads((tmp_path / "a" / "blocks.json").read_text())
    del index["documents"]
    (tmp_path / "a" / "blocks.json").write_text(json.dumps(index))
    assert read_blocks(tmp_path / "a").held_out_documents is None


def packed_by_hand(rows, ctx, bos):
    """Blocks of rows of ids: rows that fill blocks by themselves, all others joined with a BOS before them."""
    blocks = []
    tail = []
    for row in rows:
        if len(row) % ctx == 0:
            blocks += [row[i : i + ctx] for i in range(0, len(row), ctx)]
            continue
        tail += row if row[0] == bos else [bos, *row]
        while len(tail) >= ctx:
            blocks.append(tail[:ctx])
            tail = tail[ctx:]
    return [[bos, *block[1:]] for block in blocks], tail


@pytest.mark.parametrize("lengths", ["short", "ragged", "one over", "with BOS", "some whole"])
@pytest.mark.parametrize("saves", [2**20, 100])
def test_rows_that_do_not_fill_blocks_are_joined_as_documents_are(tokenizer, tmp_path, monkeypatch, lengths, saves):
    monkeypatch.setattr(packer, "TOKENS_BETWEEN_SAVES", saves)
    g = np.random.default_rng(1)
    sizes = {
        "short": 1 + np.arange(300) % 15, "ragged": g.integers(1, 100, 300), "one over": np.full(300, 17),
        "with BOS": g.integers(1, 100, 300), "some whole": np.where(np.arange(300) % 3, 40, 32),
    }[lengths]  # fmt: skip
    rows = [g.permutation(np.arange(1, 290))[:n].tolist() for n in sizes]
    if lengths == "with BOS":
        rows = [[0, *row[1:]] for row in rows]
    data = Dataset.from_dict({"ids": rows})
    request = {"ctx": 16, "text_column": "ids", "split": "train[:250]", "eval_split": "train[250:]"}
    held_out, rest = packed_by_hand(rows[250:], 16, 0)
    train, rest_of_train = packed_by_hand(rows[:250], 16, 0)
    for folder in (None, tmp_path / "blocks"):
        blocks = load_blocks(data, tokenizer, folder=folder, **request)
        assert blocks.train.tolist() == train
        assert blocks.held_out.tolist() == held_out
        assert blocks.n_tokens_dropped == len(rest) + len(rest_of_train) < 32
    copy_blocks(blocks, tmp_path / "copy")
    assert read_blocks(tmp_path / "copy").n_tokens_dropped == blocks.n_tokens_dropped
    # The document of every held-out token: that of a BOS is the one before which it was put.
    for block, documents in zip(blocks.held_out[:, 1:], blocks.held_out_documents[:, 1:], strict=True):
        assert all(id == 0 or id in rows[document] for id, document in zip(block, documents, strict=True))
    # The rule of earlier versions drops what does not fill a block.
    before = load_blocks(data, tokenizer, held_out_pool=0, **request | {"ctx": 8})
    assert before.train.size == sum(len(row) // 8 * 8 for row in rows[:250])


def test_a_killed_packing_of_ragged_rows_ends_with_the_same_blocks(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packer, "TOKENS_BETWEEN_SAVES", 300)
    g = np.random.default_rng(2)
    rows = [g.permutation(np.arange(1, 290))[:n].tolist() for n in np.where(np.arange(600) % 4, 23, 32)]
    data = Dataset.from_dict({"ids": rows})
    request = {"ctx": 16, "text_column": "ids", "max_train_tokens": 4000, "held_out_pool": 600}
    wanted = load_blocks(data, tokenizer, **request)
    n = len(disk_operations(lambda: load_blocks(data, tokenizer, folder=tmp_path / "whole", **request)))
    assert n > 6
    for at in range(1, n, 3):
        folder = tmp_path / str(at)
        dies_at_disk_operation(at, lambda folder=folder: load_blocks(data, tokenizer, folder=folder, **request))
        # Another pool than the one that it was begun with does not matter.
        pool = 9000 if (folder / "blocks.json").exists() else 600
        blocks = load_blocks(data, tokenizer, folder=folder, **request | {"held_out_pool": pool})
        assert blocks.digest() == wanted.digest()
        assert np.array_equal(blocks.held_out_documents, wanted.held_out_documents)
