"""One self-contained HTML page: verdicts, interactive figures, training curves, table, config."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from prolu.claims import Claim, paper_claims, verdicts
from prolu.figures import FRONTIER_PLANES, LABELS, PLANES, SHAPES, TITLES, colour, marker, series
from prolu.frontiers import Record, family, pareto_mask, studies

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
PLOTLY_DASHES = {"l1": "solid", "sqrt_l1": "dash"}
COLUMNS = [
    "run_id",
    "l0",
    "degradation",
    "recovered",
    "mse",
    "fvu",
    "l1",
    "sqrt_l1",
    "dead_fraction",
    "converged",
]

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def render_page(
    name: str,
    records: Sequence[Record],
    configs: Mapping[str, Mapping[str, Any]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """The whole page as text; opens offline, from the disk.

    Args:
        name: title of the page.
        records: runs of one study or, pooled, of several.
        configs: each study's resolved config, by name.
        curves: training curves by run_id.
    """
    title = html.escape(name)
    planes = [_figure_html(_plane(records, x, y), first=i == 0) for i, (x, y) in enumerate(PLANES)]
    facts = "".join(f'<p class="facts">{html.escape(fact)}</p>' for fact in _facts(records, configs))
    subject = "this study" if len(configs) == 1 else "these studies, each family by its own best runs"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: SAE frontiers</title><style>{STYLE}</style>
<script>{get_plotlyjs()}</script></head><body>
<h1>{title}: SAE frontiers</h1>{facts}
<h2>ProLU against ReLU, at equal L0</h2>{_claims_html(verdicts(records))}
<h2>The paper's claims (Taggart 2024), on {subject}</h2>{_claims_html(paper_claims(records))}
<p class="note">Only converged runs count: held-out L0 and MSE moved less than 5% over the last fifth of training
at full learning rate. The others are drawn hollow. One seed a point, so small differences are not findings.</p>
<h2>Frontiers</h2>{planes[0]}<div class="pair">{"".join(planes[1:])}</div>
<h2>Training</h2><div class="pair">{"".join(_figure_html(_curves(records, curves, n)) for n in ("l0", "mse"))}</div>
<h2>Runs</h2><div class="scroll">{_table(records)}</div>
<h2>Config</h2><details><summary>Everything that decides these numbers</summary>
<pre>{html.escape(json.dumps(configs, indent=1))}</pre></details>
</body></html>
"""


def _facts(records: Sequence[Record], configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence a study."""
    facts = []
    for name, config in configs.items():
        own, stream = [r for r in records if r.get("study", name) == name], config["stream"]
        prefix = f"{name}: " if len(configs) > 1 else ""
        facts.append(
            f"{prefix}{len(own)} of {len(config['runs'])} SAEs finished, {sum(r['converged'] for r in own)} converged; "
            f"{stream['lm']} at {stream['hook']}, {own[0]['n_tokens']:,} training tokens of {stream['data']}, scored "
            f"on {own[0]['eval_tokens']:,} held-out tokens."
        )
    return facts


def _figure_html(figure: go.Figure, first: bool = False) -> str:
    """The first figure carries the legend for all."""
    figure.update_layout(
        template="simple_white",
        height=560 if first else 400,
        margin={"l": 70, "r": 20, "t": 50, "b": 60},
        showlegend=first,
        font={"size": 13},
        title={"font": {"size": 17 if first else 14}},
    )
    figure.update_xaxes(showgrid=True, gridcolor="#e4e4e4")
    figure.update_yaxes(showgrid=True, gridcolor="#e4e4e4")
    tools = {"displaylogo": False, "responsive": True, "displayModeBar": "hover" if first else False}
    name = re.sub(
        r"\W+", "-", figure.to_dict()["layout"]["title"]["text"].lower()
    )  # plotly's own would differ from time to time
    return figure.to_html(full_html=False, include_plotlyjs=False, config=tools, div_id=name)


def _plane(records: Sequence[Record], x: str, y: str) -> go.Figure:
    figure = go.Figure()
    converged = [r for r in records if r["converged"]]
    if (x, y) in FRONTIER_PLANES:
        mask = pareto_mask([r[x] for r in converged], [r[y] for r in converged])
        best = [r for r, on in zip(converged, mask, strict=True) if on]
        ring = {"size": 19, "symbol": "circle-open", "color": "#000000", "line": {"width": 1.2}}
        figure.add_scatter(
            x=[r[x] for r in best],
            y=[r[y] for r in best],
            mode="markers",
            marker=ring,
            name="Pareto-best",
            hoverinfo="skip",
        )
    pooled, named = studies(records), set[str]()
    for rows in series(records, x):
        name, shape = family(rows[0]), SYMBOLS[marker(rows[0], pooled)]
        figure.add_scatter(
            x=[r[x] for r in rows],
            y=[r[y] for r in rows],
            mode="lines+markers",
            name=name,
            legendgroup=name,
            showlegend=name not in named,
            line={"color": colour(rows[0]["nonlinearity"]), "dash": _dash(rows[0]), "width": 1.3},
            marker={"size": 9, "symbol": [shape + ("" if r["converged"] else "-open") for r in rows]},
            text=[_hover(r) for r in rows],
            hovertemplate="%{text}<extra></extra>",
        )
        named.add(name)
    for i, study in enumerate(pooled if len(pooled) > 1 else ()):
        shape = {"symbol": SYMBOLS[SHAPES[i % len(SHAPES)]], "color": "#777777", "size": 9}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=study, marker=shape)
    figure.update_layout(title=TITLES.get((x, y), f"{y} against {x}"))
    figure.update_xaxes(title=LABELS.get(x, x), type="log" if x == "l0" else "linear")
    if x == "l0":
        figure.update_xaxes(tickvals=[1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
    figure.update_yaxes(title=LABELS.get(y, y), rangemode="tozero")
    return figure


def _dash(record: Record) -> str:
    return PLOTLY_DASHES.get(record["penalty"], "dot")


def _hover(r: Record) -> str:
    state = "" if r["converged"] else "<br>not converged"
    study = f", {r['study']}" if "study" in r else ""
    return (
        f"<b>{family(r)}</b>{study}<br>coeff {r['coeff']:.4g}, seed {r['init_seed']}<br>"
        f"L0 {r['l0']:.2f}, L1 {r['l1']:.2f}<br>"
        f"degradation {r['degradation']:.4f} nats, MSE {r['mse']:.4f}{state}"
    )


def _curves(records: Sequence[Record], curves: Mapping[str, Sequence[Mapping[str, Any]]], what: str) -> go.Figure:
    figure = go.Figure()
    for r in records:
        rows = curves.get(r["run_id"], [])
        figure.add_scatter(
            x=[row["tokens"] for row in rows],
            y=[row[what] for row in rows],
            mode="lines",
            showlegend=False,
            name=r["run_id"],
            text=r["run_id"],
            hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
            line={
                "color": colour(r["nonlinearity"]),
                "dash": _dash(r),
                "width": 1.1,
            },
        )
    title = "L0 of the training batch" if what == "l0" else "MSE of the training batch"
    figure.update_layout(title=title)
    figure.update_xaxes(title="training tokens")
    figure.update_yaxes(title=LABELS[what], type="log")
    return figure


def _claims_html(claims: Sequence[Claim]) -> str:
    kinds = {"holds": "holds", "does not hold": "not", "cannot be said": "open"}
    rows = "".join(
        f'<tr><td>{html.escape(c.statement)}</td><td class="verdict {kinds[c.verdict]}">{c.verdict}</td>'
        f"<td>{html.escape(c.evidence)}</td></tr>"
        for c in claims
    )
    return f'<table class="claims">{rows}</table>'


def _table(records: Sequence[Record]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))

    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    ordered = sorted(records, key=lambda r: (family(r), r["l0"]))
    cells = ["".join(f"<td>{cell(r[name])}</td>" for name in COLUMNS) for r in ordered]
    kinds = ["" if r["converged"] else " class=hollow" for r in ordered]
    rows = "".join(f"<tr{kind}>{row}</tr>" for kind, row in zip(kinds, cells, strict=True))
    return f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
