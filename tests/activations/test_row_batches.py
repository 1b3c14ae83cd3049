"""Rows that come in batches, from a DataLoader or an iterator."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import prolu
from prolu.activations.row_batches import as_arrays
from prolu.activations.row_files import open_rows

ROWS = np.random.default_rng(0).normal(size=(1000, 6)).astype(np.float32)
RUN = prolu.RunConfig(nonlinearity="relu", coeff=0.01, d_sae=16, n_tokens=6400)


def in_batches(rows, n=64):
    return (rows[i : i + n] for i in range(0, len(rows), n))


def loader(rows=ROWS, *, shuffle=False):
    """A DataLoader of (x, y)."""
    data = TensorDataset(torch.from_numpy(rows), torch.arange(len(rows)))
    return DataLoader(data, batch_size=96, shuffle=shuffle)


def sweep(stream, out):
    return prolu.run_sweep([RUN], stream, out, eval_tokens=100, progress=False, max_epochs=20)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("batches", [loader, lambda: in_batches(ROWS), lambda: map(torch.from_numpy, in_batches(ROWS))])
def test_batches_are_the_rows_in_their_order(batches, keep, tmp_path):
    stream = prolu.ActivationStream.from_rows(batches(), batch_size=32, keep=tmp_path / "kept" if keep else None)
    same = prolu.ActivationStream.from_rows(ROWS, batch_size=32)
    assert stream.describe() == same.describe()
    assert all(torch.equal(stream[i].acts, same[i].acts) for i in (0, 27, 30))


def test_a_buffer_that_is_filled_again_and_again():
    def batches():
        buffer = np.zeros((100, 6), np.float32)
        for rows in in_batches(ROWS, 100):
            buffer[:] = rows
            yield buffer

    assert np.array_equal(as_arrays("train", batches()).numpy(), ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_kept_rows_are_a_folder_of_rows(dtype, tmp_path):
    rows = torch.from_numpy(ROWS).to(dtype)
    train, held_out = rows[:900], rows[900:]
    stream = prolu.ActivationStream.from_rows(in_batches(train), in_batches(held_out), keep=tmp_path, batch_size=32)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["held_out.npy", "train.npy"]
    kept = np.load(tmp_path / "train.npy")
    assert kept.dtype == (np.float32 if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype)
    assert np.array_equal(kept, train.float().numpy() if dtype == torch.bfloat16 else train.numpy())
    opened = open_rows(str(tmp_path), 0, 0)  # what --activations takes
    assert opened.digest() == stream.blocks.digest()


def test_a_study_is_resumed_on_kept_rows_whatever_the_loader_does(tmp_path):
    def study(out, keep):
        return sweep(prolu.ActivationStream.from_rows(loader(shuffle=True), batch_size=64, keep=keep), tmp_path / out)

    before = study("kept", tmp_path / "rows").records
    assert study("kept", tmp_path / "rows").records == before
    study("shuffled", None)
    # Another order is another study, and is not taken for the same.
    with pytest.raises(ValueError, match=r"stream\.data_digest is"):
        study("shuffled", None)


def test_what_is_no_batch_is_refused_and_leaves_no_file(tmp_path):
    used = in_batches(ROWS)
    list(used)
    wrong = {
        "train: has no batches; an iterator that was read once": used,
        r"train: batch 0 must be an array \[n, d_in\].*but its shape is \[6\]": iter(
            TensorDataset(torch.from_numpy(ROWS))
        ),
        "train: batch 0 must be an array .*but it is a dict": iter([{"x": ROWS}]),
        r"train: batch 1 has rows of 5 torch.float32 numbers, and batch 0 of 6": iter([ROWS, ROWS[:, :5]]),
        r"train: batch 1 has rows of 6 torch.float64 numbers": iter([ROWS, ROWS.astype(np.float64)]),
    }
    for words, batches in wrong.items():
        with pytest.raises(ValueError, match=words):
            prolu.ActivationStream.from_rows(batches, keep=tmp_path / "rows")
    assert not list(tmp_path.rglob("*.npy*"))
    for batches, words in ((iter([ROWS * np.nan]), "not finite"), (iter([ROWS.astype(int)]), "convert them")):
        with pytest.raises(ValueError, match=words):
            prolu.ActivationStream.from_rows(batches)
