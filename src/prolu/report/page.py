"""One self-contained HTML page of a study: figures, verdicts, training curves, failures, all runs, config."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plotly.offline import get_plotlyjs

from prolu.activations.token_mask import NO_MASK, TokenMask
from prolu.evaluation.comparison.claims import FamilyComparison
from prolu.evaluation.comparison.figures import LATENT_VALUE, MAGNITUDE
from prolu.evaluation.comparison.frontiers import Record, family, study_names
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS, label_of, main_metric
from prolu.evaluation.comparison.points import Point, points
from prolu.evaluation.comparison.prefixes import prefix_title, prefix_widths, with_prefix
from prolu.evaluation.comparison.standing_wording import EXPLAINED
from prolu.evaluation.comparison.styles import (
    FRONTIER_PLANES,
    MAIN_PLANES,
    PLANES,
    TITLES,
    colours,
    families,
    far_apart,
    joining,
    lines,
    look,
    marker,
    pareto_points,
    planes,
)
from prolu.evaluation.comparison.wording import covered
from prolu.report.agreement import HEADS, NO_PAIRS, DrawnAgreement, cells_of, note_of
from prolu.report.assets import render
from prolu.report.headline import PageHeadline
from prolu.report.html_tables import (
    COLUMNS,
    HALF_WIDTH,
    N_TEXT_COLUMNS,
    rows_of_claims,
    rows_of_runs,
    table_of_families,
    table_of_verdicts,
    tables_of_standings,
    tables_of_verdicts,
)
from prolu.report.truth_section import TruthSection
from prolu.runtime.files import json_text

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
"""The columns of a run's training curve that are drawn, with the titles of their figures."""

SHOWN = ("l0", "l1", "sqrt_l1", "mse", "degradation", "fvu", "recovered", "dead_fraction")
"""The scores of a run that the page's script needs, for its figures and for what it shows at the pointer."""


PREFIX_SCORES = ("l0", "degradation", "fvu")
"""The scores of the prefixes of nested losses that it needs."""


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
    headline: PageHeadline | None
    """The numbers of the SAE if the page shows a single one. Comparisons and claims have nothing to say then."""


def render_page(content: PageContent) -> str:
    """Return the whole page as text: one file that opens from the disk, without a network."""
    records = content.records
    return render(
        "page.html",
        name=content.name,
        headline=content.headline,
        facts=facts(content),
        verdicts=table_of_verdicts(content.comparison.verdicts),
        half_width=HALF_WIDTH,
        n_runs=len(records),
        n_unconverged=sum(r["converged"] is False for r in records),
        other_verdicts=tables_of_verdicts(content.comparison.others),
        standings=tables_of_standings(content.comparison.standings),
        standings_explained=EXPLAINED,
        covered=covered(content.comparison.verdicts).capitalize(),
        families=table_of_families(records),
        agreement_heads=HEADS,
        agreement=[cells_of(setting) for setting in content.agreement.settings],
        agreement_note=note_of(content.agreement),
        truth=content.truth,
        claims=rows_of_claims([*content.comparison.against_relu, *content.comparison.paper]),
        subject="this study" if len(content.configs) == 1 else "these studies",
        metric=METRICS[main_metric(records)],
        in_a_model=main_metric(records) == CE_INCREASE,
        n_planes=len(PLANES) + len(prefix_widths(records)),
        n_curves=len(CURVES),
        runs=rows_of_runs(records, content.pages),
        columns=list(COLUMNS.values()),
        n_text_columns=N_TEXT_COLUMNS,
        failures=content.failures,
        config=json_text(content.configs, indent=1),
        plotly=get_plotlyjs(),  # 4.9 MB, without which the page would draw nothing offline
        data=page_data(content),
    )


def facts(content: PageContent) -> list[str]:
    """Return what was trained on what, in a few sentences per study."""
    sentences = []
    for name, config in content.configs.items():
        runs = [r for r in content.records if r.get("study", name) == name]
        stream = config["stream"]
        prefix = f"{name}: " if len(content.configs) > 1 else ""
        n_converged = sum(bool(r["converged"]) for r in runs)
        # Results of older versions do not have every field.
        n_seeds = len({r.get("init_seed") for r in runs})
        n_families = len(families(runs))
        n_tokens = runs[0].get("n_tokens")
        lm, hook, data = (stream.get(field, "not recorded") for field in ("lm", "hook", "data"))
        unit = "row" if "rows" in stream else "token"
        mask = TokenMask.recorded(stream)
        kind = "SAE"
        if hook_out := stream.get("hook_out"):
            kind = "transcoder"
            hook = f"{hook}, written at {hook_out}"
        text = data if n_tokens is None else f"{n_tokens:,} training {unit}s of {data}"
        place = "Activations from no language model" if "rows" in stream else f"Activations of {lm} at {hook}"
        sentences.append(
            f"{prefix}{len(runs)} of {_counted(len(config['runs']), kind)} finished, {n_converged} of them converged; "
            f"{_counted(n_families, 'family', 'families')}, {_counted(n_seeds, 'init seed')}. "
            f"{place}, {text}, scored on {runs[0]['eval_tokens']:,} held-out {unit}s."
            + (f" Left out of training and scores: {mask}." if mask != NO_MASK else "")
        )
    return sentences


def _counted(n: int, one: str, several: str = "") -> str:
    return f"{n} {one}" if n == 1 else f"{n} {several or one + 's'}"


def page_data(content: PageContent) -> dict[str, Any]:
    """Return what the page's script draws and filters."""
    widths = prefix_widths(content.records)
    drawn = [_plane(content.records, x, y) for x, y in planes(content.records)]
    return {
        "runs": [_run(r, content.pages) for r in content.records],
        "families": {name: _style(r) for name, r in families(content.records).items()},
        "studies": _study_symbols(content.records),
        "names": COLUMNS | {f"{name}@{n}": COLUMNS[name] for n in widths for name in PREFIX_SCORES},
        # Of one SAE they would have one point each.
        "planes": [] if content.headline else drawn + [_plane_of_prefix(content.records, n) for n in widths],
        "truth": None if content.truth is None else _response(content.truth),
        "curves": [_curve(column, title, content) for column, title in CURVES.items()],
    }


def _response(truth: TruthSection) -> dict[str, Any]:
    """Return the figure of latent values against true magnitudes, for the script to draw."""
    lines = [
        {"family": family(line.record), "l0": line.l0, "x": line.magnitudes, "y": line.values} for line in truth.lines
    ]
    return {"lines": lines, "xlabel": MAGNITUDE, "ylabel": LATENT_VALUE}


def _run(r: Record, pages: Mapping[str, str]) -> dict[str, Any]:
    about = {
        "id": r["run_id"],
        "family": family(r),
        "study": r.get("study", ""),
        "seed": r.get("init_seed", 0),
        "setting": _setting(r),
        "converged": bool(r["converged"]),
        "page": pages.get(r["run_id"], ""),
    }
    prefixes = r.get("prefixes") or ()
    of_prefixes = {f"{name}@{p['d_sae']}": _number(p.get(name)) for p in prefixes for name in PREFIX_SCORES}
    return about | {name: _number(r.get(name)) for name in SHOWN} | of_prefixes


def _setting(r: Record) -> str:
    if r.get("target_l0") is not None:
        return f"target L0 {r['target_l0']:g}"
    # An SAE of another library that was scored here may not say how it was trained.
    return "settings not known" if r["coeff"] is None else f"coeff {r['coeff']:.4g}"


def _style(r: Record) -> dict[str, Any]:
    # Taken from any run of the family, since these are the same for all of them.
    light, dark = colours(r["nonlinearity"])
    dash = DASHES.get(look(r), OTHER_DASH)
    return {"light": light, "dark": dark, "dash": dash, "symbol": SYMBOLS[marker(r, [""])]}


def _study_symbols(records: Sequence[Record]) -> dict[str, str]:
    """Return a marker for every study; none if there is only one, where markers tell nonlinearities apart instead."""
    pooled = study_names(records)
    if len(pooled) < 2:
        return {}
    first = {name: next(r for r in records if r.get("study", "") == name) for name in pooled}
    return {name: SYMBOLS[marker(r, pooled)] for name, r in first.items()}


def _plane(records: Sequence[Record], x: str, y: str) -> dict[str, Any]:
    found = points(records, x, y)
    # The script cannot tell the frontier itself: it is of all converged points, whatever the filters leave.
    best = {p.run_ids for p in pareto_points(found)} if (x, y) in FRONTIER_PLANES else set()
    return {
        "x": x,
        "y": y,
        "title": TITLES.get((x, y), f"{y} against {x}"),
        "log": x == "l0",
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
    """Return the curve that comparisons read, for the script to draw: straight lines would say otherwise."""
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


def _curve(column: str, title: str, content: PageContent) -> dict[str, Any]:
    lines = {}
    for r in content.records:
        curve = content.curves.get(r["run_id"], [])  # an SAE that was not trained here has none
        lines[r["run_id"]] = [[row["tokens"] for row in curve], [_number(row[column]) for row in curve]]
    return {"title": title, "log": column != "dead", "lines": lines}  # dead latents are often 0


def _number(value: Any) -> float | None:
    """Return a number with five digits, which keeps the page small; None for what JSON cannot hold."""
    return float(f"{value:.5g}") if isinstance(value, int | float) and math.isfinite(value) else None
