"""Malformed inputs against all that we read, and the API: `make fuzz`. All that may happen is a word on what is wrong.

A good answer is a ValueError whose text names what is wrong (through the command line: exit code 2 and one
sentence), within 10 seconds, with nothing written. Anything else is a failure and is printed.
"""

import contextlib
import io
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from safetensors.torch import save

import prolu
from prolu.cli.entry_point import main
from prolu.studies.checkpoints import RunState, read_checkpoint, write_checkpoint
from prolu.studies.results import Results
from support import models

SECONDS = 10
START_UP = 15
"""Seconds that a process may take to import PyTorch and transformers on a busy machine."""

Case = tuple[str, Callable[[], object]]
"""A name, and what must raise ValueError or return exit code 2."""


def config_cases() -> Iterator[Case]:
    """Every field of a run's config, with values of the wrong size and of the wrong kind."""
    wrong = [-1, float("nan"), float("inf"), "x", None, [], {}, -(10**30), "\x00", "../../etc"]
    permitted = {
        "init_seed": [-1, -(10**30)], "target_l0": [None], "max_grad_norm": [None, float("inf")], "resample_max_raw_norm": [None, float("inf")],
        "initial_bias": [-1, -(10**30)], "init_from": [None], "init_digest": [None],
    }  # fmt: skip
    for field in fields(prolu.RunConfig):
        for value in wrong:
            if not any(value is p or value == p for p in permitted.get(field.name, [])):
                yield f"RunConfig {field.name}={value!r}", lambda n=field.name, v=value: prolu.RunConfig(**{n: v})


def sae_cases(folder: Path, good: Path) -> Iterator[Case]:
    """A saved SAE whose two files are damaged, one way each."""
    weights, config = (good / "sae.safetensors").read_bytes(), json.loads((good / "config.json").read_text())
    n_header = struct.unpack("<Q", weights[:8])[0]
    tensors = {name: t.detach().clone() for name, t in prolu.SAE.load(good).state_dict().items()}
    damaged: dict[str, bytes] = {
        f"cut at {n}": weights[:n] for n in (0, 1, 7, 8, 9, n_header, n_header + 8, len(weights) - 1)
    }
    damaged |= {
        "huge header": struct.pack("<Q", 2**62) + weights[8:],
        "header of rubbish": weights[:8] + b"\xff" * n_header + weights[8 + n_header :],
        "deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
        "more data": weights + b"more",
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.",
        "a zip": b"PK\x03\x04" + bytes(100),
        "text": b"hello",
    }
    for name, t in tensors.items():
        shape = tuple(t.shape)
        changes = {
            "gone": None, "NaN": torch.full(shape, torch.nan), "infinite": torch.full(shape, torch.inf),
            "integers": torch.ones(shape, dtype=torch.int32), "empty": torch.empty(0), "scalar": torch.tensor(1.0),
            "one more dimension": t[None], "one more row": torch.cat([t, t[:1]]), "complex": t.to(torch.complex64),
        }  # fmt: skip
        for kind, change in changes.items():
            rest = {n: v.contiguous() for n, v in tensors.items() if n != name}
            damaged[f"{name} {kind}"] = save(rest if change is None else rest | {name: change.contiguous()})
    damaged["an unknown tensor"] = save({n: v.contiguous() for n, v in tensors.items()} | {"W_gate": torch.ones(3)})
    for name, data in damaged.items():
        yield from _sae_case(folder, good, f"weights: {name}", "sae.safetensors", data)

    sae = config["sae"]
    texts: dict[str, str | bytes] = {
        "empty": "", "not JSON": "{", "list": "[]", "number": "3", "null": "null", "deep": "[" * 100_000,
        "deep object": '{"a":' * 100_000, "not UTF-8": b"\xff\xfe", "no sae": "{}", "sae is a list": '{"sae": []}',
        "sae is null": '{"sae": null}', "huge number": '{"sae": {"d_in": 1' + "0" * 5000 + "}}",
    }  # fmt: skip
    for key in sae:
        rest = {k: v for k, v in sae.items() if k != key}
        texts[f"{key} missing"] = json.dumps({"sae": rest})
        for value in (None, -1, 0, 1.5, "x", [], {}, True, 10**40, "../../x", "prolu(1,1"):
            texts[f"{key}={value!r}"] = json.dumps({"sae": rest | {key: value}})
    texts["unknown key"] = json.dumps({"sae": sae | {"colour": "red"}})
    for name, text in texts.items():
        data = text if isinstance(text, bytes) else text.encode()
        yield from _sae_case(folder, good, f"config: {name}", "config.json", data)


def _sae_case(folder: Path, good: Path, name: str, file: str, data: bytes) -> Iterator[Case]:
    place = folder / f"sae-{abs(hash((name, file))):x}"
    shutil.copytree(good, place)
    (place / file).write_bytes(data)
    yield f"SAE {name}", lambda: prolu.SAE.load(place)


def results_cases(folder: Path, study: Path) -> Iterator[Case]:
    """A study's two files, damaged."""
    damages = {
        "config.json": ["", "{", "[]", "null", "{}", '{"stream": 1}', "[" * 100_000],
        "results.jsonl": ["", "{", "[]", "null\n", "3\n", '{"a": 1}\n{', "[" * 100_000, "\x00\n", '{"l0": 1}\n'],
    }
    for file, texts in damages.items():
        for i, text in enumerate(texts):
            place = folder / f"study-{file}-{i}"
            shutil.copytree(study, place)
            (place / file).write_text(text)
            yield f"study {file} {text[:12]!r}", lambda p=place: run_command(["report", str(p)])


BAD_NAMES = (
    "", ".", "..", "/etc", "../x", "../../x/y", "a/b", "a\\b", "C:x", "javascript:alert(1)", "a\0b", "a\nb", "\x1b[2J",
    "\u202e", "\ud800", " ", ".x", "a" * 300, None, 3, [], {},
)  # fmt: skip
"""What is no plain name of a file or folder."""


def stranger_cases(folder: Path, study: Path) -> Iterator[Case]:
    """A study, a checkpoint and a store whose names lead elsewhere, or whose text is not what it should be."""
    number = 0

    def changed(name: str, change: Callable[[Path], object]) -> Case:
        nonlocal number
        number += 1
        place = folder / f"stranger-{number}"
        shutil.copytree(study, place)
        change(place)
        return f"stranger {name}", lambda: run_command(["report", str(place)])

    def with_result(place: Path, **fields: object) -> None:
        file = place / "results.jsonl"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields) + "\n")

    def with_stream(place: Path, **fields: object) -> None:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {"stream": config["stream"] | fields}))

    def with_curve(place: Path, value: object) -> None:
        file = next(place.glob("*/metrics.jsonl"))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row | {"l0": value}) + "\n" for row in rows))

    def with_link(place: Path) -> None:
        run = next(place.glob("*/sae.safetensors")).parent
        shutil.copytree(run, folder / f"{place.name}-elsewhere")
        shutil.rmtree(run)
        run.symlink_to(folder / f"{place.name}-elsewhere")

    for name in BAD_NAMES:
        yield changed(f"run_id {str(name)[:20]!r}", lambda p, n=name: with_result(p, run_id=n))
    for value in ("x", "\x1b[2J", None, [], {}, True, 10**40):
        yield changed(f"l0 {value!r}", lambda p, v=value: with_result(p, l0=v))
        yield changed(f"nonlinearity {value!r}", lambda p, v=value: with_result(p, nonlinearity=[v]))
        if value is not None:  # null is a figure that was not finite; such lines are left out, and the rest is drawn
            yield changed(f"curve {value!r}", lambda p, v=value: with_curve(p, v))
    for field in ("lm", "hook", "data"):
        for value in (None, 3, [], "\x1b[2J", "a\nb"):
            yield changed(f"{field} {value!r}", lambda p, f=field, v=value: with_stream(p, **{f: v}))
    yield changed("link out", with_link)
    yield changed("figures elsewhere", lambda p: (p / "figures").symlink_to(folder / "good"))
    yield "stranger scored on other text", _report_with_other_text(folder, study)
    for name in BAD_NAMES[1:]:
        place = folder / f"store-of-{number}"
        number += 1
        place.mkdir()
        made = {
            "hooks": [name], "ctx": 32, "lm_batch_tokens": 32, "n_blocks": 1, "blocks_per_shard": 1,
            "d_in": {str(name): 8}, "lm": "x", "lm_digest": "x", "lm_dtype": "fp32", "data_digest": "x", "dtype": "fp32",
        }  # fmt: skip
        shards = [[{"file": f"{name}/00000.safetensors", "sha256": "0"}]]
        (place / "store.json").write_text(json.dumps({"made": made, "shards": shards, "finished": True}))
        yield f"store hook {str(name)[:20]!r}", lambda p=place: prolu.ActivationStore(p)


def _report_with_other_text(folder: Path, study: Path) -> Callable[[], object]:
    """A report of two studies that were scored on different tokens."""
    other = folder / "scored-on-other-text"
    shutil.copytree(study, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"held_out_digest": "0" * 64}))
    return lambda: run_command(["report", str(study), str(other)])


def data_cases(folder: Path, tokenizer: object) -> Iterator[Case]:
    """Texts of every kind, broken."""
    import pyarrow
    from pyarrow import parquet

    good = pyarrow.table({"text": [f"document {i} " * 30 for i in range(20)]})
    parquet.write_table(good, folder / "good.parquet")
    whole = (folder / "good.parquet").read_bytes()
    files: dict[str, bytes] = {
        f"cut-{n}.parquet": whole[:n] for n in (0, 3, 4, 8, 100, len(whole) // 2, len(whole) - 1)
    }
    files |= {f"flipped-{n}.parquet": _flipped(whole, -n) for n in (1, 4, 5, 8)}
    files |= {
        "empty.txt": b"", "bytes.txt": b"\xff\xfe", "short.txt": b"a", "spaces.txt": b" \n \n", "zero.arrow": b"",
        "rubbish.arrow": b"ARROW1\0\0" + bytes(64), "text.parquet": b"hello", "bad.jsonl": b"{", "list.jsonl": b"[1]\n",
        "null.jsonl": b"null\n", "number.jsonl": b'{"text": 3}\n', "none.jsonl": b'{"text": null}\n', "deep.jsonl": b"[" * 10**5,
        "other.jsonl": b'{"body": "x"}\n', "nested.jsonl": b'{"text": {"a": 1}}\n', "utf.jsonl": b'{"text": "\xff"}\n',
        "floats.jsonl": b'{"text": [1.5, 2]}\n', "ids.jsonl": b'{"text": [1, 99999]}\n', "minus.jsonl": b'{"text": [-1, 2]}\n',
        "ragged.jsonl": b'{"text": [[1], [2, 3]]}\n', "huge.jsonl": b'{"text": [1e999, 1' + b"0" * 40 + b"]}\n",
        "bad.jsonl.gz": b"not gzip", "what.xyz": b"x", "none": b"x", "bad.json": b"\x80\x04cos",
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
        yield f"data {name}", lambda n=name: prolu.load_blocks(str(folder / n), tokenizer, ctx=32)
    yield from mask_cases(folder, tokenizer)
    (folder / "hollow").mkdir()
    (folder / "circle").mkdir()
    (folder / "circle" / "a.txt").symlink_to(folder / "circle" / "a.txt")
    for name in ("hollow", "circle", "no/such/file.txt", "", "..\x00", "https://example.invalid/x.txt"):
        yield f"data {name!r}", lambda n=name: prolu.load_blocks(str(folder / n) if n else n, tokenizer, ctx=32)
    for split in (
        "",
        "train[",
        "train[0:40",
        "train]",
        "train[a:b]",
        "train[0:400%]",
        "nope",
        "train[5:5]",
        "../x",
        "train[0:40%][1:2]",
    ):
        yield (
            f"split {split!r}",
            lambda s=split: prolu.load_blocks(str(folder / "good.parquet"), tokenizer, ctx=8, split=s),
        )
    for ctx in (-1, 0, 1):
        yield f"ctx {ctx}", lambda c=ctx: prolu.load_blocks(str(folder / "good.parquet"), tokenizer, ctx=c)


def mask_cases(folder: Path, tokenizer: object) -> Iterator[Case]:
    """Rows of token ids whose masks say nothing that can be believed, and columns of two kinds."""
    ids = list(range(5, 69))
    masks: dict[str, object] = {
        "zero": [0] * 64, "negative": [-1] * 64, "added": [0.0] * 40 + [-1e9] * 24, "halves": [0.5] * 64, "short": [1] * 63,
        "long": [1] * 65, "text": "1" * 64, "texts": ["1"] * 64, "nested": [[1]] * 64, "null": [None] * 64, "number": 1, "object": {"a": 1},
    }  # fmt: skip
    for name, mask in masks.items():
        file = folder / f"mask-{name}.jsonl"
        file.write_text((json.dumps({"input_ids": ids, "attention_mask": mask}) + "\n") * 40)
        yield (
            f"mask {name}",
            lambda f=file: prolu.load_blocks(f, tokenizer, ctx=32, text_column="input_ids"),
        )
    text = json.dumps({"text": "One. Two. Three. " * 20}) + "\n"
    row = json.dumps({"text": ids}) + "\n"
    for name, lines in {"text-first": text * 9 + row, "ids-first": row * 9 + text, "in-turn": (text + row) * 9}.items():
        file = folder / f"kinds-{name}.jsonl"
        file.write_text(lines)
        yield f"two kinds in one column, {name}", lambda f=file: prolu.load_blocks(f, tokenizer, ctx=32)


def _flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 0xFF
    return bytes(changed)


def lm_cases(folder: Path, good: Path) -> Iterator[Case]:
    """A language model's folder, damaged; and hooks that are none."""
    for i, (file, data) in enumerate(
        [
            ("config.json", b""),
            ("config.json", b"{"),
            ("config.json", b"{}"),
            ("config.json", b'{"model_type": "nonsense"}'),
        ]
        + [("config.json", b"[" * 10_000), ("model.safetensors", b""), ("model.safetensors", b"\xff" * 100)]
        + [("tokenizer.json", b""), ("tokenizer.json", b"{}"), ("model.safetensors", struct.pack("<Q", 2**62))]
    ):
        place = folder / f"lm-{i}"
        shutil.copytree(good, place)
        (place / file).write_bytes(data)
        yield f"lm {file} {data[:16]!r}", lambda p=place: prolu.LanguageModel(p, "blocks.1.hook_resid_pre")
    code = folder / "lm-code"
    shutil.copytree(good, code)
    config = json.loads((code / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}, "model_type": "evil"}
    (code / "config.json").write_text(json.dumps(config))
    (code / "evil.py").write_text(f"open({str(folder / 'owned')!r}, 'w')\nclass Evil: pass\n")
    yield "lm that brings code", lambda: prolu.LanguageModel(code, "blocks.1.hook_resid_pre")
    pickled = folder / "lm-pickle"
    shutil.copytree(good, pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    yield "lm with a pickle only", lambda: prolu.LanguageModel(pickled, "blocks.1.hook_resid_pre")
    hooks = [
        "",
        "x",
        "blocks",
        "blocks.1",
        "blocks.-1.hook_resid_pre",
        "blocks.99.hook_resid_pre",
        "blocks.1.hook_nonsense",
    ]
    hooks += [
        "blocks.1.hook_resid_pre.",
        "transformer.h.9.output",
        "transformer.input.output",
        "..output",
        "\x00",
        "blocks.1e3.hook_mlp_out",
    ]
    for hook in hooks:
        yield f"hook {hook!r}", lambda h=hook: prolu.LanguageModel(good, h)


def api_cases(lm: prolu.LanguageModel, blocks: prolu.TokenBlocks, folder: Path) -> Iterator[Case]:
    """The functions that people call, with what they should not be given."""
    sae = prolu.SAE.load(folder / "good")
    x = torch.zeros(3, sae.config.d_in)
    for shape in ((3, 5), (0,), (), (sae.config.d_in, 3)):
        yield f"encode {shape}", lambda s=shape: sae.encode(torch.zeros(s))
    for dtype in (torch.int64, torch.bool, torch.float64, torch.complex64):
        yield f"encode {dtype}", lambda t=dtype: sae.encode(torch.zeros(3, sae.config.d_in, dtype=t))
    yield "encode on meta", lambda: sae.encode(torch.zeros(3, sae.config.d_in, device="meta"))
    trainer = prolu.Trainer(prolu.RunConfig(d_sae=16, n_tokens=640), 6, 64)
    for acts in (
        torch.zeros(64, 5),
        torch.zeros(6),
        torch.zeros(0, 6),
        torch.zeros(2, 64, 6),
        torch.zeros(64, 6).double(),
    ):
        yield f"step {tuple(acts.shape)} {acts.dtype}", lambda a=acts: trainer.step(a)
    yield "step of integers", lambda: trainer.step(torch.zeros(64, 6, dtype=torch.int64))
    yield "step on meta", lambda: trainer.step(torch.zeros(64, 6, device="meta"))
    yield "forward of the wrong width", lambda: sae(x[:, :-1])
    for m, b in (((3,), (4,)), ((2, 3), (2,)), ((3,), (2, 3)), ((), (3,))):
        yield f"prolu {m} {b}", lambda m=m, b=b: prolu.prolu(torch.zeros(m), torch.zeros(b))
    for gradient in ("", "tanh", "STE"):
        yield f"gradient {gradient!r}", lambda g=gradient: prolu.prolu(torch.zeros(3), torch.zeros(3), g)
        yield f"ProLU {gradient!r}", lambda g=gradient: prolu.ProLU(3, g)
    for name, value in (
        ("batch_size", 0),
        ("batch_size", -5),
        ("batch_size", 10**9),
        ("window_tokens", 0),
        ("window_tokens", -1),
    ):
        yield f"stream {name}={value}", lambda n=name, v=value: prolu.ActivationStream(lm, blocks, **{n: v})
    stream = prolu.ActivationStream(lm, blocks, batch_size=64, window_tokens=2048)
    small = prolu.RunConfig(d_sae=16, n_tokens=640)
    yield "no runs", lambda: prolu.run_sweep([], stream, folder / "new", progress=False)
    yield "two runs alike", lambda: prolu.run_sweep([small, small], stream, folder / "new", progress=False)
    yield "no evaluation", lambda: prolu.run_sweep([small], stream, folder / "new", eval_tokens=0, progress=False)
    yield "a file in the way", lambda: prolu.run_sweep([small], stream, folder / "good.parquet" / "x", progress=False)
    yield "grid of no field", lambda: prolu.grid(small, colour=["red"])
    yield "grid of no value", lambda: prolu.grid(small, penalty=["l7"])
    yield "load of nothing", lambda: Results.load(folder / "nowhere")
    for d_in, d_sae in ((0, 3), (3, 0), (-1, 3)):
        yield f"SAEConfig {d_in} {d_sae}", lambda a=d_in, b=d_sae: prolu.SAEConfig(d_in=a, d_sae=b)


def checkpoint_cases(folder: Path) -> Iterator[Case]:
    """Checkpoints, cut and flipped at random places: none may be taken for whole."""
    g = random.Random(0)
    for i in range(40):
        place = folder / f"checkpoint-{i}"
        write_checkpoint(place, 5, {"run": RunState({"x": torch.arange(50.0)}, {"n_updates": 5, "step": "dense"})})
        file = g.choice(sorted((place / "checkpoints" / "step-000000000005").iterdir()))
        data = file.read_bytes()
        at = g.randrange(len(data))
        file.write_bytes(data[:at] if g.random() < 0.5 else _flipped(data, at))

        def refused(place: Path = place) -> None:
            found = read_checkpoint(place)
            if found is not None and not found.runs and found.complaints:
                raise ValueError(found.complaints[0])

        yield f"checkpoint {file.name} at {at}", refused


WRONG_VALUES = (None, -1, 0, 1.5, "x", "../../x", [], {}, True, 10**12, -(10**30), [[]], {"x": 1})


def store_cases(folder: Path, lm: prolu.LanguageModel, blocks: prolu.TokenBlocks) -> Iterator[Case]:
    """A store of activations at two hooks, its index and its shards damaged, one way each."""
    hooks = ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"]
    good = folder / "store"
    prolu.harvest(lm, blocks, good, hooks=hooks, dtype="fp32", shard_tokens=8192, progress=False)
    index = json.loads((good / "store.json").read_text())
    texts = {"empty": "", "cut": json.dumps(index)[:-9], "list": "[]", "null": "null", "deep": "[" * 100_000}
    for key in ("hooks", "d_in", "dtype", "n_blocks", "blocks_per_shard", "ctx", "lm_batch_tokens", "lm_digest"):
        rest = {k: v for k, v in index["made"].items() if k != key}
        texts[f"{key} missing"] = json.dumps(index | {"made": rest})
        for value in WRONG_VALUES:
            texts[f"{key}={value!r}"] = json.dumps(index | {"made": rest | {key: value}})
    for value in (*WRONG_VALUES, index["shards"][:-1], index["shards"] * 2, index["shards"][::-1]):
        texts[f"shards={str(value)[:40]}"] = json.dumps(index | {"shards": value})
    texts["hooks swapped"] = json.dumps(index | {"made": index["made"] | {"hooks": hooks[::-1]}})
    texts["a digest"] = json.dumps(index).replace(index["shards"][0][0]["sha256"], "0" * 64)
    texts["another file"] = json.dumps(index).replace(f"{hooks[0]}/00001", f"{hooks[0]}/../../../00001")
    number = 0

    def damaged(name: str, damage: Callable[[Path], object]) -> Case:
        nonlocal number
        number += 1
        place = folder / f"store-{number}"
        shutil.copytree(good, place)
        damage(place)

        def use() -> None:
            store = prolu.ActivationStore(place)
            wrong = store.verify()
            for hook in hooks:
                try:
                    prolu.ActivationStream(lm.at(hook), store.blocks(), 64, window_tokens=2048, source=store)[40]
                except OSError as problem:  # what a run is stopped by whose files are no longer what they were
                    if not wrong:
                        raise
                    raise ValueError(str(problem)) from None
            if wrong:
                raise ValueError(f"not what was written: {wrong}")

        return f"store {name}", use

    for name, text in texts.items():
        yield damaged(f"index: {name}", lambda place, t=text: (place / "store.json").write_text(t))
    shard, other = (f"{hook}/00001.safetensors" for hook in hooks)
    whole = (good / shard).read_bytes()
    acts = torch.ones(index["made"]["blocks_per_shard"], 32, 16)
    contents = {f"cut at {n}": whole[:n] for n in (0, 1, 8, 9, 100, len(whole) // 2, len(whole) - 1)}
    contents |= {f"flipped at {n}": _flipped(whole, n) for n in (0, 7, 8, 20, 200, len(whole) // 2, len(whole) - 1)}
    contents |= {
        "of another type": save({"acts": acts.half()}), "of integers": save({"acts": acts.int()}),
        "one row more": save({"acts": torch.cat([acts, acts[:1]])}), "of one dimension": save({"acts": acts.flatten()}),
        "under another name": save({"x": acts}), "of nothing": save({}), "of other numbers": save({"acts": acts}),
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.", "more data": whole + b"more", "text": b"hello",
        "of another hook": (good / other).read_bytes(), "a huge header": struct.pack("<Q", 2**62) + whole[8:],
        "a deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    }  # fmt: skip
    for name, data in contents.items():
        yield damaged(f"shard {name}", lambda place, d=data: (place / shard).write_bytes(d))
    yield damaged("shard gone", lambda place: (place / shard).unlink())
    yield damaged("hook gone", lambda place: shutil.rmtree(place / hooks[1]))
    yield damaged("hook a file", lambda p: (shutil.rmtree(p / hooks[1]), (p / hooks[1]).write_text("x")))
    yield damaged("tokens gone", lambda place: shutil.rmtree(place / "tokens"))
    for file in ("train.bin", "held_out.bin", "blocks.json"):
        yield damaged(f"tokens {file} cut", lambda p, f=file: (p / "tokens" / f).write_bytes(b"\0" * 7))
    yield damaged("shards swapped", lambda p: _swap(p / shard, p / hooks[0] / "00000.safetensors"))
    yield damaged("hooks' folders swapped", lambda place: _swap(place / hooks[0], place / hooks[1]))
    (folder / "foreign").mkdir()
    (folder / "foreign/thesis.txt").write_text("mine")
    for change in (
        {"out": folder / "foreign"}, {"out": folder / "good.parquet"}, {"out": folder / "good.parquet/x"}, {"dtype": "int8"},
        {"shard_tokens": 0}, {"shard_tokens": -5}, {"hooks": ["x"]}, {"hooks": hooks[:1] * 2}, {"hooks": ["blocks.9.hook_mlp_out"]},
        {"out": good, "dtype": "fp16"}, {"out": good, "hooks": hooks[:1]}, {"out": good, "shard_tokens": 2**14},
    ):  # fmt: skip
        asked = {"out": folder / "new", "hooks": hooks, "dtype": "fp32", "progress": False} | change
        yield f"harvest {change}", lambda a=asked: prolu.harvest(lm, blocks, **a)


def _swap(one: Path, other: Path) -> None:
    kept = one.with_name("kept")
    one.rename(kept)
    other.rename(one)
    kept.rename(other)


def block_cases(folder: Path, tokenizer: object) -> Iterator[Case]:
    """A folder of token blocks, its index and its ids damaged."""
    good = folder / "blocks"
    prolu.load_blocks(str(folder / "stories.txt"), tokenizer, ctx=32, folder=good)
    index = json.loads((good / "blocks.json").read_text())
    texts = {"empty": "", "cut": json.dumps(index)[:-9], "list": "[]", "null": "null", "deep": "[" * 100_000}
    for key in ("made", "dtype", "n_blocks", "sha256", "progress"):
        texts[f"{key} missing"] = json.dumps({k: v for k, v in index.items() if k != key})
        for value in WRONG_VALUES:
            texts[f"{key}={value!r}"] = json.dumps(index | {key: value})
    for dtype in ("int16", "float16", ">u2", "uint32", "O", "U10", "M8[s]", "u2,u2"):
        texts[f"dtype={dtype}"] = json.dumps(index | {"dtype": dtype})
    for counts in ([1], [1, 1], [0, 0], [-1, 5], index["n_blocks"][::-1], [10**30, 1], ["a", "b"], [1.0, 2.0]):
        texts[f"n_blocks={counts}"] = json.dumps(index | {"n_blocks": counts})
    for key in ("ctx", "source", "text_column", "split", "eval_split", "max_train_tokens"):
        rest = {k: v for k, v in index["made"].items() if k != key}
        texts[f"made.{key} missing"] = json.dumps(index | {"made": rest})
        for value in WRONG_VALUES:
            if not isinstance(value, type(index["made"][key])):
                texts[f"made.{key}={value!r}"] = json.dumps(index | {"made": rest | {key: value}})
    for key in ("held_out_pool", "held_out_fraction"):  # folders of an earlier version lack them
        for value in (None, -1, "x", [], {}, True, float("nan"), -(10**30)):
            texts[f"made.{key}={value!r}"] = json.dumps(index | {"made": index["made"] | {key: value}})
    number = 0

    def damaged(name: str, file: str, data: bytes) -> Case:
        nonlocal number
        number += 1
        place = folder / f"blocks-{number}"
        shutil.copytree(good, place)
        (place / file).write_bytes(data)
        return f"blocks {name}", lambda: prolu.load_blocks(str(place), tokenizer, ctx=32)

    for name, text in texts.items():
        yield damaged(f"index: {name}", "blocks.json", text.encode())
    for file in ("train.bin", "held_out.bin"):
        whole = (good / file).read_bytes()
        for n in (0, 1, 63, 64, len(whole) - 64, len(whole) - 1):
            yield damaged(f"{file} cut at {n}", file, whole[:n])
            yield damaged(f"{file} flipped at {n}", file, _flipped(whole, min(n, len(whole) - 1)))
        yield damaged(f"{file} longer", file, whole + bytes(64))
        yield damaged(f"{file} of zeros", file, bytes(len(whole)))
    for ctx in (16, 64):
        yield f"blocks of another ctx {ctx}", lambda c=ctx: prolu.load_blocks(str(good), tokenizer, ctx=c)
    for source in (3, None, {}, {"train": 3}, ["a"], b"stories.txt"):
        yield f"data {source!r}", lambda s=source: prolu.load_blocks(s, tokenizer, ctx=32)


def interop_cases(folder: Path) -> Iterator[Case]:
    """Folders of other libraries that are damaged, or say what ours cannot."""
    from support.foreign_saes import BROKEN, write_dictionary_learning, write_saelens, write_sparsify

    places = {name: write(folder / f"interop-{i}" / "theirs") for i, (name, (write, _)) in enumerate(BROKEN.items())}
    writers = {"saelens": write_saelens, "sparsify": write_sparsify}
    writers["dictionary_learning"] = lambda place: write_dictionary_learning(place, "JumpReluAutoEncoder")
    for format, write in writers.items():
        good = write(folder / f"interop-{format}" / "theirs")
        for file in sorted(good.iterdir()):
            content = file.read_bytes()
            damaged = {f"cut at {n}": content[:n] for n in (0, 1, 7, 8, 9, len(content) // 2, len(content) - 2)}
            damaged |= {
                "rubbish": b"\xff" * 200,
                "null": b"null",
                "deep": b"[" * 10**5,
                "zip": b"PK\x03\x04" + bytes(99),
            }
            for name, data in damaged.items():
                place = folder / f"interop-{format}-{file.name}-{name}".replace(" ", "-") / "theirs"
                shutil.copytree(good, place)
                (place / file.name).write_bytes(data)
                places[f"{format} {file.name} {name}"] = place
    places["ae.pt of a gigabyte"] = write_dictionary_learning(folder / "interop-bomb" / "theirs", "AutoEncoder")
    with zipfile.ZipFile(places["ae.pt of a gigabyte"] / "ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**30))
    for name, place in places.items():
        yield f"import {name}", lambda p=place: run_command(["import", str(p), "--out", str(p.parent / "ours")])


def cli_cases(folder: Path, lm: Path, run: Callable[[list[str]], None]) -> Iterator[Case]:
    """The command line."""
    out = ["--out", str(folder / "cli")]
    source = [
        "--lm",
        str(lm),
        "--data",
        str(folder / "stories.txt"),
        "--hook",
        "blocks.1.hook_resid_pre",
        "--ctx",
        "32",
    ]
    train = ["train", *source, "--n-tokens", "640", "--batch-size", "64", "--d-sae", "16", *out]
    for flags in (
        ["--d-sae", "0"], ["--d-sae", "-1"], ["--d-sae", "x"], ["--n-tokens", "0"], ["--n-tokens", "1"], ["--lr", "nan"],
        ["--lr", "-1"], ["--lr", "0"], ["--coeff", "nan"], ["--coeff", "inf"], ["--penalty", "l2"], ["--penalty", ""],
        ["--nonlinearity", "prolu(1,2)"], ["--nonlinearity", "prolu(a,b,c)"], ["--step", "fast"], ["--precision", "fp8"],
        ["--normalisation", "layer"], ["--batch-size", "0"], ["--batch-size", "-3"], ["--ctx", "1"], ["--ctx", "9999"],
        ["--threads", "0"], ["--threads", "-2"], ["--eval-tokens", "0"], ["--eval-tokens", "-1"], ["--window-tokens", "3"],
        ["--split", "nope"], ["--eval-split", "train"], ["--text-column", "title", "--data", str(folder / "good.parquet")],
        ["--checkpoint-minutes", "-1"], ["--warmup-fraction", "2"], ["--resample-fractions", "2"], ["--lm", ""],
        ["--hook", ""], ["--data", ""], ["--data"], ["--data", "a.txt", "b.txt"], ["--data", str(folder / "stories.txt"), str(folder)],
        ["--data", "builtin", "builtin"], ["--data", "a/b", "a/c"], ["--out", "/dev/null/x"], ["--out", str(folder / "good.parquet")], ["--nonsense"],
        ["--hook"], ["--hook", "blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out"], ["--hook", "blocks.1.hook_mlp_out", "x"],
        ["--store", "nowhere"], ["--store", str(folder / "good")], ["--tokens", str(folder / "good")], ["--acts-dtype", "int8"],
        ["--resample-second-moment", "median"], ["--max-grad-norm", "0"], ["--decay-start-fraction", "3"],
    ):  # fmt: skip
        yield f"train {' '.join(flags)[:60]}", lambda f=flags: run([*train, *f])
    for args in (
        [], ["nonsense"], ["sweep"], ["sweep", "nonsense"], ["sweep", "demo", "--scale", "0"], ["sweep", "demo", "--scale", "nan"],
        ["sweep", "demo", "--scale", "-1"], ["sweep", "demo", "--json"], ["sweep", "experiment1", "--dry-run", "--lm", "nowhere/x"],
        ["eval"], ["eval", "nowhere"], ["eval", str(folder)], ["report"], ["report", "nowhere"], ["report", str(folder / "good.parquet")],
        ["harvest"], ["harvest", *source, "--out", str(folder / "good")], ["harvest", *source, *out, "--hook"],
        ["harvest", *source, *out, "--hook", "x"], ["harvest", *source, *out, "--dtype", "int8"],
        ["harvest", *source, *out, "--n-tokens", "-1"], ["harvest", *source, *out, "--json"],
        ["harvest", *source, *out, "--n-tokens", str(10**15)], ["harvest", *source, *out, "--ctx", "9999"],
        ["eval", str(folder / "good"), "--lm", "/nowhere"], ["eval", str(folder / "good"), "--like", "nowhere"],
        ["eval", str(folder / "good"), "--eval-tokens", "0"], ["eval", str(folder / "good"), "--converged"],
        ["export"], ["export", "nowhere", "--format", "saelens", *out], ["export", str(folder / "good"), "--format", "onnx", *out],
        ["export", str(folder / "good"), "--format", "dictionary_learning", *out], ["import"], ["import", "nowhere", *out],
        ["demo", "--out", "/dev/null/x"], ["report", "a", "b"],
    ):  # fmt: skip
        yield f"prolu {' '.join(args)[:60]}", lambda a=args: run(a)


def run_command(args: list[str]) -> None:
    """Runs a command in this process; exit code 2 with one sentence and no traceback becomes ValueError."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(args)
        except SystemExit as end:
            code = end.code
    if code == 2 and said.getvalue().strip() and "Traceback" not in said.getvalue():
        raise ValueError(said.getvalue())
    raise AssertionError(f"exit code {code}: {said.getvalue()[-300:]}")


def run_process(args: list[str]) -> None:
    """The same with a process of its own, as a user would."""
    done = subprocess.run(
        [sys.executable, "-m", "prolu", *args], capture_output=True, text=True, check=False, timeout=SECONDS + START_UP
    )
    if done.returncode == 2 and done.stderr.strip() and "Traceback" not in done.stderr:
        raise ValueError(done.stderr)
    raise AssertionError(f"exit code {done.returncode}: {done.stderr[-300:]}")


class TooSlowError(Exception):
    """More than ten seconds."""


def answer(name: str, work: Callable[[], object]) -> str | None:
    """What was wrong with the way an input was met; None if nothing."""

    def too_slow(*_: object) -> None:
        raise TooSlowError

    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS + START_UP if name.startswith("as a process") else SECONDS)
    try:
        work()
    except ValueError as problem:
        return None if str(problem).strip() else "an empty message"
    except TooSlowError:
        return f"more than {SECONDS} s"
    except BaseException as problem:  # whatever else: that is the finding
        return f"{type(problem).__name__}: {str(problem)[:300]}"
    finally:
        signal.alarm(0)
    return "accepted"


def main_() -> int:
    """All inputs; returns the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="prolu-fuzz-"))
    lm_folder = models.write_model(folder / "lm")
    models.write_stories(folder / "stories.txt")
    lm = prolu.LanguageModel(lm_folder, "blocks.1.hook_resid_pre")
    blocks = prolu.load_blocks(str(folder / "stories.txt"), lm.tokenizer, ctx=32)
    stream = prolu.ActivationStream(lm, blocks, batch_size=64, window_tokens=2048)
    study = prolu.run_sweep(
        [prolu.RunConfig(d_sae=24, n_tokens=640)], stream, folder / "study", eval_tokens=320, progress=False
    )
    shutil.copytree(study.runs[0].folder, folder / "good")
    cases = [
        *config_cases(), *sae_cases(folder, folder / "good"), *results_cases(folder, folder / "study"), *stranger_cases(folder, folder / "study"),
        *data_cases(folder, lm.tokenizer), *lm_cases(folder, lm_folder), *api_cases(lm, blocks, folder),
        *checkpoint_cases(folder), *store_cases(folder, lm, blocks), *block_cases(folder, lm.tokenizer), *cli_cases(folder, lm_folder, run_command), *interop_cases(folder),
    ]  # fmt: skip
    processes = [(f"as a process: {name}", work) for name, work in cli_cases(folder, lm_folder, run_process)]
    cases += processes[::2][:30]
    failures = 0
    for name, work in cases:
        before = sorted(p for p in folder.rglob("*"))
        problem = answer(name, work)
        if problem is None and sorted(p for p in folder.rglob("*")) != before:
            problem = f"wrote {sorted(set(folder.rglob('*')) - set(before))}"
        if problem:
            failures += 1
            print(f"{name}: {problem}", flush=True)
    if (folder / "owned").exists() or Path("/tmp/owned").exists():
        failures += 1
        print("code from a file was run")
    shutil.rmtree(folder)
    print(f"inputs {len(cases)}, failures {failures}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main_())
