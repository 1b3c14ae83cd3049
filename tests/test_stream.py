"""The stream is a pure function of (seed, position)."""

import pytest
import torch

from prolu import ActivationStream
from prolu.sae import normalise


def test_any_batch_is_the_same_whenever_it_is_asked_for(tiny_lm, tiny_blocks, tiny_stream):
    in_order = [tiny_stream[i] for i in range(tiny_stream.batches_per_epoch + 3)]
    fresh = ActivationStream(tiny_lm, tiny_blocks, batch_size=64, seed=3, window_tokens=2048)
    for i in (70, 2, 40, len(in_order) - 1, 0):
        assert torch.equal(fresh[i].acts, in_order[i].acts)
        assert torch.equal(fresh[i].raw_norm, in_order[i].raw_norm)
    other = ActivationStream(tiny_lm, tiny_blocks, batch_size=64, seed=4, window_tokens=2048)
    assert not torch.equal(other[0].acts, in_order[0].acts)


def test_an_epoch_holds_every_token_once_but_the_counted_tail(tiny_stream, tiny_lm, tiny_blocks):
    rows = torch.cat([tiny_stream[i].acts for i in range(tiny_stream.batches_per_epoch)])
    assert len(rows) + tiny_stream.dropped_tokens_per_epoch == tiny_blocks.train.size
    corpus = normalise(tiny_lm.activations(tiny_blocks.train).flatten(0, 1))[0]

    def multiset(x):
        return torch.unique((x * 1e3).round().long(), dim=0, return_counts=True)

    (seen, n_seen), (there, n_there) = multiset(rows), multiset(corpus)
    counts = {tuple(row.tolist()): n for row, n in zip(there, n_there.tolist(), strict=True)}
    missing = sum(counts.values()) - sum(
        min(n, counts.get(tuple(r.tolist()), 0)) for r, n in zip(seen, n_seen.tolist(), strict=True)
    )
    assert missing <= tiny_stream.dropped_tokens_per_epoch + 0.01 * len(rows)
    assert tiny_stream.dropped_tokens_per_epoch < 64 * (1 + tiny_blocks.train.size // 2048)


def test_epochs_differ_and_places_follow_from_the_index(tiny_stream):
    n = tiny_stream.batches_per_epoch
    assert tiny_stream.place(0) == (0, 0, 0)
    assert tiny_stream.place(33) == (0, 1, 64)
    assert tiny_stream.place(n) == (1, 0, 0)
    assert not torch.equal(tiny_stream[0].acts, tiny_stream[n].acts)
    with pytest.raises(IndexError):
        tiny_stream.place(-1)


def test_rows_are_scaled_to_norm_sqrt_d_and_centred_for_layernorm_models(tiny_stream):
    batch = tiny_stream[5]
    torch.testing.assert_close(batch.acts.norm(dim=1), torch.full((64,), 4.0))
    torch.testing.assert_close(batch.acts.mean(1), torch.zeros(64), atol=1e-6, rtol=0)
    assert (batch.raw_norm > 0).all()


def test_a_batch_mixes_documents(tiny_lm, tiny_blocks):
    """Positions 0 (BOS, all alike) are a 32nd of the tokens: their number in a batch is as by chance."""
    stream = ActivationStream(tiny_lm, tiny_blocks, batch_size=512, window_tokens=8192)
    bos = normalise(tiny_lm.activations(tiny_blocks.train[:1]))[0][0, 0]
    counts = [((stream[i].acts - bos).norm(dim=1) < 1e-3).sum().item() for i in range(12)]
    assert all(2 <= n <= 36 for n in counts)  # binomial(512, 1/32): mean 16, standard deviation 3.9


def test_zero_stays_zero_and_norm_is_multiplied_after_division():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    scaled, norms = normalise(x)
    assert torch.equal(scaled[0], torch.zeros(2))
    assert torch.equal(scaled[1], x[1] * torch.tensor(2**0.5 / 5))
    assert norms.tolist() == [0.0, 5.0]


def test_impossible_sizes_are_refused(tiny_lm, tiny_blocks):
    with pytest.raises(ValueError, match=r"batch_size 4096: larger than a window of 2048 tokens"):
        ActivationStream(tiny_lm, tiny_blocks, batch_size=4096, window_tokens=2048)
    with pytest.raises(ValueError, match="must be at least 1"):
        ActivationStream(tiny_lm, tiny_blocks, batch_size=0)
