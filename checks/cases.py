"""Text and models as people have them, each with what must come of it: `make cases`.

Every input is made here, in a temporary folder. For each, three things are printed: the input, what was expected, and
what came. What was expected is worked out by plain Python or plain transformers, or is a phrase of the refusal.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel

import prolu
from prolu.activations.builtin import MODEL_DIR
from support import models

CTX = 64
WORDS = models.STORY.split()
QUICK = ["--d-sae", "64", "--n-tokens", "20000", "--batch-size", "512", "--threads", "1", "--eval-tokens", "2048"]
QUICK += ["--coeff", "0.01", "--ctx", str(CTX)]


class Outcome(NamedTuple):
    """One input, what must come of it, and what came."""

    name: str
    expected: str
    came: str

    @property
    def as_expected(self) -> bool:
        return self.came == self.expected or (self.expected.startswith("refused: ") and self._refusal_matches())

    def _refusal_matches(self) -> bool:
        return self.came.startswith("refused: ") and all(
            phrase in self.came for phrase in self.expected.removeprefix("refused: ").split(" .. ")
        )


def texts(n: int, seed: int = 0) -> list[str]:
    """Return n documents, no two alike."""
    draw = random.Random(seed)
    return [f"{seed}-{i} " + " ".join(draw.choices(WORDS, k=draw.randint(30, 120))) for i in range(n)]


def came_of(work: Callable[[], object]) -> str:
    """Return what `work` returned, or that it was refused and in which words."""
    try:
        return str(work())
    except ValueError as problem:
        return f"refused: {problem}"


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `prolu` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "prolu", *map(str, arguments)],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def said(ran: subprocess.CompletedProcess) -> str:
    """Return the exit code of a command, or its refusal in its own words."""
    if ran.returncode == 2:
        return f"refused: {ran.stderr.strip().splitlines()[-1]}"
    return f"exit {ran.returncode}"


def n_documents(source: object, tokenizer: object, **options: str) -> str:
    """Return how many documents are read, or the refusal."""
    return came_of(lambda: prolu.load_blocks(source, tokenizer, ctx=CTX, **options).n_documents)


def packed_by_hand(rows: list[list[int]], bos: int) -> int:
    """Return the number of whole blocks that rows give on both sides together, joined with BOS between them.

    Which side a row falls on is what `prolu` writes down: the expected number is that of one long side, and up to one
    block less, because both sides drop their tail.
    """
    return sum(len(row) + (row[0] != bos) for row in rows) // CTX


def hub_cache(folder: Path) -> Iterator[Outcome]:
    """c01: a data file of the hub's cache is a link to a blob without an ending."""
    blob = folder / "blobs" / hashlib.sha256(b"any").hexdigest()
    data = folder / "snapshots" / "0123abc" / "data" / "train-00000-of-00001.parquet"
    blob.parent.mkdir(parents=True)
    data.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": texts(600)}), blob)
    data.symlink_to(os.path.relpath(blob, data.parent))
    out = folder / "study"
    yield Outcome("a linked file: train", "exit 0", said(command("train", "--data", data, *QUICK, "--out", out)))
    recorded = json.loads((out / "config.json").read_text())["stream"]["data"]
    yield Outcome("a linked file: recorded by its own name", str(data), recorded)
    run = next(p.parent for p in out.glob("*/sae.safetensors"))
    yield Outcome("a linked file: eval", "exit 0", said(command("eval", run)))
    yield Outcome("a linked file: report", "exit 0", said(command("report", out)))


def pad_beyond_the_embedding(folder: Path) -> Iterator[Outcome]:
    """c03: the tokenizer has a pad token that the model's embedding has no row for."""
    lm = models.write_model(folder / "lm")
    tokenizer = AutoTokenizer.from_pretrained(lm)
    n_rows = AutoModelForCausalLM.from_pretrained(lm).get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<extra{i}>" for i in range(n_rows - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(lm)
    documents = texts(400)
    ids = [tokenizer(text)["input_ids"][: 2 * CTX] for text in documents]
    padded = [(row + [tokenizer.pad_token_id] * 2 * CTX)[: 2 * CTX] for row in ids]
    mask = [[int(i < len(row)) for i in range(2 * CTX)] for row in ids]
    files = {
        "text": {"text": [text + "<|pad|>" for text in documents]},
        "masked": {"input_ids": padded, "attention_mask": mask},
        "ids": {"input_ids": [[*row[: CTX - 1], tokenizer.pad_token_id] for row in ids]},
        "labels": {"labels": [[-100 if t == tokenizer.pad_token_id else t for t in row] for row in padded]},
    }
    for name, columns in files.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")

    def train(name: str, *options: str) -> str:
        hook = ["--lm", lm, "--hook", "blocks.1.hook_resid_pre"]
        more = ["--out", folder / f"{name}{len(options)}", "--text-column", next(iter(files[name]))]
        return said(command("train", *hook, "--data", folder / f"{name}.parquet", *QUICK, *more, *options))

    yield Outcome("<|pad|> in a text is text", "exit 0", train("text"))
    yield Outcome("<|pad|> in a text, parsed", f"refused: {n_rows}", train("text", "--special-tokens", "parsed"))
    yield Outcome("pad tokens under a mask of 0", "exit 0", train("masked"))
    yield Outcome("pad tokens as text", f"refused: {n_rows}", train("ids"))
    yield Outcome("labels with -100", "refused: -100 .. labels", train("labels"))


def padded_and_ragged_rows(folder: Path) -> Iterator[Outcome]:
    """c04: rows of token ids, padded to one length, or each of its own length."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    draw = random.Random(0)
    ids = [tokenizer(text)["input_ids"][: draw.randint(16, 2 * CTX)] for text in texts(900)]
    padded = [(row + [tokenizer.eos_token_id] * 2 * CTX)[: 2 * CTX] for row in ids]
    mask = [[int(i < len(row)) for i in range(2 * CTX)] for row in ids]
    left = [(([tokenizer.eos_token_id] * 2 * CTX) + row)[-2 * CTX :] for row in ids]
    files = {
        "ragged": {"input_ids": ids},
        "padded": {"input_ids": padded, "attention_mask": mask},
        "padded left": {"input_ids": left, "attention_mask": [row[::-1] for row in mask]},
        "padded, no mask": {"input_ids": padded},
    }
    for name, columns in files.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    blocks = {}

    def read(name: str) -> object:
        blocks[name] = prolu.load_blocks(folder / f"{name}.parquet", tokenizer, ctx=CTX, text_column="input_ids")
        return blocks[name].digest()

    read("ragged")
    n_blocks = sum(map(len, (blocks["ragged"].train, blocks["ragged"].held_out)))
    whole = packed_by_hand(ids, tokenizer.bos_token_id)
    yield Outcome(
        "ragged rows: blocks kept", f"{whole}, or one less", f"{n_blocks + (n_blocks == whole - 1)}, or one less"
    )
    digest = blocks["ragged"].digest()
    yield Outcome("padded, with a mask: as without padding", digest, came_of(lambda: read("padded")))
    yield Outcome("padded on the left, with a mask", digest, came_of(lambda: read("padded left")))
    yield Outcome("padded, without a mask", "refused: padded", came_of(lambda: read("padded, no mask")))


def saved_datasets(folder: Path) -> Iterator[Outcome]:
    """c05: datasets saved with splits of names of their own."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    for name, splits in {
        "chat": {"train_sft": 300, "test_sft": 200, "train_gen": 100},
        "films": {"train": 300, "test": 200, "unsupervised": 400},
        "languages": {"en": 300, "fr": 200},
    }.items():
        saved = {s: datasets.Dataset.from_dict({"text": texts(n, seed)}) for seed, (s, n) in enumerate(splits.items())}
        datasets.DatasetDict(saved).save_to_disk(folder / name)
        for source, kind in ((folder / name, "saved"), (datasets.load_from_disk(folder / name), "at hand")):
            for split, n in splits.items():
                read = n_documents(source, tokenizer, split=split)
                yield Outcome(f"{name}, {kind}: {split}", str(n), read)
            if "train" not in splits:
                refused = "refused: train .. " + " .. ".join(splits)
                read = n_documents(source, tokenizer)
                yield Outcome(f"{name}, {kind}: no split named", refused, read)
    datasets.Dataset.from_dict({"text": texts(300)}).save_to_disk(folder / "test_set", num_shards=3)
    read = n_documents(folder / "test_set", tokenizer)
    yield Outcome("one dataset in a folder called test_set", "300", read)


def files_of_rows(folder: Path) -> Iterator[Outcome]:
    """c06: JSON in every shape, rows without text, and folders with other files in them."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    documents = texts(400)
    rows = [{"text": text} for text in documents]

    def lines(rows: list, end: str = "\n") -> str:
        return end.join(map(json.dumps, rows))

    def written(name: str, content: str | bytes) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    def table(name: str, columns: dict) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / name)
        return folder / name

    half_an_emoji = '{"text": "half an emoji \\ud83d here"}\n'
    compressed = pa.compress(lines(rows).encode(), "zstd", asbytes=True)
    cases = {
        "a JSON array": (written("array.json", json.dumps(rows)), "400"),
        "a JSON array, indented": (written("pretty.json", json.dumps(rows, indent=2)), "400"),
        "lines of strings": (written("strings.jsonl", lines(documents)), "400"),
        "BOM and CRLF": (written("bom.jsonl", "\ufeff" + lines(rows, "\r\n")), "400"),
        "a null": (written("null.jsonl", lines([*rows[:-1], {"text": None}])), "399"),
        "a missing key": (written("missing.jsonl", lines([*rows[:-1], {"id": 1}])), "399"),
        "half an emoji": (written("emoji.jsonl", half_an_emoji + lines(rows)), "400"),
        "parquet with a null": (table("null.parquet", {"text": [None, *documents[1:]]}), "399"),
        "a dictionary-encoded column": (
            table("dict.parquet", {"text": pa.array(documents).dictionary_encode()}),
            "400",
        ),
        "large strings": (table("large.parquet", {"text": pa.array(documents, pa.large_string())}), "400"),
        "chats": (
            table("chat.parquet", {"text": [[{"role": "user", "content": t}] for t in documents]}),
            "refused: list",
        ),
        "bytes": (table("bytes.parquet", {"text": pa.array([t.encode() for t in documents])}), "refused: bytes"),
        "an ending nobody reads": (written("notes.odt", b"x"), "refused: .parquet"),
    }
    cases["zstandard"] = (written("rows.jsonl.zst", compressed), "400")
    for others in (
        {"LICENSE.txt": "MIT " * 9000},
        {"stats.json": "{\n}"},
        {"README.md": "# hi", "meta/params.json": "{}"},
    ):
        name = f"with {' and '.join(others)}"
        place = table(f"{name}/data/part-0.parquet", {"text": documents}).parents[1]
        for file, content in others.items():
            (place / file).parent.mkdir(exist_ok=True)
            (place / file).write_text(content)
        cases[f"a folder {name}"] = (place, "400")
    for name, (place, expected) in cases.items():
        read = n_documents(place, tokenizer)
        yield Outcome(name, expected, read)


def composite_model(folder: Path) -> Iterator[Outcome]:
    """c08: Gemma 3 with a vision tower, whose sizes stand in a config of its own for text."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(**models.SHAPES["gemma3"])).eval()
    model.save_pretrained(folder / "lm")
    models.write_tokenizer(folder / "lm")
    tokens = models.tokens(3, 24)
    tokens[:, 0] = 0
    with torch.no_grad():
        found = model(input_ids=tokens, output_hidden_states=True)
    clean = torch.nn.functional.cross_entropy(
        found.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    for hook in ("blocks.2.hook_resid_pre", "blocks.1.hook_resid_post", "model.language_model.layers.2.input"):
        lm = prolu.LanguageModel(str(folder / "lm"), hook)
        acts = lm.activations(tokens)
        same = torch.equal(acts, found.hidden_states[2])
        spliced = (lm.cross_entropy(tokens, acts).flatten() - clean).abs().max() < 1e-5
        came = f"width {lm.d_in}, hidden_states[2]: {same}, its own splice: {bool(spliced)}"
        yield Outcome(f"gemma3: {hook}", "width 16, hidden_states[2]: True, its own splice: True", came)
    refused = came_of(lambda: prolu.LanguageModel(str(folder / "lm"), "language_model.layers.2.input"))
    yield Outcome("gemma3: a path that is not there", "refused: model.language_model.layers.2", refused)


def overflow_above_the_hook(folder: Path) -> Iterator[Outcome]:
    """c11: activations at the hook fit fp16; those of a later block do not, and the logits are NaN."""
    lm = models.write_model(folder / "lm")
    weights = load_file(lm / "model.safetensors")
    weights["transformer.h.2.mlp.c_proj.bias"][5] = 7e4  # beyond 65,504
    save_file(weights, lm / "model.safetensors", {"format": "pt"})
    stories = models.write_stories(folder / "stories.txt")
    source = ["--lm", lm, "--hook", "blocks.1.hook_resid_pre", "--data", stories, *QUICK]
    out = folder / "study"
    trained = said(command("train", *source, "--lm-dtype", "fp16", "--out", out))
    yield Outcome("logits that overflow in fp16", "refused: fp16", trained)
    yield Outcome("... and what was written", "nothing", "something" if out.exists() else "nothing")
    yield Outcome("the same model in fp32", "exit 0", said(command("train", *source, "--out", folder / "fp32")))


def characters_over_several_tokens(folder: Path) -> Iterator[Outcome]:
    """c14: emoji, Hebrew and Chinese are several tokens a character; the pages of latents show whole ones."""
    draw = random.Random(0)
    signs = [
        "שלום",
        "مرحبا",
        "日本語",
        "👩‍👩‍👧‍👦",
        "naïve",
        "</script><script>alert(1)</script>",
        "\x00",
        "\u202eabc",
        "\U0001f600",
    ]
    documents = [" ".join(draw.choices(signs + WORDS, k=100)) for _ in range(400)]
    data = folder / "signs.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    out = folder / "study"
    yield Outcome("train", "exit 0", said(command("train", "--data", data, *QUICK, "--out", out)))
    yield Outcome("pages of latents", "exit 0", said(command("report", out, "--features", "all")))
    pages = [file.read_text(errors="strict") for file in out.rglob("features/**/*") if file.suffix in {".html", ".js"}]
    written = "".join(pages)
    characters = {sign for sign in "".join(signs) if sign > "~" and not unicodedata.category(sign).startswith("C")}
    missing = sorted(c for c in characters if c not in written and json.dumps(c)[1:-1] not in written)
    yield Outcome("characters that are not shown whole", "[]", str(missing))
    yield Outcome("no script of the text runs", "0", str(written.count("<script>alert(1)")))


def datasets_at_hand(folder: Path) -> Iterator[Outcome]:
    """c16: datasets that are streamed, filtered or packed, whose other columns change; lists and paths."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    documents = texts(1200)
    whole = datasets.Dataset.from_dict({"text": documents, "n": list(range(1200))})
    streamed = whole.to_iterable_dataset(num_shards=4)

    def changing() -> Iterator[dict]:
        for n, text in enumerate(documents):
            yield {"text": text, "meta": n if n < 500 else f"id-{n}"}

    def missing() -> Iterator[dict]:
        for n, text in enumerate(documents):
            yield {"text": text} if n % 2 else {"text": text, "url": "x"}

    file = folder / "rows.parquet"
    pq.write_table(pa.table({"text": documents}), file)
    sources = {
        "a dataset": (whole, 1200),
        "a column that changes its type": (datasets.IterableDataset.from_generator(changing), 1200),
        "a column that is sometimes missing": (datasets.IterableDataset.from_generator(missing), 1200),
        "streamed and filtered": (streamed.filter(lambda row: row["n"] > 599), 600),
        "streamed, the first 1000": (streamed.take(1000), 1000),
        "every third row": (whole.select(range(0, 1200, 3)), 400),
        "a Path": (file, 1200),
        "two files": ([file, str(file)], 2400),
        "a list of texts": (documents, 1200),
    }
    for name, (source, n) in sources.items():
        read = n_documents(source, tokenizer)
        yield Outcome(name, str(n), read)
    empty = whole.filter(lambda row: row["n"] < 0)
    read = n_documents(empty, tokenizer)
    yield Outcome("an empty dataset", "refused: 0 documents", read)

    def packed(batch: dict) -> dict:
        ids = [token for row in tokenizer(batch["text"])["input_ids"] for token in row]
        return {"input_ids": [ids[i : i + CTX] for i in range(0, len(ids) - CTX + 1, CTX)]}

    of_ids = whole.map(packed, batched=True, remove_columns=whole.column_names)
    read_all = [
        prolu.load_blocks(source, tokenizer, ctx=CTX, text_column="input_ids").train
        for source in (of_ids, of_ids.with_format("torch"), of_ids.to_iterable_dataset())
    ]
    same = all(np.array_equal(read_all[0], other) for other in read_all[1:])
    yield Outcome(
        "packed ids as lists, tensors and a stream", "the same blocks", "the same blocks" if same else "others"
    )


def nowhere_to_cache(folder: Path) -> Iterator[Outcome]:
    """c19: neither the package nor the home can be written, so that compiled kernels have no cache."""
    package = folder / "package"
    shutil.copytree(Path(prolu.__file__).parent, package / "prolu", ignore=shutil.ignore_patterns("__pycache__"))
    home = folder / "home"
    home.mkdir()
    for place in [package, home, *package.rglob("*")]:
        place.chmod(place.stat().st_mode & ~0o222)
    # As root, a folder without the permission to write can be written all the same; not without these capabilities.
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)
    for step in ("auto", "sparse"):
        ran = subprocess.run(
            [*drop, sys.executable, "-m", "prolu", "train", *QUICK, "--step", step, "--out", folder / step],
            capture_output=True, text=True, env=environment, cwd=folder, check=False,
        )  # fmt: skip
        yield Outcome(f"no place for a cache: --step {step}", "exit 0", said(ran))
        yield Outcome("... is said once", "1", str(ran.stderr.count("NUMBA_CACHE_DIR")))


def width_of(lm: Path) -> str:
    """Return the width of a language model's activations in words."""
    return f"width {prolu.LanguageModel(str(lm), 'blocks.1.hook_resid_pre').d_in}"


def missing_weights(folder: Path) -> Iterator[Outcome]:
    """c21: checkpoints without some of their weights, and an adapter, which is no model."""
    config = LlamaConfig(**models.SMALL_LLAMA)
    config.tie_word_embeddings = False
    LlamaModel(config).save_pretrained(folder / "headless")
    whole = LlamaForCausalLM(config)
    whole.save_pretrained(folder / "whole")
    whole.save_pretrained(folder / "holed")
    file = folder / "holed" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder / "tied")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gpt2"}))
    expected = {
        "whole": "width 16", "tied": "width 16", "headless": "refused: lm_head.weight",
        "holed": "refused: model.layers.1.mlp.up_proj.weight", "adapter": "refused: adapter .. merge",
    }  # fmt: skip
    for name, outcome in expected.items():
        models.write_tokenizer(folder / name)
        read = came_of(partial(width_of, folder / name))
        yield Outcome(f"a checkpoint: {name}", outcome, read)


CASES = (
    hub_cache, pad_beyond_the_embedding, padded_and_ragged_rows, saved_datasets, files_of_rows, composite_model,
    overflow_above_the_hook, characters_over_several_tokens, datasets_at_hand, nowhere_to_cache, missing_weights,
)  # fmt: skip


def main(names: list[str]) -> int:
    """Print all cases, or those named, and return 1 if something else came than was expected."""
    datasets.disable_progress_bars()
    n_cases = 0
    n_wrong = 0
    for case in CASES:
        if names and case.__name__ not in names:
            continue
        print(f"\n{case.__doc__}")
        with tempfile.TemporaryDirectory() as folder:
            for outcome in case(Path(folder)):
                mark = "ok   " if outcome.as_expected else "WRONG"
                print(mark, outcome.name)
                print("      expected", outcome.expected[:300])
                print("      came    ", outcome.came[:300])
                n_cases += 1
                n_wrong += not outcome.as_expected
    print(f"\ncases {n_cases}, wrong {n_wrong}")
    return n_wrong > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
