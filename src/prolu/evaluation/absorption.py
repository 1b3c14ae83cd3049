"""Absorption of first letters: how much of "begins with an s" other latents have taken from the latent for it.

An SAE that has a latent for words with an s, and another for one such word, saves an active latent by leaving the first
inactive on that word: the second *absorbs* it (Chanin et al. 2024, "A is for Absorption", arXiv 2409.14507). The letter
of a word is known by construction, so this can be counted. Definitions and thresholds are those of SAEBench 0.6.0, but
words are read in another context (see `first_letters`), so these figures cannot be compared with SAEBench's.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from prolu.evaluation.first_letters import LetterTask, balanced_probe, f1
from prolu.sae.autoencoder import SAE
from prolu.sae.latents import Latents

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
    written = written_at(sae, task)
    ranked = ranked_latents(written.latents, task)
    own = {letter: latents_of(written.latents, task, letter, ranked[letter]) for letter in task.probes}
    return figures_with(written, task, own)


class Written(NamedTuple):
    """What the latents of an SAE write at words."""

    latents: Float[Tensor, "n_words d_sae"]
    """The latents at each word, as the SAE encodes them."""
    magnitudes: Float[Tensor, "n_words d_sae"]
    """How much each latent writes of the model's own activations, along its decoder row."""
    directions: Float[Tensor, "d_sae d_in"]
    """The decoder rows, of norm 1."""


@torch.no_grad()
def written_at(sae: SAE, task: LetterTask) -> Written:
    """Return what the latents of an SAE write at the words of a task."""
    encoded = sae.encode(task.acts.to(sae.W_dec))
    assert isinstance(encoded, Latents)
    scale = encoded.row_scale.scale
    latents = encoded.as_subclass(Tensor).float().cpu()
    # The SAE may work on scaled activations.
    magnitudes = latents * (scale.float().cpu() if isinstance(scale, Tensor) else scale) * sae.W_dec.norm(dim=1).cpu()
    return Written(latents, magnitudes, torch.nn.functional.normalize(sae.W_dec.float().cpu(), dim=1))


def figures_with(written: Written, task: LetterTask, own: Mapping[int, Sequence[int]]) -> dict[str, float | None]:
    """Return the figures of `absorption_figures`, given the latents of each letter."""
    of_words = [absorption_at(written, task, letter, own[letter]) for letter in task.probes]
    n = len(of_words)
    return {
        "absorption_fraction": sum(fraction.mean().item() for _, fraction, _ in of_words) / n,
        "absorption_full": sum(is_full.double().mean().item() for _, _, is_full in of_words) / n,
        "absorption_splits": sum(len(own[letter]) for letter in task.probes) / n,
        "absorption_letters": n,
    }


def absorption_at(
    written: Written, task: LetterTask, letter: int, own: Sequence[int]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return the words for testing that a letter's probe recognises, by their numbers, and what is absorbed on each.

    Args:
        written: what the latents write at the words of the task.
        task: the words.
        letter: the letter.
        own: its latents.

    Returns:
        The numbers of the words, `absorbed` on each, and `is_fully_absorbed`.
    """
    probe = task.probes[letter]
    recognised = torch.nonzero(task.is_test & (task.letters == letter) & (task.acts @ probe[:-1] + probe[-1] > 0))[:, 0]
    direction = torch.nn.functional.normalize(probe[:-1], dim=0)
    given = written.magnitudes[recognised], written.directions @ direction, task.acts[recognised] @ direction, own
    return recognised, absorbed(*given), is_fully_absorbed(*given)


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


def ranked_latents(latents: Float[Tensor, "n d_sae"], task: LetterTask) -> dict[int, list[int]]:
    """Return for each letter the latents that predict it best, by the coefficients of a regression with an L1 term.

    They minimise the mean over letters of the balanced logistic loss plus `L1_WEIGHT` times the sum of their absolute
    values. Each latent is divided by its largest value, so that the lengths of decoder rows do not matter.
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


def latents_of(latents: Float[Tensor, "n d_sae"], task: LetterTask, letter: int, ranked: Sequence[int]) -> list[int]:
    """Return the latents of a letter: the first of the ranked ones, and more while each raises F1 by more than 0.03."""
    labels = task.letters == letter
    best = -1.0
    own: list[int] = []
    for k in range(1, len(ranked) + 1):
        x = latents[:, ranked[:k]]
        probe = balanced_probe(x[~task.is_test], labels[~task.is_test])
        reached = f1(x[task.is_test] @ probe[:-1] + probe[-1] > 0, labels[task.is_test])
        if reached <= best + F1_JUMP:
            break
        best = reached
        own = list(ranked[:k])
    return own
