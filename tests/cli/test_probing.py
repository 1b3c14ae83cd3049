"""The command `probe`: figures of latents are added to a study whose text is Python, and no other text is probed."""

import pytest
import torch

from prolu import RunConfig, run_sweep, with_seeds
from prolu.cli.entry_point import main
from prolu.evaluation import probes
from prolu.evaluation.first_letters import task_of
from prolu.studies import probing
from prolu.studies.results import Results


@pytest.fixture
def study(tiny_stream, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "PER_CLASS", 150)
    runs = [RunConfig(d_sae=40, n_tokens=3840, coeff=0.02, nonlinearity=name) for name in ("relu", "prolu_ste")]
    return run_sweep(with_seeds(runs, [0, 1, 2]), tiny_stream, tmp_path / "study", eval_tokens=640, progress=False)


def test_figures_of_probes_are_metrics_of_the_study(study, capsys):
    command = ["probe", str(study.folder), "--data", "builtin", "--n-characters", "150000"]
    assert main(command) == 0
    printed, messages = capsys.readouterr()
    assert "left out: first letters: the tokenizer has" in messages
    assert "probe_mean_5" in printed
    assert printed.count("+-") == 2 * 4
    results = Results.load(study.folder)
    for before, after in zip(study.records, results.records, strict=True):
        assert after == before | {name: value for name, value in after.items() if name.startswith("probe_")}
        assert 0.4 < after["probe_mean_1"] <= after["probe_mean_acts"] <= 1
        assert after["probe_string_acts"] == results.records[0]["probe_string_acts"]
    for verdict in results.verdicts([results.records[0]["l0"]], y="probe_mean_all"):
        assert verdict.metric == "probe_mean_all"
    assert {s.metric for s in results.standings(["probe_comment_5"])} == {"probe_comment_5"}
    # Again: nothing is measured, so nothing changes.
    lines = (study.folder / "results.jsonl").read_bytes()
    assert main(command) == 0
    assert (study.folder / "results.jsonl").read_bytes() == lines


def test_absorption_is_measured_where_the_text_is_no_python(study, monkeypatch, capsys):
    acts = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    letters = torch.arange(400) % 10
    acts[torch.arange(400), letters] += 20
    task = task_of(acts, letters, torch.arange(400) >= 300, range(10))
    monkeypatch.setattr(probing, "letter_task", lambda lm: task)
    assert main(["probe", str(study.folder)]) == 0
    printed, messages = capsys.readouterr()
    assert "left out: probes: data" in messages
    assert "absorption_fraction" in printed
    for record in Results.load(study.folder).records:
        assert record["absorption_letters"] == 10
        assert all(0 <= record[name] <= 1 for name in ("absorption_full", "absorption_fraction"))
        assert "probe_text" not in record


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "none of its held-out documents is Python source"),
        (["--text-column", "code"], "text_column: only with --data"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_probed_is_refused_and_nothing_written(study, arguments, problem, capsys):
    before = {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()}
    assert main(["probe", str(study.folder), *arguments]) == 2
    assert problem in capsys.readouterr().err
    after = {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()}
    assert {path for path in after if not path.name.startswith(".")} == {
        path for path in before if not path.name.startswith(".")
    }


def test_a_study_without_a_text_is_refused(tmp_path, capsys):
    assert main(["probe"]) == 2
    assert "studies: name at least one folder" in capsys.readouterr().err
    flags = ["--activations", "synthetic:easy", "--n-tokens", "2000", "--d-sae", "16", "--eval-tokens", "512"]
    flags += ["--batch-size", "512", "--window-tokens", "1024"]
    assert main(["train", *flags, "--out", str(tmp_path / "rows")]) == 0
    capsys.readouterr()
    assert main(["probe", str(tmp_path / "rows")]) == 2
    assert "was trained on rows that come from no language model" in capsys.readouterr().err
