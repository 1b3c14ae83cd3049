"""Which latents are active together equals a plain, dense computation."""

import numpy as np
import pytest

from prolu import SAE, SAEConfig
from prolu.report.latents import cofiring, firings
from prolu.report.latents.cofiring import CoFirings
from prolu.report.latents.firings import HeldOutText, collect
from prolu.training.starting_weights import initial_weights

N_LATENTS = 40


def plain(active, n):
    """The definition, for every pair of latents."""
    found = []
    for i in range(active.shape[1]):
        own, rows = active[:, i], []
        for j in range(active.shape[1]):
            both, either = int((own & active[:, j]).sum()), int((own | active[:, j]).sum())
            if j != i and both >= cofiring.LEAST_TOGETHER:
                rows.append((-both / either, -both, j, both / own.sum()))
        found.append([(j, -negative, share) for negative, _, j, share in sorted(rows)[:n]])
    return found


def equal(found, expected):
    assert [[c.other for c in row] for row in found] == [[other for other, *_ in row] for row in expected]
    assert [tuple(c)[1:] for row in found for c in row] == [
        pytest.approx(row[1:], rel=1e-12) for rows in expected for row in rows
    ]


def add_in_parts(together, active, random, sizes):
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        together.add(*np.nonzero(active[part]), random[part])
        start += size
    assert start == len(active)


@pytest.mark.parametrize("at_once", [7, 256])
@pytest.mark.parametrize("n", [1, 5, 60])
def test_the_largest_jaccard_indices_equal_the_plain_ones(monkeypatch, at_once, n):
    monkeypatch.setattr(cofiring, "LATENTS_AT_ONCE", at_once)
    draw = np.random.default_rng(0)
    # From often active to never, and few enough tokens that many indices are equal.
    active = draw.random((120, 30)) < np.linspace(0.6, 0, 30)
    active[:, 11] = active[:, 3]
    together = CoFirings(30)
    add_in_parts(together, active, draw.random(120), (50, 1, 0, 69))
    expected = plain(active, n)
    assert any(len(row) < n for row in expected) or n == 1
    assert expected[29] == []
    equal(together.strongest(n), expected)
    assert together.share == 1
    assert together.strongest(1)[3][0] == (11, 1.0, 1.0)


@pytest.mark.parametrize("sizes", [(400,), (100, 100, 200), (3,) * 132 + (4,)])
def test_of_many_firings_the_same_random_share_is_counted_in_any_parts(monkeypatch, sizes):
    draw = np.random.default_rng(1)
    active, random = draw.random((400, 20)) < 0.3, draw.random(400)
    monkeypatch.setattr(cofiring, "MOST_PAIRS", int(np.square(active.sum(1)).sum() / 3))
    together = CoFirings(20)
    add_in_parts(together, active, random, sizes)
    assert together.share == 0.25
    equal(together.strongest(5), plain(active[random < 0.25], 5))


def test_the_firings_of_an_sae_are_those_of_encode(tiny_lm, tiny_blocks, monkeypatch):
    config = SAEConfig(d_in=16, d_sae=N_LATENTS, nonlinearity="relu")
    sae = SAE(config, initial_weights(config, 3, initial_bias=-0.1))
    text = HeldOutText.read(tiny_lm, tiny_blocks, 2000, lambda n: None)
    active = (sae.encode(text.acts).detach().numpy() > 0)[:, 1:].reshape(-1, N_LATENTS)  # without BOS
    expected = plain(active, firings.N_TOGETHER)
    assert sum(map(len, expected)) > 100
    found = collect(sae, text, 3)
    equal(found.together, expected)
    assert found.together_share == 1
    monkeypatch.setattr(firings, "ENTRIES_PER_PASS", 3 * text.ctx * N_LATENTS)
    assert collect(sae, text, 3).together == found.together
