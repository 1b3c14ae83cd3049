"""Rows in files, and the rows that have a name."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prolu.activations.row_files import open_rows, width_of_rows
from prolu.activations.synthetic import HARD

X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


def all_of(blocks):
    return blocks[np.arange(len(blocks))].flatten(0, 1).numpy()


def test_one_file_of_either_kind_gives_the_same_rows(tmp_path):
    np.save(tmp_path / "x.npy", X)
    save_file({"anything": torch.from_numpy(X)}, tmp_path / "x.safetensors")
    one, other = (open_rows(str(tmp_path / f"x.{ending}"), 0, 0) for ending in ("npy", "safetensors"))
    assert one.digest() == other.digest()
    assert (one.n_train_tokens, one.n_held_out_tokens) == (45, 5)
    assert one.source == str(tmp_path / "x.npy")
    assert np.array_equal(np.sort(np.concatenate([all_of(one.train), all_of(one.held_out)]), 0), np.sort(X, 0))
    assert width_of_rows(str(tmp_path / "x.npy")) == 4


def test_a_folder_is_read_in_the_order_of_names_and_may_have_a_held_out_part(tmp_path):
    np.save(tmp_path / "b.npy", X[20:40])
    save_file({"x": torch.from_numpy(X[:20])}, tmp_path / "a.safetensors")
    (tmp_path / "notes.txt").write_text("not rows")
    drawn = open_rows(str(tmp_path), 0, 0)
    assert (drawn.n_train_tokens, drawn.n_held_out_tokens) == (36, 4)
    np.save(tmp_path / "held_out_1.npy", X[40:])
    rows = open_rows(str(tmp_path), 0, 0)
    assert np.array_equal(all_of(rows.train), X[:40])
    assert np.array_equal(all_of(rows.held_out), X[40:])
    assert width_of_rows(str(tmp_path)) == 4


def test_synthetic_rows_have_names_and_lengths():
    rows = open_rows("synthetic:hard", 10_000, 3000)
    assert rows.n_train_tokens >= 10_000 + 65_536
    assert rows.n_held_out_tokens == 3072
    described = rows.describe()
    assert described["data"] == "synthetic:hard"
    assert (described["max_train_tokens"], described["held_out_pool"]) == (10_000, 3000)
    assert described["synthetic"]["n_features"] == HARD.n_features
    assert width_of_rows("synthetic:hard") == HARD.d_in


def test_what_is_no_file_of_rows_is_refused(tmp_path):
    np.save(tmp_path / "flat.npy", X[0])
    np.save(tmp_path / "objects.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("text")
    (tmp_path / "x.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "two.safetensors")
    for name, complaint in (
        ("flat.npy", r"must be an array \[n_rows, d_in\]"),
        ("objects.npy", r"objects\.npy': cannot be read"),
        ("text.npy", r"text\.npy': cannot be read"),
        ("x.csv", r"x\.csv': must end in \.npy or \.safetensors"),
        ("two.safetensors", r"must hold one tensor, but holds a, b"),
        ("empty", "no file or folder of rows to train on"),
        ("missing.npy", "no file or folder of rows to train on"),
    ):
        for ask in (width_of_rows, lambda name: open_rows(name, 1, 1)):
            with pytest.raises(ValueError, match=complaint):
                ask(str(tmp_path / name))
    with pytest.raises(ValueError, match="activations 'synthetic:soft': choose one of synthetic:easy, synthetic:hard"):
        open_rows("synthetic:soft", 1, 1)
