"""Figures for papers: families of runs in a plane, and training curves (matplotlib)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.typing import LineStyleType

from prolu.frontiers import Record, family, pareto_mask, studies
from prolu.latents import Response

COLOURS = {"relu": "#444444", "prolu_relu": "#0072B2", "prolu_ste": "#D55E00"}
"""By nonlinearity, told apart by every kind of colour vision (Okabe and Ito)."""
GREY = "#777777"
OTHER_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#E69F00")

MARKERS = {"l1": "o", "sqrt_l1": "s"}
"""By penalty, in a figure of one study."""
SHAPES = "os^Dv*P"
"""By study, in a figure of several."""
DASHES: dict[str, LineStyleType] = {"l1": "-", "sqrt_l1": "--"}

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

FRONTIER_PLANES = {plane for plane in PLANES if plane != ("l0", "l1")}
"""Planes in which lower is better on both axes, so that a Pareto frontier means something."""


def colour(nonlinearity: str) -> str:
    """The colour of a nonlinearity."""
    return COLOURS.get(nonlinearity) or OTHER_COLOURS[sum(map(ord, nonlinearity)) % len(OTHER_COLOURS)]


def save_figure(figure: Figure, file: Path) -> None:
    """Writes by the file's ending (svg, png, pdf) and closes the figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "prolu"}):  # names within the file that are the same every time
        figure.savefig(file, bbox_inches="tight", dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def draw_frontier(records: Sequence[Record], x: str, y: str) -> Figure:
    """Runs by family in one plane: filled where converged, hollow where not, ringed where Pareto-best."""
    figure, axes = plt.subplots(figsize=(7.2, 5.0))
    converged = [r for r in records if r["converged"]]
    for rows in series(records, x):
        _draw_series(axes, rows, x, y, marker(rows[0], studies(records)))
    if (x, y) in FRONTIER_PLANES:
        mask = pareto_mask([r[x] for r in converged], [r[y] for r in converged])
        best = [r for r, on in zip(converged, mask, strict=True) if on]
        label = "Pareto-best" if best else None
        axes.scatter(
            [r[x] for r in best], [r[y] for r in best], s=150, facecolors="none", edgecolors="#000000",
            linewidths=1.1, zorder=4, label=label,
        )  # fmt: skip
    axes.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y), title=TITLES.get((x, y), f"{y} against {x}"))
    if x == "l0":
        axes.set_xscale("log")
        _plain_log_ticks(axes)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes, records)
    return figure


def series(records: Sequence[Record], x: str) -> list[list[Record]]:
    """What one line joins: the runs of one family in one study, in order of x."""
    found: dict[tuple[str, str], list[Record]] = {}
    for r in sorted(records, key=lambda r: r[x]):
        found.setdefault((family(r), r.get("study", "")), []).append(r)
    keys = dict.fromkeys((family(r), r.get("study", "")) for r in records)
    return [found[key] for key in keys]


def marker(record: Record, pooled: Sequence[str]) -> str:
    """By study where several are pooled, else by penalty."""
    if len(pooled) > 1:
        return SHAPES[pooled.index(record["study"]) % len(SHAPES)]
    return MARKERS.get(record["penalty"], "D")


def _draw_series(axes: Axes, rows: Sequence[Record], x: str, y: str, shape: str) -> None:
    ink, dash = colour(rows[0]["nonlinearity"]), DASHES.get(rows[0]["penalty"], ":")
    done = [r for r in rows if r["converged"]]
    for part, alpha in ((rows, 0.25), (done, 0.8)):
        axes.plot([r[x] for r in part], [r[y] for r in part], dash, color=ink, linewidth=1.3, alpha=alpha)
    for part, face in ((done, ink), ([r for r in rows if not r["converged"]], "none")):
        axes.scatter(
            [r[x] for r in part], [r[y] for r in part], s=42, marker=shape, facecolors=face, edgecolors=ink,
            linewidths=1.3, zorder=3,
        )  # fmt: skip


def _legend(axes: Axes, records: Sequence[Record]) -> None:
    pooled, first = studies(records), {family(r): r for r in reversed(records)}
    handles = []
    for name in dict.fromkeys(family(r) for r in records):
        ink, dash = colour(first[name]["nonlinearity"]), DASHES.get(first[name]["penalty"], ":")
        shape = "" if len(pooled) > 1 else marker(first[name], pooled)
        handles.append(Line2D([], [], color=ink, linestyle=dash, marker=shape, label=name))
    if len(pooled) > 1:
        shapes = (SHAPES[i % len(SHAPES)] for i in range(len(pooled)))
        handles += [_point(shape, GREY, name) for shape, name in zip(shapes, pooled, strict=True)]
    if not all(r["converged"] for r in records):
        handles.append(_point("o", "none", "not converged"))
    axes.legend(handles=[*handles, *axes.get_legend_handles_labels()[0]], frameon=False, fontsize=9)


def _point(shape: str, face: str, label: str) -> Line2D:
    """A grey marker for a legend."""
    return Line2D([], [], color=GREY, linestyle="", marker=shape, markerfacecolor=face, label=label)


def draw_training_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], records: Sequence[Record]) -> Figure:
    """L0, MSE and latents that have gone silent, over training tokens, one line a run."""
    figure, all_axes = plt.subplots(1, 3, figsize=(13, 3.8))
    panels = (
        ("l0", "L0 of the batch"),
        ("mse", "MSE of the batch"),
        ("dead", "latents silent for a tenth of the run"),
    )
    for axes, (name, title) in zip(all_axes, panels, strict=True):
        for record in records:
            rows = curves.get(record["run_id"], [])
            style = DASHES.get(record["penalty"], ":")
            tokens, values = [r["tokens"] / 1e6 for r in rows], [r[name] for r in rows]
            axes.plot(tokens, values, style, color=colour(record["nonlinearity"]), linewidth=0.9, alpha=0.7)
        axes.set(xlabel="training tokens, millions", title=title)
        if name != "dead":
            axes.set_yscale("log")
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    seen = dict.fromkeys((r["nonlinearity"], r["penalty"]) for r in records)
    handles = [Line2D([], [], color=colour(n), linestyle=DASHES.get(p, ":"), label=f"{n} + {p}") for n, p in seen]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, bbox_to_anchor=(0.5, -0.09))
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
