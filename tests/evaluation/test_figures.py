"""Figures: colours that everybody tells apart, legible with many families, the same bytes every time."""

import itertools
import math

import numpy as np
import pytest

from prolu.evaluation.comparison.claims import compare_families
from prolu.evaluation.comparison.figures import draw_frontier, save_figure
from prolu.evaluation.comparison.points import points
from prolu.evaluation.comparison.styles import (
    COLOURS,
    DASHES,
    MARKERS,
    OTHER_MARKERS,
    colours,
    lines,
    marker_of,
    pareto_points,
)
from prolu.report.page import render_page
from prolu.report.page_data import DASHES as PAGE_DASHES
from prolu.report.page_data import SYMBOLS, PageContent, page_data

VISION = {
    "all": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
"""Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB."""


def linear(colour):
    part = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ rgb.clip(0, 1) / np.array([0.9505, 1, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("dark", [False, True])
def test_colours_are_told_apart(vision, dark):
    seen = {name: lab(np.array(VISION[vision]) @ linear(pair[dark])) for name, pair in COLOURS.items()}
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 10, (one, other)


@pytest.mark.parametrize(("dark", "paper"), [(False, "#ffffff"), (True, "#1b1f24")])
def test_colours_stand_out_from_the_paper(dark, paper):
    luminance = np.array([0.2126, 0.7152, 0.0722])
    for pair in COLOURS.values():
        low, high = sorted((luminance @ linear(pair[dark]), luminance @ linear(paper)))
        assert (high + 0.05) / (low + 0.05) > 2.5


def test_no_two_nonlinearities_are_told_apart_by_colour_alone():
    assert MARKERS.keys() == COLOURS.keys()
    assert len(set(MARKERS.values())) == len(MARKERS)
    assert not set(OTHER_MARKERS) & set(MARKERS.values())
    assert set(MARKERS.values()) | set(OTHER_MARKERS) <= SYMBOLS.keys()
    assert marker_of("jumprelu(0.3)") == MARKERS["jumprelu"]
    assert marker_of("prolu(0,1,1)") in OTHER_MARKERS
    figure = draw_frontier(list(study()), "l0", "degradation")
    styles = [(line.get_marker(), line._unscaled_dash_pattern) for line in legend_lines(figure)]
    assert len(set(map(str, styles))) == len(FAMILIES)


def legend_lines(figure):
    return figure.legends[0].get_lines()[: len(FAMILIES)]


def test_every_penalty_and_random_baseline_has_its_dash():
    assert len(set(map(str, DASHES.values()))) == len(DASHES)
    assert DASHES.keys() == PAGE_DASHES.keys()


FAMILIES = [(n, p) for n in ("relu", "prolu_relu", "prolu_ste") for p in ("l1", "sqrt_l1")]
FAMILIES += [("gated", "gated_l1"), ("jumprelu", "l0"), ("topk", "none"), ("new", "other")]


def study(n_seeds=3):
    for (k, (nonlinearity, penalty)), l0, seed in itertools.product(enumerate(FAMILIES), (8, 16, 32), range(n_seeds)):
        lost = (1 - 0.05 * k) * (1 + 0.04 * seed) / math.sqrt(l0)
        yield {
            "run_id": f"{k}-{l0}-{seed}", "nonlinearity": nonlinearity, "penalty": penalty, "coeff": 0.1 / l0,
            "init_seed": seed, "d_sae": 64, "n_tokens": 1000, "eval_tokens": 640, "l0": l0 + seed / 9,
            "degradation": lost, "mse": lost / 4, "l1": l0 / 2, "sqrt_l1": l0 / 1.5, "recovered": 1 - lost,
            "converged": (k, l0) != (2, 8),
        }  # fmt: skip


def test_a_figure_of_ten_families(tmp_path):
    records = list(study())
    figure = draw_frontier(records, "l0", "degradation")
    (axes,) = figure.axes
    assert len(axes.containers) == 20  # converged or not, each with error bars
    assert [text.get_text() for text in figure.legends[0].get_texts()][-2:] == ["not converged", "Pareto-best"]
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x0 > axes.get_window_extent().x1  # beside it, and whole
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


def test_heights_are_logarithmic_only_where_they_are_far_apart():
    records = list(study())
    for factor, scale in ((1, "linear"), (0.01, "log"), (0, "linear")):
        some = [r | {"degradation": r["degradation"] * (factor if r["l0"] > 30 else 1)} for r in records]
        figure = draw_frontier(some, "l0", "degradation")
        assert figure.axes[0].get_yscale() == scale
        assert scale == "log" or figure.axes[0].get_ylim()[0] == 0


def test_l0_is_logarithmic_only_where_it_is_far_apart():
    records = list(study())
    for factor, scale in ((0.2, "linear"), (1, "log"), (0, "linear")):
        some = [r | {"l0": 8 + factor * (r["l0"] - 8)} for r in records]
        figure = draw_frontier(some, "l0", "degradation")
        assert figure.axes[0].get_xscale() == scale
        low, high = figure.axes[0].get_xlim()
        assert len([t for t in figure.axes[0].get_xticks() if low <= t <= high]) >= 3


def test_pooled_studies_have_letters_and_nonlinearities_keep_their_markers(tmp_path):
    records = [r | {"study": name, "run_id": f"{name}/{r['run_id']}"} for name in ("one", "two $x$") for r in study()]
    figure = draw_frontier(records, "l0", "degradation")
    (axes,) = figure.axes
    assert sorted(text.get_text() for text in axes.texts) == ["A"] * 10 + ["B"] * 10
    styles = [(line.get_marker(), line._unscaled_dash_pattern) for line in legend_lines(figure)]
    assert len(set(map(str, styles))) == len(FAMILIES)
    save_figure(figure, tmp_path / "a.png")


def test_a_nonlinearity_has_its_colour_whatever_its_arguments():
    assert colours("jumprelu(0.3)") == colours("jumprelu") == COLOURS["jumprelu"]
    assert colours("prolu(0,1,1)") not in COLOURS.values()


def test_a_figure_is_the_same_bytes_every_time(tmp_path):
    for name in ("a", "b"):
        figure = draw_frontier(list(study()), "l0", "degradation")
        save_figure(figure, *(tmp_path / f"{name}.{ending}" for ending in ("svg", "pdf", "png")))
    for ending in ("svg", "pdf", "png"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_one_seed_has_no_bars(tmp_path):
    records = list(study(n_seeds=1))
    save_figure(draw_frontier(records, "l0", "mse"), tmp_path / "a.png")
    found = points(records, "l0", "mse")
    assert all(math.isnan(p.y_half_width) for p in found)
    assert [len(line) for line in lines(found)] == [3] * 10
    assert all(p.converged for p in pareto_points(found))


class Finished:
    """As much of a study as verdicts need."""

    def __init__(self, folder, records):
        self.folder, self.records, self.stream_seed, self.config = folder, records, 0, {}


def test_the_page_draws_what_the_statistics_say(tmp_path):
    records = list(study())
    stream = {"lm": "x", "hook": "y", "data": "</script><script>alert(1)</script>"}
    content = PageContent(
        name="<b>", records=records, configs={"<b>": {"runs": [{}] * 99, "stream": stream}}, curves={},
        comparison=compare_families([Finished(tmp_path, records)]), failures={"r": "<i>why</i>"},
        pages={"0-8-0": 'a"b.html'}, headline=None,
    )  # fmt: skip
    data, found = page_data(content), points(records, "l0", "degradation")
    plane = data["planes"][0]
    assert [(p["x"], p["y"]) for p in plane["points"]] == [(p.x, p.y) for p in found]
    assert [p["dy"] for p in plane["points"]] == pytest.approx([p.y_half_width for p in found], rel=1e-4)
    assert {tuple(p["runs"]) for p in plane["points"] if p["best"]} == {p.run_ids for p in pareto_points(found)}
    assert [len(line["x"]) for line in plane["lines"]] == [2 * 12 + 1] * 10  # curves through three points each
    assert data["planes"][1]["lines"] == []
    page = render_page(content)
    assert "alert(1)</script>" not in page
    assert "<i>why" not in page
    assert 'href="a&#34;b.html"' in page
    assert page.count('<tr data-run="') == len(records)
    one = render_page(content)
    assert one == page
