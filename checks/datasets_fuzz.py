"""Folders and files composed at random, read by us and by `datasets` with plain Python: `make datasets-fuzz`.

Every dataset has a form (one file, a folder, folders by split, a repository with a card, a saved dataset, the hub's
cache of links), a format, a compression, bad rows, other columns, other files, and texts or rows of token ids with or
without a mask. The other reader is the `datasets` library, which says what splits there are and which files they have,
and plain Python, which says what is a document: a text that is not empty and can be encoded, or the token ids where
the mask is not 0. Documents, their order and their split must be equal, or both must refuse.

`datasets` cannot read JSON rows whose types change from row to row, so JSON is read by `json.loads` from the files that
it names. Everything else it reads itself.
"""

import argparse
import gzip
import json
import logging
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from prolu.activations.documents import Documents
from prolu.activations.text_rows import SplitRows

WORDS = [
    "the", "cat", "sat", "on", "a", "mat,", "while", "rain", "fell:", "\u05e9\u05dc\u05d5\u05dd", "\u65e5\u672c",
    "caf\u00e9", "\U0001f600", "(", "1,", "2", ")", "end",
]  # fmt: skip
SPLITS = ["train", "test", "validation", "train_sft", "en", "dev"]
PAD = 0
Refused = ValueError
Splits = dict[str, list[Any]]


def some_text(draw: random.Random) -> str:
    """Return a text of a few words, often over several lines."""
    return draw.choice([" ", "\n"]).join(draw.choices(WORDS, k=draw.randint(1, 30)))


def some_rows(draw: random.Random, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows as a recipe wants them: texts or ids in its column, some of them bad, with other columns beside."""
    rows = []
    for i in range(draw.randint(8, 40)):
        row: dict[str, Any] = {}
        if recipe["content"] == "text":
            row["text"] = some_text(draw)
        else:
            ids = [draw.randint(1, 90) for _ in range(draw.randint(2, 24))]
            ids[0] = ids[1] % 90 + 1  # no row looks padded by chance
            ids[-1] = ids[-2] % 90 + 1
            mask = [1] * len(ids)
            if recipe["padded"]:
                padding = [PAD] * (30 - len(ids))
                ids = padding + ids if recipe["left"] else ids + padding
                mask = [0] * len(padding) + mask if recipe["left"] else mask + [0] * len(padding)
            row["input_ids"] = ids
            if recipe["mask"]:
                row["attention_mask"] = mask
        if "id" in recipe["others"]:
            row["id"] = i
        if "meta" in recipe["others"]:
            row["meta"] = {"source": draw.choice("abc"), "scores": [0.5, float(i)]}
        if "changing" in recipe["others"]:
            row["note"] = i if i < 5 else f"number {i}"
        rows.append(row)
    column = "text" if recipe["content"] == "text" else "input_ids"
    for row in draw.sample(rows, k=min(recipe["n_bad"], len(rows) - 4)):
        kind = draw.choice(recipe["bad_kinds"])
        if kind == "missing":
            del row[column]
        else:
            row[column] = {"null": None, "empty": "", "blank": " \n", "number": 7, "surrogate": "half \ud83d here"}[
                kind
            ]
    return rows


def some_recipe(draw: random.Random) -> dict[str, Any]:
    """Return what a dataset is made of."""
    form = draw.choice(["file", "folder", "by name", "by folder", "card", "configs", "saved", "saved alone", "cache"])
    saved = form.startswith("saved")
    file_format = "saved" if saved else draw.choice(["jsonl", "json", "parquet", "arrow"])
    is_json = file_format.startswith("json")
    content = draw.choice(["text", "text", "ids"])
    kinds = ["null"] if content == "ids" else ["null", "empty", "blank"]
    if is_json:
        kinds += ["missing"] if content == "ids" else ["missing", "number", "surrogate"]
    padded = content == "ids" and draw.random() < 0.5
    return {
        "form": form,
        "format": file_format,
        "content": content,
        "compression": draw.choice(["", "", ".gz", ".zst"]) if file_format == "jsonl" else "",
        "padded": padded,
        "left": draw.random() < 0.3,
        "mask": content == "ids" and draw.random() < (0.7 if padded else 0.3),
        "others": [o for o in ("id", "meta", *(["changing"] if is_json else [])) if draw.random() < 0.4],
        "n_bad": draw.choice([0, 0, 1, 3]),
        "bad_kinds": kinds,
        "n_files": draw.randint(1, 3),
        "splits": draw.sample(SPLITS, k=draw.randint(1, 3)),
        "strays": draw.sample(
            ["README.md", "LICENSE", "LICENSE.txt", "stats.json", ".gitattributes"], k=draw.randint(0, 2)
        ),
    }


def write_rows(file: Path, rows: list[dict[str, Any]], recipe: dict[str, Any]) -> Path:
    """Write rows in the format of a recipe; return the file, whose ending may have grown."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file = file.with_name(f"{file.name}.{recipe['format']}{recipe['compression']}")
    if recipe["format"] == "jsonl":
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        compress: dict[str, Callable[[bytes], bytes]] = {
            "": bytes, ".gz": gzip.compress, ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
        }  # fmt: skip
        file.write_bytes(compress[recipe["compression"]](data))
    elif recipe["format"] == "json":
        file.write_text(json.dumps(rows))
    elif recipe["format"] == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return file


def compose(folder: Path, draw: random.Random, recipe: dict[str, Any]) -> Path:
    """Write a dataset as a recipe says; return what is to be read: a file or a folder."""
    form = recipe["form"]
    if form == "saved alone":
        datasets.Dataset.from_list(some_rows(draw, recipe)).save_to_disk(folder / "data", num_shards=recipe["n_files"])
        return folder / "data"
    if form == "saved":
        splits = {split: datasets.Dataset.from_list(some_rows(draw, recipe)) for split in recipe["splits"]}
        datasets.DatasetDict(splits).save_to_disk(folder / "data")
        return folder / "data"
    root = folder / "data"
    root.mkdir()
    if form == "file":
        return write_rows(root / "rows", some_rows(draw, recipe), recipe)
    splits = ["train"] if form in ("folder", "cache") else recipe["splits"]
    named = {
        "folder": "part-{i}", "cache": "part-{i}", "by name": "{split}-{i:05d}-of-{n:05d}",
        "by folder": "{split}/rows-{i}", "card": "files/{split}-{i}", "configs": "files/{split}/{i}",
    }[form]  # fmt: skip
    written: dict[str, list[str]] = {}
    for split in splits:
        for i in range(recipe["n_files"]):
            name = named.format(split=split, i=i, n=recipe["n_files"])
            file = write_rows(root / name, some_rows(draw, recipe), recipe)
            written.setdefault(split, []).append(str(file.relative_to(root)))
            if form == "cache":
                blob = folder / "blobs" / f"{i:064x}"
                blob.parent.mkdir(exist_ok=True)
                file.rename(blob)
                file.symlink_to(blob)
    if form == "card":
        listed = [{"split": split, "path": files} for split, files in written.items()]
        write_card(root, [{"config_name": "default", "data_files": listed}])
    elif form == "configs":
        write_card(root, [{"config_name": split, "data_files": files} for split, files in written.items()])
    for stray in recipe["strays"]:
        # One other file beside one file of data is a tie for `datasets`, which then goes by the order of the endings.
        if not (root / stray).exists() and (recipe["format"] in ("parquet", "arrow") and recipe["n_files"] > 1):
            (root / stray).write_text("{}" if stray.endswith("json") else "about the data\n")
    return root


def write_card(root: Path, configs: list[dict[str, Any]]) -> None:
    """Write a repository's card, which declares its configurations. JSON is YAML."""
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n# Some data\n")


def by_datasets(place: Path, config: str, column: str) -> Splits:
    """Return the documents of each split, by `datasets` and plain Python. Raise ValueError if there are none."""
    saved = (place / "dataset_dict.json").exists() or (place / "state.json").exists()
    found: dict[str, list[dict[str, Any]]] = {}
    if saved:
        loaded = datasets.load_from_disk(str(place))
        loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
        found = {str(split): dataset.to_list() for split, dataset in loaded.items()}
    else:
        with tempfile.TemporaryDirectory() as cache:
            if place.is_file():
                kind = "json" if ".json" in place.name else place.suffix[1:]
                builder = datasets.load_dataset_builder(kind, data_files=str(place), cache_dir=cache)
            else:
                builder = datasets.load_dataset_builder(str(place), config or None, cache_dir=cache)
            for split, files in (builder.config.data_files or {}).items():
                for file in sorted(map(str, files)):
                    found.setdefault(str(split), []).extend(rows_of(file))
    return {split: documents(rows, column) for split, rows in found.items()}


def rows_of(file: str) -> list[dict[str, Any]]:
    """Return the rows of one file: JSON by `json.loads`, all else by `datasets`."""
    name = Path(file).name
    if ".json" in name:
        raw = Path(file).read_bytes()
        raw = gzip.decompress(raw) if name.endswith(".gz") else raw
        raw = pa.input_stream(pa.BufferReader(raw), compression="zstd").read() if name.endswith(".zst") else raw
        text = raw.decode()
        return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines() if line]
    kind = "parquet" if name.endswith(".parquet") else "arrow"
    with tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(kind, data_files=file, split="train", cache_dir=cache).to_list()


def documents(rows: list[dict[str, Any]], column: str) -> list[Any]:
    """Return the documents among rows, as the documentation says what one is."""
    found = []
    unmasked = []
    for row in rows:
        content = row.get(column)
        if isinstance(content, str) and content.strip() and content.encode("utf-8", "ignore").decode() == content:
            found.append(content)
        elif isinstance(content, list):
            mask = row.get("attention_mask")
            if mask is None:
                unmasked.append(content)
            kept = content if mask is None else [t for t, keeps in zip(content, mask, strict=True) if keeps]
            if kept:
                found.append(kept)
    padded = [ids for ids in unmasked if PAD in (ids[0], ids[-1])]
    if not found or 2 * len(padded) > len(unmasked):
        raise Refused("no documents, or padded rows without a mask")
    return found


def by_us(place: Path, config: str, column: str, splits: list[str]) -> Splits:
    """Return the documents of each split as this library reads them."""
    return {
        split: [
            d.content if isinstance(d.content, str) else d.content.tolist()
            for d in Documents(SplitRows(str(place), split, config), column)
        ]
        for split in splits
    }


def outcome(read: Callable[[], Splits]) -> Splits | str:
    """Return what a reader gives, or that it refuses."""
    try:
        return read()
    except Refused as problem:
        return f"refused: {problem}"


def difference(place: Path, recipe: dict[str, Any]) -> str:
    """Return how the two readers differ on one dataset; empty if they agree."""
    column = "text" if recipe["content"] == "text" else "input_ids"
    splits = ["train"] if recipe["form"] in ("file", "folder", "cache", "saved alone", "configs") else recipe["splits"]
    for config in recipe["splits"] if recipe["form"] == "configs" else [""]:
        theirs = outcome(lambda config=config: by_datasets(place, config, column))
        names = splits if isinstance(theirs, str) else list(theirs)
        ours = outcome(lambda config=config, names=names: by_us(place, config, column, names))
        if isinstance(theirs, str) != isinstance(ours, str):
            return f"config {config!r}: datasets {str(theirs)[:300]}, ours {str(ours)[:300]}"
        if not isinstance(theirs, str) and theirs != ours:
            wrong = [split for split in names if theirs[split] != ours[split]]
            return f"config {config!r}: other documents in {wrong}: {len(theirs[wrong[0]])} and {len(ours[wrong[0]])}"
        if not isinstance(theirs, str):
            other = outcome(lambda config=config: by_us(place, config, column, ["no_such_split"]))
            if not isinstance(other, str):
                return f"config {config!r}: a split that is not there was read"
    if recipe["form"] == "configs" and len(recipe["splits"]) > 1:
        unnamed = outcome(lambda: by_us(place, "", column, ["train"]))
        if not isinstance(unnamed, str):
            return "several configurations, none of them named, and one was read"
    return ""


def main() -> int:
    """Compose and compare; return 1 if any dataset was read differently."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    logging.getLogger("prolu").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    n_different = 0
    for i in range(args.n):
        draw = random.Random(f"{args.seed} {i}")
        recipe = some_recipe(draw)
        folder = Path(tempfile.mkdtemp())
        try:
            found = difference(compose(folder, draw, recipe), recipe)
        finally:
            shutil.rmtree(folder)
        if found:
            n_different += 1
            print(f"{args.seed} {i}: {found}\n    {recipe}", flush=True)
    print(f"datasets {args.n}, different {n_different}")
    return n_different > 0


if __name__ == "__main__":
    sys.exit(main())
