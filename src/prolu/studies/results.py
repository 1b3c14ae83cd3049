"""The finished runs of a study: loading them, choosing among them, comparing them."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prolu.evaluation.comparison.curves import check_l0
from prolu.evaluation.comparison.frontiers import Record, family, pareto_best
from prolu.evaluation.comparison.metric_catalog import main_metric
from prolu.evaluation.comparison.same_text import check_comparable
from prolu.evaluation.comparison.standings import Standing, standings
from prolu.evaluation.comparison.verdicts import Verdict, verdict_table
from prolu.runtime.checks import one_of
from prolu.runtime.files import read_json_lines
from prolu.runtime.notebooks import ShownRows, html_table
from prolu.studies.folder import failures, read_study
from prolu.studies.records import RESULTS_FILE, check_records, scores_lacking, warn_once
from prolu.studies.runs import Frontier, Run, columns_of, frame_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDED = {"run_id", "nonlinearity", "penalty", "coeff", "converged", "l0", "l1", "mse", "degradation", "recovered"}
"""The fields that every line of results.jsonl must have. Older versions wrote fewer fields than this one, but all of
these."""

NEAR_L0 = 1.25
"""The largest ratio of two L0s that `Results.best` takes for nearly equal."""


@dataclass(frozen=True, repr=False)
class Results:
    """The finished runs of a study.

    `Results.load("runs/first").best(l0=20).load()` is the best SAE of a study at about 20 active latents per token.
    """

    folder: Path
    """The folder of the study."""
    records: list[dict[str, Any]]
    """The lines of results.jsonl, one per run, without those whose scores are not finite: these are `failures`."""

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Read the results of a study.

        Args:
            folder: The folder of the study.

        Raises:
            ValueError: The folder holds no study, no run of it has finished, or a line of the results is malformed.
        """
        folder = Path(folder)
        config = read_study(folder)
        records = read_json_lines(folder / RESULTS_FILE)
        if not records:
            raise ValueError(f"{folder}: no run has finished yet")
        for number, record in enumerate(records, 1):
            if missing := NEEDED - record.keys():
                raise ValueError(f"{folder / RESULTS_FILE}: line {number} lacks {', '.join(sorted(missing))}")
        check_records(folder / RESULTS_FILE, records)
        not_finite = {r["run_id"]: reason for r in records if (reason := scores_lacking(r))}
        kept = [r for r in records if r["run_id"] not in not_finite]
        if not kept:
            raise ValueError(f"{folder}: no finished run has finite scores")
        if not_finite:
            named = ", ".join(f"{run_id} ({reason})" for run_id, reason in not_finite.items())
            warn_once(f"{folder}: left out of comparisons: {named}")
        results = cls(folder, kept)
        results.__dict__["_not_finite"] = not_finite
        # Fills the cached property below, so that a study's config.json is read once.
        results.__dict__["_config"] = config
        return results

    @property
    def config(self) -> dict[str, Any]:
        """The study's config.json: its stream of activations, its runs and all their settings."""
        return self._config

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_study(self.folder)

    @property
    def runs(self) -> list[Run]:
        """The finished runs, in the order of results.jsonl."""
        return [Run(self.folder / r["run_id"], r) for r in self.records]

    @property
    def stream_seed(self) -> int:
        """The seed of the order in which the study's runs saw activations."""
        return self.config["stream"].get("seed", 0)

    def verdicts(
        self, l0s: Sequence[float] | None = None, *, y: str = "", unconverged: bool = True
    ) -> ShownRows[Verdict]:
        """Compare every family with `relu + l1` and `relu + sqrt_l1` at equal L0, with 95% intervals.

        Args:
            l0s: The L0s to compare at. If None, they are the target L0s of the runs, or else three L0s that both
                families reach.
            y: The metric that is compared, by its name in `records`; by default the CE increase, or the FVU of runs on
                rows that come from no language model.
            unconverged: Whether runs that have not converged take part. Verdicts count them.

        Raises:
            ValueError: One of `l0s` is not above 0, or `y` is no metric.
        """
        return verdict_table(self, l0s, y=y, unconverged=unconverged)

    def standings(
        self, metrics: Sequence[str] | None = None, l0s: Sequence[float] | None = None, *, unconverged: bool = True
    ) -> ShownRows[Standing]:
        """Return what every family reaches in several metrics at equal L0, and how probably it is the best.

        Args:
            metrics: The metrics, by their names in `records`. If None, they are CE increase, KL divergence, FVU and
                dead latents.
            l0s: The L0s. If None, they are the target L0s of the runs, or else three L0s that most families reach.
            unconverged: Whether runs that have not converged take part.

        Raises:
            ValueError: One of `l0s` is not above 0, or one of `metrics` is no metric.
        """
        return standings(self, metrics, l0s, unconverged=unconverged)

    @property
    def failures(self) -> dict[str, str]:
        """The reason for which each failed run failed, or cannot be compared, by run_id."""
        return self.__dict__.get("_not_finite", {}) | failures(self.folder)

    def frontier(self, x: str = "l0", y: str = "") -> Frontier:
        """Return the converged runs that no other converged run beats in both x and y.

        Args:
            x: The name of a score in `records`.
            y: The name of another one. By default it is `degradation`, the CE increase in nats per token, or `fvu` for
                runs on rows that come from no language model.

        Raises:
            ValueError: There is no score of that name.
        """
        y = y or main_metric(self.records)
        for name in (x, y):
            if self.records:
                one_of("result", name, self.records[0])
        best = pareto_best((r for r in self.records if r["converged"]), x, y)
        in_order = sorted(best, key=lambda r: r[x])
        return Frontier(x, y, [Run(self.folder / r["run_id"], r) for r in in_order], self.runs)

    def best(self, l0: float, nonlinearity: str | None = None, *, unconverged: bool = False) -> Run:
        """Return the run with the lowest CE increase among those whose L0 is within a factor of 1.25 of `l0`.

        If there is none, the run with the nearest L0 is returned. Of runs on rows that come from no language model, the
        one with the lowest FVU is returned.

        Args:
            l0: The number of active latents per token.
            nonlinearity: The nonlinearity of the runs to look at; if None, all runs are looked at.
            unconverged: Whether runs that have not converged are looked at too. SAEs of other libraries, of which it is
                not known, always are.

        Raises:
            ValueError: There is no finished run with this nonlinearity and an L0 above 0, none of them has converged,
                or `l0` is not above 0.
        """
        check_l0(l0)
        runs = [run for run in self.runs if nonlinearity in (None, run.record["nonlinearity"])]
        runs = [run for run in runs if run.record["l0"] > 0]  # a dead SAE has no log(L0)
        which = "" if nonlinearity is None else f" with nonlinearity {nonlinearity!r}"
        if not runs:
            raise ValueError(f"{self.folder}: no finished run{which} has an L0 above 0")
        if not unconverged:
            n_finished = len(runs)
            runs = [run for run in runs if run.record["converged"] is not False]
            if not runs:
                raise ValueError(
                    f"{self.folder}: none of the {n_finished} finished runs{which} has converged; best(l0={l0:g}, "
                    "unconverged=True) takes one all the same, and a longer training (n_tokens) lets them converge"
                )

        def distance(run: Run) -> float:
            return abs(math.log(run.record["l0"] / l0))

        near = [run for run in runs if distance(run) <= math.log(NEAR_L0)]
        # Among runs of nearly equal L0, the better one is more useful than the nearest.
        metric = main_metric(self.records)
        return min(near, key=lambda run: run.record[metric]) if near else min(runs, key=distance)

    @property
    def families(self) -> list[str]:
        """The families in the study, in order of appearance."""
        return list(dict.fromkeys(family(r) for r in self.records))

    def plot(self, ax: "Axes | None" = None, *, x: str = "l0", y: str = "") -> "Figure":
        """Draw all runs in one plane, as `Frontier.plot` does.

        Args:
            ax: The axes to draw into; by default those of a new figure.
            x: The name of the score on the horizontal axis.
            y: The name of the other score; by default as in `frontier`.

        Returns:
            The figure, which a notebook shows if it is the last line of a cell.

        Raises:
            ValueError: There is no score of that name.
        """
        return self.frontier(x, y).plot(ax=ax)

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with a row per run: its family, then the fields of results.jsonl.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return frame_of(self.records)

    def __repr__(self) -> str:
        return f"Results({self._described()})"

    def _repr_html_(self) -> str:
        if not self.records:
            return html_table(f"Results: {self._described()}", [])
        failed = [f"{run_id} failed: {reason}" for run_id, reason in self.failures.items()]
        return html_table(f"Results: {self._described()}", columns_of(self.records), *failed)

    def _described(self) -> str:
        n_converged = sum(r["converged"] is True for r in self.records)
        n_families = len(self.families)
        families = f"{n_families} families" if n_families != 1 else "one family"
        return f"{self.folder}: {len(self.records)} runs of {families}, {n_converged} converged"


def pool(studies: Sequence[Results], *, hooks_apart: bool = False) -> list[dict[str, Any]]:
    """Return the runs of several studies as one list.

    Each run's `study` names its study, and its `run_id` begins with that name, so that runs of equal settings in two
    studies stay apart. Its `stream_seed` is the study's, since runs of two orders of the tokens are two replicates.

    Args:
        studies: The studies, all scored with the same language model, at the same hook and on the same tokens.
        hooks_apart: Whether studies at several hooks are taken too. Then each run's `hook` keeps families apart.

    Raises:
        ValueError: A study is listed twice, or two were scored with different models, at different hooks or on
            different tokens.
    """
    folders = [results.folder.resolve() for results in studies]
    if len(set(folders)) < len(folders):
        raise ValueError(f"studies {', '.join(map(str, folders))}: one is listed twice")
    # Links are followed to see whether two are one folder, and not to name them.
    folders = [Path(os.path.abspath(results.folder)) for results in studies]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    check_comparable(studies, hooks_apart=hooks_apart)
    hooks = [results.config["stream"].get("hook", "") for results in studies]
    several = len(set(hooks)) > 1
    return [
        record
        | {"study": name, "run_id": f"{name}/{record['run_id']}", "stream_seed": results.stream_seed}
        | ({"hook": hook} if several else {})
        for name, hook, results in zip(names, hooks, studies, strict=True)
        for record in results.records
    ]


def records_of(found: Sequence[Results], *, hooks_apart: bool = False) -> Sequence[Record]:
    """Return the runs of one study as they are, or those of several studies pooled, as `pool` does it."""
    return pool(found, hooks_apart=hooks_apart) if len(found) > 1 else found[0].records
