"""The finished runs of a study, and questions to ask of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prolu.evaluation.comparison.frontiers import Record, family, pareto_best
from prolu.evaluation.comparison.verdicts import Verdict, verdict_table
from prolu.runtime.files import read_json_lines
from prolu.sae.autoencoder import SAE
from prolu.studies.folder import RESULTS_FILE, failures, read_study

NEEDED = {"run_id", "nonlinearity", "penalty", "coeff", "converged", "l0", "l1", "mse", "degradation", "recovered"}
"""What a line of results must have to be shown."""


@dataclass(frozen=True)
class Run:
    """One finished run."""

    folder: Path
    record: Record
    """Its line of results.jsonl."""

    def load(self) -> SAE:
        """The trained SAE."""
        return SAE.load(self.folder)


@dataclass(frozen=True)
class Frontier:
    """Converged runs in a plane, both axes better when lower."""

    x: str
    y: str
    runs: list[Run]
    """Those that no other converged run beats, in order of x."""
    all_runs: list[Run]

    def plot(self, file: str | Path) -> None:
        """Draws all runs, families joined, the frontier's marked, unconverged hollow; SVG, PNG or PDF."""
        from prolu.evaluation.comparison.figures import draw_frontier, save_figure

        save_figure(draw_frontier([run.record for run in self.all_runs], self.x, self.y), Path(file))


@dataclass(frozen=True)
class Results:
    """The runs of one study that have finished."""

    folder: Path
    records: list[dict[str, Any]]

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Reads a study's folder.

        Raises:
            ValueError: not a study's folder, or nothing finished in it.
        """
        folder = Path(folder)
        config = read_study(folder)
        records = read_json_lines(folder / RESULTS_FILE)
        if not records:
            raise ValueError(f"{folder}: no run has finished yet")
        for number, record in enumerate(records, 1):
            if missing := NEEDED - record.keys():
                raise ValueError(f"{folder / RESULTS_FILE}: line {number} lacks {', '.join(sorted(missing))}")
        results = cls(folder, records)
        # Fills the cached property below, so that a study's config.json is read once.
        results.__dict__["config"] = config
        return results

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config of the study."""
        return read_study(self.folder)

    @property
    def runs(self) -> list[Run]:
        """All finished runs."""
        return [Run(self.folder / r["run_id"], r) for r in self.records]

    @property
    def stream_seed(self) -> int:
        """Seed of the order in which the study's runs saw activations."""
        return self.config["stream"].get("seed", 0)

    def verdicts(self, l0s: Sequence[float] | None = None, *, unconverged: bool = False) -> list[Verdict]:
        """Families compared at matched L0, with 95% intervals: `statistics.verdict_table` of this study."""
        return verdict_table(self, l0s, unconverged=unconverged)

    @property
    def failures(self) -> dict[str, str]:
        """Why the runs that failed did, by run_id."""
        return failures(self.folder)

    def frontier(self, x: str = "l0", y: str = "degradation") -> Frontier:
        """The Pareto frontier of converged runs; x and y are names of results."""
        for name in (x, y):
            if self.records and name not in self.records[0]:
                raise ValueError(f"result {name!r}: choose one of {', '.join(self.records[0])}")
        best = pareto_best((r for r in self.records if r["converged"]), x, y)
        in_order = sorted(best, key=lambda r: r[x])
        return Frontier(x, y, [Run(self.folder / r["run_id"], r) for r in in_order], self.runs)

    def best(self, l0: float, nonlinearity: str | None = None) -> Run:
        """Of the runs within a quarter of this L0 (or the nearest), the one that loses least.

        Args:
            l0: latents on per token.
            nonlinearity: look only among these.
        """
        runs = [run for run in self.runs if nonlinearity in (None, run.record["nonlinearity"])]
        runs = [run for run in runs if run.record["l0"] > 0]
        if not runs:
            raise ValueError(f"no finished run with nonlinearity {nonlinearity!r} and an L0 above 0")
        distance = {id(run): abs(math.log(run.record["l0"] / l0)) for run in runs}
        near = [run for run in runs if distance[id(run)] <= math.log(1.25)]
        if near:
            return min(near, key=lambda run: run.record["degradation"])
        return min(runs, key=lambda run: distance[id(run)])

    def families(self) -> list[str]:
        """Families present, in order of appearance."""
        return list(dict.fromkeys(family(r) for r in self.records))


def pool(studies: Sequence[Results]) -> list[dict[str, Any]]:
    """The runs of several studies as one list: `study` names where each comes from, and `run_id` begins with it.

    Raises:
        ValueError: one study twice.
    """
    folders = [results.folder.resolve() for results in studies]
    if len(set(folders)) < len(folders):
        raise ValueError(f"studies {', '.join(map(str, folders))}: one is listed twice")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    return [
        record | {"study": name, "run_id": f"{name}/{record['run_id']}"}
        for name, results in zip(names, studies, strict=True)
        for record in results.records
    ]


def records_of(found: Sequence[Results]) -> Sequence[Record]:
    """The runs of one study, or of several, pooled."""
    return pool(found) if len(found) > 1 else found[0].records
