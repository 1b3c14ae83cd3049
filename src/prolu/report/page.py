"""One self-contained HTML page of a study: figures, verdicts, training curves, failures, all runs, config."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plotly.offline import get_plotlyjs

from prolu.evaluation.comparison.claims import paper_claims
from prolu.evaluation.comparison.figures import (
    FRONTIER_PLANES,
    LABELS,
    PLANES,
    TITLES,
    colours,
    families,
    far_apart,
    marker,
    pareto_points,
)
from prolu.evaluation.comparison.frontiers import Record, family, studies
from prolu.evaluation.comparison.points import Point, points
from prolu.evaluation.comparison.verdicts import Verdict
from prolu.report.assets import asset, inlined
from prolu.report.html_tables import COLUMNS, claims_table, families_table, runs_table, verdicts_table

SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "*": "star",
    "P": "cross",
}
"""Plotly's names of the other figures' markers."""
DASHES = {"l1": "solid", "sqrt_l1": "5px,3px", "l0": "8px,3px,2px,3px", "gated_l1": "12px,4px", "none": "2px,3px"}
OTHER_DASH = "1px,2px"
CURVES = {
    "l0": "L0 of the training batch",
    "mse": "MSE of the training batch",
    "dead": "Latents silent for a tenth of the run",
}
"""Columns of a run's curve that are drawn."""
SHOWN = ("l0", "l1", "sqrt_l1", "mse", "degradation", "fvu", "recovered", "dead_fraction")
"""Figures of a run that the page's script needs."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows of one study, or of several together."""

    name: str
    records: Sequence[Record]
    configs: Mapping[str, Mapping[str, Any]]
    """Each study's resolved config, by name."""
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    """Training curves by run_id."""
    verdicts: list[Verdict]
    failures: Mapping[str, str]
    """Why runs failed, by run_id."""
    pages: Mapping[str, str]
    """Addresses of the pages of latents, relative to the report's, by run_id."""


def render_page(report: Report) -> str:
    """The whole page as text; opens offline, from the disk."""
    converged, n_failed = sum(bool(r["converged"]) for r in report.records), len(report.failures)
    failures = "".join(f"<li><b>{html.escape(run)}</b> {html.escape(why)}</li>" for run, why in report.failures.items())
    return asset("page.html").format(
        name=html.escape(report.name),
        style=asset("theme.css") + asset("page.css"),
        theme=asset("theme.js"),
        plotly=get_plotlyjs(),
        facts="".join(f"<p>{html.escape(fact)}</p>" for fact in facts(report)),
        verdicts=verdicts_table(report.verdicts),
        families=families_table(report.records),
        claims=claims_table(paper_claims(report.records)),
        subject="this study" if len(report.configs) == 1 else "these studies, each family by its own best runs",
        failures=f"<ul class='failures'>{failures}</ul>" if failures else "<p class='quiet'>None failed.</p>",
        failed=f" ({n_failed})" if n_failed else "",
        n_runs=len(report.records),
        n_unconverged=len(report.records) - converged,
        runs=runs_table(report.records, report.pages),
        config=html.escape(json.dumps(report.configs, indent=1)),
        data=inlined(page_data(report)),
        script=asset("page.js"),
    )


def facts(report: Report) -> list[str]:
    """A sentence or two a study."""
    sentences = []
    for name, config in report.configs.items():
        own, stream = [r for r in report.records if r.get("study", name) == name], config["stream"]
        prefix = f"{name}: " if len(report.configs) > 1 else ""
        seeds = len({r.get("init_seed") for r in own})
        n_tokens = own[0].get("n_tokens")
        text = stream["data"] if n_tokens is None else f"{n_tokens:,} training tokens of {stream['data']}"
        sentences.append(
            f"{prefix}{len(own)} of {len(config['runs'])} SAEs finished, {sum(bool(r['converged']) for r in own)} "
            f"converged; {len(families(own))} families, {seeds} init seed{'s' if seeds > 1 else ''}. "
            f"{stream['lm']} at {stream['hook']}, {text}, scored on {own[0]['eval_tokens']:,} held-out tokens."
        )
    return sentences


def page_data(report: Report) -> dict[str, Any]:
    """What the page's script draws."""
    return {
        "runs": [_run(r, report.pages) for r in report.records],
        "families": {name: _style(r) for name, r in families(report.records).items()},
        "studies": _study_symbols(report.records),
        "names": COLUMNS,
        "planes": [_plane(report.records, x, y) for x, y in PLANES],
        "curves": [_curve(what, title, report) for what, title in CURVES.items()],
    }


def _run(r: Record, pages: Mapping[str, str]) -> dict[str, Any]:
    coeff = "settings not known" if r["coeff"] is None else f"coeff {r['coeff']:.4g}"
    setting = coeff if r.get("target_l0") is None else f"target L0 {r['target_l0']:g}"
    return {
        "id": r["run_id"], "family": family(r), "study": r.get("study", ""), "seed": r.get("init_seed", 0),
        "setting": setting, "converged": bool(r["converged"]), "page": pages.get(r["run_id"], ""),
    } | {name: _number(r.get(name)) for name in SHOWN}  # fmt: skip


def _style(r: Record) -> dict[str, Any]:
    light, dark = colours(r["nonlinearity"])
    dash = DASHES.get(r["penalty"], OTHER_DASH)
    return {"light": light, "dark": dark, "dash": dash, "symbol": SYMBOLS[marker(r, [""])]}


def _study_symbols(records: Sequence[Record]) -> dict[str, str]:
    """A marker for every study; none where there is only one."""
    pooled = studies(records)
    first = {name: next(r for r in records if r.get("study", "") == name) for name in pooled}
    return {name: SYMBOLS[marker(r, pooled)] for name, r in first.items()} if len(pooled) > 1 else {}


def _plane(records: Sequence[Record], x: str, y: str) -> dict[str, Any]:
    found = points(records, x, y)
    best = {p.run_ids for p in pareto_points(found)} if (x, y) in FRONTIER_PLANES else set()
    return {
        "x": x, "y": y, "title": TITLES.get((x, y), f"{y} against {x}"), "log": x == "l0", "tall": far_apart(found),
        "xlabel": LABELS.get(x, x), "ylabel": LABELS.get(y, y),
        "points": [_point(p) | {"best": p.run_ids in best} for p in found],
    }  # fmt: skip


def _point(p: Point) -> dict[str, Any]:
    return {
        "family": p.family, "study": p.study, "x": p.x, "y": p.y, "dx": _number(p.x_half_width),
        "dy": _number(p.y_half_width), "n": p.n_seeds, "runs": p.run_ids, "converged": p.converged,
    }  # fmt: skip


def _curve(what: str, title: str, report: Report) -> dict[str, Any]:
    rows = {r["run_id"]: report.curves.get(r["run_id"], []) for r in report.records}
    return {
        "title": title, "log": what != "dead",
        "lines": {
            run_id: [[row["tokens"] for row in curve], [_number(row[what]) for row in curve]]
            for run_id, curve in rows.items()
        },
    }  # fmt: skip


def _number(value: Any) -> float | None:
    """Five digits; None for what is no number."""
    return float(f"{value:.5g}") if isinstance(value, int | float) and math.isfinite(value) else None
