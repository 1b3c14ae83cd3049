"""What a mask leaves out of a stream: special tokens, positions and rows of large norm."""

import numpy as np
import pytest
import torch

from prolu import ActivationStream, LanguageModel, TokenBlocks, TokenMask, harvest
from prolu.activations.kept_tokens import special_token_ids
from prolu.activations.token_mask import NO_MASK
from support.models import write_model

SPECIAL = 0
"""The only special token of the tiny tokenizer, which is its BOS."""


@pytest.fixture(scope="module")
def blocks(tiny_blocks):
    """A text with special tokens in the midst of its blocks too, at irregular places; block 3 has nothing else."""
    train = np.array(tiny_blocks.train)
    numbers = np.arange(train.size).reshape(train.shape)
    train[(numbers * 7919) % 11 == 0] = SPECIAL
    train[3] = SPECIAL
    train[:, 0] = SPECIAL
    return TokenBlocks(
        train=train, held_out=np.array(tiny_blocks.held_out), source="made", max_train_tokens=train.size, n_documents=1
    )


def stream_of(lm, blocks, mask=NO_MASK, **more):
    return ActivationStream(lm, blocks, 64, 3, 2048, mask=mask, **more)


def assert_same(a, b, indices):
    for i in indices:
        assert torch.equal(a[i].acts, b[i].acts)
        assert torch.equal(a[i].raw_norm, b[i].raw_norm)


def around_epochs(stream):
    n = stream.batches_per_epoch
    return (n + 2, 0, n - 1, 33, n, 2 * n + 1)


class Numbered:
    """In place of activations: vectors whose norm is the number of their token, from 1 on."""

    dtype = "fp32"

    def __init__(self, blocks):
        self._ctx = blocks.ctx

    def check(self, facts): ...

    def expect(self, hook, chosen): ...

    def at(self, hook, chosen):
        for some in np.array_split(chosen, 3):
            numbers = torch.from_numpy(some)[:, None] * self._ctx + torch.arange(self._ctx) + 1
            yield torch.nn.functional.pad(numbers[..., None].float(), (0, 15))


def epoch_of(stream, epoch):
    """The numbers of the tokens of an epoch's batches."""
    found, index = [], 0
    while stream.place(index).epoch <= epoch:
        if stream.place(index).epoch == epoch:
            found.append(stream[index].raw_norm.round().long() - 1)
            assert len(found[-1]) == stream.batch_size
        index += 1
    return torch.cat(found)


@pytest.mark.parametrize(
    "mask",
    [TokenMask(exclude_special_tokens=True), TokenMask(exclude_positions=5),
     TokenMask(exclude_special_tokens=True, exclude_positions=3)],
)  # fmt: skip
def test_an_epoch_has_every_kept_token_once_and_no_other(mask, tiny_lm, blocks):
    kept = np.ones(blocks.train.shape, bool)
    if mask.exclude_special_tokens:
        kept &= blocks.train != SPECIAL
    kept[:, : mask.exclude_positions] = False
    wanted = set(kept.ravel().nonzero()[0].tolist())
    stream = stream_of(tiny_lm, blocks, mask, source=Numbered(blocks))
    assert stream.n_train_tokens == len(wanted)
    for epoch in (0, 1, 2):
        numbers = epoch_of(stream, epoch).tolist()
        assert len(set(numbers)) == len(numbers) <= len(wanted)
        assert set(numbers) <= wanted
        windows = -(-len(blocks.train) // (2048 // blocks.ctx))
        assert len(wanted) - len(numbers) < 64 * windows
    assert stream.dropped_tokens_per_epoch == len(wanted) - len(epoch_of(stream, 0))


def test_a_batch_is_the_same_whenever_it_is_asked_for_and_read_ahead(tiny_lm, blocks):
    mask = TokenMask(exclude_special_tokens=True, max_norm_multiple=1.2)
    asked = around_epochs(stream_of(tiny_lm, blocks, mask))
    in_order = stream_of(tiny_lm, blocks, mask)
    batches = {i: in_order[i] for i in range(max(asked) + 1)}
    for stream in (stream_of(tiny_lm, blocks, mask), stream_of(tiny_lm, blocks, mask, read_ahead="on")):
        for i in asked:
            assert torch.equal(stream[i].acts, batches[i].acts)
        stream.close()


def test_a_mask_that_leaves_nothing_out_gives_the_same_bits(tiny_lm, tiny_blocks):
    plain = stream_of(tiny_lm, tiny_blocks)
    masked = stream_of(tiny_lm, tiny_blocks, TokenMask(max_norm=1e9))
    assert_same(plain, masked, around_epochs(plain))
    assert plain.describe() == {k: v for k, v in masked.describe().items() if k != "max_norm"}
    for a, b in zip(plain.fresh(500, "x"), masked.fresh(500, "x"), strict=True):
        assert torch.equal(a.acts, b.acts)


def test_positions_special_tokens_and_train_on_bos_agree_where_they_mean_the_same(tiny_lm, tiny_blocks):
    """In this text BOS is the only special token, and stands at position 0 only."""
    tokens = tiny_blocks.train.copy()
    tokens[:, 1:][tokens[:, 1:] == SPECIAL] = 5
    text = TokenBlocks(train=tokens, held_out=tiny_blocks.held_out, source="x", max_train_tokens=1, n_documents=1)
    by_id = stream_of(tiny_lm, text, TokenMask(exclude_special_tokens=True))
    by_place = stream_of(tiny_lm, text, TokenMask(exclude_positions=1))
    not_trained = stream_of(tiny_lm, text, train_on_bos=False)
    assert_same(by_id, by_place, around_epochs(by_id))
    assert_same(by_id, not_trained, around_epochs(by_id))
    for a, b in zip(by_id.fresh(500, "x"), by_place.fresh(500, "x"), strict=True):
        assert torch.equal(a.acts, b.acts)


def test_rows_of_large_norm_are_never_seen_and_the_threshold_is_recorded(tiny_lm, tiny_blocks):
    plain = stream_of(tiny_lm, tiny_blocks)
    n = plain.batches_per_epoch
    norms = torch.cat([plain[i].raw_norm for i in range(n)])
    stream = stream_of(tiny_lm, tiny_blocks, TokenMask(max_norm_multiple=1.1))
    assert stream.mask.max_norm == pytest.approx(1.1 * norms.median().item(), rel=0.05)
    assert stream.describe()["max_norm"] == stream.mask.max_norm
    assert 0.01 < (norms > stream.mask.max_norm).float().mean() < 0.5
    seen = torch.cat([stream[i].raw_norm for i in range(n)])
    assert stream.batches_per_epoch == n
    assert len(seen) == len(norms)
    assert seen.max() <= stream.mask.max_norm
    kept = norms[norms <= stream.mask.max_norm]
    assert set(seen.tolist()) <= set(norms.tolist())
    assert set(kept.tolist()) - set(seen.tolist()) == set()  # what is left out makes room for what would be dropped
    fresh = list(stream.fresh(700, "y"))
    assert max(batch.raw_norm.max() for batch in fresh) <= stream.mask.max_norm
    # Another seed and another order have the same threshold, and a threshold that is given is not measured.
    assert ActivationStream(tiny_lm, tiny_blocks, 64, 9, mask=TokenMask(max_norm_multiple=1.1)).mask == stream.mask
    given = stream_of(tiny_lm, tiny_blocks, TokenMask(max_norm=stream.mask.max_norm))
    assert_same(stream, given, (0, n - 1, n + 1))


def test_a_store_and_a_language_model_give_the_same_bits(many_passes_lm, blocks, tmp_path):
    mask = TokenMask(exclude_special_tokens=True, exclude_positions=2, max_norm_multiple=1.2)
    store = harvest(many_passes_lm, blocks, tmp_path / "store", dtype="fp32", progress=False)
    live = stream_of(many_passes_lm, blocks, mask)
    kept = stream_of(many_passes_lm, store.blocks(), mask, source=store)
    assert live.mask == kept.mask
    assert_same(live, kept, around_epochs(live))


def test_targets_of_transcoders_are_of_the_same_tokens(tiny_lm, blocks):
    mask = TokenMask(exclude_special_tokens=True, max_norm_multiple=1.2)
    stream = stream_of(tiny_lm, blocks, mask, hook_out="blocks.1.hook_mlp_out")
    every = tiny_lm.activations_at([tiny_lm.hook, "blocks.1.hook_mlp_out"], torch.from_numpy(blocks.train.astype(int)))
    read, written = (acts.flatten(0, 1) for acts in every)
    n = stream.batches_per_epoch
    batches = [stream[0], stream[n - 1], stream[n + 3], *stream.fresh(300, "z")]
    for batch in batches:
        raw = (batch.acts * batch.raw_norm[:, None] / 4)[-64:]
        found = torch.cdist(raw, read, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        torch.testing.assert_close(raw, read[found], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch.target[-64:], written[found], rtol=1e-3, atol=1e-4)


def test_special_tokens_are_all_that_a_tokenizer_marks_so(tmp_path):
    lm = LanguageModel(write_model(tmp_path), "blocks.1.hook_resid_pre")
    assert special_token_ids(lm.tokenizer).tolist() == [0]
    lm.tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    lm.tokenizer.add_tokens(["plain"])
    assert special_token_ids(lm.tokenizer).tolist() == [0, 300]


def test_what_leaves_nothing_or_means_nothing_is_refused(tiny_lm, blocks, tiny_blocks):
    with pytest.raises(ValueError, match=r"the mask leaves out the first 32 positions .* all training tokens"):
        stream_of(tiny_lm, blocks, TokenMask(exclude_positions=32))
    with pytest.raises(ValueError, match="batch_size 64: larger than a window of 32 tokens"):
        ActivationStream(tiny_lm, tiny_blocks, 64, 3, 1024, mask=TokenMask(exclude_positions=31))
    for wrong, match in (
        ({"exclude_positions": -1}, "exclude_positions -1: must be 0 or more"),
        ({"max_norm_multiple": 0.5}, "max_norm_multiple 0.5: must be 1 or more"),
        ({"max_norm": 0.0}, "max_norm 0: must be above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            stream_of(tiny_lm, blocks, TokenMask(**wrong))
    with pytest.raises(ValueError, match=r"max_norm 1e-06: all activations of a window have a larger norm"):
        _ = stream_of(tiny_lm, tiny_blocks, TokenMask(max_norm=1e-6))[0]


def test_a_mask_is_recorded_and_read_again():
    mask = TokenMask(exclude_special_tokens=True, keep_roles=("assistant",), max_norm_multiple=10.0, max_norm=31.5)
    assert NO_MASK.describe() == {}
    assert TokenMask.recorded(mask.describe() | {"seed": 3}) == mask
    assert TokenMask.recorded({"lm": "gpt2"}) == NO_MASK
    assert str(mask) == (
        "special tokens, all but the messages of assistant, activations of a norm above 31.5, 10 times the median"
    )
    for wrong in ({"exclude_positions": "1"}, {"exclude_positions": True}, {"keep_roles": "user"}, {"max_norm": "9"}):
        with pytest.raises(ValueError, match="not a valid value of a token mask"):
            TokenMask.recorded(wrong)
