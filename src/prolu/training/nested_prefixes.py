"""The prefixes of a nested (Matryoshka) loss in one update: those of the config, or drawn anew for every batch."""

import torch

from prolu.runtime.rng import keyed_generator
from prolu.training.config import RunConfig


def prefixes_now(config: RunConfig, n_updates: int) -> tuple[int, ...]:
    """Return the numbers of latents of the prefixes in the update after `n_updates` others, without d_sae.

    Prefixes that are drawn (`matryoshka_drawn`) are different numbers between 1 and d_sae - 1, of which n has a
    probability proportional to sqrt(n + 1) - sqrt(n): a Pareto distribution with exponent 1/2, cut at d_sae, so that
    short prefixes are drawn more often than from a uniform distribution. The draw is that of Nabeshima's Matryoshka
    SAEs (2024; Bussmann, Nabeshima, Karvonen and Nanda 2025, arXiv 2503.17547).
    """
    if not config.matryoshka_drawn:
        return config.matryoshka
    roots = torch.arange(1, config.d_sae + 1, dtype=torch.float64).sqrt()
    # Keyed by the update, so that a resumed run draws the same; and all families of one seed draw the same.
    generator = keyed_generator(config.init_seed, "prefixes", n_updates)
    drawn = torch.multinomial(roots.diff(), config.matryoshka_drawn, replacement=False, generator=generator)
    return tuple(sorted((drawn + 1).tolist()))


def scored_prefixes(config: RunConfig) -> tuple[int, ...]:
    """Return the prefixes at which a nested SAE is scored: its own, or, if they are drawn, d_sae / 16, / 8, / 4, / 2.

    Drawn prefixes shorter than one latent are left out.
    """
    if not config.matryoshka_drawn:
        return config.matryoshka
    return tuple(n for n in (config.d_sae // part for part in (16, 8, 4, 2)) if n)
