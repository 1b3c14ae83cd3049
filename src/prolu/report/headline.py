"""The few numbers by which one SAE is known, for the terminal and the page of a study that has a single run."""

from collections.abc import Sequence
from typing import NamedTuple

from prolu.evaluation.latents import density_quartiles
from prolu.studies.runs import Run

CONVERGED = {
    True: "converged",
    False: "not converged when training ended",
    None: "not known whether converged",
}
"""Whether a run has converged, in words; None of an SAE that another library trained."""


class Figure(NamedTuple):
    """One number of an SAE."""

    name: str
    value: str
    meaning: str


class PageHeadline(NamedTuple):
    """The headline of a page that shows one SAE. Addresses are relative to the page."""

    name: str
    """The name of the run."""
    figures: Sequence[Figure]
    weights: str
    """The address of the weights."""
    page: str
    """The address of the pages of its latents; empty if there are none."""
    folder: str
    """The path of the run's folder, as a text in Python."""


def headline(run: Run) -> Sequence[Figure]:
    """Return the numbers of a run that matter most, as they are shown."""
    record = run.record
    figures = [Figure("L0", f"{record['l0']:.1f}", "active latents per token")]
    if record["degradation"] is not None:  # rows come from no language model
        figures.append(Figure("CE increase", f"{record['degradation']:.3f}", "nats per token"))
    if record["recovered"] is not None:  # it has no value where zeros are no worse than the activations
        figures.append(Figure("recovered", f"{record['recovered']:.1%}", "of the CE increase that zeros would cause"))
    if record.get("fvu") is not None:  # results of the first version lack it
        figures.append(Figure("FVU", f"{record['fvu']:.3f}", "fraction of variance unexplained"))
    n = f"of {record['d_sae']:,} latents," if record.get("d_sae") else "of all latents,"
    figures.append(Figure("dead", f"{record['dead_fraction']:.1%}", f"{n} never active"))
    if quartiles := density_quartiles(run.folder):
        values = ", ".join(f"{q:.2%}" for q in quartiles)
        figures.append(Figure("density", values, "of tokens: quartiles of live latents"))
    return figures
