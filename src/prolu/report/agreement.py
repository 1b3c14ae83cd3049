"""Agreement between seeds in a report: what is computed, the tables of the page and the terminal, the CSV files."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from prolu.evaluation.comparison.intervals import Mean
from prolu.evaluation.comparison.seed_agreement import (
    FIGURES,
    SeedPair,
    SettingAgreement,
    by_setting,
    figures_of,
    seed_pairs,
)
from prolu.evaluation.comparison.wording import shown_l0
from prolu.report.console import print_sentence, print_table
from prolu.runtime.files import write_atomically
from prolu.runtime.tables import Column
from prolu.studies.results import Results

SETTINGS_FILE = "agreement.csv"
PAIRS_FILE = "agreement_pairs.csv"

MOST_COMPARED = 2e8
"""The number of pairs of latents, over all pairs of runs, up to which agreement is computed without being asked for: a
minute at most on two cores. It is 190 pairs of runs with 1,024 latents, or 11 with 4,096."""

SHOWN = {
    "decoder_matched_cosine": "matched cosine",
    "decoder_found_again_07": "found again, 0.7",
    "decoder_found_again_09": "found again, 0.9",
    "encoder_matched_cosine": "encoder matched",
}
"""The figures in the tables, of all in the CSV files, with the heads of their columns."""

TITLE = "Agreement between seeds"

MEANING = (
    "Do SAEs that differ in their seed only find the same latents? Matched cosine: the mean cosine of decoder rows, "
    "each paired with one of the other SAE. Found again: the fraction of latents with one of a cosine of 0.7, or 0.9, "
    "in the other SAE. Means over pairs of seeds"
)


class DrawnAgreement(NamedTuple):
    """The agreement between seeds that a report shows."""

    pairs: list[SeedPair]
    """The pairs that were compared; none if they were too many or too large."""
    figures: list[dict[str, float]]
    """The figures of each pair."""
    settings: list[SettingAgreement]
    """Their means over the pairs of each setting."""
    left_out: str
    """Why pairs were not compared, as a sentence; empty if there are none, or all were."""


NO_PAIRS = DrawnAgreement([], [], [], "")
"""That of studies in which every setting has one seed."""


def compare_seeds(studies: Sequence[Results], *, whatever_it_takes: bool = False) -> DrawnAgreement:
    """Return how far SAEs that differ in their init seed only agree, where computing it takes a minute at most.

    Args:
        studies: the studies.
        whatever_it_takes: whether it is computed in any case.
    """
    pairs = seed_pairs(studies)
    n_compared = sum(math.prod(record.get("d_sae") or 0 for record in pair.records) for pair in pairs)
    if n_compared > MOST_COMPARED and not whatever_it_takes:
        reason = f"{len(pairs)} pairs of SAEs were not compared, which takes long; prolu report --agreement does"
        return DrawnAgreement([], [], [], reason)
    figures = [figures_of(pair) for pair in pairs]
    return DrawnAgreement(pairs, figures, by_setting(pairs, figures), "")


def write_agreement(found: DrawnAgreement, folder: Path) -> None:
    """Write a table with a row per pair of runs, and one with a row per setting; none without pairs."""
    if not found.pairs:
        return
    about = ["family", "setting"]
    pair_rows = [
        [pair.family, pair.setting, *(r["run_id"] for r in pair.records), *(r["l0"] for r in pair.records)]
        + [figures[name] for name in FIGURES]
        for pair, figures in zip(found.pairs, found.figures, strict=True)
    ]
    _write_csv(folder / PAIRS_FILE, [*about, "run_a", "run_b", "l0_a", "l0_b", *FIGURES], pair_rows)
    columns = [column for name in FIGURES for column in (name, f"{name}_half_width")]
    setting_rows = [
        [s.family, s.setting, s.l0, s.n_seeds]
        + [value for name in FIGURES for value in (s.figures[name].mean, s.figures[name].half_width)]
        for s in found.settings
    ]
    _write_csv(folder / SETTINGS_FILE, [*about, "l0", "n_seeds", *columns], setting_rows)


def _write_csv(file: Path, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV file, in which a cell is empty where a number is not known."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([[_csv_cell(value) for value in row] for row in rows])
    write_atomically(file, content.getvalue())


def _csv_cell(value: object) -> object:
    is_known = value is not None and not (isinstance(value, float) and math.isnan(value))
    return value if is_known else ""


def note_of(found: DrawnAgreement) -> str:
    """Return what the figures mean and what their intervals cover, in a few sentences."""
    if not found.settings:
        return found.left_out
    has_intervals = any(s.n_seeds > 2 for s in found.settings)
    interval = (
        " with 95% intervals by a jackknife over seeds, as pairs that share a seed are not independent"
        if has_intervals
        else "; two seeds are one pair, of which no interval can be said"
    )
    return f"{MEANING}{interval}. Latents that are active on no held-out token do not count."


def cells_of(setting: SettingAgreement) -> list[str]:
    """Return the cells of a setting's row: family, L0, seeds, and the figures of `SHOWN` with their half widths."""
    return [setting.family, shown_l0(setting.l0), str(setting.n_seeds)] + [_cell(setting.figures[n]) for n in SHOWN]


def _cell(mean: Mean) -> str:
    if math.isnan(mean.mean):
        return "-"
    return f"{mean.mean:.3f}" + (f" \u00b1{mean.half_width:.3f}" if math.isfinite(mean.half_width) else "")


HEADS = ("family", "L0", "seeds", *SHOWN.values())
"""The heads of the columns of `cells_of`."""


def print_agreement(console: Console, found: DrawnAgreement, *, in_full: bool) -> None:
    """Print how far seeds agree: a line per family, or per setting if the whole is asked for."""
    if not found.settings and not found.left_out:
        return
    console.print()
    print_sentence(console, TITLE, indent="", style="bold")
    if found.settings:
        rows = [cells_of(s) for s in found.settings] if in_full else _by_family(found.settings)
        columns = [
            Column(head, [row[i] for row in rows], is_text=i == 0, is_optional=i > 3) for i, head in enumerate(HEADS)
        ]
        print_table(console, columns)
    if in_full or not found.settings:
        print_sentence(console, note_of(found))


def _by_family(settings: Sequence[SettingAgreement]) -> list[list[str]]:
    """Return a row of cells per family, with the least and the greatest of its settings."""
    rows = []
    for name in dict.fromkeys(s.family for s in settings):
        some = [s for s in settings if s.family == name]
        figures = [[s.figures[figure].mean for s in some] for figure in SHOWN]
        l0s = _range([s.l0 for s in some], "{:.3g}")
        seeds = _range([s.n_seeds for s in some], "{}")
        rows.append([name, l0s, seeds, *(_range(list(filter(math.isfinite, v)), "{:.2f}") for v in figures)])
    return rows


def _range(values: Sequence[float], written: str) -> str:
    ends = dict.fromkeys(written.format(end) for end in (min(values), max(values))) if values else ["-"]
    return " to ".join(ends)
