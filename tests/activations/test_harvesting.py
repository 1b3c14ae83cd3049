"""A harvest waits for the device once a window, and nothing that is not finite gets further."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prolu import ActivationStream, LanguageModel, harvest
from prolu.activations.harvesting import Harvest
from prolu.activations.windows import WindowNumber
from support.sweeps import HOOK

HOOKS = (HOOK, "blocks.2.hook_resid_post")


class Readings(TorchDispatchMode):
    """Counts the numbers read from a device, for each of which a GPU has to be waited for."""

    def __init__(self):
        super().__init__()
        self.n = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
            self.n[name] += 1
        return func(*args, **(kwargs or {}))


def readings(source, n_passes):
    """How often numbers were read in so many passes. On a CPU, a list of flags is read without an operation."""
    with Readings() as found:
        pieces = list(source.all_hooks(np.arange(n_passes * source.blocks_per_pass)))
    assert len(pieces) == n_passes
    return found.n.total()


def test_the_number_of_passes_makes_no_difference_to_how_often_the_device_is_waited_for(
    many_passes_lm, tiny_blocks, monkeypatch
):
    source = Harvest(many_passes_lm, tiny_blocks, HOOKS)
    # transformers itself reads a number in a pass, to see whether several texts are packed into one row.
    ids = torch.from_numpy(tiny_blocks.train[:8].astype(np.int64))
    with Readings() as of_a_pass:
        many_passes_lm.activations_at(HOOKS, ids)
    for n_passes in (2, 7):
        assert readings(source, n_passes) == n_passes * of_a_pass.n.total()
    monkeypatch.setattr(Harvest, "_check_finite", lambda harvest, passes, finite: [all(f) for f in finite.values()])
    assert readings(source, 7) == 7 * (of_a_pass.n.total() + len(HOOKS))  # one by one, they would be counted


def test_tokens_are_sent_once(many_passes_lm, tiny_blocks, monkeypatch):
    seen = []
    plain = LanguageModel.activations_at

    def noted(lm, hooks, ids):
        seen.append(ids)
        return plain(lm, hooks, ids)

    monkeypatch.setattr(LanguageModel, "activations_at", noted)
    source = Harvest(many_passes_lm, tiny_blocks)
    list(source.all_hooks(np.arange(3 * source.blocks_per_pass - 1)))
    assert len(seen) == 3
    assert len({ids.untyped_storage().data_ptr() for ids in seen}) == 1
    assert list(source.all_hooks(np.arange(0))) == []


@pytest.fixture
def poison(many_passes_lm, tiny_blocks, monkeypatch):
    """Make one activation of a training block infinite, at one of the hooks; the block is known by its tokens."""

    def spoil(block, at=0):
        plain = LanguageModel.activations_at
        tokens = torch.from_numpy(tiny_blocks.train[block].astype(np.int64))
        assert (tiny_blocks.train == tiny_blocks.train[block]).all(1).sum() == 1

        def spoilt(lm, hooks, ids):
            found = plain(lm, hooks, ids)
            found[at][(ids == tokens).all(1), 3, 5] = math.inf
            return found

        monkeypatch.setattr(LanguageModel, "activations_at", spoilt)

    return spoil


@pytest.mark.parametrize("at", [0, 1])
def test_the_error_names_hook_and_blocks_of_the_pass(many_passes_lm, tiny_blocks, poison, at):
    source = Harvest(many_passes_lm, tiny_blocks, HOOKS)
    chosen = np.arange(100, 140)[::-1].copy()  # five passes of eight blocks
    poison(114, at)  # in the fourth of them, of blocks 108 to 115
    handed_out = []
    with pytest.raises(FloatingPointError, match=rf"{HOOKS[at]} are not finite as fp32, among blocks \[108, .*115\]"):
        handed_out.extend(source.all_hooks(chosen))
    assert len(handed_out) == 4  # not the last: so whoever has all of them knows that they are finite


def test_one_pass_is_looked_at_before_it_is_handed_out(many_passes_lm, tiny_blocks, poison):
    poison(3)
    with pytest.raises(FloatingPointError, match=r"among blocks \[0, 1, 2, "):
        next(Harvest(many_passes_lm, tiny_blocks).all_hooks(np.arange(8)))


def test_nothing_of_such_a_window_is_trained_on(many_passes_lm, tiny_blocks, poison, monkeypatch):
    def fresh():
        return ActivationStream(many_passes_lm, tiny_blocks, 64, 3, 1024)

    stream, expected = fresh(), [fresh()[i].acts for i in (0, 17)]
    unique = np.unique(tiny_blocks.train, axis=0, return_index=True, return_counts=True)
    once = set(unique[1][unique[2] == 1].tolist())
    bad = next(block for block in stream._windows.blocks_of(WindowNumber(0, 1)).tolist() if block in once)
    with monkeypatch.context():
        poison(bad)
        assert torch.equal(stream[0].acts, expected[0])
        for _ in range(2):
            with pytest.raises(FloatingPointError, match=f"{bad}"):
                stream[17]
        assert torch.equal(stream[0].acts, expected[0])
        with pytest.raises(FloatingPointError):  # every block is drawn
            list(stream.fresh(tiny_blocks.train.size, "resample", 1))
    monkeypatch.undo()
    assert torch.equal(stream[17].acts, expected[1])


def test_nothing_of_such_a_shard_is_written(many_passes_lm, tiny_blocks, poison, tmp_path):
    poison(33)  # in the first pass of the second shard of 32 blocks
    with pytest.raises(FloatingPointError, match="33"):
        harvest(many_passes_lm, tiny_blocks, tmp_path / "s", dtype="fp32", shard_tokens=1024, progress=False)
    assert [file.name for file in (tmp_path / "s" / HOOK).iterdir()] == ["00000.safetensors"]
    assert len(json.loads((tmp_path / "s" / "store.json").read_text())["shards"]) == 1
