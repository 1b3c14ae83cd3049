"""Commands: good requests, and bad ones, which give one sentence, exit code 2, and write nothing."""

import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import prolu
from prolu.activations.resolving import check_is_there
from prolu.cli.entry_point import main
from prolu.training.starting_weights import starting_weights
from prolu.training.steps.dense import DenseStep

TINY_TRAIN = ["--d-sae", "40", "--n-tokens", "3840", "--batch-size", "64", "--ctx", "32", "--coeff", "0.02"]


@pytest.fixture
def source(tiny_lm_folder, stories_file):
    return ["--lm", str(tiny_lm_folder), "--data", str(stories_file), "--hook", "blocks.1.hook_resid_pre"]


def test_train_report_eval(source, tmp_path, capsys):
    out = tmp_path / "a"
    train = [
        "train",
        *source,
        *TINY_TRAIN,
        "--nonlinearity",
        "prolu_ste",
        "--eval-tokens",
        "640",
        "--out",
        str(out),
    ]
    assert main(train) == 0
    shown = capsys.readouterr().out
    assert "one SAE, prolu_ste + l1" in " ".join(shown.split())
    assert "report.html" in shown
    (record,) = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert main(["report", str(out)]) == 0
    capsys.readouterr()
    assert main(["eval", str(out / record["run_id"]), "--eval-tokens", "640", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == {name: record[name] for name in figures}
    assert main(train) == 0  # again: nothing to do


ANSWERED_BY_TYRO = {"--step", "--precision", "--normalisation"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--lm": "/no/such/model"}, "lm '/no/such/model': no such folder"),
        ({"--lm": "no-such-model"}, "lm 'no-such-model': cannot be loaded"),
        ({"--hook": "blocks.12.hook_resid_pre"}, "hook 'blocks.12.hook_resid_pre': this model has blocks 0-2"),
        ({"--hook": "layer3"}, "hook 'layer3': write blocks.L.hook_SITE"),
        ({"--data": "empty.txt"}, "0 documents"),
        ({"--data": "short.txt"}, "fewer than one block"),
        ({"--data": "no/such/data.txt"}, "neither a file"),
        ({"--batch-size": "100000", "--n-tokens": "1000000"}, "larger than a window"),
        ({"--coeff": "-1"}, "coeff -1.0: must be 0 or more"),
        ({"--coeff": "many"}, "--coeff"),
        ({"--step": "fast"}, "'--step'. Expected one of ('auto', 'dense', 'sparse', 'sparse_torch', 'stacked')"),
        ({"--precision": "fp8"}, "'--precision'. Expected one of ('fp32', 'tf32', 'bf16')"),
        ({"--normalisation": "layer"}, "'--normalisation'. Expected one of ('per_token', 'none')"),
        ({"--nonlinearity": "gelu"}, "choose one of relu"),
        ({"--n-tokens": "5"}, "fewer than one batch"),
        ({"--ctx": "100"}, "takes at most 64 tokens"),
        ({"--threads": "0"}, "threads 0"),
        ({"--eval-tokens": "0"}, "eval_tokens 0"),
        ({"--colour": "red"}, "option '--colour': not an option of `prolu train`; `prolu train --help` lists all"),
        ({"--n-tokenz": "5"}, "option '--n-tokenz': not an option of `prolu train` (did you mean --n-tokens"),
        ({"--d_say=8": "8"}, "option '--d_say': not an option of `prolu train` (did you mean --d-sae?)"),
        ({"--out": "full"}, "not empty, and not a study"),
        ({"--out": "short.txt/x"}, "is a file"),
        ({"--out": "/proc/prolu"}, "cannot be written"),
    ],
)  # fmt: skip
def test_bad_requests(source, tmp_path, monkeypatch, capsys, change, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Lily")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    flags = [*source, *TINY_TRAIN, "--eval-tokens", "320", "--out", "new"]
    options = dict(zip(flags[::2], flags[1::2], strict=True)) | change
    try:
        code = main(["train", *(part for pair in options.items() for part in pair)])
    except SystemExit as stop:
        code = stop.code
    problem = capsys.readouterr().err
    boxed = not problem.startswith("prolu: ")  # what tyro itself refuses, it says in a box or under a rule
    assert code == 2
    assert words in (" ".join(problem.replace("│", " ").split()) if boxed else problem)
    assert "Traceback" not in problem
    assert boxed == (change.get("--coeff") == "many" or not ANSWERED_BY_TYRO.isdisjoint(change))
    if not boxed:
        assert problem.startswith("prolu: ")
        assert problem.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["sweep", "nonsense", "--out", "x"],
            "study 'nonsense': choose one of demo, comparison, comparison2026, c",
        ),
        (["sweep", "--out", "x"], "study: name one of demo, comparison, comparison2026, causes, synthetic, exp"),
        (["sweep"], "study: name one of demo"),
        (["trian", "--out", "x"], "command 'trian': choose one of demo, train, sweep, harvest, eval, latents, pro"),
        (["trian", "--out", "x"], "(did you mean train?)"),
        ([], "command: name one of demo, train"),
        (["--out", "x"], "command: name one of demo, train"),
        (["demo", "--scale", "0", "--out", "x"], "scale 0.0: must be more than 0, and finite"),
        (["report", "nowhere"], "no study here"),
        (["eval", "nowhere"], "no saved SAE here"),
    ],
)
def test_bad_requests_of_other_commands(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    problem = capsys.readouterr().err
    assert words in problem
    assert problem.startswith("prolu: ")
    assert problem.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sweep", "grid", "--lrs", "3"], "option '--lrs': not an option of `prolu sweep grid` (did you mean --lr"),
        (["report", "x", "--metric=kl"], "option '--metric': not an option of `prolu report` (did you mean --metrics"),
        (["train", "--nonsense"], "option '--nonsense': not an option of `prolu train`; `prolu train --help` lists"),
    ],
)
def test_an_option_that_does_not_exist(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    problem = capsys.readouterr().err
    assert problem.startswith(f"prolu: {words}")
    assert problem.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_else_is_wrong_with_options_is_said_in_a_box(capsys):
    with pytest.raises(SystemExit):
        main(["train"])  # --out is missing
    assert "--out PATH" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--out", "x", "--n-tokens", "1M"])
    assert "1M is not a whole number, such as 1000000 or 1e6" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_a_wrong_request(source, tmp_path, monkeypatch, capsys):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    assert main(["train", *source, *TINY_TRAIN, "--out", str(tmp_path / "a")]) == 2
    problem = capsys.readouterr().err
    assert problem.startswith("prolu: ")
    assert "Permission denied" in problem
    assert problem.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_failure_while_running_is_not_a_wrong_request(source, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("a bug of ours")

    monkeypatch.setattr("prolu.studies.run_in_training.score", fail)
    assert main(["train", *source, *TINY_TRAIN, "--eval-tokens", "640", "--out", str(tmp_path / "a")]) == 1
    assert "what was finished is saved" in capsys.readouterr().err


def test_an_interrupt_exits_130(source, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("prolu.studies.run_in_training.score", interrupt)
    assert main(["train", *source, *TINY_TRAIN, "--eval-tokens", "640", "--out", str(tmp_path / "a")]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("args", "code"), [(["--help"], 0), (["train", "--colour", "red"], 2), (["report", "no"], 2)])
def test_as_a_process(tmp_path, args, code):
    done = subprocess.run(
        [sys.executable, "-m", "prolu", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_five_files_lie_between_a_command_and_a_gradient(source, tmp_path, monkeypatch):
    stacks = []
    plain = DenseStep.gradients

    def seen(self, *args, **kwargs):
        here = Path(prolu.__file__).parent
        frames = [Path(frame.filename) for frame in traceback.extract_stack()]
        files = dict.fromkeys(file for file in frames if here in file.parents)
        stacks.append([str(file.relative_to(here)) for file in files])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DenseStep, "gradients", seen)
    command = ["train", *source, *TINY_TRAIN, "--eval-tokens", "320", "--step", "dense", "--out", str(tmp_path / "a")]
    assert main(command) == 0
    road = ["cli/entry_point.py", "studies/sweep.py", "training/trainer.py", "training/steps/base.py"]
    assert stacks[0] == road, stacks[0]  # and the fifth, training/steps/dense.py, which holds the gradients


def test_the_installed_script_is_the_command_line():
    script = Path(sys.executable).with_name("prolu")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"prolu {prolu.__version__}\n"


def test_help_may_be_cut_off_by_its_reader():
    """As in `prolu train --help | head`."""
    command = [sys.executable, "-m", "prolu", "train", "--help"]
    help_text = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    help_text.stdout.close()
    assert help_text.stderr.read() == ""
    assert help_text.wait() == 0


def test_a_study_in_place_of_a_run_and_the_reverse(tiny_stream, tmp_path, monkeypatch, capsys):
    runs = prolu.grid(prolu.RunConfig(d_sae=24, n_tokens=640, nonlinearity="relu"), coeff=[0.01 * i for i in range(8)])
    prolu.run_sweep(runs, tiny_stream, tmp_path / "study", eval_tokens=320, progress=False)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    first, *_, last = sorted(str(path.parent) for path in Path("study").glob("*/sae.safetensors"))
    for command in (
        ["eval", "study"],
        ["export", "study", "--format", "saelens", "--out", "x"],
        ["eval", first, "study"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"study: this is a study, and not one SAE; its runs are {first}, " in said
        assert said.endswith(", and 2 more\n")
        assert last not in said
    with pytest.raises(ValueError, match=r"this is a study, and not one SAE; its runs are .*relu"):
        prolu.SAE.load("study")
    for run, study in ((first, "study"), (str(tmp_path / last), str(tmp_path / "study"))):
        assert main(["report", run]) == 2
        assert (
            f"{run}: this is the folder of one SAE, and not of a study; its study is {study}\n"
            in capsys.readouterr().err
        )
    monkeypatch.chdir(first)
    assert main(["report", "."]) == 2
    assert f"its study is {tmp_path / 'study'}\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not of a study"):
        prolu.Results.load(".")
    assert sorted(tmp_path.rglob("*")) == before


def small_sae():
    config = prolu.RunConfig(d_sae=8, nonlinearity="relu")
    return prolu.SAE(config.sae_config(4), starting_weights(config, 4))


def test_an_sae_of_no_study_and_a_study_without_finished_runs(tmp_path, capsys):
    small_sae().save(tmp_path / "alone")
    assert main(["report", str(tmp_path / "alone")]) == 2
    assert capsys.readouterr().err.endswith("this is the folder of one SAE, and not of a study\n")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"stream": {}, "runs": []}')
    assert main(["eval", str(tmp_path / "new")]) == 2
    assert "none of its runs has finished yet" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["missing.txt", "no.jsonl.gz", "./here", "/no/such/folder", "~/x", "a/b/c.parquet"])
@pytest.mark.parametrize("command", ["train", "harvest", "eval", "sweep demo"])
def test_a_missing_file_is_said_before_a_model_is_looked_for(tmp_path, monkeypatch, capsys, data, command):
    def ask(*_, **__):
        raise AssertionError("the hub was asked first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prolu.activations.model_loading.is_reachable", ask)
    monkeypatch.setattr("prolu.runtime.hub.is_reachable", ask)
    small_sae().save(tmp_path / "run", {"hook": "blocks.0.hook_resid_pre", "ctx": 32})
    place = ["run"] if command == "eval" else ["--out", "new"]
    before = sorted(tmp_path.rglob("*"))
    assert main([*command.split(), *place, "--lm", "gpt2", "--data", data]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"prolu: data {data!r}: neither a file")
    assert "no such file" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["train", "harvest", "sweep demo"])
def test_a_place_without_permission_is_refused_before_a_model_is_opened(tmp_path, monkeypatch, capsys, command):
    def opened(*_, **__):
        raise AssertionError("a model was opened first")

    monkeypatch.chdir(tmp_path)
    # The tests may run as a user who may write everywhere.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr("prolu.activations.language_model.load_model", opened)
    assert main([*command.split(), "--out", "new/study"]) == 2
    said = capsys.readouterr().err
    assert said == f"prolu: out 'new/study': cannot be written (no permission to write into {tmp_path})\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["squad", "user/data", "user/data.json", "builtin"])
def test_what_may_be_on_the_hub_is_not_called_missing(name):
    check_is_there(name)
