"""Pushing to and pulling from a hub on this machine, and from the hub's own cache, offline; refusals; the token."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

import prolu
from prolu import SAE, ActivationStream, Harvest, Results, RunConfig, grid, run_sweep, run_sweeps
from prolu.cli.entry_point import main
from prolu.interop.sharing import pack
from support.fake_hub import FakeHub
from support.markdown import blocks

TOKEN = "hf_sentinelSentinelSentinelSentinel"
BASE = RunConfig(d_sae=32, n_tokens=64 * 20, coeff=0.02, lr=3e-3)


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_lm, tiny_blocks):
    """A study of two runs, as it was written, with all that never leaves the machine beside it."""
    out = tmp_path_factory.mktemp("studies") / "two"
    stream = ActivationStream(tiny_lm, tiny_blocks, batch_size=64, seed=3, window_tokens=2048)
    run_sweep(
        grid(BASE, nonlinearity=["relu", "prolu_ste"]), stream, out, eval_tokens=640, keep_state=True, progress=False
    )
    return out


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, somebody logged in, an empty cache."""
    server = FakeHub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in {
        "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value, raising=name != "HF_URL_HOSTS")  # unknown to hubs of before 2026
    yield server
    server.shutdown()
    server.server_close()


def writes(hub):
    return [path for method, path, *_ in hub.requests if method in ("POST", "PUT")]


def test_what_is_pushed_comes_back(study, hub, tmp_path, capsys):
    assert main(["push", str(study), "ann/two"]) == 0
    assert "2 SAEs" in capsys.readouterr().out
    assert main(["pull", "ann/two", "--out", str(tmp_path / "back")]) == 0
    back = Results.load(tmp_path / "back")
    assert back.records == Results.load(study).records
    for run, ours in zip(back.runs, Results.load(study).runs, strict=True):
        for name in ("sae.safetensors", "metrics.jsonl", "documents.safetensors", "latents.safetensors"):
            assert (run.folder / name).read_bytes() == (ours.folder / name).read_bytes()
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(SAE.from_hub(f"ann/two/{run.folder.name}").encode(x), ours.load().encode(x))
    assert back.frontier().all_runs == back.runs


def test_it_is_one_commit_and_a_second_push_is_none(study, hub, capsys):
    assert prolu.push(study, "ann/two").changed
    assert sum("/commit/" in path for path in writes(hub)) == 1
    capsys.readouterr()
    assert main(["push", str(study), "ann/two"]) == 0
    assert "nothing was sent" in capsys.readouterr().out
    assert sum("/commit/" in path for path in writes(hub)) == 1
    assert sum(path.startswith("/lfs/") for path in writes(hub)) == 6  # each of 2 x 3 large files once


def test_nothing_of_this_machine_is_sent(study, hub, tiny_lm_folder, stories_file):
    assert str(tiny_lm_folder) in (study / "config.json").read_text(), "this study does not show whether paths are cut"
    prolu.push(study, "ann/two")
    files = hub.files("ann/two")
    runs = {r["run_id"] for r in Results.load(study).records}
    own = {"config.json", "sae.safetensors", "metrics.jsonl", "documents.safetensors", "latents.safetensors"}
    expected = {f"{run}/{name}" for run in runs for name in own} | {"config.json", "results.jsonl", "README.md"}
    assert set(files) == expected | {"frontier.png", ".gitattributes"}
    assert any((study / run / "final").exists() for run in runs)
    assert (study / "log.jsonl").exists()
    for name, content in files.items():
        for path in (tiny_lm_folder, stories_file):
            assert str(path.parent).encode() not in content, name
    stream = json.loads(files["config.json"])["stream"]
    assert (stream["lm"], stream["data"]) == (tiny_lm_folder.name, stories_file.name)
    assert stream["lm_digest"] == json.loads((study / "config.json").read_text())["stream"]["lm_digest"]


def test_a_run_alone_and_a_folder_alone(study, hub, tmp_path):
    run = Results.load(study).runs[1]
    prolu.push(run.folder, "ann/one")
    assert [r["run_id"] for r in map(json.loads, hub.files("ann/one")["results.jsonl"].splitlines())] == [
        run.folder.name
    ]
    assert prolu.pull(f"ann/one/{run.folder.name}", tmp_path / "sae") == [""]
    assert torch.equal(SAE.load(tmp_path / "sae").W_enc, run.load().W_enc)


def test_studies_at_several_hooks_are_one_repository(tiny_lm, tiny_blocks, hub, tmp_path):
    hooks = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    shared = Harvest(tiny_lm, tiny_blocks, hooks)
    streams = [ActivationStream(tiny_lm.at(h), tiny_blocks, batch_size=64, seed=3, source=shared) for h in hooks]
    run_sweeps([BASE], streams, tmp_path / "both", eval_tokens=640, progress=False)
    parcel = pack(tmp_path / "both", "ann/both")
    assert parcel.saes == [f"{hook}/{BASE.run_id}" for hook in hooks]
    prolu.push(tmp_path / "both", "ann/both")
    assert prolu.pull("ann/both", tmp_path / "back") == parcel.saes
    assert prolu.pull(f"ann/both/{hooks[1]}", tmp_path / "second") == [BASE.run_id]
    assert Results.load(tmp_path / "second").records == Results.load(tmp_path / "both" / hooks[1]).records


def test_a_dry_run_sends_and_writes_nothing(study, hub, tmp_path, capsys, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in study.rglob("*")}
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(study), "ann/two", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert hub.requests == []
    assert {p: p.stat().st_mtime_ns for p in study.rglob("*")} == before
    for record in Results.load(study).records:
        size = (study / record["run_id"] / "sae.safetensors").stat().st_size
        assert re.search(rf"^ *{size:,}  {re.escape(record['run_id'])}/sae\.safetensors$", shown, flags=re.MULTILINE)
    assert "library_name" in shown
    assert "nothing is sent" in shown


def test_the_card(study):
    parcel = pack(study, "ann/two", license="cc-by-4.0")
    _, front, body = parcel.card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["library_name"] == "prolu"
    assert facts["license"] == "cc-by-4.0"
    assert {"sparse-autoencoder", "relu", "prolu_ste"} <= set(facts["tags"])
    assert parcel.files["frontier.png"].startswith(b"\x89PNG")
    assert "(frontier.png)" in body
    for r in Results.load(study).records:
        (row,) = [line for line in body.splitlines() if line.startswith(f"| `{r['run_id']}` ")]
        assert f"| {r['l0']:.1f} | {r['degradation']:.4f}" in row
        assert f"| {r['fvu']:.4f} |" in row
    assert re.search(r'from_hub\("ann/two/[\w.+-]+"\)', body)


def test_the_card_of_rows_names_no_language_model(tmp_path):
    rows = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    stream = prolu.ActivationStream.from_rows(rows, batch_size=64, name="my rows")
    run = prolu.RunConfig(d_sae=16, n_tokens=640)
    (record,) = prolu.run_sweep([run], stream, tmp_path / "rows", eval_tokens=50, progress=False).records
    parcel = pack(tmp_path / "rows", "ann/rows")
    assert parcel.files["frontier.png"].startswith(b"\x89PNG")
    _, front, body = parcel.card.split("---\n", 2)
    assert "base_model" not in yaml.safe_load(front)
    assert "# rows: 1 sparse autoencoder of `my rows`" in body
    assert "no language model: 540 rows of `my rows` to train on, and 60 that are held out." in body
    assert "| SAE | family | L0 | FVU | dead | converged |" in body
    assert f"| {record['l0']:.1f} | {record['fvu']:.4f} |" in body
    assert "50 held-out rows" in body
    assert "sae.encode(rows)" in body
    assert not re.search("LanguageModel|cross-entropy|CE increase|token", body)


def test_private_and_branches(study, hub, capsys):
    prolu.push(study, "ann/hidden", private=True)
    assert hub.repos["ann/hidden"]["private"]
    prolu.push(study, "ann/hidden", private=True, revision="v1")  # the branch is made; what it holds is all there
    hub.create("ann/public")
    n = len(writes(hub))
    assert main(["push", str(study), "ann/public", "--private"]) == 2
    assert "public" in capsys.readouterr().err
    assert len(writes(hub)) == n
    assert main(["push", str(study), "ann/public", "--revision", "v2"]) == 0
    assert set(hub.repos["ann/public"]["branches"]) == {"main", "v2"}
    assert set(hub.files("ann/public")) == {".gitattributes"}
    assert "results.jsonl" in hub.files("ann/public", "v2")


def test_a_repository_is_one_study(study, hub, capsys):
    prolu.push(study, "ann/two")
    assert main(["push", str(Results.load(study).runs[0].folder), "ann/two"]) == 2
    assert "holds SAEs that are not in this push" in capsys.readouterr().err


def test_somebody_else_committed(study, hub, monkeypatch):
    from prolu.interop import sharing

    hub.create("ann/two")
    parcel = pack(study, "ann/two")
    head = sharing.check_push(parcel, revision="main", private=False)
    hub.replace("ann/two", {"theirs": b""})
    with pytest.raises(ValueError, match="somebody else has committed"):
        sharing.deliver(parcel, head, revision="main", private=False)
    assert set(hub.files("ann/two")) == {"theirs"}


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(401, 2, "does not take your token"), (403, 2, "may not do that"), (400, 2, "refused with status 400")],
)
def test_refusals_do_not_show_the_token(study, hub, capsys, status, code, words):
    hub.create("ann/two")
    hub.fail = status, f"bad credentials {TOKEN}"
    assert main(["push", str(study), "ann/two"]) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.err.startswith("prolu: ann/two")
    assert len(shown.err.splitlines()) == 1
    assert TOKEN not in shown.out + shown.err
    assert any(headers.get("Authorization") == f"Bearer {TOKEN}" for _, _, headers, _ in hub.requests)


def test_a_token_that_is_no_good_is_told_before_anything_is_made(study, hub, capsys):
    hub.fail = 401, f"Invalid credentials {TOKEN}"
    assert main(["push", str(study), "ann/new"]) == 2
    shown = capsys.readouterr()
    assert "does not take your token" in shown.err
    assert TOKEN not in shown.out + shown.err
    assert writes(hub) == []


def test_exceptions_hold_no_token(study, hub):
    hub.create("ann/two")
    hub.fail = 403, TOKEN
    with pytest.raises(ValueError, match="may not do that") as caught:
        prolu.push(study, "ann/two")
    seen = caught.value
    while seen is not None:
        assert TOKEN not in repr(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def test_a_hub_that_breaks_down(study, hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between tries
    hub.create("ann/two")
    before = dict(hub.files("ann/two"))
    hub.fail = 500, "oh"
    assert main(["push", str(study), "ann/two"]) == 1
    assert "status 500" in capsys.readouterr().err
    assert hub.files("ann/two") == before


def test_a_licence_that_the_hub_does_not_know(study, hub, capsys):
    assert main(["push", str(study), "ann/two", "--license", "none"]) == 2
    assert "licence" in capsys.readouterr().err
    assert set(hub.files("ann/two")) == {".gitattributes"}


def test_nobody_logged_in(study, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    assert main(["push", str(study), "ann/two"]) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert hub.requests == []


def refused(args, capsys):
    assert main(args) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1
    return shown.err


@pytest.mark.parametrize("name", ["two", "ann/", "ann/two/../x", "/home/ann", "ann/two words", ""])
def test_no_place(study, hub, capsys, tmp_path, name):
    assert "user/repo" in refused(["push", str(study), name], capsys)
    assert "user/repo" in refused(["pull", name, "--out", str(tmp_path / "o")], capsys)
    assert hub.requests == []


def test_nothing_to_push(study, hub, capsys, tmp_path):
    assert "neither a study" in refused(["push", str(tmp_path / "gone"), "ann/two"], capsys)
    alone = tmp_path / "alone" / "sae"
    Results.load(study).runs[0].load().save(alone)
    assert "no study here" in refused(["push", str(alone), "ann/two"], capsys)
    broken = shutil.copytree(study, tmp_path / "broken")
    weights = broken / Results.load(study).records[0]["run_id"] / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "not a readable safetensors file" in refused(["push", str(broken), "ann/two"], capsys)
    assert "one study" in refused(["push", str(study), "ann/two/folder"], capsys)
    assert hub.requests == []


def test_nothing_to_pull(study, hub, capsys, tmp_path):
    out = tmp_path / "o"
    assert "no such repository" in refused(["pull", "ann/none", "--out", str(out)], capsys)
    hub.create("ann/empty")
    assert "no SAEs there" in refused(["pull", "ann/empty", "--out", str(out)], capsys)
    prolu.push(study, "ann/two")
    assert "no SAEs there" in refused(["pull", "ann/two/nothing", "--out", str(out)], capsys)
    assert "no such revision" in refused(["pull", "ann/two", "--revision", "v9", "--out", str(out)], capsys)
    with pytest.raises(ValueError, match="no SAE there"):
        SAE.from_hub("ann/two")
    assert not out.exists()


def test_a_damaged_sae_is_not_written(study, hub, capsys, tmp_path):
    prolu.push(study, "ann/two")
    run_id = Results.load(study).records[0]["run_id"]
    name, whole = f"{run_id}/sae.safetensors", hub.files("ann/two")
    cut, gone = whole | {name: whole[name][:-4]}, {key: value for key, value in whole.items() if key != name}
    for files, words in ((cut, "not a readable safetensors file"), (gone, "which is not there")):
        hub.replace("ann/two", files)
        err = refused(["pull", "ann/two", "--out", str(tmp_path / "o")], capsys)
        assert words in err
        assert str(tmp_path) not in err
    assert list(tmp_path.glob("*o*")) == []


def test_pull_refuses_what_is_in_the_way(study, hub, capsys, tmp_path):
    prolu.push(study, "ann/two")
    out = tmp_path / "o"
    out.mkdir()
    assert main(["pull", "ann/two", "--out", str(out)]) == 0  # empty: as if it were not there
    (out / "report.html").write_text("mine")
    assert main(["pull", "ann/two", "--out", str(out)]) == 0
    assert "which held them already" in capsys.readouterr().out
    (out / "results.jsonl").write_text("mine")
    assert "results.jsonl differs" in refused(["pull", "ann/two", "--out", str(out)], capsys)
    assert (out / "results.jsonl").read_text() == "mine"
    assert "is a file" in refused(["pull", "ann/two", "--out", str(out / "results.jsonl")], capsys)


def test_a_full_disk_leaves_nothing(study, hub, tmp_path, capsys, monkeypatch):
    prolu.push(study, "ann/two")

    def full(operation, path):
        if operation == "write" and path.name == "metrics.jsonl":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("prolu.runtime.files.before_operation", [full])
    assert main(["pull", "ann/two", "--out", str(tmp_path / "o")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.glob("*o*")) == []


def test_the_cache_is_enough_offline(study, tmp_path, monkeypatch, capsys):
    """A repository in the hub's cache layout, put there by hand, HF_HUB_OFFLINE set as everywhere in these tests."""
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    sha = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "cache" / "models--ann--two"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(sha)
    for name, content in pack(study, "ann/two").files.items():
        (place / "blobs").mkdir(exist_ok=True)
        blob = place / "blobs" / name.replace("/", "_")
        blob.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        link = place / "snapshots" / sha / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    assert main(["pull", "ann/two", "--out", str(tmp_path / "o")]) == 0
    assert Results.load(tmp_path / "o").records == Results.load(study).records
    assert not any(p.is_symlink() for p in (tmp_path / "o").rglob("*"))
    assert "HF_HUB_OFFLINE" in refused(["pull", "ann/other", "--out", str(tmp_path / "p")], capsys)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "HF_HUB_OFFLINE" in refused(["push", str(study), "ann/two"], capsys)


def test_no_network(study, hub, capsys, tmp_path):
    hub.shutdown()
    hub.server_close()
    assert "does not answer" in refused(["pull", "ann/two", "--out", str(tmp_path / "o")], capsys)
    assert "does not answer" in refused(["push", str(study), "ann/two"], capsys)


def test_the_examples_of_the_docs_run(study, hub, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "howto" / "hub.md").read_text()
    run = Results.load(study).runs[0].folder.name
    shutil.copytree(study, tmp_path / "runs" / "one")
    monkeypatch.chdir(tmp_path)
    commands, examples = blocks("sh", text), blocks("py", text)
    for line in "".join(commands).replace("RUN_ID", run).splitlines():
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    for example in examples:
        exec(example.replace("RUN_ID", run), {})
    assert SAE.load(tmp_path / "pulled" / "sae")
    assert (len(commands), len(examples)) == (1, 1)
