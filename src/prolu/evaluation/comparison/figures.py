"""Figures for papers: families in a plane with error bars, and training curves (matplotlib)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.typing import LineStyleType

from prolu.evaluation.comparison.frontiers import Record, family, pareto_mask, studies
from prolu.evaluation.comparison.points import Point, points
from prolu.evaluation.latents import Response

COLOURS = {
    "relu": ("#444444", "#d0d3d6"),
    "prolu_relu": ("#0072B2", "#4a90d9"),
    "prolu_ste": ("#D55E00", "#f07a2e"),
    "gated": ("#009E73", "#1fbf8f"),
    "jumprelu": ("#CC6FA6", "#e08cc0"),
    "topk": ("#C49A00", "#e6c23c"),
    "batchtopk": ("#44AADD", "#8fd3f7"),
}
"""By nonlinearity, on white and on black: told apart by every kind of colour vision, after Okabe and Ito."""
GREY = "#777777"
OTHER_COLOURS = (("#882255", "#c65f95"), ("#7A7A1F", "#c2c266"), ("#117733", "#6fbf73"), ("#6A51A3", "#ab98dd"))

MARKERS = {"l1": "o", "sqrt_l1": "s", "l0": "^", "gated_l1": "D", "none": "v"}
"""By penalty, in a figure of one study."""
OTHER_MARKER = "P"
SHAPES = "os^Dv*P"
"""By study, in a figure of several."""
DASHES: dict[str, LineStyleType] = {
    "l1": "-", "sqrt_l1": (0, (5, 2)), "l0": (0, (6, 2, 1, 2)), "gated_l1": (0, (9, 3)), "none": (0, (2, 1.5)),
}  # fmt: skip
OTHER_DASH: LineStyleType = (0, (1, 1))

LABELS = {
    "l0": "L0: latents on per token",
    "l1": "L1: sum of latents per token",
    "sqrt_l1": "sqrt-L1: sum of square roots of latents per token",
    "mse": "MSE per dimension, normalised space",
    "degradation": "information lost, nats per token",
    "fvu": "fraction of variance unexplained",
}
"""Axis titles, with units."""

PLANES = [("l0", "degradation"), ("l1", "mse"), ("l0", "l1"), ("l0", "mse"), ("sqrt_l1", "mse")]
"""The paper's four figures, and the one its author regrets lacking."""

TITLES = {
    ("l0", "degradation"): "Information lost against sparsity",
    ("l1", "mse"): "Reconstruction error against L1: what the L1 loss optimises",
    ("l0", "l1"): "L1 against L0: less suppression lies higher",
    ("l0", "mse"): "Reconstruction error against sparsity",
    ("sqrt_l1", "mse"): "Reconstruction error against sqrt-L1: what the Sqrt(L1) loss optimises",
}
BETTER = {"degradation", "mse", "l0", "l1", "sqrt_l1", "fvu"}
"""Lower is better."""

MANY = 6
"""Families whose legend still finds room in a figure."""

WIDE = 20
"""Ratio of the highest point to the lowest from which heights are drawn on a logarithmic scale."""

FRONTIER_PLANES = {plane for plane in PLANES if plane != ("l0", "l1")}
"""Planes in which lower is better on both axes, so that a Pareto frontier means something."""


def colours(nonlinearity: str) -> tuple[str, str]:
    """The colours of a nonlinearity, whatever its arguments, on white and on black."""
    known = COLOURS.get(nonlinearity.partition("(")[0])
    return known or OTHER_COLOURS[sum(map(ord, nonlinearity)) % len(OTHER_COLOURS)]


def colour(nonlinearity: str) -> str:
    """The colour of a nonlinearity on white."""
    return colours(nonlinearity)[0]


UNDATED: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""By a file's ending: what leaves the clock out of it."""


def save_figure(figure: Figure, *files: Path) -> None:
    """Writes, each by its ending (svg, png, pdf), and closes the figure."""
    with matplotlib.rc_context({"svg.hashsalt": "prolu", "pdf.fonttype": 42}):  # names that are the same every time
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, bbox_inches="tight", dpi=160, metadata=UNDATED.get(file.suffix))
    plt.close(figure)


def draw_frontier(records: Sequence[Record], x: str, y: str) -> Figure:
    """Families in one plane: a point is the mean over init seeds with its 95% t intervals, small ones the runs.

    Filled where converged, hollow where not, ringed where Pareto-best.
    """
    found = points(records, x, y)
    many = len(families(records)) > MANY
    figure, axes = plt.subplots(figsize=(8.6 if many else 7.2, 5.4 if many else 5.0), layout="constrained")
    for line in lines(found):
        _draw_line(axes, line, records, x, y)
    if (x, y) in FRONTIER_PLANES:
        best = pareto_points(found)
        axes.scatter(
            [p.x for p in best], [p.y for p in best], s=130, facecolors="none", edgecolors="#000000", linewidths=0.9,
            zorder=4, label="Pareto-best" if best else None,
        )  # fmt: skip
    axes.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y), title=TITLES.get((x, y), f"{y} against {x}"))
    if x == "l0":
        axes.set_xscale("log")
        _plain_log_ticks(axes)
    if far_apart(found):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if any(p.y < 0 for p in found) else 0)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, axes, records, beside=many)
    return figure


def far_apart(found: Sequence[Point]) -> bool:
    """Whether heights are drawn on a logarithmic scale."""
    heights = [p.y for p in found]
    return min(heights, default=0) > 0 and max(heights) > WIDE * min(heights)


def families(records: Sequence[Record]) -> dict[str, Record]:
    """A run of every family, in order of appearance."""
    first: dict[str, Record] = {}
    for r in records:
        first.setdefault(family(r), r)
    return first


def lines(found: Sequence[Point]) -> list[list[Point]]:
    """What one line joins: the points of one family in one study, in order of x."""
    joined: dict[tuple[str, str], list[Point]] = {}
    for point in sorted(found, key=lambda p: p.x):
        joined.setdefault((point.family, point.study), []).append(point)
    return list(joined.values())


def pareto_points(found: Sequence[Point]) -> list[Point]:
    """Converged points that no other converged point beats."""
    converged = [p for p in found if p.converged]
    mask = pareto_mask([p.x for p in converged], [p.y for p in converged])
    return [p for p, on in zip(converged, mask, strict=True) if on]


def marker(record: Record, pooled: Sequence[str]) -> str:
    """By study where several are pooled, else by penalty."""
    if len(pooled) > 1:
        return SHAPES[pooled.index(record["study"]) % len(SHAPES)]
    return MARKERS.get(record["penalty"], OTHER_MARKER)


def _draw_line(axes: Axes, line: Sequence[Point], records: Sequence[Record], x: str, y: str) -> None:
    """One family in one study: its line, its points with their intervals, its runs."""
    own = {run_id for point in line for run_id in point.run_ids}
    runs = [r for r in records if r["run_id"] in own]
    ink, dash = colour(runs[0]["nonlinearity"]), DASHES.get(runs[0]["penalty"], OTHER_DASH)
    shape, done = marker(runs[0], studies(records)), [p for p in line if p.converged]
    for part, alpha in ((line, 0.3), (done, 0.85)):
        axes.plot([p.x for p in part], [p.y for p in part], linestyle=dash, color=ink, linewidth=1.3, alpha=alpha)
    seeds = [r for point in line if point.n_seeds > 1 for r in runs if r["run_id"] in point.run_ids]
    axes.scatter([r[x] for r in seeds], [r[y] for r in seeds], s=7, color=ink, alpha=0.35, linewidths=0, zorder=2)
    for part, face in ((done, ink), ([p for p in line if not p.converged], "white")):
        axes.errorbar(
            [p.x for p in part], [p.y for p in part], _drawn([p.y_half_width for p in part]),
            _drawn([p.x_half_width for p in part]), fmt=shape, color=ink, markerfacecolor=face, markersize=6,
            markeredgewidth=1.2, elinewidth=0.9, capsize=2, zorder=3,
        )  # fmt: skip


def _drawn(half_widths: Sequence[float]) -> list[float]:
    """Without an interval, no bar."""
    return [0.0 if math.isnan(half) else half for half in half_widths]


def _legend(figure: Figure, axes: Axes, records: Sequence[Record], *, beside: bool) -> None:
    """In the figure, or beside it where it would hide too much."""
    pooled, handles = studies(records), []
    for name, first in families(records).items():
        ink, dash = colour(first["nonlinearity"]), DASHES.get(first["penalty"], OTHER_DASH)
        shape = "" if len(pooled) > 1 else marker(first, pooled)
        handles.append(Line2D([], [], color=ink, linestyle=dash, marker=shape, markersize=5, label=name))
    if len(pooled) > 1:
        shapes = (SHAPES[i % len(SHAPES)] for i in range(len(pooled)))
        handles += [_point(shape, GREY, name) for shape, name in zip(shapes, pooled, strict=True)]
    if not all(r["converged"] for r in records):
        handles.append(_point("o", "none", "not converged"))
    handles += axes.get_legend_handles_labels()[0]
    if beside:
        figure.legend(handles=handles, frameon=False, fontsize=8.5, loc="outside right upper", handlelength=3)
    else:
        axes.legend(handles=handles, frameon=False, fontsize=8.5, handlelength=3)


def _point(shape: str, face: str, label: str) -> Line2D:
    """A grey marker for a legend."""
    return Line2D([], [], color=GREY, linestyle="", marker=shape, markerfacecolor=face, label=label)


def draw_training_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], records: Sequence[Record]) -> Figure:
    """L0, MSE and latents that have gone silent, over training tokens, one line a run."""
    figure, all_axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    panels = (
        ("l0", "L0 of the batch"),
        ("mse", "MSE of the batch"),
        ("dead", "latents silent for a tenth of the run"),
    )
    for axes, (name, title) in zip(all_axes, panels, strict=True):
        for record in records:
            rows = curves.get(record["run_id"], [])
            dash = DASHES.get(record["penalty"], OTHER_DASH)
            tokens, values = [r["tokens"] / 1e6 for r in rows], [r[name] for r in rows]
            axes.plot(tokens, values, linestyle=dash, color=colour(record["nonlinearity"]), linewidth=0.9, alpha=0.7)
        axes.set(xlabel="training tokens, millions", title=title)
        if name != "dead":
            axes.set_yscale("log")
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=colour(r["nonlinearity"]), linestyle=DASHES.get(r["penalty"], OTHER_DASH), label=name)
        for name, r in families(records).items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9, handlelength=3)
    return figure


def _plain_log_ticks(axes: Axes) -> None:
    ticks = [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000]
    low, high = axes.get_xlim()
    if high > 100 * low:
        ticks = [1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000]
    axes.set_xticks([t for t in ticks if low <= t <= high], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")


def draw_scale_response(responses: Mapping[str, Mapping[float, Response]]) -> Figure:
    """What SAEs make of inputs k times as far from b_dec, a line each: gain of what is on, and what stays on.

    Args:
        responses: of `latents.scale_response`, by label; a label that begins with a nonlinearity has its colour.
    """
    figure, (gains, shares) = plt.subplots(1, 2, figsize=(10, 4.0))
    for label, by_scale in responses.items():
        scales = sorted(by_scale)
        style = {"color": colour(label.split(" + ")[0]), "marker": "o", "markersize": 4, "linewidth": 1.3}
        gains.plot(scales, [by_scale[k].gain for k in scales], label=label, **style)
        shares.plot(scales, [by_scale[k].still_on for k in scales], **style)
    gains.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    gains.set(title="Gain of latents that are on", ylabel="f(k v) / (k f(v)), mean over latents")
    shares.set(title="What stays on", ylabel="share of pairs on at v that are on at k v", ylim=(0, 1.03))
    for axes in (gains, shares):
        axes.set(xlabel="k: scale of the centred input", xscale="log")
        ticks = sorted({k for by_scale in responses.values() for k in by_scale})
        axes.set_xticks(ticks, [f"{k:g}" for k in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    gains.legend(frameon=False, fontsize=9)
    return figure
