"""Agreement between seeds: whether SAEs that differ in their init seed only find the same latents, with intervals."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from prolu.evaluation.agreement import Agreement, SAEAgreement, agreement_of
from prolu.evaluation.comparison.frontiers import Record, family, grouped, setting, setting_value
from prolu.evaluation.comparison.intervals import Mean, mean_over_pairs
from prolu.evaluation.comparison.replicates import FinishedStudy
from prolu.evaluation.latents import densities_of
from prolu.sae.autoencoder import SAE
from prolu.sae.saved_sae import WEIGHTS_FILE

FIGURES = tuple(f"{part}_{figure}" for part in SAEAgreement._fields for figure in Agreement._fields)
"""The names of the figures of a pair: `decoder_mean_max_cosine`, ..., `encoder_found_again_09`."""


class SeedPair(NamedTuple):
    """Two runs of a study that differ in their init seed only."""

    family: str
    setting: float | None
    """The target L0 if there was one, otherwise the coefficient."""
    group: int
    """The number of the setting; pairs of one setting have the same."""
    records: tuple[Record, Record]
    """The two lines of results."""
    folders: tuple[Path, Path]
    """The folders of the two runs."""


class SettingAgreement(NamedTuple):
    """How far the SAEs of one setting agree, over all pairs of its seeds."""

    family: str
    setting: float | None
    """The target L0 if there was one, otherwise the coefficient."""
    l0: float
    """The mean L0 of the runs."""
    n_seeds: int
    """The number of seeds, n; there are n (n - 1) / 2 pairs."""
    figures: dict[str, Mean]
    """The mean over pairs of each of `FIGURES`. Half widths are nan with two seeds; a mean is nan where it is not
    defined for some pair, as where an SAE is dead."""


def seed_agreement(studies: FinishedStudy | Sequence[FinishedStudy]) -> list[SettingAgreement]:
    """Return how far SAEs that differ in their init seed only agree, for each setting with two seeds or more.

    Only latents that are active on some held-out token count; of a run that has no file of them, as those of the first
    version, all do. What agrees, and how, is defined in `prolu.evaluation.agreement`.

    The interval is a jackknife over seeds (`prolu.evaluation.comparison.intervals.mean_over_pairs`), since pairs that
    share a seed are not independent. It covers init seeds. With two seeds there is none.

    Args:
        studies: one study, or several; runs of two studies are never paired.

    Raises:
        ValueError: a file of an SAE or of its latents is damaged.
    """
    pairs = seed_pairs(studies)
    return by_setting(pairs, [figures_of(pair) for pair in pairs])


def seed_pairs(studies: FinishedStudy | Sequence[FinishedStudy]) -> list[SeedPair]:
    """Return all pairs of runs of one setting whose weights are there."""
    several = list(studies) if isinstance(studies, Sequence) else [studies]
    runs = [
        (study.folder / record["run_id"], record, place)
        for place, study in enumerate(several)
        for record in study.records
        if (study.folder / record["run_id"] / WEIGHTS_FILE).is_file()
    ]
    # Runs of two studies differ in more than their seed, so a study's number is a part of the key.
    groups = grouped(runs, lambda run: (run[2], family(run[1]), setting(run[1])))
    return [
        SeedPair(family(a[1]), setting_value(a[1]), group, (a[1], b[1]), (a[0], b[0]))
        for group, some in enumerate(groups.values())
        for a, b in combinations(some, 2)
    ]


def figures_of(pair: SeedPair) -> dict[str, float]:
    """Return how far the SAEs of a pair agree, by `FIGURES`."""
    a, b = (SAE.load(folder) for folder in pair.folders)
    live_a, live_b = (_live(folder) for folder in pair.folders)
    found = agreement_of(a, b, live_a, live_b)
    return dict(zip(FIGURES, [*found.decoder, *found.encoder], strict=True))


def _live(folder: Path) -> Tensor | None:
    density = densities_of(folder)
    return None if density is None else density > 0


def by_setting(pairs: Iterable[SeedPair], figures: Iterable[dict[str, float]]) -> list[SettingAgreement]:
    """Return the means over the pairs of each setting, in the order of the pairs."""
    groups = grouped(zip(pairs, figures, strict=True), lambda item: item[0].group)
    return [_setting_agreement(some) for some in groups.values()]


def _setting_agreement(found: Sequence[tuple[SeedPair, dict[str, float]]]) -> SettingAgreement:
    first = found[0][0]
    runs = {record["run_id"]: record for pair, _ in found for record in pair.records}
    places = {run_id: place for place, run_id in enumerate(runs)}
    values = {name: np.full((len(runs), len(runs)), np.nan) for name in FIGURES}
    for pair, figures in found:
        a, b = sorted(places[record["run_id"]] for record in pair.records)
        for name in FIGURES:
            values[name][a, b] = figures[name]
    return SettingAgreement(
        family=first.family,
        setting=first.setting,
        l0=float(np.mean([record["l0"] for record in runs.values()])),
        n_seeds=len(runs),
        figures={name: mean_over_pairs(matrix) for name, matrix in values.items()},
    )
