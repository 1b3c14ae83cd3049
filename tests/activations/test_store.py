"""Activations on the disk are the live ones, to the bit; a harvest that was interrupted ends as if it had not been."""

import json
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from prolu import ActivationStore, ActivationStream, LanguageModel, RunConfig, grid, harvest, load_blocks
from prolu.activations.harvesting import Harvest
from prolu.activations.packing import ReadingStoppedError
from prolu.activations.store_writer import HarvestStoppedError
from prolu.cli.entry_point import main
from support.commands import flags, text_flags
from support.interruptions import before_disk_operations, dies_at_disk_operation, disk_operations
from support.sweeps import contents, sweep

HOOKS = ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")
WINDOW = 1024


@pytest.fixture(scope="module")
def lm(many_passes_lm):
    return many_passes_lm


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16"])
def store(request, lm, tiny_blocks, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / request.param
    return harvest(lm, tiny_blocks, out, hooks=HOOKS, dtype=request.param, shard_tokens=1000, progress=False)


def same_batch(a, b):
    return torch.equal(a.acts, b.acts) and torch.equal(a.raw_norm, b.raw_norm)


@pytest.mark.parametrize("hook", HOOKS)
def test_batches_from_a_store_are_the_live_ones_to_the_bit(store, lm, tiny_blocks, hook):
    assert store.n_shards > 3
    there = lm.at(hook)
    live = ActivationStream(there, tiny_blocks, 64, 3, WINDOW, acts_dtype=store.dtype)
    kept = ActivationStream(there, store.blocks(), 64, 3, WINDOW, source=store)
    assert live.describe() == kept.describe() | {"data": live.describe()["data"]}
    n = live.batches_per_epoch
    for i in (0, 1, n - 1, n, 2 * n - 1, 5):
        assert same_batch(live[i], kept[i])
    fresh = [list(stream.fresh(2000, "resample", 7)) for stream in (live, kept)]
    assert len(fresh[0]) == len(fresh[1]) > 1
    assert all(same_batch(a, b) for a, b in zip(*fresh, strict=True))


def test_a_sweep_over_a_store_is_the_live_one_to_the_bit(store, lm, tiny_blocks, tmp_path):
    runs = grid(RunConfig(d_sae=40, n_tokens=3200, coeff=0.02), nonlinearity=["relu", "prolu_ste"])
    streams = {
        "live": ActivationStream(lm, tiny_blocks, 64, acts_dtype=store.dtype),
        "kept": ActivationStream(lm, store.blocks(), 64, source=store),
    }
    for name, stream in streams.items():
        sweep(runs, stream, tmp_path / name)
    assert len(contents(tmp_path / "live")) > 8
    assert contents(tmp_path / "kept") == contents(tmp_path / "live")


def test_a_sweep_over_a_store_leaves_the_language_model_alone(store, lm, monkeypatch):
    stream = ActivationStream(lm, store.blocks(), 64, source=store)
    monkeypatch.setattr(LanguageModel, "activations_at", None)
    assert stream[stream.batches_per_epoch].acts.isfinite().all()


def test_the_store_holds_what_the_model_gives_in_one_pass_for_all_hooks(lm, tiny_blocks, tmp_path, monkeypatch):
    passes = []
    plain = lm._model.base_model.forward
    monkeypatch.setattr(lm._model.base_model, "forward", lambda *a, **k: passes.append(1) or plain(*a, **k))
    widths_known_after = len(HOOKS)
    store = harvest(lm, tiny_blocks, tmp_path / "s", hooks=HOOKS, dtype="fp32", shard_tokens=1024, progress=False)
    assert len(passes) - widths_known_after == -(-len(tiny_blocks.train) // 8)
    for hook in HOOKS:
        kept = torch.cat([piece.clone() for piece in store.at(hook, np.arange(len(tiny_blocks.train)))])
        torch.testing.assert_close(kept, lm.at(hook).activations(tiny_blocks.train), rtol=1e-6, atol=1e-6)
    assert store.verify() == []
    names = sorted(p.name for p in (tmp_path / "s").iterdir() if not p.name.startswith("."))
    assert names == sorted([*HOOKS, "store.json", "tokens"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blocks_activations_do_not_depend_on_its_company(tiny_lm_folder, tiny_blocks, dtype):
    lm = LanguageModel(tiny_lm_folder, HOOKS[0], batch_tokens=256, dtype=dtype)
    source, n = Harvest(lm, tiny_blocks, HOOKS), len(tiny_blocks.train)
    straight = [torch.cat(pieces) for pieces in zip(*source.all_hooks(np.arange(n)), strict=True)]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy()[: n - 3]
    for i, hook in enumerate(HOOKS):
        assert torch.equal(torch.cat(list(source.at(hook, order))), straight[i][order])


def test_streams_at_several_hooks_share_one_pass(lm, tiny_blocks, monkeypatch):
    shared = Harvest(lm, tiny_blocks, HOOKS)
    streams = [ActivationStream(lm.at(hook), tiny_blocks, 64, 3, WINDOW, source=shared) for hook in HOOKS]
    alone = [ActivationStream(lm.at(hook), tiny_blocks, 64, 3, WINDOW) for hook in HOOKS]
    n = []
    plain = LanguageModel.activations_at
    monkeypatch.setattr(LanguageModel, "activations_at", lambda *a: n.append(1) or plain(*a))
    batches = [[stream[i] for stream in streams] for i in (0, 1, 15, 16)]
    assert len(n) == 2 * WINDOW // 256
    for i, row in zip((0, 1, 15, 16), batches, strict=True):
        assert all(same_batch(batch, stream[i]) for batch, stream in zip(row, alone, strict=True))


def test_a_harvest_that_dies_anywhere_ends_byte_identical(lm, stories_file, tmp_path):
    blocks = load_blocks(str(stories_file), lm.tokenizer, ctx=32, max_train_tokens=6000)
    arguments = {"hooks": HOOKS[:2], "dtype": "bf16", "shard_tokens": 500, "progress": False}
    harvest(lm, blocks, tmp_path / "whole", **arguments)
    n_operations = len(disk_operations(lambda: harvest(lm, blocks, tmp_path / "counted", **arguments)))
    assert n_operations > 40
    for at in range(0, n_operations, 3):
        dies_at_disk_operation(at, lambda: harvest(lm, blocks, tmp_path / "killed", **arguments))
        harvest(lm, blocks, tmp_path / "killed", **arguments)
        assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "killed")


def full_disk(operation, file):
    def observe(name, path):
        if name == operation and file in str(path):
            raise OSError(28, "No space left on device")

    return before_disk_operations(observe)


@pytest.mark.parametrize(("operation", "file"), [("write", "00001"), ("rename", "00001"), ("write", "store.json")])
def test_a_full_disk_ends_a_harvest_in_one_sentence_and_it_resumes(lm, tiny_blocks, tmp_path, operation, file):
    def write(folder):
        return harvest(lm, tiny_blocks, folder, shard_tokens=640, progress=False)

    write(tmp_path / "wanted")
    with full_disk(operation, file), pytest.raises(HarvestStoppedError, match="No space left on device") as stopped:
        write(tmp_path / "store")
    assert str(stopped.value).endswith("; finished shards are kept; harvest the same again to resume")
    assert (stopped.value.errno, stopped.value.__cause__) == (28, None)
    write(tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "wanted")


@pytest.mark.parametrize(("operation", "file"), [("write", "train.bin"), ("rename", "blocks.json")])
def test_a_full_disk_ends_the_reading_of_text_in_one_sentence(tiny_lm, stories_file, tmp_path, operation, file):
    def read(folder):
        return load_blocks(stories_file, tiny_lm.tokenizer, 32, max_train_tokens=3000, folder=folder)

    wanted = read(tmp_path / "wanted").digest()
    with full_disk(operation, file), pytest.raises(ReadingStoppedError, match="No space left") as stopped:
        read(tmp_path / "blocks")
    assert str(stopped.value).endswith("read the same text into the same folder again to resume")
    assert read(tmp_path / "blocks").digest() == wanted


def test_a_full_disk_while_text_is_tokenised_is_no_wrong_request(tiny_lm_folder, stories_file, tmp_path, capsys):
    where = ["--lm", str(tiny_lm_folder), "--data", str(stories_file), "--hook", "blocks.1.hook_resid_pre"]
    with full_disk("write", "train.bin"):
        assert main(["harvest", *where, "--ctx", "32", "--n-tokens", "3000", "--out", str(tmp_path / "store")]) == 1
    assert "No space left on device; what was finished is saved; run the same command again" in capsys.readouterr().err


def test_going_on_does_not_harvest_again(lm, tiny_blocks, tmp_path, monkeypatch):
    arguments = {"dtype": "fp32", "shard_tokens": 1024, "progress": False}
    harvest(lm, tiny_blocks, tmp_path / "s", **arguments)
    index = json.loads((tmp_path / "s/store.json").read_text())
    index["shards"] = index["shards"][:-2]
    (tmp_path / "s/store.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"2 of \d+ shards are missing"):
        ActivationStore(tmp_path / "s")
    n = []
    plain = LanguageModel.activations_at
    monkeypatch.setattr(LanguageModel, "activations_at", lambda *a: n.append(1) or plain(*a))
    harvest(lm, tiny_blocks, tmp_path / "s", **arguments)
    assert 4 < len(n) <= 8


@pytest.fixture
def small(lm, tiny_blocks, tmp_path):
    harvest(lm, tiny_blocks, tmp_path / "s", dtype="fp16", shard_tokens=1024, progress=False)
    return tmp_path / "s"


def test_other_requests_are_refused(small, lm, tiny_blocks, tiny_lm, stories_file, tmp_path):
    before = contents(small)
    for words, change in (
        ("holds another store: dtype is 'fp16' there, 'fp32' here", {"dtype": "fp32"}),
        ("holds another store: d_in", {"hooks": HOOKS}),
        ("holds another store: blocks_per_shard", {"shard_tokens": 512}),
        ("one is listed twice", {"hooks": HOOKS[:1] * 2}),
        ("must be at least 1", {"shard_tokens": 0}),
        ("acts_dtype 'int8': choose one of fp32, bf16, fp16", {"dtype": "int8"}),
    ):
        with pytest.raises(ValueError, match=words):
            harvest(lm, tiny_blocks, small, **({"dtype": "fp16", "shard_tokens": 1024, "progress": False} | change))
    store = ActivationStore(small)
    with pytest.raises(ValueError, match="holds other activations: lm_batch_tokens is 256 there, 8192 here"):
        ActivationStream(tiny_lm, store.blocks(), 64, source=store)
    with pytest.raises(ValueError, match=f"the store .* has {HOOKS[0]}"):
        ActivationStream(lm.at(HOOKS[1]), store.blocks(), 64, source=store)
    other = load_blocks(str(stories_file), lm.tokenizer, ctx=16)
    with pytest.raises(ValueError, match="holds other activations: data_digest"):
        ActivationStream(lm, other, 64, source=store)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty, and not a store"):
        harvest(lm, tiny_blocks, tmp_path / "mine", progress=False)
    assert contents(small) == before


def test_damage_is_named(small, lm, tiny_blocks):
    good = (small / "store.json").read_text()
    shard = small / HOOKS[0] / "00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40] + b"\1" * 40)
    assert ActivationStore(small).verify() == [f"{HOOKS[0]}/00001.safetensors"]
    for at in (-1, -900, len(whole) // 2):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        shard.write_bytes(flipped)
        opened = ActivationStore(small)  # the size is right, and nothing is read yet
        assert len(next(opened.at(HOOKS[0], np.array([1])))) == 1  # of another shard
        with pytest.raises(OSError, match=r"00001.safetensors: not what was written \(SHA-256\)"):
            next(opened.at(HOOKS[0], np.array([40])))
    assert main(["harvest", "--out", str(small), "--verify"]) == 2
    shard.write_bytes(whole)
    assert main(["harvest", "--out", str(small), "--verify"]) == 0
    for broken in (whole[:-8], whole[:5], b""):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=r"00001.safetensors cannot be read"):
            ActivationStore(small)
    shard.write_bytes(whole)
    opened, chosen = ActivationStore(small), np.array([40])
    next(opened.at(HOOKS[0], chosen))  # verified while it is whole
    shard.write_bytes(whole[:-2000])
    with pytest.raises(OSError, match=r"00001.safetensors: shorter than it was"):
        [list(opened.at(HOOKS[0], np.array([i]))) for i in range(32, 64)]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001.safetensors"):
        next(opened.at(HOOKS[0], chosen))
    with pytest.raises(ValueError, match=r"00001.safetensors cannot be read"):
        ActivationStore(small)
    for index in ("{", "[]", "{}", '{"made": {"hooks": 3}, "shards": []}'):
        (small / "store.json").write_text(index)
        with pytest.raises(ValueError, match=r"store\.json: not"):
            ActivationStore(small)
    for name, value in (
        ("n_blocks", "many"), ("blocks_per_shard", 0), ("ctx", None), ("dtype", "int8"), ("hooks", []),
        ("hooks", ["x"]), ("d_in", {}), ("d_in", 3), ("lm", None), ("lm_dtype", 16), ("lm_batch_tokens", True),
    ):  # fmt: skip
        index = json.loads(good)
        index["made"][name] = value
        (small / "store.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"store\.json: not the index of a store"):
            ActivationStore(small)
        with pytest.raises(ValueError, match=r"store\.json: not the index of a store"):
            harvest(lm, tiny_blocks, small, dtype="fp16", shard_tokens=1024, progress=False)
    with pytest.raises(ValueError, match="no store here"):
        ActivationStore(small / "nothing")


def test_a_disk_without_room_is_refused_before_anything_is_written(lm, tiny_blocks, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, 10**5))
    with pytest.raises(ValueError, match=r"needs 0\.0 GB, its disk has 0\.0 GB free; harvest fewer tokens or hooks"):
        harvest(lm, tiny_blocks, tmp_path / "s", hooks=HOOKS, dtype="fp32", progress=False)
    assert not (tmp_path / "s").exists()


def test_what_does_not_fit_into_the_number_format_stops_the_harvest(lm, tiny_blocks, tmp_path, monkeypatch):
    plain = LanguageModel.activations_at
    monkeypatch.setattr(LanguageModel, "activations_at", lambda *a: [1e5 * acts for acts in plain(*a)])
    with pytest.raises(FloatingPointError, match=r"hook_resid_pre are not finite as fp16, .* another number format"):
        harvest(lm, tiny_blocks, tmp_path / "s", dtype="fp16", progress=False)
    harvest(lm, tiny_blocks, tmp_path / "t", dtype="bf16", progress=False)


def test_only_blocks_of_the_window_to_come_are_announced(small, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, how: asked.append((at, size)))
    store = ActivationStore(small)
    store.expect(HOOKS[0], np.array([40, 3, 4]))
    n_bytes, per_shard = 32 * 16 * 2, 32
    starts = [at % n_bytes for at, _ in asked]
    assert [size for _, size in asked] == [n_bytes] * 3
    assert len(set(starts)) == 1
    assert [at // n_bytes for at, _ in asked] == [3, 4, 40 - per_shard]


def test_harvest_and_train_from_the_command_line(tiny_lm_folder, stories_file, tmp_path, capsys):
    size = {"hook": HOOKS[:2], "n_tokens": 5000, "dtype": "fp32"}
    store = ["harvest", *text_flags(tiny_lm_folder, stories_file, **size), "--out"]
    assert main([*store, str(tmp_path / "s"), "--dry-run", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["disk"] == 5000 * (2 * 16 * 4 + 4)
    assert cost["seconds"] > 0
    assert not (tmp_path / "s").exists()
    assert main([*store, str(tmp_path / "s")]) == 0
    assert main([*store, str(tmp_path / "s")]) == 0  # again: nothing to do
    train = ["train", *flags(d_sae=40, n_tokens=3840, batch_size=64, eval_tokens=640), "--out"]
    assert main([*train, str(tmp_path / "kept"), "--hook", HOOKS[1], "--store", str(tmp_path / "s")]) == 0
    live = text_flags(tiny_lm_folder, tmp_path / "s/tokens", hook=HOOKS[1])
    assert main([*train, str(tmp_path / "live"), *live]) == 0
    kept, live = ((tmp_path / name / "results.jsonl").read_bytes() for name in ("kept", "live"))
    assert kept == live
    capsys.readouterr()
    for wrong, words in (
        ([*train, str(tmp_path / "x"), "--store", str(tmp_path / "s")], f"has {HOOKS[0]}, {HOOKS[1]}"),
        ([*train, str(tmp_path / "x"), "--store", str(tmp_path / "no")], "no store here"),
        (
            ["fp16" if part == "fp32" else part for part in [*store, str(tmp_path / "s")]],
            "dtype is 'fp32' there, 'fp16' here",
        ),
        ([*store, str(tmp_path / "s/store.json/x")], "is a file"),
        ([*store, str(tmp_path / "x"), "--n-tokens", "0"], "n_tokens 0: must be at least 1"),
        ([*store, str(tmp_path / "x"), "--json"], "only with --dry-run"),
    ):
        assert main(wrong) == 2, wrong
        problem = capsys.readouterr().err
        assert words in problem
        assert not (tmp_path / "x").exists()
