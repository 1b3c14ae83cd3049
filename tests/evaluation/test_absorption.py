"""Absorption by its laws: none where each letter has a latent, and as much as was built in where latents absorb."""

import numpy as np
import pytest
import torch

from prolu import SAE, LanguageModel, SAEConfig
from prolu.evaluation import first_letters
from prolu.evaluation.absorption import absorbed, absorption_figures, is_fully_absorbed
from prolu.evaluation.first_letters import letter_task, letter_words, task_of
from prolu.training.starting_weights import initial_weights

N_LETTERS = 12
N_CHILDREN = 10
"""The children of each letter: sets of words, each of which has a direction of its own."""
D = N_LETTERS * (1 + N_CHILDREN)
N_FIT, N_TEST = 200, 50
"""The words of each letter. A child has 4 and 1 of them: too few to count as a part of a split letter."""


def child_of(word):
    """The child that a word belongs to, of the words of one letter in order; -1 for none."""
    place, step = (word, N_FIT // 50) if word < N_FIT else (word - N_FIT, 1)
    return place // step if place // step < N_CHILDREN else -1


@pytest.fixture(scope="module")
def task():
    """Words with the direction of their letter and, a fifth of them, as much of that of a child."""
    g = torch.Generator().manual_seed(0)
    n = N_LETTERS * (N_FIT + N_TEST)
    letters = torch.arange(N_LETTERS).repeat_interleave(N_FIT + N_TEST)
    words = torch.arange(N_FIT + N_TEST).repeat(N_LETTERS)
    acts = 0.005 * torch.randn(n, D, generator=g)
    sizes = 1 + 0.2 * torch.rand(n, generator=g)
    for row in range(n):
        acts[row, letters[row]] += sizes[row]
        if (child := child_of(int(words[row]))) >= 0:
            acts[row, N_LETTERS + letters[row] * N_CHILDREN + child] += sizes[row]
    return task_of(acts, letters, words >= N_FIT, range(N_LETTERS))


def sae_of(encoder, decoder):
    config = SAEConfig(d_in=D, d_sae=len(encoder), nonlinearity="relu", normalisation="none")
    sae = SAE(config, initial_weights(config, 0, initial_bias=-0.05))
    sae.W_enc.data, sae.W_dec.data = encoder.T.contiguous(), decoder.clone()
    return sae


def faithful():
    """One latent for each letter and one for each child."""
    return sae_of(torch.eye(D), torch.eye(D))


def absorbing():
    """The latent of a letter is silent on all words of its children, whose latents write the letter's direction too."""
    encoder, decoder = torch.eye(D), torch.eye(D)
    for letter in range(N_LETTERS):
        children = range(N_LETTERS + letter * N_CHILDREN, N_LETTERS + (letter + 1) * N_CHILDREN)
        for child in children:
            encoder[letter, child] = -1
            encoder[child] *= 2**0.5
            decoder[child, letter] = 1
            decoder[child] /= 2**0.5
    return sae_of(encoder, decoder)


def test_a_latent_for_each_letter_absorbs_nothing(task):
    found = absorption_figures(faithful(), task)
    assert found == {
        "absorption_fraction": 0,
        "absorption_full": 0,
        "absorption_splits": 1,
        "absorption_letters": N_LETTERS,
    }


def test_latents_built_to_absorb_a_fifth_of_the_words_are_found_to(task):
    found = absorption_figures(absorbing(), task)
    assert found["absorption_splits"] == 1
    assert found["absorption_fraction"] == pytest.approx(N_CHILDREN / N_TEST)
    assert found["absorption_full"] == pytest.approx(N_CHILDREN / N_TEST)


def test_a_letter_with_two_latents_is_split_and_nothing_absorbed(task):
    # One latent for the words with children, one for those without: halves of the letter, and not absorption.
    encoder, decoder = torch.eye(D), torch.eye(D)
    letter = 0
    children = slice(N_LETTERS, N_LETTERS + N_CHILDREN)
    encoder[letter, children] = -1
    encoder[N_LETTERS] = 0
    encoder[N_LETTERS, children] = 1
    decoder[N_LETTERS] = decoder[letter]
    found = absorption_figures(sae_of(encoder, decoder), task)
    assert found["absorption_splits"] == pytest.approx((N_LETTERS + 1) / N_LETTERS)
    assert found["absorption_fraction"] == 0


def test_order_and_lengths_of_latents_change_nothing(task):
    sae, other = absorbing(), absorbing()
    order = torch.randperm(D, generator=torch.Generator().manual_seed(1))
    scales = 0.5 + torch.rand(D, generator=torch.Generator().manual_seed(2))
    other.W_enc.data = (sae.W_enc * scales)[:, order]
    other.get_parameter("b_enc").data = (sae.get_parameter("b_enc") * scales)[order]
    other.W_dec.data = (sae.W_dec / scales[:, None])[order]
    assert absorption_figures(other, task) == pytest.approx(absorption_figures(sae, task))


def as_saebench_has_it(magnitudes, cosines, projection, own):
    """One word's absorption fraction, and whether it is fully absorbed, step by step as in SAEBench 0.6.0."""
    written = magnitudes * cosines
    main = written[own].sum()
    others = np.ones(len(written), bool)
    others[own] = False
    others &= (cosines >= 0.1) & (written > 0)
    top = np.sort(written[others])[::-1][:3].sum()
    if main >= projection or top / projection < 0.4:
        fraction = 0.0
    elif main <= 0:
        fraction = 1.0
    else:
        absorbing_part = min(top, projection - main)
        fraction = float(np.clip(absorbing_part / (absorbing_part + main), 0, 1))
    most = written.argmax()
    is_full = (magnitudes[own] < 1e-8).all() and cosines[most] >= 0.025 and projection >= 0
    return fraction, bool(is_full and written[most] / projection >= 0.4)


def test_fractions_are_those_of_saebench():
    g = np.random.default_rng(0)
    n, n_latents, own = 400, 23, [3, 17]
    magnitudes = g.exponential(1, (n, n_latents)) * (g.random((n, n_latents)) < 0.2)
    cosines = g.normal(0, 0.4, n_latents).clip(-1, 1)
    cosines[own] = 0.6, 0.5
    projections = g.normal(0.8, 0.7, n)
    args = torch.from_numpy(magnitudes), torch.from_numpy(cosines), torch.from_numpy(projections), own
    expected = [as_saebench_has_it(m, cosines, p, own) for m, p in zip(magnitudes, projections, strict=True)]
    fractions = [fraction for fraction, _ in expected]
    np.testing.assert_allclose(absorbed(*args).numpy(), fractions, atol=1e-12)
    assert is_fully_absorbed(*args).tolist() == [is_full for _, is_full in expected]
    # All cases occur.
    assert 0 in fractions
    assert 1 in fractions
    assert sum(0 < fraction < 1 for fraction in fractions) > 10


def test_activations_that_do_not_tell_letters_are_refused(task):
    noise = torch.randn(task.acts.shape, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match=r"recognise 0 letters in the activations with an F1 above 0\.6; at least 10"):
        task_of(noise[:, :8], task.letters, task.is_test, range(N_LETTERS))


def test_a_small_vocabulary_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="words for testing for only 0 letters"):
        letter_task(tiny_lm)


def test_words_of_one_spelling_are_on_one_side(monkeypatch):
    tokenizer = LanguageModel("builtin", hook="blocks.2.hook_resid_pre").tokenizer
    words = letter_words(tokenizer)
    sides = {}
    for i, letter, is_test in zip(*(part.tolist() for part in words), strict=True):
        word = tokenizer.decode([i]).strip().lower()
        assert first_letters.LETTERS[letter] == word[0]
        assert sides.setdefault(word, is_test) == is_test
    assert 0.15 < np.mean(list(sides.values())) < 0.25
    assert len(words.enough()) >= first_letters.FEWEST_LETTERS
    monkeypatch.setattr(first_letters, "MOST_WORDS", 100)
    assert len(letter_words(tokenizer).ids) == 100
