"""How figures look, shared by matplotlib's figures and the HTML page: planes, colours, markers, dashes."""

from collections.abc import Sequence
from string import ascii_uppercase

from matplotlib.typing import LineStyleType

from prolu.evaluation.comparison.curves import drawn
from prolu.evaluation.comparison.frontiers import Record, family, grouped, pareto_mask
from prolu.evaluation.comparison.metric_catalog import METRICS, main_metric
from prolu.evaluation.comparison.points import Point

COLOURS = {
    "relu": ("#444444", "#d0d3d6"),
    "prolu_relu": ("#0072B2", "#4a90d9"),
    "prolu_ste": ("#D55E00", "#f07a2e"),
    "gated": ("#009E73", "#1fbf8f"),
    "jumprelu": ("#CC6FA6", "#e08cc0"),
    "jumprelu_plain": ("#9E2A66", "#d0609c"),
    "jumprelu_ste": ("#9610f9", "#8730fb"),
    "topk": ("#C49A00", "#e6c23c"),
    "batchtopk": ("#44AADD", "#8fd3f7"),
}
"""The colours of each nonlinearity on white and on black. They are after Okabe and Ito, so that they differ for
readers with any kind of colour blindness."""
OTHER_COLOURS = (("#882255", "#c65f95"), ("#7A7A1F", "#c2c266"), ("#117733", "#6fbf73"), ("#6A51A3", "#ab98dd"))
"""The colours from which a nonlinearity that `COLOURS` lacks gets one."""

MARKERS = {
    "relu": "o",
    "prolu_relu": "s",
    "prolu_ste": "^",
    "gated": "D",
    "jumprelu": "v",
    "jumprelu_plain": "<",
    "jumprelu_ste": ">",
    "topk": "P",
    "batchtopk": "X",
}
"""The marker of each nonlinearity, so that colour is never all that tells two apart."""
OTHER_MARKERS = "hp8d"
"""The markers from which a nonlinearity that `MARKERS` lacks gets one."""
DASHES: dict[str, LineStyleType] = {
    "l1": "-",
    "sqrt_l1": (0, (5, 2)),
    "l0": (0, (6, 2, 1, 2)),
    "gated_l1": (0, (9, 3)),
    "tanh": (0, (4, 1.5, 1, 1.5, 1, 1.5)),
    "quadratic_l0": (0, (7, 1.5, 2, 1.5, 2, 1.5)),
    "frequency_l0": (0, (7, 1.5, 1, 1.5, 1, 1.5, 1, 1.5)),
    "none": (0, (2, 1.5)),
    "decoder": (0, (1, 2)),
    "encoder": (0, (1, 3.5)),
    "soft_decoder": (0, (3, 2, 1, 2, 1, 2)),
    "nested": (0, (8, 1.5)),
    "refitted": (0, (10, 2, 2, 2, 2, 2)),
}
"""The line style of each `look`."""
OTHER_DASH: LineStyleType = (0, (1, 1))

PLANES = [("l0", "degradation"), ("l1", "mse"), ("l0", "l1"), ("l0", "mse"), ("sqrt_l1", "mse")]
"""The axes of each plane: those of the paper's four figures, and sqrt-L1 against MSE."""

MAIN_PLANES = {("l0", "degradation"), ("l0", "fvu")}
"""The planes in which families are compared: the second where activations come from no language model."""

TITLES = {
    ("l0", "degradation"): "CE increase against sparsity",
    ("l0", "fvu"): "Unexplained variance against sparsity",
    ("l1", "mse"): "Reconstruction error against L1: what the L1 loss optimises",
    ("l0", "l1"): "L1 against L0: less suppression lies higher",
    ("l0", "mse"): "Reconstruction error against sparsity",
    ("sqrt_l1", "mse"): "Reconstruction error against sqrt-L1: what the Sqrt(L1) loss optimises",
}
"""The title of each plane."""

FRONTIER_PLANES = {plane for plane in PLANES if plane != ("l0", "l1")} | MAIN_PLANES
"""The planes in which lower is better on both axes, so that they have a Pareto frontier."""

NARROW = 3
"""The ratio of the largest L0 to the smallest up to which an axis of L0 is linear: a logarithmic one has few ticks."""

WIDE = 20
"""The ratio of the highest point to the lowest above which heights are drawn on a logarithmic scale."""


def planes(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return the planes of a report, the first with the metric by which its runs are compared."""
    return [("l0", main_metric(records)), *PLANES[1:]]


def colours(nonlinearity: str) -> tuple[str, str]:
    """Return the colours of a nonlinearity, whatever its arguments, on white and on black."""
    return COLOURS.get(nonlinearity.partition("(")[0]) or OTHER_COLOURS[_number(nonlinearity) % len(OTHER_COLOURS)]


def _number(nonlinearity: str) -> int:
    """Return a number that stands for a nonlinearity. Python's hash differs between processes, this one does not."""
    return sum(map(ord, nonlinearity))


def colour(nonlinearity: str) -> str:
    """Return the colour of a nonlinearity on white."""
    return colours(nonlinearity)[0]


def look(record: Record) -> str:
    """Return what a run's line style stands for.

    That is its penalty or, for these runs, the frozen matrix of a random baseline, a nested loss or a refitted decoder.
    """
    if record.get("refit_tokens"):
        return "refitted"
    if record.get("matryoshka") or record.get("matryoshka_drawn"):
        return "nested"
    return str(record.get("freeze") or record["penalty"]).partition("(")[0]


def study_letters(names: Sequence[str]) -> dict[str, str]:
    """Return the letter of each study, which stands at the end of its lines; none if there is only one study."""
    if len(names) < 2:
        return {}
    return {name: ascii_uppercase[i] if i < len(ascii_uppercase) else str(i + 1) for i, name in enumerate(names)}


def marker_of(nonlinearity: str) -> str:
    """Return the marker of a nonlinearity, whatever its arguments."""
    known = MARKERS.get(nonlinearity.partition("(")[0])
    return known or OTHER_MARKERS[_number(nonlinearity) % len(OTHER_MARKERS)]


def families(records: Sequence[Record]) -> dict[str, Record]:
    """Return the first run of every family, in order of appearance."""
    return {name: runs[0] for (name,), runs in grouped(records, family).items()}


def lines(found: Sequence[Point]) -> list[list[Point]]:
    """Return the points that one line joins, those of one family in one study, in ascending order of x."""
    in_order = sorted(found, key=lambda p: p.x)
    return list(grouped(in_order, lambda p: p.family, lambda p: p.study).values())


def pareto_points(found: Sequence[Point]) -> list[Point]:
    """Return the converged points that no other converged point at the same hook beats."""
    best: list[Point] = []
    for converged in grouped([p for p in found if p.converged], lambda p: p.hook).values():
        mask = pareto_mask([p.x for p in converged], [p.y for p in converged])
        best += [p for p, is_best in zip(converged, mask, strict=True) if is_best]
    return best


def joining(line: Sequence[Point], x: str, y: str) -> list[tuple[float, float]]:
    """Return the line that joins the points of a family: where families are compared, the curve that is read there."""
    places = [(p.x, p.y) for p in line]
    return drawn(places, METRICS[y]) if x == "l0" and y in METRICS and places else places


def far_apart(found: Sequence[Point]) -> bool:
    """Return whether heights are drawn on a logarithmic scale."""
    heights = [p.y for p in found]
    return min(heights, default=0) > 0 and max(heights) > WIDE * min(heights)


def is_logarithmic(x: str, found: Sequence[Point]) -> bool:
    """Return whether the horizontal axis is logarithmic: that of L0 is, unless all points lie close together."""
    values = [p.x for p in found if p.x > 0]
    return x == "l0" and bool(values) and max(values) > NARROW * min(values)
