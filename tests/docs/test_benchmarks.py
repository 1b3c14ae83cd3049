"""The benchmark scripts run and write what they promise; what they measure is not judged here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import prolu
from prolu.evaluation.comparison.metric_catalog import METRICS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow  # starts Python anew
def test_the_step_benchmark_writes_its_figures(tmp_path):
    shape = ["--d-in", "32", "--d-sae", "64", "--batch", "128", "--l0", "8", "--rounds", "1"]
    command = [sys.executable, str(BENCHMARKS / "step.py"), *shape, "--json", str(tmp_path / "step.json")]
    subprocess.run(command, check=True, timeout=300)
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["floor_s"] > 0
    assert list(result["variants"]) == ["sparse_numba", "sparse_torch", "dense", "autograd"]
    for figures in result["variants"].values():
        assert figures["x_floor"] == pytest.approx(figures["median_s"] / result["floor_s"])


PEERS = BENCHMARKS.parent / ".venv-peers" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="needs the environment of the other libraries (make bench)")
def test_sweeps_of_both_libraries_end_with_the_saes_that_were_asked_for(tmp_path):
    size = ["--steps", "3", "--rounds", "1", "--counts", "6", "--threads", "1", "--json", str(tmp_path / "found.json")]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent / "src")}
    subprocess.run([PEERS, BENCHMARKS / "sweep_peers.py", *size], check=True, timeout=600, env=environment)
    (row,) = json.loads((tmp_path / "found.json").read_text())
    assert row["wanted_l0"] == [32, 32, 32, 32, 32, 16]
    for name in ("ours", "saelens"):
        assert row[f"{name}_sae_tokens_per_second"] > 0
        assert row[f"{name}_l0"][0] == 32  # topk(32)
        assert row[f"{name}_l0"][5] == 16


def test_the_saes_of_the_sweeps_that_are_compared_are_of_mixed_families():
    benchmark = loaded("sweep_peers")
    assert benchmark.kinds(1) == [("topk", 32)]
    for n in benchmark.COUNTS:
        assert len(set(benchmark.kinds(n))) == n
    assert {family for family, _ in benchmark.kinds(6)} == set(benchmark.FAMILIES)


@pytest.mark.slow  # starts Python anew
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_the_gpu_benchmark_says_when_there_is_none():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "this machine has no GPU that torch can use"


@pytest.mark.parametrize("penalty", ["l1", "sqrt_l1"])
def test_forces_on_biases_are_what_autograd_finds(penalty, tmp_path):
    benchmark = loaded("bias_forces")
    torch.manual_seed(0)
    rows = torch.randn(2000, 8)
    weights = {"W_enc": torch.randn(8, 24), "W_dec": torch.randn(24, 8)}
    weights |= {"b_enc": -torch.rand(24), "b_dec": torch.zeros(8)}
    run = {"nonlinearity": "prolu_ste", "penalty": penalty, "coeff": 0.3, "normalisation": "none"}
    config = {"d_in": 8, "d_sae": 24, "nonlinearity": "prolu_ste", "normalisation": "none"}
    save_file(weights, tmp_path / "sae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"sae": config, "provenance": {"run": run}}))
    found = benchmark.forces(tmp_path, rows)
    for gradient, name in (("relu", "E[g delta]"), ("ste", "E[g m delta]")):
        b = weights["b_enc"].clone().requires_grad_()
        f = prolu.prolu(rows @ weights["W_enc"], b, gradient=gradient)
        loss = (f @ weights["W_dec"] - rows).square().mean()
        penalised = f if penalty == "l1" else (f + 1e-6).sqrt()
        (loss + 0.3 * penalised.sum(1).mean()).backward()
        assert found[name].sign().tolist() == b.grad.sign().tolist()
        assert len(set(found[name].sign().tolist())) == 2


def loaded(name):
    """A benchmark's module; benchmarks are scripts, not a package."""
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_stated_tolerance_of_the_curves_is_the_one_that_is_measured():
    benchmark = loaded("interpolation")
    found = benchmark.measured()
    curve = found["monotone curve"]["all"]
    assert curve["n"] == 60  # two of the four runs of each of 30 curves
    assert round(curve["rate, 90%"], 2) == METRICS["degradation"].tolerance
    for metric in METRICS.values():
        if metric.tolerance is not None:
            assert benchmark.rate(metric) == pytest.approx(metric.tolerance, rel=0.05), metric.name
    assert abs(curve["mean"]) < 0.02 < abs(found["log-log chord"]["all"]["mean"]) < found["linear"]["all"]["mean"]
    # The figures that the guide states.
    guide = (BENCHMARKS.parent / "docs" / "guide" / "statistics.md").read_text()
    for name, by_gap in found.items():
        for gap, e in by_gap.items():
            if gap == "all":
                cells = (f"{e['mean']:+.1%}", *(f"{e[key]:.1%}" for key in ("median", "90%", "max")))
                assert f"| {name} | {' | '.join(cells)} |" in guide
    exactly = benchmark.left_out([(l0, l0**-1.3) for l0 in (8.0, 16.0, 30.0, 70.0)])
    assert len(exactly) == 2
    for one in exactly:
        assert one.errors[1:] == pytest.approx((0, 0), abs=1e-12)
        assert one.errors[0] > 0.1


def test_the_findings_are_what_the_library_says():
    findings = loaded("findings")
    page = (findings.FINDINGS / "comparison.md").read_text()
    rows = [findings.row_of(name, verdicts) for name, verdicts in findings.comparisons().items()]
    assert len(rows) == 18
    for row in rows:
        assert row in page


@pytest.mark.parametrize(("name", "table"), [
    ("comparison2026.md", "comparison2026.csv"),
    ("comparison2026.md", "comparison2026-stories260K.csv"),
    ("causes.md", "causes.csv"),
    ("causes.md", "causes-stories260K.csv"),
    ("causes.md", "causes-hard.csv"),
    ("causes.md", "causes-even.csv"),
    ("synthetic.md", "synthetic.csv"),
])  # fmt: skip
def test_the_findings_of_a_study_are_what_the_library_says(name, table, capsys):
    findings = loaded("findings")
    page = (findings.FINDINGS / name).read_text()
    findings.means(findings.FINDINGS / table)
    rows = capsys.readouterr().out.splitlines()[2:]
    compared = findings.comparisons_of(findings.FINDINGS / table)
    rows += [findings.row_of(name, found) for name, found in compared.items()]
    rows += findings.shares(findings.FINDINGS / table) if name == "causes.md" else []
    rows += findings.truths(findings.FINDINGS / table) if name == "synthetic.md" else []
    assert [row for row in rows if row and row not in page] == []
