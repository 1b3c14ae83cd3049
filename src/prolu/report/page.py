"""One self-contained HTML page of a study: figures, verdicts, training curves, failures, all runs, config."""

from typing import Any

from plotly.offline import get_plotlyjs

from prolu.activations.token_mask import NO_MASK, TokenMask
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS, main_metric
from prolu.evaluation.comparison.prefixes import prefix_widths
from prolu.evaluation.comparison.standing_wording import EXPLAINED
from prolu.evaluation.comparison.styles import PLANES, families
from prolu.evaluation.comparison.wording import covered, listed
from prolu.report.agreement import HEADS, cells_of, note_of
from prolu.report.assets import render
from prolu.report.html_tables import (
    HALF_WIDTH,
    rows_of_claims,
    table_of_families,
    table_of_verdicts,
    tables_of_standings,
    tables_of_verdicts,
)
from prolu.report.page_data import CURVES, PageContent, page_data
from prolu.report.run_tables import COLUMNS, N_TEXT_COLUMNS, PROGRESS_COLUMNS, rows_of_progress, rows_of_runs
from prolu.runtime.files import json_text


def render_page(content: PageContent) -> str:
    """Return the whole page as text.

    A page on the disk is one file that opens without a network. One that is served loads plotly by its address.
    """
    return render(
        "page.html",
        name=content.name,
        live=content.live,
        headline=content.headline,
        facts=facts(content),
        n_runs=len(content.records),
        n_curves=len(CURVES),
        in_training=rows_of_progress(content.in_training),
        progress_columns=list(PROGRESS_COLUMNS.values()),
        failures=content.failures,
        config=json_text(content.configs, indent=1),
        plotly="" if content.live else get_plotlyjs(),  # 4.9 MB
        data=page_data(content),
        # Before the first run has finished there is nothing to compare.
        **(_comparisons(content) if content.records else {}),
    )


def _comparisons(content: PageContent) -> dict[str, Any]:
    """Return what the page shows of the results of finished runs."""
    records = content.records
    return {
        "verdicts": table_of_verdicts(content.comparison.verdicts),
        "half_width": HALF_WIDTH,
        "n_unconverged": sum(r["converged"] is False for r in records),
        "other_verdicts": tables_of_verdicts(content.comparison.others),
        "standings": tables_of_standings(content.comparison.standings),
        "standings_explained": EXPLAINED,
        "covered": covered(content.comparison.verdicts).capitalize(),
        "families": table_of_families(records),
        "agreement_heads": HEADS,
        "agreement": [cells_of(setting) for setting in content.agreement.settings],
        "agreement_note": note_of(content.agreement),
        "truth": content.truth,
        "claims": rows_of_claims([*content.comparison.against_relu, *content.comparison.paper]),
        "subject": "this study" if len(content.configs) == 1 else "these studies",
        "metric": METRICS[main_metric(records)],
        "in_a_model": main_metric(records) == CE_INCREASE,
        "n_planes": len(PLANES) + len(prefix_widths(records)),
        "runs": rows_of_runs(records, content.pages),
        "columns": list(COLUMNS.values()),
        "n_text_columns": N_TEXT_COLUMNS,
    }


def facts(content: PageContent) -> list[str]:
    """Return what was trained on what, in a few sentences per study."""
    sentences = []
    for name, config in content.configs.items():
        runs = [r for r in content.records if r.get("study", name) == name]
        stream = config["stream"]
        prefix = f"{name}: " if len(content.configs) > 1 else ""
        n_converged = sum(bool(r["converged"]) for r in runs)
        known = runs or [run.settings for run in content.in_training]
        # Results of older versions do not have every field.
        n_seeds = len({r.get("init_seed") for r in known})
        n_families = len(families(known))
        n_tokens = known[0].get("n_tokens") if known else None
        n_scored = runs[0]["eval_tokens"] if runs else config.get("eval_tokens")
        lm, hook, data = (stream.get(field, "not recorded") for field in ("lm", "hook", "data"))
        data = listed(data) if isinstance(data, list) else data
        unit = "row" if "rows" in stream else "token"
        mask = TokenMask.recorded(stream)
        kind = "SAE"
        if hook_out := stream.get("hook_out"):
            kind = "transcoder"
            hook = f"{hook}, written at {hook_out}"
        text = data if n_tokens is None else f"{n_tokens:,} training {unit}s of {data}"
        place = "Activations from no language model" if "rows" in stream else f"Activations of {lm} at {hook}"
        scored = "" if n_scored is None else f", scored on {n_scored:,} held-out {unit}s"
        sentences.append(
            f"{prefix}{len(runs)} of {_counted(len(config['runs']), kind)} finished, {n_converged} of them converged; "
            f"{_counted(n_families, 'family', 'families')}, {_counted(n_seeds, 'init seed')}. "
            f"{place}, {text}{scored}." + (f" Left out of training and scores: {mask}." if mask != NO_MASK else "")
        )
    return sentences


def _counted(n: int, one: str, several: str = "") -> str:
    return f"{n} {one}" if n == 1 else f"{n} {several or one + 's'}"
