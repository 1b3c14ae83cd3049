"""Figures of a run from the result files of sae-probes, the benchmark of Kantamneni et al. 2025 (arXiv 2502.16681).

sae-probes takes our SAEs as `prolu.interop.saebench.SAEBenchSAE`, and writes a file for each of its data sets. Written
against sae-probes 0.4.2, of which nothing is imported here.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

SCORES = {"test_auc": "auc", "test_acc": "acc"}
"""The scores of a result file that become figures, with the ends of their names."""


def sae_probes_figures(folder: str | Path) -> dict[str, float]:
    """Return the figures of one SAE from the results that `run_sae_evals` wrote, by names for results.jsonl.

    - `sae_probes_158_code_C_5_auc`, `sae_probes_158_code_C_5_acc`: the area under the ROC curve and the accuracy of a
      probe on 5 latents, on the rows for testing of the data set `158_code_C`; likewise for all data sets and numbers.
    - `sae_probes_mean_5_auc` and `_acc`: their means over the data sets.

    Args:
        folder: The `results_path` of `run_sae_evals`, with the setting `normal`. It must be the results of one SAE, at
            one hook, with one kind of regularisation.

    Raises:
        ValueError: There are no such results, or those of two hooks or regularisations, or a file is none of them.
    """
    folder = Path(folder)
    files = sorted(folder.glob("sae_probes_*/normal_setting/*.json"))
    if not files:
        raise ValueError(f"{folder}: holds no results of sae-probes in the setting normal")
    figures: dict[str, float] = {}
    ks: dict[str, list[float]] = {}
    for file in files:
        for row in _rows(file):
            for score, end in SCORES.items():
                name = f"sae_probes_{row['dataset']}_{row['k']}_{end}"
                if name in figures:
                    raise ValueError(f"{folder}: holds two results for {row['dataset']} and k {row['k']}")
                figures[name] = float(row[score])
                ks.setdefault(f"{row['k']}_{end}", []).append(float(row[score]))
    return figures | {f"sae_probes_mean_{kind}": fmean(values) for kind, values in ks.items()}


def _rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a result file, one for each number of latents."""
    try:
        rows = json.loads(file.read_text())
        needed = {"dataset", "k", *SCORES}
        if not all(needed <= row.keys() for row in rows):
            raise ValueError(f"{file}: no result file of sae-probes; its rows need {', '.join(sorted(needed))}")
    except (OSError, AttributeError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{file}: no result file of sae-probes") from None
    return rows
