"""Splits and configurations of folders, which are those that the datasets library finds."""

import json
import logging
import os
import socket
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset, load_from_disk

from prolu import LanguageModel, load_blocks
from prolu.activations.text_rows import SplitRows
from prolu.cli.entry_point import main
from prolu.studies.results import Results

TEXTS = {
    name: [f"{name} {i} a ball went up the tree " * 4 for i in range(40 + 10 * k)] for k, name in enumerate("abcd")
}


@pytest.fixture
def tokenizer(tiny_lm):
    return tiny_lm.tokenizer


@pytest.fixture(autouse=True)
def _nothing_is_fetched(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection is made")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write(folder, files, card=None):
    """Files with the texts of TEXTS, by name; those that are no table hold the text that is given."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix not in (".parquet", ".jsonl") or content not in TEXTS:
            file.write_text(content)
        elif file.suffix == ".parquet":
            Dataset.from_dict({"text": TEXTS[content]}).to_parquet(file)
        else:
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[content]))
    if card is not None:
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# A card\n")
    return str(folder)


def texts_of(source, split="train", config=""):
    return [row["text"] for row in SplitRows(source, split, config).read(["text"])]


def config(name, **rest):
    return {"config_name": name} | rest


REPOSITORIES = {
    "names tell the splits": ({"train.jsonl": "a", "test.jsonl": "b", "dev.jsonl": "c"}, None),
    "folders tell the splits": ({"train/x.jsonl": "a", "train/y.jsonl": "c", "validation/x.jsonl": "b"}, None),
    "names of the hub": ({f"data/{s}-00000-of-00001.parquet": s for s in "abcd"}, None),
    "no splits": ({"one.jsonl": "a", "two.jsonl": "b"}, None),
    "card without configurations": ({"train.jsonl": "a", "test.jsonl": "b"}, {"license": "mit"}),
    "splits of a card": (
        {"x/1.parquet": "a", "x/2.parquet": "b", "train.parquet": "c"},
        {"configs": [
            config("default", data_files=[{"split": "sft", "path": "x/1.parquet"}, {"split": "gen", "path": "x/2*"}]),
        ]},
    ),
    "two configurations": (
        {"en/train-0.parquet": "a", "en/test-0.parquet": "b", "fr/train-0.parquet": "c"},
        {"configs": [
            config("en", data_files=[{"split": "train", "path": "en/train-*"}, {"split": "test", "path": "en/test-*"}]),
            config("fr", data_files="fr/*"),
        ]},
    ),
    "folders of configurations": (
        {"en/train.jsonl": "a", "en/test.jsonl": "b", "de/train.jsonl": "c"},
        {"configs": [config("en", data_dir="en"), config("de", data_dir="de", default=True)]},
    ),
    "lists of files": (
        {"1.jsonl": "a", "2.jsonl": "b", "3.jsonl": "c"},
        {"configs": [
            config("all", data_files=[{"split": "train", "path": ["1.jsonl", "3.jsonl"]}]),
            config("second", data_files="2.jsonl"),
        ]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_repository_is_resolved_as_datasets_resolves_it(tmp_path, name):
    source = write(tmp_path / "repository", *REPOSITORIES[name])
    n_found = 0
    for one in get_dataset_config_names(source):
        splits = load_dataset(source, one, cache_dir=tmp_path / "cache")
        for split, dataset in splits.items():
            assert texts_of(source, split, one) == list(dataset["text"])
            assert texts_of(source, f"{split}[10:20]", one) == list(dataset["text"])[10:20]
            n_found += 1
        with pytest.raises(ValueError, match=f"split 'nope': .* has {', '.join(splits)}$"):
            SplitRows(source, "nope", one)
    assert n_found > 0


def test_a_configuration_must_be_named_where_there_is_no_default(tokenizer, tmp_path):
    two = write(tmp_path / "two", *REPOSITORIES["two configurations"])
    with pytest.raises(ValueError, match=r"data_config: .* has several configurations; name one of en, fr$"):
        load_blocks(two, tokenizer, 16)
    with pytest.raises(ValueError, match=r"data_config 'de': .* has en, fr$"):
        load_blocks(two, tokenizer, 16, data_config="de")
    blocks = load_blocks(two, tokenizer, 16, data_config="en", eval_split="test", folder=tmp_path / "blocks")
    assert (blocks.data_config, blocks.n_documents) == ("en", 90)
    assert load_blocks(str(tmp_path / "blocks"), tokenizer, 16).data_config == "en"
    with pytest.raises(ValueError, match="holds other blocks: data_config is 'en' there, 'fr' here"):
        load_blocks(two, tokenizer, 16, data_config="fr", folder=tmp_path / "blocks")
    assert texts_of(write(tmp_path / "default", *REPOSITORIES["folders of configurations"])) == TEXTS["c"]
    for source in (write(tmp_path / "plain", {"train.jsonl": "a"}), "builtin", Dataset.from_dict({"text": TEXTS["a"]})):
        with pytest.raises(ValueError, match=r"data_config 'en': .* has no configurations; leave it out"):
            SplitRows(source, "train", "en")


@pytest.mark.parametrize(
    "splits",
    [
        ("train_sft", "test_sft", "train_gen"), ("train", "test", "unsupervised"), ("en", "fr"), ("validation",),
        ("train.clean.100", "train.other"),
    ],
)  # fmt: skip
def test_saved_datasets_have_the_splits_that_they_were_saved_with(tmp_path, splits):
    saved = DatasetDict({split: Dataset.from_dict({"text": TEXTS["abc"[k]]}) for k, split in enumerate(splits)})
    saved.save_to_disk(tmp_path / "test_saved", num_shards=dict.fromkeys(splits, 2))
    for split, dataset in load_from_disk(tmp_path / "test_saved").items():
        assert texts_of(str(tmp_path / "test_saved"), split) == list(dataset["text"])
        assert texts_of(str(tmp_path / "test_saved"), f"{split}[50%:]") == list(dataset["text"])[len(dataset) // 2 :]
        assert texts_of(saved, split) == list(dataset["text"])
    with pytest.raises(ValueError, match=f"split 'nope': .* has {', '.join(splits)}$"):
        SplitRows(str(tmp_path / "test_saved"), "nope")


@pytest.mark.parametrize("name", ["test_set", "validation", "plain"])
def test_a_dataset_saved_alone_is_train_whatever_its_folder_is_called(tmp_path, name):
    Dataset.from_dict({"text": TEXTS["a"]}).save_to_disk(tmp_path / name, num_shards=3)
    assert texts_of(str(tmp_path / name)) == TEXTS["a"]
    (tmp_path / name / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable folder of a saved dataset"):
        SplitRows(str(tmp_path / name))


def test_splits_over_the_same_file_overlap(tokenizer, tmp_path):
    files = [{"split": "train", "path": "*.jsonl"}, {"split": "test", "path": "b.jsonl"}]
    both = write(
        tmp_path / "both", {"a.jsonl": "a", "b.jsonl": "b"}, {"configs": [config("default", data_files=files)]}
    )
    linked = write(tmp_path / "linked", {"train.jsonl": "a"})
    os.symlink(tmp_path / "linked/train.jsonl", tmp_path / "linked/test.jsonl")
    one = Dataset.from_dict({"text": TEXTS["a"]})
    for source in (both, linked, DatasetDict({"train": one, "test": one})):
        with pytest.raises(ValueError, match="eval_split 'test': overlaps split 'train'"):
            load_blocks(source, tokenizer, 16, eval_split="test")
    streams = {name: Dataset.from_dict({"text": TEXTS[name]}).to_iterable_dataset() for name in "ab"}
    assert load_blocks(streams, tokenizer, 16, split="a", eval_split="b").n_documents == 90


@pytest.mark.parametrize(
    "path", ["https://example.invalid/x.jsonl", "hf://datasets/a/b/x.jsonl", "/etc/hosts", "../outside.jsonl", "zip://a::b.zip"]
)  # fmt: skip
@pytest.mark.parametrize("key", ["data_files", "data_dir"])
def test_a_card_that_names_other_places_is_refused(tmp_path, path, key):
    (tmp_path / "outside.jsonl").write_text('{"text": "a secret"}\n')
    card = {
        "configs": [config("default", **{key: path if key == "data_dir" else [{"split": "train", "path": [path]}]})]
    }
    source = write(tmp_path / "r", {"train.jsonl": "a"}, card)
    with pytest.raises(ValueError, match=r"its card names .* which is not in the folder"):
        SplitRows(source)
    (tmp_path / "r/README.md").unlink()
    (tmp_path / "r/.huggingface.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(ValueError, match=r"its card names .* which is not in the folder"):
        SplitRows(source)


def test_scripts_and_damaged_cards_are_refused(tmp_path):
    card = {"configs": [config("default", data_files="train.jsonl")]}
    source = Path(write(tmp_path / "r", {"train.jsonl": "a"}, card))
    (source / "r.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="scripts are not run"):
        SplitRows(str(source))
    (source / "README.md").unlink()
    assert texts_of(str(source)) == TEXTS["a"]  # without a card the script is a file like any other
    for text in ("configs: [", "configs: 3", "configs: [{data_files: nope.jsonl}]", "configs: [3]", "- a"):
        (source / "README.md").write_text(f"---\n{text}\n---\n")
        with pytest.raises(ValueError, match=r"card|scripts"):
            SplitRows(str(source))
    assert not (tmp_path / "ran").exists()


def test_the_cache_of_datasets_is_neither_needed_nor_written(tmp_path, monkeypatch):
    from datasets import config as settings

    monkeypatch.setattr(settings, "HF_DATASETS_CACHE", tmp_path / "no" / "cache")
    (tmp_path / "no").write_text("a file where the cache's folder should be")
    assert texts_of(write(tmp_path / "r", *REPOSITORIES["splits of a card"]), "sft") == TEXTS["a"]


BESIDE = {
    "licence": {"LICENSE.txt": "MIT " * 9999, "NOTICE.txt": "MIT " * 9999},
    "statistics": {"stats.json": json.dumps({"rows": 40}, indent=1), "meta/params.json": "{}"},
    "infos": {"dataset_infos.json": "{}", "dataset_info.json": "{}"},
    "requirements": {"requirements.txt": "torch\n"},
    "other": {"prepare.py": "print()", "figure.png": "", "a.csv": "x,y\n"},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("name", ["data/part-0.parquet", "part.jsonl"])
def test_files_of_another_kind_are_no_data_and_are_named(tokenizer, tmp_path, caplog, beside, name):
    source = write(tmp_path / "r", {name: "a"} | BESIDE[beside])
    caplog.set_level(logging.WARNING)
    assert texts_of(source) == TEXTS["a"]
    for other in BESIDE[beside]:
        if other.endswith((".txt", ".csv", "stats.json")):
            assert Path(other).name in caplog.text


def test_a_licence_beside_text_files_is_no_data(tmp_path, caplog):
    source = write(
        tmp_path / "r", {"one.txt": "A book.", "two.txt": "Another.", "LICENSE.txt": "MIT", "README.txt": "x"}
    )
    assert texts_of(source) == ["A book.", "Another."]
    assert "LICENSE.txt" in caplog.text
    assert texts_of(write(tmp_path / "only", {"license.txt": "A text about licences."})) == ["A text about licences."]
    card = {"configs": [config("default", data_files="*.txt")]}
    assert len(texts_of(write(tmp_path / "card", {"one.txt": "A book.", "LICENSE.txt": "MIT"}, card))) == 2


def test_formats_that_cannot_be_told_apart_are_refused(tmp_path):
    assert texts_of(write(tmp_path / "large", {"part.jsonl": "a", "one.txt": "x", "two.txt": "y"})) == TEXTS["a"]
    few_large = write(tmp_path / "few", {"part.jsonl": "a", "one.txt": "x " * 500, "two.txt": "y " * 500})
    with pytest.raises(ValueError, match=r"files of several formats .*1 \.jsonl .*2 \.txt .*pass one file"):
        SplitRows(few_large)
    unknown = write(tmp_path / "csv", {"a.csv": "x", "b.csv": "y", "LICENSE.txt": "MIT"})
    with pytest.raises(ValueError, match=r"2 \.csv .*known: \.txt"):
        SplitRows(unknown)


def test_each_split_has_a_format_of_its_own(tmp_path):
    source = write(tmp_path / "r", {"train.jsonl": "a", "test.parquet": "b"})
    assert texts_of(source) == TEXTS["a"]
    assert texts_of(source, "test") == TEXTS["b"]


def test_endings_may_be_written_large(tmp_path):
    assert texts_of(write(tmp_path / "r", {"A.TXT": "A book."})) == ["A book."]


@pytest.mark.parametrize("data", ["file", "folder", "folder that is a link", "relative"])
def test_what_was_trained_on_through_links_is_scored_and_reported_again(
    tiny_lm_folder, tmp_path, monkeypatch, capsys, data
):
    """As in the cache of the hub: `snapshots/REVISION/data/*.parquet` are links to `blobs/SHA`."""
    texts = [f"{i} {text}" for i in range(12) for text in TEXTS["a"]]
    blob, snapshot = tmp_path / "blobs/0a1b2c", tmp_path / "snapshots/0123abc/data"
    blob.parent.mkdir()
    snapshot.mkdir(parents=True)
    Dataset.from_dict({"text": texts}).to_parquet(blob)
    (snapshot / "train-00000-of-00001.parquet").symlink_to("../../../blobs/0a1b2c")
    (tmp_path / "latest").symlink_to(snapshot.parent)
    monkeypatch.chdir(tmp_path)
    source = {
        "file": snapshot / "train-00000-of-00001.parquet", "folder": snapshot.parent,
        "folder that is a link": tmp_path / "latest", "relative": "snapshots/0123abc/data/train-00000-of-00001.parquet",
    }[data]  # fmt: skip
    common = ["--lm", str(tiny_lm_folder), "--hook", "blocks.1.hook_resid_pre", "--ctx", "16", "--threads", "1"]
    sizes = ["--d-sae", "24", "--n-tokens", "4000", "--batch-size", "128", "--eval-tokens", "320", "--coeff", "0.02"]
    out = ["--out", "run", "--latent-pages", "none"]
    assert main(["train", "--data", str(source), *common, *sizes, *out]) == 0
    monkeypatch.chdir("/")
    study = tmp_path / "run"
    (run,) = Results.load(study).runs
    assert main(["eval", str(run.folder), "--eval-tokens", "320"]) == 0
    assert main(["report", str(study), "--latent-pages", "all", "--latent-tokens", "320"]) == 0
    assert json.loads((study / "config.json").read_text())["stream"]["data"].startswith(str(tmp_path))


def test_a_language_model_keeps_the_name_of_its_link(tiny_lm_folder, tmp_path, monkeypatch):
    """The target of a link may have another name tomorrow; the link is what its user knows."""
    (tmp_path / "0f3a").symlink_to(tiny_lm_folder)
    (tmp_path / "latest").symlink_to("0f3a")
    monkeypatch.chdir(tmp_path)
    for name in ("latest", Path("latest"), "./latest", tmp_path / "latest"):
        assert LanguageModel(name, hook="blocks.1.hook_resid_pre").name == str(tmp_path / "latest")


@pytest.mark.parametrize("names", [["a.txt", "b.jsonl"], ["b.jsonl", "a.txt", "c.txt"]])
def test_several_files_are_trained_on_in_their_order_scored_and_resumed(tiny_lm_folder, tmp_path, monkeypatch, names):
    texts = {
        name: [f"{name} {i} {text}" for i in range(8) for text in TEXTS["a"]] for name in ("a.txt", "b.jsonl", "c.txt")
    }
    write(tmp_path, {
        "a.txt": "\n<|endoftext|>\n".join(texts["a.txt"]),
        "b.jsonl": "\n".join(json.dumps({"text": text}) for text in texts["b.jsonl"]),
        "c.txt": "\n<|endoftext|>\n".join(texts["c.txt"]),
    })  # fmt: skip
    common = ["--lm", str(tiny_lm_folder), "--hook", "blocks.1.hook_resid_pre", "--ctx", "16", "--threads", "1"]
    sizes = ["--d-sae", "24", "--n-tokens", "3000", "--batch-size", "128", "--eval-tokens", "320", "--coeff", "0.02"]

    def train() -> int:
        data = ["--data", *(str(tmp_path / name) for name in names)]
        out = ["--out", str(tmp_path / "run"), "--latent-pages", "none"]
        return main(["train", *data, *common, *sizes, *out])

    assert train() == 0
    results = Results.load(tmp_path / "run")
    assert results.config["stream"]["data"] == [str(tmp_path / name) for name in names]
    lm = LanguageModel(tiny_lm_folder, hook="blocks.1.hook_resid_pre")
    wanted = load_blocks(
        [text for name in names for text in texts[name]], lm.tokenizer, 16, max_train_tokens=3000, held_out_pool=2560
    )
    assert results.config["stream"]["data_digest"] == wanted.digest()
    before = (tmp_path / "run/results.jsonl").read_bytes()
    monkeypatch.chdir("/")
    assert train() == 0
    assert (tmp_path / "run/results.jsonl").read_bytes() == before
    (run,) = results.runs
    assert main(["eval", str(tmp_path / "run" / run.record["run_id"]), "--eval-tokens", "320"]) == 0
    others = [str(tmp_path / name) for name in names]
    assert main(["eval", str(tmp_path / "run" / run.record["run_id"]), "--eval-tokens", "320", "--data", *others]) == 0


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.txt", "missing.txt"], "no file 'missing.txt'"),
        (["a.txt", "folder"], "a folder 'folder', in a list"),
        (["builtin", "a.txt"], "no file 'builtin'"),
        (["user/data", "user/other"], "no file 'user/data'"),
        (["two", "words"], "no file 'two'"),
        ([], "data"),
    ],
)
@pytest.mark.parametrize("command", ["train", "harvest", "sweep demo"])
def test_several_names_are_those_of_files(tiny_lm_folder, tmp_path, monkeypatch, capsys, names, words, command):
    write(tmp_path, {"a.txt": "A text.", "folder/a.txt": "A text."})
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([*command.split(), "--lm", str(tiny_lm_folder), "--out", "out", "--data", *names]) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_blocks_of_two_names_of_one_file_are_the_same(tokenizer, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS["a"]))
    wanted = load_blocks(str(tmp_path / "text.jsonl"), tokenizer, 16, folder=tmp_path / "blocks")
    index = json.loads((tmp_path / "blocks/blocks.json").read_text())
    (tmp_path / "there").symlink_to(tmp_path)
    index["made"]["source"] = str(tmp_path / "there/text.jsonl")
    (tmp_path / "blocks/blocks.json").write_text(json.dumps(index))
    again = load_blocks(str(tmp_path / "text.jsonl"), tokenizer, 16, folder=tmp_path / "blocks")
    assert again.digest() == wanted.digest()
