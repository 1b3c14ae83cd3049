"""Studies that somebody else may have written: their names lead nowhere, and their text does nothing."""

import json
import shutil

import pytest

from prolu import Results, RunConfig, grid
from prolu.activations.store import _is_index
from prolu.cli.entry_point import main
from prolu.interop.sharing import pack
from prolu.report.writer import write_report
from prolu.runtime.names import is_plain_name, plain_name, shown
from prolu.studies.checkpoints import RunState, read_checkpoint, write_checkpoint
from prolu.studies.folder import read_results
from support.sweeps import contents, sweep

BAD_NAMES = [
    "", " ", ".", "..", "...", ".hidden", "/", "/etc", "/tmp/x", "../x", "../../other/run", "a/b", "a/../../b", "a\\b",
    "..\\x", "C:\\x", "C:x", "\\\\host\\share", "javascript:alert(1)", "data:text/html,x", "http://x", "a\0b", "a\nb",
    "\r", "a\tb", "\x1b[2J", "\x9b2J", "a\u202eb", "a\u2028b", "\ud800", " a", "a ", "a" * 300, "\u00e9" * 150, 'a"b',
    "<b>", "a|b", "a?b", "a*b", "a`b", None, 3, True, [], ["a"], {}, {"a": 1},
]  # fmt: skip
GOOD_NAMES = [
    "a", "relu-l1-0.05-lr0.02-d48-s0", "prolu_1_2_3-l1-1e-05-lr0.001-d8-s-1-from0123abcd", "blocks.6.hook_resid_pre",
    "a..b", "layer 12, 16k (first)", "\u00e9t\u00e9", "\u4e2d\u6587", "x" * 200, "a%2e%2e", "~", "$HOME", "a;b",
    "a'b", "#1",
]  # fmt: skip

WRONG_FIELDS = {
    "nonlinearity": ["\x1b[31m", "a\nb", 3, [], True, None],
    "penalty": ["\x07", 1.5, {}],
    "unit": ["\u202e", 1],
    "coeff": ["0.1", True, [], 10**400],
    "converged": ["yes", 1, 0.0, []],
    "l0": ["12", True, [1], 10**30],
    "mse": ["nan", {}],
    "degradation": ["\x1b]0;x\x07"],
    "recovered": ["1"],
    "n_tokens": ["1e6", 2**63],
    "eval_tokens": ["320", []],
    "init_seed": ["0", {}],
    "target_l0": ["16"],
    "dead_fraction": ["0"],
    "density_total": [10**20],
    "note": ["a\x1b[1mb"],
}


@pytest.fixture(scope="module")
def study(tiny_lm, tiny_blocks, tmp_path_factory):
    from support.sweeps import stream_over

    folder = tmp_path_factory.mktemp("strangers") / "study"
    runs = grid(RunConfig(d_sae=24, n_tokens=640, coeff=0.01), nonlinearity=["relu", "prolu_ste"])
    sweep(runs, stream_over(tiny_lm, tiny_blocks), folder)
    return folder


@pytest.fixture
def copy(study, tmp_path):
    shutil.copytree(study, tmp_path / "study")
    return tmp_path / "study"


def change_results(folder, **fields):
    file = folder / "results.jsonl"
    first, *others = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in [first | fields, *others]))


def refused(capsys, *command):
    """What a command says that is refused with one sentence, nothing of which a terminal obeys."""
    capsys.readouterr()
    assert main([str(word) for word in command]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said[:-1].isprintable()
    return said


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_plain_names_are_taken_as_they_are(name):
    assert plain_name(name, "here") == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_other_names_are_refused_in_one_printable_sentence(name):
    assert not is_plain_name(name)
    with pytest.raises(ValueError, match=r"^here .*: not a plain name; ") as refusal:
        plain_name(name, "here")
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_run_id_is_a_plain_name_in_every_reader(copy, name, capsys):
    before = contents(copy.parent)
    change_results(copy, run_id=name)
    changed = contents(copy.parent)
    for read in (Results.load, read_results, lambda f: write_report([f]), lambda f: pack(f, "ann/study")):
        with pytest.raises(ValueError, match=r"results.jsonl: line 1: run_id .*: not a plain name"):
            read(copy)
    for command in (
        ["report", copy],
        ["report", copy, "--latent-pages", "all"],
        ["push", copy, "ann/study", "--dry-run"],
    ):
        assert "run_id" in refused(capsys, *command)
    assert contents(copy.parent) == changed
    assert changed.keys() == before.keys()


def test_a_run_that_is_a_link_out_of_its_study_is_refused(copy, tmp_path, capsys):
    run_id = read_results(copy)[0]["run_id"]
    foreign = tmp_path / "foreign"
    (copy / run_id).rename(foreign)
    (foreign / "features").mkdir()
    (foreign / "features" / "mine.txt").write_text("mine")
    (copy / run_id).symlink_to(foreign)
    before = contents(foreign)
    assert "leads out of" in refused(capsys, "report", copy, "--latent-pages", "all")
    assert "leads out of" in refused(capsys, "push", copy, "ann/study", "--dry-run")
    assert contents(foreign) == before
    # A link within the study is as good as a folder, and the study itself may be a link.
    (copy / run_id).unlink()
    foreign.rename(copy / "elsewhere")
    (copy / run_id).symlink_to(copy / "elsewhere")
    (tmp_path / "link").symlink_to(copy)
    assert len(Results.load(tmp_path / "link").runs) == 2


@pytest.mark.usefixtures("every_format")
def test_a_report_is_not_written_through_links(copy, tmp_path, capsys):
    own = tmp_path / "own.txt"
    own.write_text("mine")
    (tmp_path / "place").mkdir()
    (copy / "figures").symlink_to(tmp_path / "place")
    assert "leads out of" in refused(capsys, "report", copy, "--latent-pages", "none")
    assert list((tmp_path / "place").iterdir()) == []
    (copy / "figures").unlink()
    (copy / "figures").mkdir()
    links = ["report.html", "results.csv", ".report.html.partial", ".results.csv.partial"]
    links += [f"figures/degradation-against-l0.{ending}" for ending in ("svg", "png", "pdf")]
    for link in (*links, "figures/.training-curves.svg.partial"):
        (copy / link).symlink_to(own)
    assert main(["report", str(copy), "--latent-pages", "none"]) == 0
    assert own.read_text() == "mine"
    assert [link for link in links if (copy / link).is_symlink()] == []


def test_a_push_sends_no_file_that_a_link_leads_to(copy, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("password")
    run_id = read_results(copy)[0]["run_id"]
    for name in ("metrics.jsonl", "documents.safetensors", "latents.safetensors", "sae.safetensors", "config.json"):
        kept = (copy / run_id / name).read_bytes()
        (copy / run_id / name).unlink()
        (copy / run_id / name).symlink_to(secret)
        refused(capsys, "push", copy, "ann/study", "--dry-run")
        (copy / run_id / name).unlink()
        (copy / run_id / name).write_bytes(kept)
    assert main(["push", str(copy), "ann/study", "--dry-run"]) == 0


def test_links_in_the_page_are_paths_and_nothing_else(copy):
    name = "a b#c%41&x=1'$(x)"
    run_id = read_results(copy)[0]["run_id"]
    (copy / run_id).rename(copy / name)
    change_results(copy, run_id=name)
    (copy / name / "features").mkdir()
    (copy / name / "features" / "index.html").write_text("pages")
    page = write_report([copy]).page.read_text()
    assert 'href="a%20b%23c%2541%26x%3D1%27%24%28x%29/features/index.html"' in page


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG_FIELDS.items() for v in values])
def test_what_is_shown_of_results_is_checked_when_it_is_read(copy, field, value, capsys):
    change_results(copy, **{field: value})
    assert f"line 1: {field} is " in refused(capsys, "report", copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None])
@pytest.mark.parametrize("field", ["l0", "mse", "degradation", "l1"])
def test_one_run_without_a_finite_score_does_not_cost_the_report(copy, field, value):
    change_results(copy, **{field: value})
    # The data of the page are JSON, which knows neither nan nor inf, so a page with them could not be written.
    page = write_report([copy]).page.read_text()
    assert all(record["run_id"] in page for record in read_results(copy))


@pytest.mark.parametrize("field", ["eval_tokens", "dead_fraction", "sqrt_l1"])
def test_what_a_report_cannot_do_without_is_named(copy, field, capsys):
    change_results(copy, **{field: None})
    assert f"line 1 lacks {field}" in refused(capsys, "report", copy)


@pytest.mark.parametrize("line", [
    {"l0": "twelve"}, {"mse": []}, {"tokens": True}, {"dead": [1]}, {"step": "\x1b[2J"},
    {"l0": 10**400}, "3", "[]", "\x1b", "",
])  # fmt: skip
def test_a_training_curve_holds_numbers(copy, line, capsys):
    file = copy / read_results(copy)[0]["run_id"] / "metrics.jsonl"
    rows = file.read_text().splitlines()
    rows[1] = json.dumps(json.loads(rows[1]) | line) if isinstance(line, dict) else line
    file.write_text("\n".join(rows))
    assert "metrics.jsonl: line 2" in refused(capsys, "report", copy, "--latent-pages", "none")
    assert not (copy / "figures").exists()


@pytest.mark.parametrize(("field", "value"), [
    ("seed", []), ("seed", {}), ("seed", "0"),
    ("lm", "\x1b[31mgpt2"), ("hook", "h\n"), ("data", 3), ("hook", None), ("lm", ["gpt2"]), ("split", "\x07"),
])  # fmt: skip
def test_what_is_shown_of_a_config_is_checked_when_it_is_read(copy, field, value, capsys):
    config = json.loads((copy / "config.json").read_text())
    config["stream"][field] = value
    (copy / "config.json").write_text(json.dumps(config))
    assert f"stream.{field} is " in refused(capsys, "report", copy)


@pytest.mark.parametrize("content", ['{"step": 3}', '{"reason": 3}', '{"reason": null}', "[]", "{"])
def test_a_failure_says_why(copy, content, capsys):
    (copy / "failed").mkdir()
    (copy / "failed" / "failure.json").write_text(content)
    refused(capsys, "report", copy, "--latent-pages", "none")


def test_nothing_of_a_study_is_a_command_to_the_terminal_or_markup(copy, capsys):
    (copy / "failed").mkdir()
    (copy / "failed" / "failure.json").write_text(json.dumps({"step": 1, "reason": "<i>\x1b[2J</i>"}))
    change_results(copy, nonlinearity="[red]$x^{$[/red]", penalty="[link=http://x]<script>")
    assert main(["report", str(copy), "--latent-pages", "none"]) == 0
    shown_text = capsys.readouterr().out
    assert "\x1b" not in shown_text
    assert "[red]$x^{$[/red] + [link=http://x]<script>" in shown_text
    page = (copy / "report.html").read_text()
    assert "<i>\x1b" not in page
    assert "http://x]<script>" not in page


@pytest.mark.parametrize("text", ["\x1b[2J", "\x9b31m", "a\rb", "\b\b", "\u202e", "\x7f", "\ud800", "\x00"])
def test_a_terminal_is_sent_no_control_character(text):
    assert shown(text).isprintable()
    assert shown(f"plain {text} text\n").startswith("plain ")


def test_a_checkpoint_names_files_of_its_own_folder_only(tmp_path):
    write_checkpoint(tmp_path / "other", 5, {"run": RunState({}, {})})
    foreign = (tmp_path / "other" / "checkpoints" / "step-000000000005" / "run.safetensors").rename(
        tmp_path / "run.safetensors"
    )
    for name in ("../../../run", str(foreign.with_suffix("")), "a\0b"):
        place = tmp_path / "study"
        write_checkpoint(place, 5, {"run": RunState({}, {})})
        file = place / "checkpoints" / "step-000000000005" / "checkpoint.json"
        import hashlib

        content = json.dumps(json.loads(json.loads(file.read_text())["content"]))
        content = content.replace('"run"', json.dumps(name))
        file.write_text(json.dumps({"sha256": hashlib.sha256(content.encode()).hexdigest(), "content": content}))
        found = read_checkpoint(place)
        assert found is not None
        assert (found.runs, "not a plain name" in found.complaints[0]) == ({}, True)


@pytest.mark.parametrize("hook", ["../x", "/tmp", "a/b", "", "..", "\x1b[2J", "a:b"])
def test_a_store_names_hooks_in_its_own_folder_only(hook):
    index = {
        "made": {
            "hooks": [hook], "ctx": 32, "lm_batch_tokens": 32, "n_blocks": 1, "blocks_per_shard": 1, "d_in": {hook: 8},
            "lm": "x", "lm_digest": "x", "lm_dtype": "fp32", "data_digest": "x", "dtype": "fp32",
        },
        "shards": [[{"file": f"{hook}/00000.safetensors", "sha256": "0"}]],
    }  # fmt: skip
    assert not _is_index(index)
    assert _is_index(json.loads(json.dumps(index).replace(json.dumps(hook)[1:-1] or "\0", "hook"))) or not hook


def test_an_sae_is_scored_under_a_plain_name_only(study, tmp_path, capsys):
    run = Results.load(study).runs[0].folder
    for name in ("a:b", ".hidden", "x" * 230):
        shutil.copytree(run, tmp_path / name)
        command = ["eval", tmp_path / name, "--like", study, "--out", tmp_path / "scored"]
        assert "not a plain name" in refused(capsys, *command)
    assert not (tmp_path / "scored").exists()
