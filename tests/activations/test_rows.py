"""Rows that come from no language model: the stream over them is that of any source."""

import numpy as np
import pytest
import torch

from prolu import ActivationStream
from prolu.activations.rows import rows_of_arrays
from prolu.sae.scaling import normalise


def some_rows(n=1000, d_in=6, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(n, d_in)).astype(dtype)


def numbered_rows(n, d_in=3):
    """Rows whose norm is their number, from 1 on."""
    return np.pad(np.arange(1, n + 1, dtype=np.float32)[:, None], ((0, 0), (0, d_in - 1)))


def epoch_of(stream, epoch=0):
    n = stream.batches_per_epoch
    return [stream[i] for i in range(epoch * n, (epoch + 1) * n)]


def test_every_row_to_train_on_comes_once_an_epoch_and_no_held_out_one_ever():
    stream = ActivationStream.from_rows(numbered_rows(1000), batch_size=50, window_tokens=200)
    held_out = {round(x) for x in stream.blocks.held_out[np.arange(100)].flatten().tolist()} - {0}
    assert len(held_out) == 100
    epochs = [torch.cat([batch.raw_norm for batch in epoch_of(stream, e)]).round().int().tolist() for e in (0, 1)]
    for numbers in epochs:
        assert sorted(numbers) == sorted(set(range(1, 1001)) - held_out)[: len(numbers)] or len(numbers) < 900
        assert len(set(numbers)) == len(numbers) == 900 - stream.dropped_tokens_per_epoch
        assert not held_out & set(numbers)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_batches_are_the_rows_scaled_and_can_be_had_as_they_were():
    x = some_rows()
    stream = ActivationStream.from_rows(x, x[:1], batch_size=100, window_tokens=300)
    batch = stream[7]
    raw = batch.acts * (batch.raw_norm / 6**0.5)[:, None]
    distances = torch.cdist(raw.double(), torch.from_numpy(x).double())
    which = distances.argmin(1)
    torch.testing.assert_close(batch.acts, normalise(torch.from_numpy(x)[which])[0])
    torch.testing.assert_close(batch.scaled("none")[0], torch.from_numpy(x)[which])
    assert len(set(which.tolist())) == 100


def test_any_batch_is_the_same_whenever_and_in_whatever_form_its_rows_are_given():
    x = some_rows()
    tensor = torch.from_numpy(x)
    forms = [x, tensor, [x[:300], x[300:301], x[301:]], [tensor[:999], tensor[999:]]]
    streams = [ActivationStream.from_rows(form, batch_size=64, seed=3, window_tokens=256) for form in forms]
    first = epoch_of(streams[0])
    for stream in streams[1:]:
        assert stream.describe() == streams[0].describe()
        for i in (9, 2, 12, 0):
            assert torch.equal(stream[i].acts, first[i].acts)
            assert torch.equal(stream[i].raw_norm, first[i].raw_norm)
    ahead = ActivationStream.from_rows(x, batch_size=64, seed=3, window_tokens=256, read_ahead="on")
    assert all(torch.equal(a.acts, b.acts) for a, b in zip(epoch_of(ahead), first, strict=True))
    ahead.close()
    other = ActivationStream.from_rows(x, batch_size=64, seed=4, window_tokens=256)
    assert not torch.equal(other[0].acts, first[0].acts)


def test_fresh_rows_depend_on_the_key_alone_and_more_begin_as_fewer():
    stream = ActivationStream.from_rows(numbered_rows(20_000), batch_size=50)
    asked = ((9000, "a"), (17_000, "a"), (9000, "b"))
    few, many, other = (torch.cat([batch.raw_norm for batch in stream.fresh(n, key)]) for n, key in asked)
    assert (len(few), len(many)) == (2 * 8192, 18_000)
    assert len(set(many.tolist())) == 18_000
    assert torch.equal(many[: len(few)], few)
    assert not torch.equal(few, other)


def test_the_description_names_the_rows_by_their_values():
    x = some_rows()
    described = ActivationStream.from_rows(x, batch_size=64, name="digits").describe()
    assert described["data"] == "digits"
    assert (described["rows"], described["held_out_rows"], described["ctx"]) == (900, 100, 1)
    assert "lm" not in described
    assert "train_on_bos" not in described
    changed = x.copy()
    changed[17, 3] += 1e-6
    assert rows_of_arrays(changed).digest() != rows_of_arrays(x).digest() == rows_of_arrays(x.copy()).digest()
    assert rows_of_arrays(x[:900], x[900:]).digest() != rows_of_arrays(x[:901], x[901:]).digest()
    assert rows_of_arrays(x.astype(np.float64)).digest() != rows_of_arrays(x).digest()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "fp32"), (torch.float64, "fp64"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")],
)
def test_every_number_format_is_read_in_fp32(dtype, name):
    x = torch.from_numpy(some_rows()).to(dtype)
    stream = ActivationStream.from_rows(x, x[:10], batch_size=1000)
    batch = stream[0]
    assert batch.acts.dtype == torch.float32
    assert batch.raw_norm.sort().values == pytest.approx(x.float().norm(dim=1).sort().values.tolist())
    assert (
        stream.describe()["acts_dtype"]
        == {4: "fp32", 8: "fp64", 2: "fp16" if dtype == torch.float16 else "bf16"}[x.itemsize]
    )


def test_the_held_out_part_may_be_given_or_drawn():
    x = some_rows()
    given = rows_of_arrays(x, x[:7])
    assert (given.n_train_tokens, given.n_held_out_tokens) == (1000, 7)
    assert torch.equal(given.held_out[np.array([2, 0])][:, 0], torch.from_numpy(x[[2, 0]]))
    drawn = rows_of_arrays(x, held_out_fraction=0.25)
    assert (drawn.n_train_tokens, drawn.n_held_out_tokens) == (750, 250)
    both = torch.cat([drawn.train[np.arange(750)], drawn.held_out[np.arange(250)]])[:, 0]
    assert torch.equal(both.sort(0).values, torch.from_numpy(x).sort(0).values)


def nan_at(x, row):
    x = x.copy()
    x[row, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((some_rows()[0],), r"train: must be an array \[n_rows, d_in\] with at least one row, but its shape is \[6\]"),
        ((some_rows()[:0],), r"its shape is \[0, 6\]"),
        (([],), "train: has no arrays"),
        ((some_rows().astype(int),), "train: its numbers are int64; convert them to one of fp32, bf16, fp16, fp64"),
        ((some_rows().astype(">f4"),), "train: its numbers are >f4; convert them"),
        ((nan_at(some_rows(), 987),), "train: row 987 holds a number that is not finite"),
        ((torch.from_numpy(nan_at(some_rows(), 3)),), "train: row 3 holds"),
        ((some_rows(), nan_at(some_rows(), 4)), "held_out: row 4 holds"),
        ((some_rows(), some_rows(d_in=5)), "held_out: has fp32 rows of width 5, and train fp32 ones of 6"),
        ((some_rows(), some_rows(dtype=np.float64)), "held_out: has fp64 rows of width 6, and train fp32 ones of 6"),
        (([some_rows(), some_rows(d_in=5)],), "train: its arrays differ in width or number format"),
        ((some_rows(n=3),), "held_out_fraction 0.1: leaves 0 of 3 rows to score on"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        ActivationStream.from_rows(*arguments, batch_size=2)


def test_rows_have_no_language_model(tiny_lm):
    stream = ActivationStream.from_rows(some_rows(), batch_size=64)
    with pytest.raises(ValueError, match="lm: the rows of rows come from no language model"):
        _ = stream.lm
    with pytest.raises(ValueError, match="blocks: rows come from no language model"):
        ActivationStream(tiny_lm, stream.blocks)
    with pytest.raises(ValueError, match="batch_size 1000: larger than a window of 900 rows"):
        ActivationStream.from_rows(some_rows(), batch_size=1000)


def test_a_text_needs_a_language_model(tiny_blocks):
    with pytest.raises(ValueError, match="lm None: token blocks need a language model"):
        ActivationStream(None, tiny_blocks)
