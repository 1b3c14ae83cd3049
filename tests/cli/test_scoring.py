"""Evaluating saved SAEs: what an import does not say comes from flags, or from a study whose tokens it is scored on."""

import json

import pytest
import torch

from prolu import SAE, RunConfig, run_sweep
from prolu.cli.entry_point import main
from prolu.evaluation.comparison.points import points
from prolu.interop import export_files, import_sae, write_folder
from prolu.studies.results import Results
from support.foreign_saes import write_saelens

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture
def study(tiny_stream, tmp_path):
    runs = [RunConfig(d_sae=40, n_tokens=3840, coeff=0.02, nonlinearity=n) for n in ("relu", "prolu_ste")]
    return run_sweep(runs, tiny_stream, tmp_path / "study", eval_tokens=640, progress=False)


@pytest.fixture
def imported(study, tmp_path):
    """A SAELens folder without a trace of us, as a run of ours."""
    write_folder(tmp_path / "theirs", export_files(study.runs[1].folder, "saelens"))
    (tmp_path / "theirs" / "prolu.safetensors").unlink()
    config = json.loads((tmp_path / "theirs" / "cfg.json").read_text())
    del config["metadata"]["prolu"]
    config["metadata"] |= {"dataset_path": None, "context_size": None}
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(config))
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "imported")]) == 0
    return tmp_path / "imported"


def scores(capsys, *args):
    capsys.readouterr()
    assert main(["eval", *map(str, args), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_is_missing_is_named_and_taken_from_flags(study, imported, tiny_lm_folder, stories_file, capsys):
    assert main(["eval", str(imported)]) == 2
    assert "its config does not say data, ctx; give --data --ctx" in capsys.readouterr().err
    flags = ["--lm", tiny_lm_folder, "--data", stories_file, "--ctx", 32, "--eval-tokens", 640]
    (found,) = scores(capsys, imported, *flags, "--max-train-tokens", 100_000_000)
    record = study.records[1]
    assert found == {name: record[name] for name in found} | {"negative_bias_fraction": 0.0}


def test_beside_a_study_on_its_very_tokens(study, imported, tmp_path, capsys):
    out = tmp_path / "scored"
    (found,) = scores(capsys, imported, "--like", study.folder, "--out", out)
    record = study.records[1]
    assert found["degradation"] == record["degradation"]
    assert found["l0"] == record["l0"]
    (kept,) = Results.load(out).records
    assert kept == kept | found
    assert (kept["run_id"], kept["nonlinearity"], kept["converged"]) == ("imported", "saelens: jumprelu", None)
    assert [kept[name] for name in ("coeff", "penalty", "lr", "init_seed", "n_tokens")] == [None] * 5
    assert main(["report", str(study.folder), str(out), "--out", str(tmp_path / "both"), "--latent-pages", "none"]) == 0
    assert "saelens: jumprelu" in capsys.readouterr().out
    assert "saelens: jumprelu" in (tmp_path / "both" / "report.html").read_text()
    assert main(["report", str(out), "--latent-pages", "all", "--latent-tokens", "640"]) == 0
    assert (out / "imported" / "features" / "index.html").is_file()


def test_a_word_lets_it_enter_frontiers(study, imported, tmp_path, capsys):
    scores(capsys, imported, "--like", study.folder, "--out", tmp_path / "scored", "--converged")
    (run,) = Results.load(tmp_path / "scored").frontier().runs
    assert run.record["converged"] is True


def test_a_shelf_grows_and_never_takes_two_for_seeds_of_one(study, imported, tmp_path, capsys):
    sae, made = import_sae(imported)
    sae.b_enc.data.sub_(0.05)
    sae.save(tmp_path / "another", made)
    out = tmp_path / "scored"
    scores(capsys, imported, "--like", study.folder, "--out", out)
    scores(capsys, tmp_path / "another", imported, "--like", study.folder, "--out", out)
    records = Results.load(out).records
    assert [r["run_id"] for r in records] == ["another", "imported"]
    assert [p.n_seeds for p in points(records)] == [1, 1]
    sae.b_enc.data.sub_(0.05)
    sae.save(tmp_path / "elsewhere" / "another", made)
    before = (out / "results.jsonl").read_bytes()
    refused = ["eval", str(tmp_path / "elsewhere" / "another"), "--like", str(study.folder), "--out", str(out)]
    assert main(refused) == 2
    assert "holds another SAE named another" in capsys.readouterr().err
    assert main([*refused[:2], "--like", str(study.folder), "--out", str(study.folder)]) == 2
    assert "another study" in capsys.readouterr().err
    assert (out / "results.jsonl").read_bytes() == before


def test_our_own_runs_keep_their_settings(study, tmp_path, capsys):
    out = tmp_path / "scored"
    found = scores(capsys, *[run.folder for run in study.runs], "--like", study.folder, "--out", out)
    assert [f["mse"] for f in found] == [r["mse"] for r in study.records]
    for kept, record in zip(Results.load(out).records, study.records, strict=True):
        assert all(kept[name] == record[name] for name in ("nonlinearity", "penalty", "coeff", "lr", "init_seed"))


def test_an_sae_of_uncentred_activations_gets_them(study, tiny_lm, tmp_path, capsys):
    """The LayerNorm model's mean over d_model is left in for an SAE that says so, and only there."""
    sae, made = import_sae(study.runs[0].folder)
    sae.save(tmp_path / "uncentred", made | {"centred": False})
    # What an SAE knows of itself it says, so this one knows nothing.
    unknowing = SAE(sae.config, sae.weights)
    unknowing.save(tmp_path / "silent", {name: value for name, value in made.items() if name != "centred"})
    (centred,) = scores(capsys, study.runs[0].folder, "--eval-tokens", 640)
    (uncentred,) = scores(capsys, tmp_path / "uncentred", "--eval-tokens", 640)
    assert centred["mse"] != uncentred["mse"]
    assert centred["ce_clean"] == uncentred["ce_clean"]
    tokens = torch.randint(1, 300, (2, 8))
    raw = tiny_lm.uncentred().activations(tokens)
    torch.testing.assert_close(raw - raw.mean(-1, keepdim=True), tiny_lm.activations(tokens))
    assert raw.mean(-1).abs().max() > 1e-3
    assert main(["eval", str(tmp_path / "silent")]) == 2
    assert "give --centred True or --centred False" in capsys.readouterr().err
    (told,) = scores(capsys, tmp_path / "silent", "--eval-tokens", 640, "--centred", "True")
    assert told == centred


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--like", "study", "--data", "x"], "like: the study sets data itself; leave --data out"),
        (["--like", "nowhere"], "no study here"),
        (["--converged"], "converged: only with --out"),
        (["--eval-tokens", "0"], "eval_tokens 0"),
        (["--like", "study", "--hook", "blocks.9.hook_resid_pre"], "this model has blocks 0-2"),
        (["--like", "study", "--out", "theirs"], "not empty, and not a study"),
        (["--lm", "/nowhere"], "lm '/nowhere'"),
    ],
)
def test_bad_requests(study, imported, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = [] if "--like" in args else ["--data", "builtin", "--ctx", "32"]
    assert main(["eval", str(study.runs[0].folder), *given, *args]) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_another_hook_or_width_is_told(study, tmp_path, capsys):
    assert main(["import", str(write_saelens(tmp_path / "theirs")), "--out", str(tmp_path / "wide")]) == 0
    assert main(["eval", str(tmp_path / "wide"), "--like", str(study.folder)]) == 2
    assert "takes activations of width 12" in capsys.readouterr().err
    sae, made = import_sae(study.runs[0].folder)
    sae.save(tmp_path / "above", made | {"hook": "blocks.2.hook_resid_pre"})
    assert main(["eval", str(tmp_path / "above"), "--like", str(study.folder)]) == 2
    assert f"give --hook {HOOK} to score it there anyway" in capsys.readouterr().err
    elsewhere = ["eval", str(tmp_path / "above"), "--hook", HOOK, "--eval-tokens", "640"]
    assert main(elsewhere) == 0
    assert f"above was trained at blocks.2.hook_resid_pre, and is scored at {HOOK}" in capsys.readouterr().err
    assert main(["eval", str(study.runs[0].folder), str(tmp_path / "above")]) == 2
    assert "score them one by one" in capsys.readouterr().err
