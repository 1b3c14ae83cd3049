"""Absorption of first letters: how much of "begins with an s" other latents have taken from the latent for it.

An SAE that has a latent for words with an s, and another for one such word, saves an active latent by leaving the first
inactive on that word: the second *absorbs* it (Chanin et al. 2024, "A is for Absorption", arXiv 2409.14507). The letter
of a word is known by construction, so this can be counted. Definitions and thresholds are those of SAEBench 0.6.0.

SAEBench reads activations at a word behind ten examples of spelling, for which it takes models of 2 billion parameters.
Here a word stands alone behind BOS, so that small models can be asked too: a proxy, whose figures are not SAEBench's.
"""

import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from prolu.activations.documents import is_held_out
from prolu.activations.language_model import LanguageModel
from prolu.evaluation.probes import fitted_probe
from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE
from prolu.sae.latents import Latents

LETTERS = string.ascii_lowercase
TEST_FRACTION = 0.2
"""The fraction of spellings that are for testing, as in SAEBench."""

FEWEST_WORDS = 10
"""The least number of words for testing with which a letter is scored."""

MOST_WORDS = 8192
"""The number of words, of fitting and testing together, above which some are drawn. Their latents are held together."""

FEWEST_LETTERS = 10
"""The least number of letters that must be scored. SAEBench asks for 20, with vocabularies of 256,000 tokens."""

PROBE_F1 = 0.6
"""The F1 above which the activations count as having a letter at all."""

LARGEST_K = 10
"""The largest number of latents that can be the parts of one split letter."""

F1_JUMP = 0.03
"""The increase of F1 above which a further latent counts as a part of the letter, and not as one that absorbs it."""

ABSORBER_COSINE = 0.1
"""The cosine with the probe from which on a latent may be one that absorbs."""

FULL_COSINE = 0.025
"""The same for full absorption."""

LEAST_PART = 0.4
"""The part of the probe's projection that absorbing latents must make up."""

MOST_ABSORBERS = 3
"""The number of latents that may absorb one word together."""

L1_WEIGHT = 0.01
"""The weight of the L1 norm of the coefficients by which latents are ranked."""

N_STEPS = 300
"""The number of steps in which these coefficients are fitted."""


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
                f"first letters: the tokenizer has {FEWEST_WORDS} words for testing for {len(letters)} letters only, "
                f"needed are {FEWEST_LETTERS}"
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
        ValueError: its tokenizer has too few words, or its activations tell too few letters.
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
    """Return the task of some activations, with a probe for each letter that they tell.

    Args:
        acts: the activations at words.
        letters: the first letter of each word.
        is_test: whether the word is for testing.
        asked: the letters to fit probes for.

    Raises:
        ValueError: the activations tell too few of these letters.
    """
    probes = {}
    for letter in asked:
        probe = _probe(acts[~is_test], letters[~is_test] == letter)
        guesses = acts[is_test] @ probe[:-1] + probe[-1] > 0
        if f1(guesses, letters[is_test] == letter) > PROBE_F1:
            probes[letter] = probe
    if len(probes) < FEWEST_LETTERS:
        raise ValueError(
            f"first letters: probes of the activations tell {len(probes)} letters with an F1 above {PROBE_F1}, needed "
            f"are {FEWEST_LETTERS}"
        )
    return LetterTask(acts, letters, is_test, probes)


@torch.no_grad()
def absorption_figures(sae: SAE, task: LetterTask) -> dict[str, float | None]:
    """Return how much of first letters is absorbed, by the names that results.jsonl has.

    - `absorption_fraction`: the mean over letters of the mean `absorbed` over the words for testing that the letter's
      probe recognises, from 0 to 1.
    - `absorption_full`: the same for the fraction of words on which no latent of the letter is active and a single
      latent absorbs it.
    - `absorption_splits`: the mean number of latents of a letter, from 1 on.
    - `absorption_letters`: the number of letters that are scored, the same for all SAEs at a hook.

    All but the last are None for a transcoder, whose decoder does not write where the probe reads.

    Args:
        sae: the SAE.
        task: as `letter_task` returns it.
    """
    if sae.is_transcoder:
        nothing = dict.fromkeys(("absorption_fraction", "absorption_full", "absorption_splits"))
        return {**nothing, "absorption_letters": len(task.probes)}
    encoded = sae.encode(task.acts.to(sae.W_dec))
    assert isinstance(encoded, Latents)
    scale = encoded.row_scale.scale
    latents = encoded.as_subclass(Tensor).float().cpu()
    # How much each latent writes of the model's own activations: the SAE may work on scaled ones.
    magnitudes = latents * (scale.float().cpu() if isinstance(scale, Tensor) else scale) * sae.W_dec.norm(dim=1).cpu()
    directions = torch.nn.functional.normalize(sae.W_dec.float().cpu(), dim=1)
    ranked = _ranked(latents, task)
    fractions = []
    full = []
    n_latents = []
    for letter, probe in task.probes.items():
        own = _latents_of(latents, task, letter, ranked[letter])
        recognised = task.is_test & (task.letters == letter) & (task.acts @ probe[:-1] + probe[-1] > 0)
        direction = torch.nn.functional.normalize(probe[:-1], dim=0)
        cosines = directions @ direction
        projections = task.acts[recognised] @ direction
        fractions.append(absorbed(magnitudes[recognised], cosines, projections, own).mean().item())
        full.append(is_fully_absorbed(magnitudes[recognised], cosines, projections, own).double().mean().item())
        n_latents.append(len(own))
    return {
        "absorption_fraction": sum(fractions) / len(fractions),
        "absorption_full": sum(full) / len(full),
        "absorption_splits": sum(n_latents) / len(n_latents),
        "absorption_letters": len(task.probes),
    }


def absorbed(
    magnitudes: Float[Tensor, "n d_sae"],
    cosines: Float[Tensor, " d_sae"],
    projections: Float[Tensor, " n"],
    own: Sequence[int],
) -> Float[Tensor, " n"]:
    """Return the fraction of a letter that other latents write on each word, from 0 to 1.

    With p = x . w the projection of the activation on the probe's unit direction w, m that of what the letter's own
    latents write, and a that of the (at most 3) others that write most of w and have a cosine of at least 0.1 with it:
    0 if m >= p or a < 0.4 p; 1 if m <= 0; else b / (b + m) with b = min(a, p - m).

    Args:
        magnitudes: what each latent writes along its decoder row on each word.
        cosines: the cosine of each decoder row with w.
        projections: p.
        own: the latents of the letter.
    """
    written = magnitudes * cosines
    main = written[:, list(own)].sum(1)
    others = torch.where((cosines >= ABSORBER_COSINE) & (written > 0), written, 0)
    others[:, list(own)] = 0
    top = others.topk(min(MOST_ABSORBERS, others.shape[1]), dim=1).values.sum(1)
    part = torch.minimum(top, projections - main)
    fraction = torch.where(main <= 0, 1.0, (part / (part + main)).clamp(0, 1))
    return torch.where((main >= projections) | (top / projections < LEAST_PART), 0.0, fraction)


def is_fully_absorbed(
    magnitudes: Float[Tensor, "n d_sae"],
    cosines: Float[Tensor, " d_sae"],
    projections: Float[Tensor, " n"],
    own: Sequence[int],
) -> Bool[Tensor, " n"]:
    """Return on which words none of a letter's latents is active, and the latent that writes most of w makes up 0.4 p.

    Arguments are those of `absorbed`.
    """
    written, most = (magnitudes * cosines).max(1)
    silent = (magnitudes[:, list(own)] <= 0).all(1)
    aligned = cosines[most] >= FULL_COSINE
    return silent & aligned & (projections >= 0) & (written / projections >= LEAST_PART)


def f1(guesses: Bool[Tensor, " n"], labels: Bool[Tensor, " n"]) -> float:
    """Return the harmonic mean of precision and recall; 0 if nothing is guessed rightly."""
    right = (guesses & labels).sum().item()
    return 2 * right / max(1, guesses.sum().item() + labels.sum().item())


def _probe(x: Float[Tensor, "n d"], labels: Bool[Tensor, " n"]) -> Float[Tensor, " d_plus_1"]:
    """Return the coefficients of a logistic regression that weighs both classes alike, and last its intercept.

    Inputs are divided by one number only: dividing each dimension by its own spread would turn the probe's direction
    towards dimensions that are rarely active.
    """
    n_with = int(labels.sum())
    spread = x.std().clamp_min(1e-12)
    probe = fitted_probe(x / spread, labels, weight_with=(len(labels) - n_with) / max(1, n_with))
    return torch.cat([probe[:-1] / spread, probe[-1:]])


def _ranked(latents: Float[Tensor, "n d_sae"], task: LetterTask) -> dict[int, list[int]]:
    """Return for each letter the latents that speak for it most, by the coefficients of a regression with an L1 term.

    They minimise the mean over letters of the balanced logistic loss plus `L1_WEIGHT` times their sum of sizes. Each
    latent is divided by its largest value, so that the lengths of decoder rows do not matter.
    """
    fit = ~task.is_test
    largest = latents[fit].amax(0)
    alive = torch.nonzero(largest > 0).flatten()
    x = latents[fit][:, alive] / largest[alive]
    labels = torch.stack([task.letters[fit] == letter for letter in task.probes], 1).float()
    n_with = labels.sum(0)
    weights = torch.zeros(len(alive), labels.shape[1], requires_grad=True)
    intercepts = torch.zeros(labels.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([weights, intercepts], lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, gamma=1e-3 ** (1 / N_STEPS))
    with torch.enable_grad():
        for _ in range(N_STEPS):
            optimiser.zero_grad()
            logits = x @ weights + intercepts
            loss = binary_cross_entropy_with_logits(logits, labels, pos_weight=(len(labels) - n_with) / n_with)
            (loss + L1_WEIGHT * weights.abs().sum(0).mean()).backward()
            optimiser.step()
            schedule.step()
    order = weights.detach().argsort(dim=0, descending=True, stable=True)[:LARGEST_K]
    return {letter: alive[order[:, column]].tolist() for column, letter in enumerate(task.probes)}


def _latents_of(latents: Float[Tensor, "n d_sae"], task: LetterTask, letter: int, ranked: Sequence[int]) -> list[int]:
    """Return the latents of a letter: the first of the ranked ones, and more while each raises F1 by more than 0.03."""
    labels = task.letters == letter
    best = -1.0
    own: list[int] = []
    for k in range(1, len(ranked) + 1):
        x = latents[:, ranked[:k]]
        probe = _probe(x[~task.is_test], labels[~task.is_test])
        reached = f1(x[task.is_test] @ probe[:-1] + probe[-1] > 0, labels[task.is_test])
        if reached <= best + F1_JUMP:
            break
        best = reached
        own = list(ranked[:k])
    return own
