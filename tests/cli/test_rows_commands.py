"""Commands that train on rows: files of them, and sums of known features."""

import json

import numpy as np
import pytest

from prolu.cli.entry_point import main
from prolu.studies.results import Results
from support.commands import flags
from support.sweeps import contents

SMALL = {"d_sae": 16, "n_tokens": 2560, "batch_size": 64, "eval_tokens": 100, "window_tokens": 1024, "threads": 1}


@pytest.fixture
def rows_file(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32))
    return tmp_path / "x.npy"


def test_train_on_a_file_and_report(rows_file, tmp_path, capsys):
    out = tmp_path / "one"
    command = ["train", *flags(**SMALL, activations=rows_file, nonlinearity="topk", target_l0=3, out=out)]
    assert main(command) == 0
    results = Results.load(out)
    assert results.config["stream"]["data"] == str(rows_file)
    assert results.records[0]["degradation"] is None
    page = (out / "report.html").read_text()
    assert "FVU" in page
    printed = capsys.readouterr().out
    assert "one SAE, topk" in " ".join(printed.split())
    assert "FVU" in printed
    before = contents(out)
    assert main(command) == 0
    assert contents(out) == before
    assert main(["report", str(out)]) == 0
    assert contents(out) == before


def test_a_moved_file_is_the_same_and_another_is_not(rows_file, tmp_path, capsys):
    out = tmp_path / "one"
    settings = flags(**SMALL, nonlinearity="topk", target_l0=3, out=out)
    assert main(["train", *settings, "--activations", str(rows_file)]) == 0
    moved = rows_file.rename(tmp_path / "moved.npy")
    assert main(["train", *settings, "--activations", str(moved)]) == 0
    np.save(rows_file, np.load(moved)[1:])
    assert main(["train", *settings, "--activations", str(rows_file)]) == 2
    assert "holds another study" in capsys.readouterr().err


def test_a_named_study_on_synthetic_rows_is_extended_on_the_same_rows(tmp_path):
    settings = {"activations": "synthetic:easy", "eval_tokens": 512, "window_tokens": 2048, "threads": 1}
    command = ["sweep", "demo", *flags(**settings, d_sae=64, out=tmp_path / "demo")]
    assert main([*command, "--n-tokens", "20000", "--dry-run"]) == 0
    assert not (tmp_path / "demo").exists()
    assert main([*command, "--n-tokens", "20000"]) == 0
    stream = Results.load(tmp_path / "demo").config["stream"]
    assert stream["synthetic"]["n_features"] == 96
    assert stream["max_train_tokens"] == 20_000
    assert all(0 < r["truth_cosine"] <= 1 for r in Results.load(tmp_path / "demo").records)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Against the true features" in page
    assert (tmp_path / "demo" / "figures" / "magnitude-response.svg").is_file()


def test_a_dry_run_names_no_hook(tmp_path, capsys):
    command = ["sweep", "comparison", *flags(activations="synthetic:hard", out=tmp_path / "x"), "--dry-run", "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["hooks"] == []
    assert printed["runs"][0]["d_sae"] == 8 * 64
    assert printed["estimate"]["flops_language_model"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activations": "nowhere.npy"}, "activations 'nowhere.npy': no file or folder of rows"),
        ({"activations": "synthetic:soft"}, "activations 'synthetic:soft': choose one of synthetic:easy"),
        ({"hook_out": "blocks.2.hook_mlp_out"}, "hook_out: not with --activations"),
        ({"store": "somewhere"}, "store: not with --activations"),
        ({"n_tokens": 100_000}, "n_tokens 100000: the data has 2,700 training rows"),
    ],
)
def test_wrong_requests_write_nothing(rows_file, tmp_path, capsys, change, words):
    settings = SMALL | {"activations": rows_file, "out": tmp_path / "out", "nonlinearity": "relu"} | change
    assert main(["train", *flags(**settings)]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def scores(capsys, *words):
    capsys.readouterr()
    assert main(["eval", *map(str, words), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["x.npy", "synthetic:even"])
def test_eval_scores_on_the_held_out_rows_of_the_training(name, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = flags(**SMALL, activations=name, nonlinearity="batchtopk", target_l0=3, out="one")
    assert main(["train", *settings]) == 0
    run = Results.load("one").runs[0]
    wanted = {figure: value for figure, value in run.record.items() if figure.startswith(("l0", "fvu", "mse", "dead"))}
    for words in ((), ("--activations", name), ("--like", "one", "--out", "scored")):
        n = () if "--like" in words else ("--eval-tokens", 100)
        (found,) = scores(capsys, run.folder, *words, *n)
        assert found["degradation"] is None
        assert {figure: found[figure] for figure in wanted if figure in found}.items() <= wanted.items()
        assert {"l0", "fvu", "mse"} <= found.keys()
    (kept,) = Results.load("scored").records
    assert (kept["run_id"], kept["fvu"]) == (run.folder.name, run.record["fvu"])
    assert main(["report", "one", "scored"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run.folder), "--eval-tokens", "100"]) == 0
    printed = capsys.readouterr().out
    assert "fvu" in printed
    assert "degradation" not in printed


def test_eval_refuses_other_rows_than_those_of_the_training(rows_file, tmp_path, capsys):
    out = tmp_path / "one"
    assert main(["train", *flags(**SMALL, activations=rows_file, nonlinearity="topk", target_l0=3, out=out)]) == 0
    run = str(Results.load(out).runs[0].folder)
    narrow = tmp_path / "narrow.npy"
    np.save(narrow, np.load(rows_file)[:, :4])
    moved = rows_file.rename(tmp_path / "moved.npy")
    np.save(rows_file, np.load(moved)[1:])
    before = sorted(tmp_path.rglob("*"))

    def refused(*words):
        assert main(["eval", run, "--eval-tokens", "100", "--out", str(tmp_path / "x"), *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "are not the rows of the training of" in refused()
    assert "takes activations of width 8, and the rows have 4" in refused("--activations", narrow)
    assert "hook: not for SAEs of rows" in refused("--hook", "blocks.0.hook_resid_pre")
    rows_file.unlink()
    assert "no file or folder of rows to train on (.npy, .safetensors); name the rows with --activations" in refused()
    assert main(["eval", run, "--like", str(out), "--activations", str(narrow)]) == 2
    assert "are not the rows of the study" in capsys.readouterr().err
    assert sorted(p for p in tmp_path.rglob("*") if p != rows_file) == [p for p in before if p != rows_file]
    assert main(["eval", run, "--like", str(out), "--activations", str(moved)]) == 0
