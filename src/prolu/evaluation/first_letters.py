"""First letters of words: what absorption is measured on, because they are known by construction.

SAEBench reads activations at a word after ten examples of spelling, which needs models of about 2 billion parameters.
Here a word stands alone after BOS, so that small models can be used too.
"""

import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prolu.activations.documents import is_held_out
from prolu.activations.language_model import LanguageModel
from prolu.evaluation.probes import fitted_probe
from prolu.runtime.rng import keyed_generator

LETTERS = string.ascii_lowercase
TEST_FRACTION = 0.2
"""The fraction of spellings that are for testing, as in SAEBench."""

FEWEST_WORDS = 10
"""The least number of words for testing with which a letter is scored."""

MOST_WORDS = 8192
"""The largest number of words, of fitting and testing together. If there are more, so many are drawn, because the
latents of all words are held in memory at once."""

FEWEST_LETTERS = 10
"""The least number of letters that must be scored. SAEBench asks for 20, with vocabularies of 256,000 tokens."""

PROBE_F1 = 0.6
"""The F1 of a letter's probe above which the activations count as representing the letter."""


class LetterWords(NamedTuple):
    """The words that a tokenizer has as single tokens."""

    ids: Int[Tensor, " n_words"]
    """The token of each word."""
    letters: Int[Tensor, " n_words"]
    """The first letter of each word: 0 for a, upper or lower case, to 25 for z."""
    is_test: Bool[Tensor, " n_words"]
    """Whether the word is for testing. Words that differ in case, or in a space before them, are on one side."""

    def enough(self) -> list[int]:
        """Return the letters with enough words for testing.

        Raises:
            ValueError: there are too few such letters.
        """
        counts = torch.bincount(self.letters[self.is_test], minlength=len(LETTERS))
        letters = torch.nonzero(counts >= FEWEST_WORDS).flatten().tolist()
        if len(letters) < FEWEST_LETTERS:
            raise ValueError(
                f"first letters: the tokenizer has {FEWEST_WORDS} words for testing for only {len(letters)} letters; "
                f"at least {FEWEST_LETTERS} are needed"
            )
        return letters


class LetterTask(NamedTuple):
    """What absorption is measured on: the activations at words, and a probe for each letter."""

    acts: Float[Tensor, "n_words d_in"]
    """The language model's activations at the words, each behind BOS."""
    letters: Int[Tensor, " n_words"]
    """The first letter of each word."""
    is_test: Bool[Tensor, " n_words"]
    """Whether the word is for testing."""
    probes: dict[int, Float[Tensor, " d_in_plus_1"]]
    """The coefficients of the probe for each letter that is scored, on `acts`, and last its intercept."""


def letter_words(tokenizer: Any) -> LetterWords:
    """Return the words of a tokenizer: its tokens of letters a to z in either case, with or without a space before."""
    found = [
        (i, text.removeprefix(" ").lower())
        for i, text in enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))
    ]
    words = [(i, word) for i, word in found if word and word.isascii() and word.isalpha()]
    if len(words) > MOST_WORDS:
        order = torch.randperm(len(words), generator=keyed_generator("words"))[:MOST_WORDS]
        words = [words[place] for place in sorted(order.tolist())]
    return LetterWords(
        torch.tensor([i for i, _ in words], dtype=torch.int64),
        torch.tensor([LETTERS.index(word[0]) for _, word in words], dtype=torch.int64),
        torch.tensor([is_held_out(word, TEST_FRACTION) for _, word in words], dtype=torch.bool),
    )


def letter_task(lm: LanguageModel) -> LetterTask:
    """Return what absorption of first letters is measured on.

    Args:
        lm: the language model at the hook of the SAEs.

    Raises:
        ValueError: its tokenizer has too few words, or probes recognise too few letters in its activations.
    """
    words = letter_words(lm.tokenizer)
    letters = words.enough()
    blocks = torch.stack([torch.full_like(words.ids, lm.bos), words.ids], 1)
    acts = lm.activations(blocks)[:, 1].float().cpu()
    return task_of(acts, words.letters, words.is_test, letters)


def task_of(
    acts: Float[Tensor, "n_words d_in"],
    letters: Int[Tensor, " n_words"],
    is_test: Bool[Tensor, " n_words"],
    asked: Sequence[int],
) -> LetterTask:
    """Return the task of some activations, with a probe for each letter that probes recognise in them.

    Args:
        acts: the activations at words.
        letters: the first letter of each word.
        is_test: whether the word is for testing.
        asked: the letters to fit probes for.

    Raises:
        ValueError: probes recognise too few of these letters in the activations.
    """
    probes = {}
    for letter in asked:
        probe = balanced_probe(acts[~is_test], letters[~is_test] == letter)
        guesses = acts[is_test] @ probe[:-1] + probe[-1] > 0
        if f1(guesses, letters[is_test] == letter) > PROBE_F1:
            probes[letter] = probe
    if len(probes) < FEWEST_LETTERS:
        raise ValueError(
            f"first letters: probes recognise {len(probes)} letters in the activations with an F1 above {PROBE_F1}; at "
            f"least {FEWEST_LETTERS} are needed"
        )
    return LetterTask(acts, letters, is_test, probes)


def f1(guesses: Bool[Tensor, " n"], labels: Bool[Tensor, " n"]) -> float:
    """Return the harmonic mean of precision and recall; 0 if nothing is guessed rightly."""
    right = (guesses & labels).sum().item()
    return 2 * right / max(1, guesses.sum().item() + labels.sum().item())


def balanced_probe(x: Float[Tensor, "n d"], labels: Bool[Tensor, " n"]) -> Float[Tensor, " d_plus_1"]:
    """Return the coefficients of a logistic regression that weighs both classes alike, and last its intercept.

    Inputs are divided by one number only: dividing each dimension by its own spread would turn the probe's direction
    towards dimensions that are rarely active.
    """
    n_with = int(labels.sum())
    spread = x.std().clamp_min(1e-12)
    probe = fitted_probe(x / spread, labels, weight_with=(len(labels) - n_with) / max(1, n_with))
    return torch.cat([probe[:-1] / spread, probe[-1:]])
