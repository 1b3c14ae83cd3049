"""Result files of sae-probes become figures of a run. `checks/sae_probes.py` runs that library itself."""

import json

import pytest

from prolu.evaluation.comparison.metric_catalog import METRICS
from prolu.interop.sae_probes import sae_probes_figures


def write(folder, dataset, aucs, hook="blocks.2.hook_resid_pre", reg="l2"):
    """Write a file as sae-probes 0.4.2 does."""
    file = folder / "sae_probes_gpt2" / "normal_setting" / f"{dataset}_{hook}_{reg}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"test_f1": 0.1, "test_acc": auc / 2, "test_auc": auc, "val_auc": 0.2, "k": k, "dataset": dataset,
         "hook_name": hook, "reg_type": reg, "binarize": False, "indices": list(range(k))}
        for k, auc in aucs.items()
    ]  # fmt: skip
    file.write_text(json.dumps(rows, indent=4))


def test_scores_become_figures_with_their_means_over_data_sets(tmp_path):
    write(tmp_path, "158_code_C", {1: 0.5, 16: 0.75})
    write(tmp_path, "901_string", {1: 0.75, 16: 1.0})
    found = sae_probes_figures(tmp_path)
    assert found["sae_probes_158_code_C_16_auc"] == 0.75
    assert found["sae_probes_901_string_1_acc"] == 0.375
    assert found["sae_probes_mean_1_auc"] == 0.625
    assert found["sae_probes_mean_16_acc"] == 0.4375
    assert len(found) == 3 * 4
    assert {"sae_probes_mean_1_auc", "sae_probes_mean_16_auc"} <= METRICS.keys()


def test_what_is_not_the_results_of_one_sae_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no results of sae-probes"):
        sae_probes_figures(tmp_path)
    write(tmp_path, "158_code_C", {1: 0.5})
    write(tmp_path, "158_code_C", {1: 0.5}, reg="l1")
    with pytest.raises(ValueError, match="holds two results for 158_code_C and k 1"):
        sae_probes_figures(tmp_path)
    for content in ("no JSON", '[{"k": 1}]', "[1]"):
        other = tmp_path / str(hash(content)) / "sae_probes_gpt2" / "normal_setting"
        other.mkdir(parents=True)
        (other / "x.json").write_text(content)
        with pytest.raises(ValueError, match="no result file of sae-probes"):
            sae_probes_figures(other.parents[1])
