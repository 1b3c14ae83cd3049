"""The stream is a pure function of (seed, position)."""

import pytest
import torch

from prolu import ActivationStream
from prolu.sae.scaling import normalise


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


class Labelled:
    """In place of activations: vectors whose norm is the number of their token, block after block."""

    dtype = "fp32"

    def __init__(self, blocks):
        self._blocks = blocks

    def check(self, facts):
        assert facts["ctx"] == self._blocks.ctx

    def expect(self, hook, chosen):
        assert chosen.max() < len(self._blocks.train)

    def at(self, hook, chosen):
        ctx = self._blocks.ctx
        numbers = torch.from_numpy(chosen)[:, None] * ctx + torch.arange(ctx) + 1
        yield torch.nn.functional.pad(numbers[..., None].float(), (0, 15))


WINDOW = 2048


@pytest.fixture(params=[True, False])
def labelled(request, tiny_lm, tiny_blocks):
    source = Labelled(tiny_blocks)
    return ActivationStream(tiny_lm, tiny_blocks, 128, 5, WINDOW, train_on_bos=request.param, source=source)


def token_numbers(stream, batches):
    return torch.stack([stream[i].raw_norm.round().long() - 1 for i in batches])


def test_every_token_comes_once_an_epoch_but_the_counted_tail(labelled):
    n, first = labelled.batches_per_epoch, 0 if labelled.train_on_bos else 1
    epochs = [token_numbers(labelled, range(e * n, (e + 1) * n)).flatten() for e in (0, 1)]
    n_there = len(labelled.blocks.train) * (labelled.blocks.ctx - first)
    for numbers in epochs:
        assert len(set(numbers.tolist())) == len(numbers) == n_there - labelled.dropped_tokens_per_epoch
        assert (numbers % labelled.blocks.ctx >= first).all()
    assert labelled.dropped_tokens_per_epoch < 128 * (1 + labelled.blocks.train.size // WINDOW)
    assert (epochs[0] == epochs[1]).float().mean() < 0.01


def standard_score(chi2, n_free):
    """Of a chi-squared variable, by Wilson and Hilferty: about standard normal."""
    return ((chi2 / n_free) ** (1 / 3) - 1 + 2 / (9 * n_free)) / (2 / (9 * n_free)) ** 0.5


def document_score(numbers, ctx, n_blocks):
    """How unevenly the blocks of a window are spread over its batches [n, batch].

    In a random permutation of the window, the rows of a batch that come from one block are hypergeometric. So
    the sum over blocks of (count - expected)^2 / expected, times (N - 1) / (N - batch), is about chi-squared with
    blocks - 1 degrees of freedom; batches are summed, all but the last, which the others decide.
    """
    chi2 = n_free = 0
    for batch in numbers[:-1]:
        counts = torch.unique(batch // ctx, return_counts=True)[1].double()
        expected = len(batch) / n_blocks
        spread = ((counts - expected) ** 2).sum() + (n_blocks - len(counts)) * expected**2
        chi2 += (spread / expected * (WINDOW - 1) / (WINDOW - len(batch))).item()
        n_free += n_blocks - 1
    return standard_score(chi2, n_free)


def test_batches_mix_documents_as_a_random_permutation_of_the_window_would(tiny_lm, tiny_blocks):
    """Five standard deviations: a sound shuffle fails once in a million seeds; the broken ones here lie far beyond."""
    stream = ActivationStream(tiny_lm, tiny_blocks, 128, 5, WINDOW, source=Labelled(tiny_blocks))
    per_window, ctx = WINDOW // 128, tiny_blocks.ctx
    for window in (0, 1, 2):
        numbers = token_numbers(stream, range(window * per_window, (window + 1) * per_window))
        assert len(torch.unique(numbers // ctx)) == WINDOW // ctx
        assert abs(document_score(numbers, ctx, WINDOW // ctx)) < 5
        neighbours = (numbers[:, 1:] // ctx == numbers[:, :-1] // ctx).sum().item()
        by_chance = numbers[:, 1:].numel() * (ctx - 1) / (WINDOW - 1)
        assert abs(neighbours - by_chance) < 5 * by_chance**0.5
        whole = numbers.flatten().sort().values.reshape(per_window, -1)  # not shuffled
        halves = torch.cat([part.flatten()[torch.randperm(WINDOW // 2)] for part in whole.chunk(2)])  # badly
        assert document_score(whole, ctx, WINDOW // ctx) > 50
        assert document_score(halves.reshape(per_window, -1), ctx, WINDOW // ctx) > 15


def test_blocks_are_assigned_to_windows_at_random(tiny_lm, tiny_blocks):
    """Of the blocks of a window, those from the first half of the corpus are as many as by chance."""
    stream = ActivationStream(tiny_lm, tiny_blocks, 128, 5, WINDOW, source=Labelled(tiny_blocks))
    n, per_window = len(tiny_blocks.train), WINDOW // tiny_blocks.ctx
    for epoch in range(4):
        start = epoch * stream.batches_per_epoch
        blocks = torch.unique(token_numbers(stream, range(start, start + WINDOW // 128)) // tiny_blocks.ctx)
        early = (blocks < n // 2).sum().item()
        variance = per_window / 4 * (n - per_window) / (n - 1)
        assert abs(early - per_window / 2) < 5 * variance**0.5
