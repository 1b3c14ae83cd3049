"""Figures for papers, drawn with matplotlib: families in a plane with error bars, training curves, scale responses."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

# Without pyplot, which keeps all figures, looks for a display, and shows figures a second time in a notebook.
from matplotlib import figure as mpl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from prolu.evaluation.comparison.frontiers import Record, family, study_names
from prolu.evaluation.comparison.metric_catalog import label_of
from prolu.evaluation.comparison.points import Point, points
from prolu.evaluation.comparison.styles import (
    DASHES,
    FRONTIER_PLANES,
    OTHER_DASH,
    TITLES,
    colour,
    families,
    far_apart,
    is_logarithmic,
    joining,
    lines,
    look,
    marker_of,
    pareto_points,
    study_letters,
)
from prolu.evaluation.latents import Response
from prolu.runtime.files import write_atomically

GREY = "#777777"

MAGNITUDE = "true magnitude (multiple of the feature's mean)"
"""The title of the axis of magnitudes."""

LATENT_VALUE = "mean value of its latent (same scale)"
"""The title of the axis of latent values."""

MANY = 6
"""The number of families up to which the legend has room inside the axes."""

DASHED = 4.5
"""The length of a line in a legend, in font sizes: on a shorter one the marker hides the gaps of the longest dashes."""

UNDATED: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""The metadata, by a file's ending, that keeps the date out of it: the same study gives the same bytes."""


class Figure(mpl.Figure):
    """A figure that a notebook shows as the last line of a cell, whether or not matplotlib is set up there."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", bbox_inches="tight")
        return content.getvalue()


def save_figure(figure: mpl.Figure, *files: Path) -> None:
    """Write a figure to each of these files, in the format of its ending: svg, pdf or png."""
    # Without a fixed salt, matplotlib draws the names of an SVG's elements at random; 42 embeds fonts as TrueType, so
    # that a PDF's text can be selected.
    with matplotlib.rc_context({"svg.hashsalt": "prolu", "pdf.fonttype": 42}):
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            ending = file.suffix.removeprefix(".")
            figure.savefig(content, format=ending, bbox_inches="tight", dpi=160, metadata=UNDATED.get(file.suffix))
            write_atomically(file, content.getvalue())


def draw_frontier(
    records: Sequence[Record], x: str, y: str, title: str | None = None, *, axes: Axes | None = None
) -> mpl.Figure:
    """Return the figure of all families in one plane.

    A large point is a mean over init seeds with its 95% t intervals, small points are the runs. Points are filled if
    all their runs have converged, hollow if not, and ringed if they are Pareto-best.

    Args:
        records: the runs of one study, or of several.
        x: the figure on the horizontal axis, by its name in results.jsonl.
        y: the figure on the vertical axis, likewise.
        title: the title, if it is not the usual one of the plane.
        axes: the axes to draw into, whose figure is returned then; by default those of a new figure.
    """
    found = points(records, x, y)
    # The legend of many families is as wide as axes that are one of several.
    many = axes is None and len(families(records)) > MANY
    if axes is None:
        figure = Figure(figsize=(8.6, 5.4) if many else (7.2, 5.0), layout="constrained")
        axes = figure.subplots()
    else:
        figure = axes.figure.figure  # of a part of a figure, the whole
    letters = study_letters(study_names(records))
    for line in lines(found):
        _draw_line(axes, line, records, x, y)
        if letters:
            _name_study(axes, line[-1], letters[line[-1].study], records)
    if (x, y) in FRONTIER_PLANES:
        _draw_rings(axes, pareto_points(found))
    title = title or TITLES.get((x, y), f"{y} against {x}")
    axes.set(xlabel=label_of(x), ylabel=label_of(y), title=title)
    if is_logarithmic(x, found):
        axes.set_xscale("log")
        _set_plain_ticks(axes)
    if far_apart(found):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        # Heights begin at 0, so that they can be compared by eye; a CE increase can be below it.
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if any(p.y < 0 for p in found) else 0)
    axes.set_axisbelow(True)
    _set_frame(axes)
    _draw_legend(figure, axes, records, beside=many)
    return figure


def _draw_line(axes: Axes, line: Sequence[Point], records: Sequence[Record], x: str, y: str) -> None:
    """Draw one family in one study: its line, its points with their intervals, its runs."""
    own = {run_id for point in line for run_id in point.run_ids}
    runs = {r["run_id"]: r for r in records if r["run_id"] in own}
    first = next(iter(runs.values()))
    ink = colour(first["nonlinearity"])
    dash = DASHES.get(look(first), OTHER_DASH)
    shape = marker_of(first["nonlinearity"])
    converged = [p for p in line if p.converged]
    others = [p for p in line if not p.converged]
    # The line goes through all points, because comparisons use all runs; hollow markers show which have not converged.
    axes.plot(*zip(*joining(line, x, y), strict=True), linestyle=dash, color=ink, linewidth=1.3, alpha=0.85)
    seeds = [r for point in line if point.n_seeds > 1 for r in runs.values() if r["run_id"] in point.run_ids]
    axes.scatter([r[x] for r in seeds], [r[y] for r in seeds], s=7, color=ink, alpha=0.35, linewidths=0, zorder=2)
    for part, face in ((converged, ink), (others, "white")):
        axes.errorbar(
            [p.x for p in part],
            [p.y for p in part],
            yerr=_bars([p.y_half_width for p in part]),
            xerr=_bars([p.x_half_width for p in part]),
            fmt=shape,
            color=ink,
            markerfacecolor=face,
            markersize=6,
            markeredgewidth=1.2,
            elinewidth=0.9,
            capsize=2,
            zorder=3,
        )


def _name_study(axes: Axes, end: Point, letter: str, records: Sequence[Record]) -> None:
    """Write the letter of a study at the end of a line."""
    ink = colour(next(r["nonlinearity"] for r in records if r["run_id"] in end.run_ids))
    axes.annotate(letter, (end.x, end.y), xytext=(6, 3), textcoords="offset points", fontsize=8.5, color=ink)


def _bars(half_widths: Sequence[float]) -> list[float]:
    """Return the lengths of error bars: 0 where there is no interval."""
    return [0.0 if math.isnan(half) else half for half in half_widths]


def _draw_rings(axes: Axes, best: Sequence[Point]) -> None:
    axes.scatter(
        [p.x for p in best],
        [p.y for p in best],
        s=130,
        facecolors="none",
        edgecolors="#000000",
        linewidths=0.9,
        zorder=4,
        label="Pareto-best" if best else None,
    )


def _draw_legend(figure: mpl.Figure, axes: Axes, records: Sequence[Record], *, beside: bool) -> None:
    """Draw the legend inside the axes, or beside them where it would hide too much."""
    handles = []
    for name, first in families(records).items():
        style = {"color": colour(first["nonlinearity"]), "linestyle": DASHES.get(look(first), OTHER_DASH)}
        shape = marker_of(first["nonlinearity"])
        handles.append(Line2D([], [], marker=shape, markersize=5, label=_label(name), **style))
    for name, letter in study_letters(study_names(records)).items():
        handles.append(_grey_marker(rf"$\mathrm{{{letter}}}$", GREY, name))
    if not all(r["converged"] for r in records):
        handles.append(_grey_marker("o", "none", "not converged"))
    handles += axes.get_legend_handles_labels()[0]
    if beside:
        figure.legend(handles=handles, frameon=False, fontsize=8.5, loc="outside right upper", handlelength=DASHED)
    else:
        axes.legend(handles=handles, frameon=False, fontsize=8.5, handlelength=DASHED)


def _label(name: str) -> str:
    """Return a name with its dollar signs escaped; matplotlib would draw the text between two of them as a formula."""
    return name.replace("$", r"\$")


def _grey_marker(shape: str, face: str, label: str) -> Line2D:
    """Return a legend entry that is a marker without a line."""
    return Line2D([], [], color=GREY, linestyle="", marker=shape, markerfacecolor=face, label=_label(label))


def _set_plain_ticks(axes: Axes) -> None:
    """Label a logarithmic L0 axis with plain numbers, where matplotlib would write powers of ten only."""
    ticks = [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000]
    low, high = axes.get_xlim()
    if high > 100 * low:
        # Over two decades the full list would overlap.
        ticks = [1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000]
    axes.set_xticks([t for t in ticks if low <= t <= high], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")


def _set_frame(axes: Axes) -> None:
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw_training_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], records: Sequence[Record]) -> Figure:
    """Return the figure of L0, MSE and silent latents over the tokens trained on, with one line per run.

    Args:
        curves: the lines of each run's metrics.jsonl, by run_id; runs without any are left out.
        records: the runs.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    all_axes = figure.subplots(1, 3)
    panels = {"l0": "L0 of the batch", "mse": "MSE of the batch", "dead": "latents silent for a tenth of the run"}
    for axes, (name, title) in zip(all_axes, panels.items(), strict=True):
        for record in records:
            rows = curves.get(record["run_id"], [])
            ink = colour(record["nonlinearity"])
            dash = DASHES.get(look(record), OTHER_DASH)
            tokens = [r["tokens"] / 1e6 for r in rows]
            shape = marker_of(record["nonlinearity"])
            style = {
                "linestyle": dash,
                "color": ink,
                "marker": shape,
                "markevery": max(1, len(rows) // 5),
                "markersize": 3,
            }
            axes.plot(tokens, [r[name] for r in rows], linewidth=0.9, alpha=0.7, **style)
        axes.set(xlabel="training tokens, millions", title=title)
        if name != "dead":  # which may be 0
            axes.set_yscale("log")
        _set_frame(axes)
    handles = []
    for name, r in families(records).items():
        dash = DASHES.get(look(r), OTHER_DASH)
        style = {
            "color": colour(r["nonlinearity"]),
            "linestyle": dash,
            "marker": marker_of(r["nonlinearity"]),
            "markersize": 5,
        }
        handles.append(Line2D([], [], label=_label(name), **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9, handlelength=3)
    return figure


class ResponseLine(NamedTuple):
    """How latents respond to the magnitudes of the features that they stand for, which are known."""

    record: Record
    """One of the runs."""
    l0: float
    """The mean L0 of the runs."""
    magnitudes: list[float]
    """True magnitudes, as multiples of the mean magnitude of each feature."""
    values: list[float]
    """The mean values of the latents there, on the same scale, those of 0 included."""


def draw_magnitude_response(found: Sequence[ResponseLine]) -> Figure:
    """Return the figure of latent values against true magnitudes: a line per family, and the truth beside them."""
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    end = max((max(line.magnitudes) for line in found), default=1.0)
    axes.plot([0, end], [0, end], color="#bbbbbb", linewidth=1, zorder=0, label="truth")
    for line in found:
        style = {"color": colour(line.record["nonlinearity"]), "linestyle": DASHES.get(look(line.record), OTHER_DASH)}
        label = f"{_label(family(line.record))}, L0 {line.l0:.3g}"
        shape = marker_of(line.record["nonlinearity"])
        axes.plot(line.magnitudes, line.values, marker=shape, markersize=4, linewidth=1.3, label=label, **style)
    axes.set(xlabel=MAGNITUDE, ylabel=LATENT_VALUE, title="Latent values against true magnitudes", xlim=0, ylim=0)
    _set_frame(axes)
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_scale_response(responses: Mapping[str, Mapping[float, Response]]) -> Figure:
    """Return the figure of how SAEs respond to inputs k times as far from b_dec, with one line per SAE.

    The left panel shows the gain of active latents, the right one the fraction of latents that stay active.

    Args:
        responses: results of `latents.scale_response`, by label. A label that begins with a nonlinearity, such as
            `prolu_ste + l1`, has its colour.
    """
    figure = Figure(figsize=(10, 4.0))
    gains, fractions = figure.subplots(1, 2)
    for label, by_scale in responses.items():
        scales = sorted(by_scale)
        nonlinearity = label.split(" + ")[0]
        style = {"color": colour(nonlinearity), "marker": marker_of(nonlinearity), "markersize": 4, "linewidth": 1.3}
        gains.plot(scales, [by_scale[k].gain for k in scales], label=_label(label), **style)
        fractions.plot(scales, [by_scale[k].still_active for k in scales], **style)
    gains.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    gains.set(title="Gain of active latents", ylabel="f(k v) / (k f(v)), mean over latents")
    fractions.set(title="Latents that stay active", ylabel="fraction of those active at v", ylim=(0, 1.03))
    ticks = sorted({k for by_scale in responses.values() for k in by_scale})
    for axes in (gains, fractions):
        axes.set(xlabel="k: scale of the centred input", xscale="log")
        axes.set_xticks(ticks, [f"{k:g}" for k in ticks], minor=False)
        axes.set_xticks([], minor=True)
        _set_frame(axes)
    gains.legend(frameon=False, fontsize=9)
    return figure
