"""What the page's script draws and filters: points, lines and styles of the figures, and the runs themselves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prolu.evaluation.comparison.claims import FamilyComparison
from prolu.evaluation.comparison.figures import LATENT_VALUE, MAGNITUDE
from prolu.evaluation.comparison.frontiers import Record, family, study_names
from prolu.evaluation.comparison.metric_catalog import label_of, main_metric
from prolu.evaluation.comparison.points import Point, points
from prolu.evaluation.comparison.prefixes import prefix_title, prefix_widths, with_prefix
from prolu.evaluation.comparison.styles import (
    FRONTIER_PLANES,
    MAIN_PLANES,
    TITLES,
    colours,
    families,
    far_apart,
    is_logarithmic,
    joining,
    lines,
    look,
    marker_of,
    pareto_points,
    planes,
    study_letters,
)
from prolu.evaluation.latents import DENSITY_EDGES
from prolu.report.agreement import NO_PAIRS, DrawnAgreement
from prolu.report.headline import PageHeadline
from prolu.report.run_settings import USUAL, settings_of
from prolu.report.run_tables import COLUMNS
from prolu.report.truth_section import TruthSection
from prolu.studies.progress import RunProgress

SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "*": "star",
    "P": "cross",
    "<": "triangle-left",
    ">": "triangle-right",
    "X": "x",
    "h": "hexagon",
    "p": "pentagon",
    "8": "octagon",
    "H": "hexagon2",
    "d": "diamond-tall",
}
"""Plotly's names of the markers that the figures for papers use."""

DASHES = {
    "l1": "solid",
    "sqrt_l1": "5px,3px",
    "l0": "8px,3px,2px,3px",
    "tanh": "6px,2px,2px,2px,2px,2px",
    "quadratic_l0": "9px,2px,3px,2px,3px,2px",
    "frequency_l0": "9px,2px,1px,2px,1px,2px,1px,2px",
    "gated_l1": "12px,4px",
    "none": "2px,3px",
    "decoder": "1px,3px",
    "encoder": "1px,6px",
    "soft_decoder": "4px,3px,1px,3px,1px,3px",
    "nested": "11px,2px",
    "refitted": "13px,3px,3px,3px",
}
"""Plotly's line styles by `look`, like those of the figures for papers."""
OTHER_DASH = "1px,2px"

CURVES = {
    "l0": "L0 of the training batch",
    "mse": "MSE of the training batch",
    "dead": "Dead latents (inactive for a tenth of the run)",
}
"""The columns of a run's training curve that are drawn for all runs together, with the titles of their figures."""

CURVES_OF_ONE = CURVES | {"coeff": "Coefficient of the penalty", "lr": "Learning rate"}
"""Those that are drawn of a single run."""

NEVER_LOGARITHMIC = ("dead", "lr", "coeff")
"""Columns that are often 0."""

SHOWN = ("l0", "l1", "sqrt_l1", "mse", "degradation", "fvu", "recovered", "dead_fraction")
"""The scores of a run that the page's script needs, for its figures and for what it shows at the pointer."""


PREFIX_SCORES = ("l0", "degradation", "fvu")
"""The scores of the prefixes of nested losses that it needs."""


class LiveState(NamedTuple):
    """How far a study is whose page is served while it trains."""

    runs: Sequence[RunProgress]
    """The runs that have neither a result nor failed."""
    changed: float
    """When a file of the study was last written, in seconds since 1970."""
    notice: str = ""
    """Why the page does not show the newest state; empty if it does."""


@dataclass(frozen=True, kw_only=True)
class PageContent:
    """What a page shows of one study, or of several together."""

    name: str
    records: Sequence[Record]
    configs: Mapping[str, Mapping[str, Any]]
    """Each study's resolved config, by the study's name."""
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    """Training curves by run_id."""
    comparison: FamilyComparison
    agreement: DrawnAgreement = NO_PAIRS
    """How far SAEs that differ in their init seed only agree."""
    truth: TruthSection | None = None
    """How the runs stand to the features that their rows are made of; None where these are not known."""
    failures: Mapping[str, str]
    """Why runs failed, by run_id."""
    pages: Mapping[str, str]
    """The addresses of pages of latents, relative to this page, by run_id."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """The folders of the runs whose weights are there, relative to this page, by run_id."""
    headline: PageHeadline | None
    """The numbers of the SAE if the page shows a single one. Comparisons and claims have nothing to say then."""
    live: LiveState | None = None
    """How far the study is, if the page is served while it trains."""

    @property
    def in_training(self) -> Sequence[RunProgress]:
        """The runs without a result that the page shows besides `records`."""
        return self.live.runs if self.live else ()


def page_data(content: PageContent) -> dict[str, Any]:
    """Return what the page's script draws and filters."""
    widths = prefix_widths(content.records)
    drawn = [_plane(content.records, x, y) for x, y in planes(content.records)] if content.records else []
    in_training = [run.settings for run in content.in_training]
    return {
        "runs": [_run(r, content) for r in content.records] + [_unfinished(run) for run in content.in_training],
        "families": {name: _style(r) for name, r in families([*content.records, *in_training]).items()},
        "studies": study_letters(study_names(content.records)),
        "names": COLUMNS | {f"{name}@{n}": COLUMNS[name] for n in widths for name in PREFIX_SCORES},
        # With one SAE, each figure would have only one point.
        "planes": [] if content.headline else drawn + [_plane_of_prefix(content.records, n) for n in widths],
        "truth": None if content.truth is None else _response(content.truth),
        "curves": [_curve(column) for column in CURVES],
        "curvesOfOne": [_curve(column) for column in CURVES_OF_ONE],
        "usual": USUAL,
        "densityEdges": DENSITY_EDGES,
        "changed": content.live.changed if content.live else None,
    }


def _response(truth: TruthSection) -> dict[str, Any]:
    """Return the figure of latent values against true magnitudes, for the script to draw."""
    lines = [
        {"family": family(line.record), "l0": line.l0, "x": line.magnitudes, "y": line.values} for line in truth.lines
    ]
    return {"lines": lines, "xlabel": MAGNITUDE, "ylabel": LATENT_VALUE}


def _run(r: Record, content: PageContent) -> dict[str, Any]:
    prefixes = r.get("prefixes") or ()
    of_prefixes = {f"{name}@{p['d_sae']}": _number(p.get(name)) for p in prefixes for name in PREFIX_SCORES}
    about = {
        "converged": r["converged"],
        "progress": None,
        "page": content.pages.get(r["run_id"], ""),
        "folder": content.folders.get(r["run_id"], ""),
        "density": _density(r),
        "curve": _columns(content.curves.get(r["run_id"], [])),
    }
    return _identity(r) | about | {name: _number(r.get(name)) for name in SHOWN} | of_prefixes


def _unfinished(run: RunProgress) -> dict[str, Any]:
    about = {"converged": None, "progress": run.fraction, "page": "", "folder": "", "density": None}
    return _identity(run.settings) | about | {"curve": _columns(run.curve)} | dict.fromkeys(SHOWN)


def _identity(r: Record) -> dict[str, Any]:
    """Return what tells a run apart from the others, and its settings."""
    settings = settings_of(r)
    return {
        "id": r["run_id"],
        "family": family(r),
        "study": r.get("study", ""),
        "seed": r.get("init_seed", 0),
        "setting": _setting(r),
        "changed": settings.changed,
        "unknown": settings.unknown,
    }


def _density(r: Record) -> list[float | None] | None:
    """Return how many latents lie between the densities of `DENSITY_EDGES`; None if the results do not say it."""
    counts = r.get("density_histogram")
    return [_number(n) for n in counts] if isinstance(counts, list) and len(counts) == len(DENSITY_EDGES) + 1 else None


def _columns(curve: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return a training curve column by column. An SAE that was not trained here has no curve."""
    return {name: [_number(row.get(name)) for row in curve] for name in ("tokens", *CURVES_OF_ONE)}


def _setting(r: Record) -> str:
    if r.get("target_l0") is not None:
        return f"target L0 {r['target_l0']:g}"
    # An SAE of another library that was scored here may not say how it was trained.
    return "settings not known" if r["coeff"] is None else f"coeff {r['coeff']:.4g}"


def _style(r: Record) -> dict[str, Any]:
    # Taken from any run of the family, since these are the same for all of them.
    light, dark = colours(r["nonlinearity"])
    dash = DASHES.get(look(r), OTHER_DASH)
    return {"light": light, "dark": dark, "dash": dash, "symbol": SYMBOLS[marker_of(r["nonlinearity"])]}


def _plane(records: Sequence[Record], x: str, y: str) -> dict[str, Any]:
    found = points(records, x, y)
    # The frontier is found here and not by the script, because it is that of all converged points, whatever is filtered
    # out.
    best = {p.run_ids for p in pareto_points(found)} if (x, y) in FRONTIER_PLANES else set()
    return {
        "x": x,
        "y": y,
        "title": TITLES.get((x, y), f"{y} against {x}"),
        "log": is_logarithmic(x, found),
        "tall": far_apart(found),
        "xlabel": label_of(x),
        "ylabel": label_of(y),
        "points": [_point(p) | {"best": p.run_ids in best} for p in found],
        "lines": [_joining(line, x, y) for line in lines(found)] if (x, y) in MAIN_PLANES else [],
    }


def _plane_of_prefix(records: Sequence[Record], n: int) -> dict[str, Any]:
    """Return the plane of what the first n latents of nested losses do by themselves."""
    metric = main_metric(records)
    plane = _plane(with_prefix(records, n), "l0", metric)
    # The script takes the points of single runs by these names.
    return plane | {"title": prefix_title(n, metric), "x": f"l0@{n}", "y": f"{metric}@{n}"}


def _joining(line: Sequence[Point], x: str, y: str) -> dict[str, Any]:
    """Return the curve that comparisons use, for the script to draw; straight lines would show other values between
    runs.
    """
    places = joining(line, x, y)
    return {
        "family": line[0].family,
        "study": line[0].study,
        "x": [_number(a) for a, _ in places],
        "y": [_number(b) for _, b in places],
    }


def _point(p: Point) -> dict[str, Any]:
    return {
        "family": p.family,
        "study": p.study,
        "x": p.x if math.isfinite(p.x) else None,  # JSON holds no other numbers
        "y": p.y if math.isfinite(p.y) else None,
        "dx": _number(p.x_half_width),  # None with one seed: then the script draws no bars
        "dy": _number(p.y_half_width),
        "n": p.n_seeds,
        "runs": p.run_ids,
        "converged": p.converged,
    }


def _curve(column: str) -> dict[str, Any]:
    return {"column": column, "title": CURVES_OF_ONE[column], "log": column not in NEVER_LOGARITHMIC}


def _number(value: Any) -> float | None:
    """Return a number with five digits, which keeps the page small; None for what JSON cannot hold."""
    return float(f"{value:.5g}") if isinstance(value, int | float) and math.isfinite(value) else None
