"""`prolu sweep grid`: all combinations of some settings as one study, and `prolu train --dry-run`."""

import json

import numpy as np
import pytest

import prolu
from prolu.cli.entry_point import main
from prolu.studies.rates import Rates
from prolu.studies.widths import Multiple, n_latents
from support.commands import flags
from support.sweeps import HOOK, contents

SIZE = {"d_sae": "2x", "n_tokens": 640, "batch_size": 64, "eval_tokens": 320, "ctx": 32, "latent_pages": "none"}

RATES = Rates(1e9, 1e-3, 1e-3)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """Dry runs do not time this machine."""
    monkeypatch.setattr("prolu.studies.cost.measure", lambda *_: RATES)


def dry_runs(capsys, *words):
    """The runs that a command would train."""
    assert main([*map(str, words), "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["runs"]


@pytest.fixture
def source(tiny_lm_folder, stories_file):
    return ["--lm", str(tiny_lm_folder), "--hook", HOOK, "--data", str(stories_file)]


def grid(capsys, *words):
    return dry_runs(capsys, "sweep", "grid", *words)


def test_all_combinations_of_what_is_given(capsys):
    """The example of the help."""
    words = "--nonlinearity relu prolu_ste topk --target-l0 16 32 --d-sae 8x --init-seeds 0 1 2"
    runs = grid(capsys, *words.split())
    assert len(runs) == 18
    found = {(r["nonlinearity"], r["penalty"], r["target_l0"], r["init_seed"]) for r in runs}
    penalties = {"relu": "l1", "prolu_ste": "l1", "topk": "none"}
    assert found == {(n, p, l0, s) for n, p in penalties.items() for l0 in (16.0, 32.0) for s in (0, 1, 2)}
    relu = json.loads(json.dumps(prolu.RunConfig(nonlinearity="relu", d_sae=8 * 128, target_l0=16.0).describe()))
    assert runs[0] == relu


def test_it_is_the_grid_of_python(capsys):
    values = {"nonlinearity": ["relu", "gated"], "coeff": [0.01, 0.02], "d_sae": [96], "lr": [1e-3, 3e-3]}
    runs = grid(capsys, *flags(**values))
    assert runs == [json.loads(json.dumps(run.describe())) for run in prolu.grid(prolu.RunConfig(), **values)]


def test_several_coefficients_make_one_run_of_what_has_no_penalty(capsys):
    runs = grid(capsys, "--nonlinearity", "relu", "topk(8)", "--coeff", "0.01", "0.02", "--d-sae", "96")
    assert [(r["nonlinearity"], r["coeff"]) for r in runs] == [("relu", 0.01), ("relu", 0.02), ("topk(8)", 0.0012)]


def test_what_names_do_not_hold_is_added_to_them_where_it_differs():
    base = prolu.RunConfig(d_sae=96)
    assert [run.named for run in prolu.grid(base, lr=[1e-3, 2e-3])] == [(), ()]
    runs = prolu.grid(base, lr=[1e-3, 2e-3], beta1=[0.0, 0.9], normalisation=["per_token", "none"], d_sae=[96])
    assert {run.named for run in runs} == {("beta1", "normalisation")}
    assert len({run.run_id for run in runs}) == len(runs) == 8
    assert runs[0].run_id == "prolu_ste-l1-0.0012-lr0.001-d96-s0-beta1_0-normalisation_per_token"
    # The curves of such runs are as many as without the longer names.
    variants = {prolu.evaluation.comparison.frontiers.variant(run.describe()) for run in runs}
    assert len(variants) == 8
    # Runs that are equal in all are not told apart, and no study takes them.
    assert [run.named for run in prolu.grid(base, penalty=["auto", "l1"])] == [(), ()]
    with pytest.raises(ValueError, match=r"^named .*: must be names of fields$"):
        prolu.RunConfig(named=("beta3",))


def test_a_study_of_several_lengths_and_widths_is_trained_and_resumed(source, tmp_path, capsys):
    out = tmp_path / "grid"
    size = flags(**SIZE | {"threads": 1}, out=out)
    command = ["sweep", "grid", *source, *size, "--nonlinearity", "relu", "topk", "--target-l0", "3", "6"]
    command += ["--beta1", "0", "0.9", "--n-tokens", "640", "1280"]
    assert main(command) == 0
    results = prolu.Results.load(out)
    assert len(results.records) == 16
    assert {r["d_sae"] for r in results.records} == {2 * 16}
    assert {(r["n_tokens"], r["beta1"]) for r in results.records} == {(n, b) for n in (640, 1280) for b in (0, 0.9)}
    before = contents(out)
    capsys.readouterr()
    assert main(command) == 0
    assert contents(out) == before
    # Another run is another study.
    assert main([*command, "--init-seeds", "0", "1"]) == 2
    assert "holds another study: 16 runs there, 32 here" in capsys.readouterr().err
    assert main([*command[:-1], "2560"]) == 2
    assert "the run's name holds a setting that would change" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.parametrize(("words", "sentence"), [
    (["--nonlinearity", "relu", "jumprelu", "--penalty", "l0"], "penalty 'l0': "),
    (["--nonlinearity", "topk"], "nonlinearity 'topk'"),
    (["--nonlinearity", "topk(8)", "--target-l0", "8"], "target_l0 8.0: needs a penalty"),
    (["--target-l0", "8", "--coeff", "0.1", "0.2"], "coeff 0.1 0.2: the L0 controller adjusts the coefficient"),
    (["--lr", "1e-3", "0.001"], "lr 0.001 0.001: name one or more, each once"),
    (["--init-seeds", "1", "1"], "init_seed 1 1: name one or more, each once"),
    (["--lr"], "lr none: name one or more, each once"),
    (["--penalty", "auto", "l1"], "run prolu_ste-l1-0.0012-lr0.001-d12288-s0: listed twice"),
    (["--target-l0", "64", "--d-sae", "1x"], "target_l0 64.0: must be more than 0 and less than d_sae"),
    (["--d-sae", "0.001x"], "d_sae 0: must be at least 1"),
    (["--n-tokens", "5"], "fewer than one batch"),
    (["--init-seeds", *map(str, range(101)), "--lr", *map(str, range(1, 101))],
     "the grid has 10,100 combinations, and one study at most 10,000: name fewer values"),
    (["--json"], "json: only with --dry-run"),
])  # fmt: skip
def test_wrong_grids_are_refused_before_the_text_is_read(source, tmp_path, capsys, words, sentence):
    before = sorted(tmp_path.rglob("*"))
    where = ["--out", str(tmp_path / "x"), "--tokens", str(tmp_path / "tokens")]
    assert main(["sweep", "grid", *source, *where, *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("word", ["8y", "x", "-8x", "0x", "8.x", "1e3x", "infx"])
def test_what_is_no_multiple_is_refused(word, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", f"--d-sae={word}", "--out", str(tmp_path / "x")])
    assert stop.value.code == 2
    assert "multiple of d_in such as 8x" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_multiples():
    assert [n_latents(Multiple("1.5x"), 33), n_latents(Multiple("8x"), 768), n_latents(20, 768)] == [50, 6144, 20]
    assert str(Multiple("8x")) == "8x"


def test_train_takes_a_multiple_and_is_resumed_with_the_number(source, tmp_path):
    out = tmp_path / "one"
    command = ["train", *source, *flags(**SIZE | {"threads": 1}, out=out), "--nonlinearity", "topk", "--k", "4"]
    assert main(command) == 0
    assert prolu.Results.load(out).records[0]["d_sae"] == 32
    before = contents(out)
    assert main([*command, "--d-sae", "32"]) == 0
    assert contents(out) == before


def test_a_dry_run_of_one_sae(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--lm", "gpt2", "--hook", "blocks.6.hook_resid_pre", "--data", "my_text.parquet"]
    words += ["--nonlinearity", "topk", "--k", "32", "--d-sae", "8x", "--n-tokens", "1e6", "--out", "runs/gpt2"]
    assert main([*words, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (run,) = said["runs"]
    assert run == json.loads(json.dumps(prolu.RunConfig(
        nonlinearity="topk", target_l0=32.0, d_sae=6144, n_tokens=1_000_000).describe()))  # fmt: skip
    assert said["hooks"] == ["blocks.6.hook_resid_pre"]
    assert said["estimate"]["tokens"] == 244 * 4096
    assert main([*words, "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("1 run ", "nonlinearity topk(32), penalty none", "d_sae 6144", "244 per run", "memory", "time"):
        assert part in printed
    assert not list(tmp_path.iterdir())
    # What a training would refuse.
    assert main([*words, "--dry-run", "--coeff", "0.1"]) == 2
    assert "coeff 0.1: topk is trained without a penalty" in capsys.readouterr().err
    assert main([*words, "--json"]) == 2


@pytest.mark.parametrize("name", ["demo", "experiment2"])
def test_coefficients_of_a_named_study(name, capsys):
    where = ["--lm", "builtin", "--hook", "blocks.2.hook_resid_pre"]
    before = dry_runs(capsys, "sweep", name, *where)
    after = dry_runs(capsys, "sweep", name, *where, "--coeff", "0.01", "0.02", "0.04", "--d-sae", "8x")
    families = list(dict.fromkeys((r["nonlinearity"], r["penalty"]) for r in before))
    assert [(r["nonlinearity"], r["penalty"], r["coeff"]) for r in after] == [
        (*family, coeff) for family in families for coeff in (0.01, 0.02, 0.04)
    ]
    assert {r["d_sae"] for r in after} == {8 * 128}


def test_the_coefficient_of_a_study_with_target_l0s_is_a_start(capsys):
    before = dry_runs(capsys, "sweep", "comparison")
    after = dry_runs(capsys, "sweep", "comparison", "--coeff", "0.5")
    assert after == [r if r["penalty"] == "none" else r | {"coeff": 0.5} for r in before]
    assert main(["sweep", "comparison", "--coeff", "0.5", "0.6", "--dry-run"]) == 2
    assert "coeff 0.5 0.6: the L0 controller adjusts" in capsys.readouterr().err


def test_a_grid_on_rows(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32))
    size = flags(d_sae="4x", n_tokens=2560, batch_size=64, eval_tokens=100, threads=1, out=tmp_path / "grid")
    words = ["--activations", str(tmp_path / "x.npy"), "--nonlinearity", "relu", "batchtopk", "--target-l0", "2", "4"]
    assert main(["sweep", "grid", *size, *words]) == 0
    assert [r["d_sae"] for r in prolu.Results.load(tmp_path / "grid").records] == [32] * 4
