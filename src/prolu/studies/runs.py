"""A finished run of a study, and the runs on its frontier: what they are, as objects and in a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prolu.evaluation.comparison.frontiers import Record, family
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS, main_metric
from prolu.runtime.notebooks import data_frame, html_facts, html_table
from prolu.runtime.tables import Column
from prolu.sae.autoencoder import SAE
from prolu.sae.saved_sae import read_provenance
from prolu.studies.records import read_curve
from prolu.training.config import RunConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONVERGED = {True: "converged", False: "not converged", None: "not known whether converged"}
"""Whether a run has converged, in words; None of an SAE that another library trained."""


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run of a study."""

    folder: Path
    """The folder of the run."""
    record: Record
    """The run's line of results.jsonl: its settings and its scores, by name."""

    def load(self) -> SAE:
        """Load the trained SAE."""
        return SAE.load(self.folder)

    @property
    def run_id(self) -> str:
        """The name of the run, and of its folder."""
        return str(self.record["run_id"])

    @property
    def family(self) -> str:
        """The family of the run, as in `prolu_ste + l1`."""
        return family(self.record)

    @property
    def l0(self) -> float:
        """The mean number of active latents per held-out token."""
        return self.record["l0"]

    @property
    def config(self) -> RunConfig:
        """The settings that the run was trained with.

        Raises:
            ValueError: The SAE was not trained by this library, so its settings are not known.
        """
        described = read_provenance(self.folder).get("run")
        if not isinstance(described, dict):
            raise ValueError(f"{self.folder}: this SAE was not trained by prolu, so its RunConfig is not known")
        return RunConfig.recorded(described)

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The training curve, a line for each hundredth of the steps: step, tokens, mse, l0, dead and more.

        It is empty for an SAE that was not trained here.
        """
        return read_curve(self.folder)

    def __repr__(self) -> str:
        scores = [f"{name} {value}" for name, value in self._scores().items()]
        return f"Run({self.run_id}: {', '.join([*scores, CONVERGED[self.record['converged']]])})"

    def _repr_html_(self) -> str:
        facts = {"run": self.run_id, "family": self.family} | self._scores()
        facts["training"] = CONVERGED[self.record["converged"]]
        return html_facts(f"Run in {self.folder.parent}", facts, {k: str(v) for k, v in self.record.items()})

    def _scores(self) -> dict[str, str]:
        metric = METRICS[main_metric([self.record])]
        unit = f" {metric.unit}" if metric.unit else ""
        return {"L0": f"{self.l0:.1f}", metric.words: f"{self.record[metric.name]:.3f}{unit}"}


@dataclass(frozen=True, repr=False)
class Frontier:
    """The converged runs that no other converged run beats in two scores, both of which are better when lower."""

    x: str
    """The name of the first score."""
    y: str
    """The name of the second score."""
    runs: list[Run]
    """The runs on the frontier, in order of x."""
    all_runs: list[Run]
    """All finished runs of the study."""

    def plot(self, file: str | Path | None = None, *, ax: "Axes | None" = None) -> "Figure":
        """Draw all runs, with a line per family, the frontier marked, and hollow markers for unconverged runs.

        Args:
            file: The file to write besides, whose suffix is .svg, .png or .pdf.
            ax: The axes to draw into; by default those of a new figure.

        Returns:
            The figure, which a notebook shows if it is the last line of a cell.
        """
        return plot_runs([run.record for run in self.all_runs], self.x, self.y, file, ax)

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with a row for each run on the frontier, as `Results.to_pandas` does.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return frame_of([run.record for run in self.runs])

    def __repr__(self) -> str:
        return f"Frontier({self._described()})"

    def _repr_html_(self) -> str:
        return html_table(f"Frontier: {self._described()}", columns_of([run.record for run in self.runs]))

    def _described(self) -> str:
        x, y = (METRICS[name].words if name in METRICS else name for name in (self.x, self.y))
        n_converged = sum(run.record["converged"] is True for run in self.all_runs)
        return f"{len(self.runs)} of {n_converged} converged runs are best in {x} and {y}"


def plot_runs(
    records: Sequence[Record], x: str, y: str, file: str | Path | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Return the figure of runs in one plane, as `Frontier.plot` does."""
    # matplotlib, which `import prolu` must not wait for
    from prolu.evaluation.comparison.figures import draw_frontier, save_figure

    figure = draw_frontier(records, x, y, axes=ax)
    if file is not None:
        save_figure(figure, Path(file))
    return figure


def frame_of(records: Sequence[Record]) -> Any:
    """Return a pandas DataFrame of runs: a row per run, its family first, then the fields of results.jsonl."""
    return data_frame([{"family": family(record)} | dict(record) for record in records])


def columns_of(records: Sequence[Record]) -> list[Column]:
    """Return the columns of a table of runs in a notebook, by family and L0."""
    order = list(dict.fromkeys(map(family, records)))
    # Families in the order of their first run, which is the order in which they were asked for.
    rows = sorted(records, key=lambda r: (order.index(family(r)), r["l0"]))
    metric = METRICS[main_metric(records)]
    columns = [
        Column("family", [family(r) for r in rows], is_text=True),
        Column("seed", [_number(r.get("init_seed"), "d") for r in rows]),
        Column("coefficient", [_number(r["coeff"], ".3g") for r in rows]),
        Column("target L0", [_number(r.get("target_l0"), "g") for r in rows]),
        Column("L0", [_number(r["l0"], ".1f") for r in rows]),
        Column(metric.label, [_number(r[metric.name], ".3f") for r in rows]),
        Column("loss recovered", [_number(r["recovered"], ".1%") for r in rows]),
        Column("MSE", [_number(r["mse"], ".3f") for r in rows]),
        Column("dead latents", [_number(r.get("dead_fraction"), ".1%") for r in rows]),
        Column("training", [CONVERGED[r["converged"]] for r in rows], is_text=True),
    ]
    if metric.name != CE_INCREASE:
        columns = [column for column in columns if column.title != "loss recovered"]
    return [column for column in columns if any(column.cells)]


def _number(value: float | None, form: str) -> str:
    """Return a number as it is shown; empty where it is not known."""
    return "" if value is None else format(value, form)
