"""A report is drawn from one reading of its studies, and says what it drew."""

import json

import pytest

from prolu import Results
from prolu.cli.entry_point import main
from prolu.report import writer
from prolu.studies import folder as study_folder
from prolu.studies import results


@pytest.fixture
def study(tmp_path):
    """A study of four runs that nobody trained, in two families."""
    folder = tmp_path / "study"
    records = [
        {
            "run_id": f"{nonlinearity}-{l0}", "nonlinearity": nonlinearity, "penalty": "l1", "coeff": 0.1, "l0": l0,
            "degradation": loss / l0, "recovered": 0.9, "mse": loss / l0, "l1": l0 / 2, "sqrt_l1": l0, "fvu": 0.1,
            "dead_fraction": 0.0, "n_tokens": 100, "eval_tokens": 64, "init_seed": 0, "converged": True,
        }
        for nonlinearity, loss in (("relu", 2.0), ("prolu_ste", 1.0))
        for l0 in (8.0, 32.0)
    ]  # fmt: skip
    folder.mkdir()
    stream = {"lm": "tiny", "hook": "h", "data": "text", "seed": 0}
    (folder / "config.json").write_text(json.dumps({"stream": stream, "runs": [{}] * 4}))
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture
def readings(monkeypatch):
    """Counts how often a study is read and compared; figures are not saved, which would take seconds."""
    counts = {"config": 0, "results": 0, "verdicts": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(results, "read_study", counted("config", study_folder.read_study))
    monkeypatch.setattr(results, "read_json_lines", counted("results", results.read_json_lines))
    monkeypatch.setattr(writer, "compare_families", counted("verdicts", writer.compare_families))
    monkeypatch.setattr(writer, "save_figure", lambda figure, *files: None)
    return counts


def test_a_report_says_what_it_drew(study, readings):
    drawn = writer.write_report([study])
    assert drawn.page == study / "report.html"
    assert drawn.folders == [study]
    assert drawn.records == Results.load(study).records
    assert drawn.comparison.verdicts == Results.load(study).verdicts()
    assert {v.challenger for v in drawn.comparison.verdicts} == {"prolu_ste + l1"}


@pytest.mark.parametrize("flag", ["--latent-pages", "--features"])  # the second is the first's older name
def test_the_command_reads_a_study_once(study, readings, capsys, flag):
    assert main(["report", str(study), flag, "none"]) == 0
    assert readings == {"config": 1, "results": 1, "verdicts": 1}
    shown = capsys.readouterr().out
    assert "4 SAEs" in " ".join(shown.split())  # a long path may break the line between them
    assert f"report:   {study / 'report.html'}" in shown


def test_several_texts_are_named_in_a_sentence(study, readings):
    config = json.loads((study / "config.json").read_text())
    config["stream"]["data"] = ["first.parquet", "second.parquet"]
    (study / "config.json").write_text(json.dumps(config))
    assert main(["report", str(study), "--latent-pages", "none"]) == 0
    assert "100 training tokens of first.parquet and second.parquet" in (study / "report.html").read_text()
