"""The page of a study in training is made from its files, read only, and served to this machine alone."""

import http.client
import json
import os
import threading

import pytest
import torch

from prolu import RunConfig
from prolu.cli.entry_point import main
from prolu.report.server import StudyServer
from prolu.report.watched_study import WatchedStudy
from prolu.runtime.files import locked
from prolu.studies.checkpoints import RunState, write_checkpoint
from prolu.studies.folder import write_failure, write_results, write_study
from prolu.studies.progress import unfinished_runs

RUNS = [
    RunConfig(nonlinearity=name, penalty="l1", coeff=0.01, d_sae=8, n_tokens=n, init_seed=seed)
    for name, n, seed in (("relu", 1000, 0), ("relu", 1000, 1), ("prolu_ste", 2000, 0))
]
STREAM = {"lm": "tiny", "hook": "h", "data": "<script>alert(1)</script>", "seed": 0, "batch_size": 10}


def record_of(run):
    return run.describe() | {
        "run_id": run.run_id, "l0": 4.0, "degradation": 0.5, "recovered": 0.9, "mse": 0.2, "l1": 2.0, "sqrt_l1": 3.0,
        "fvu": 0.1, "dead_fraction": 0.0, "eval_tokens": 64, "converged": True,
    }  # fmt: skip


def line(step):
    return json.dumps({"step": step, "tokens": 10 * step, "mse": 1 / step, "l0": 4.5, "dead": 0, "coeff": 0.01}) + "\n"


def save(folder, runs, step):
    """Write a checkpoint as a study in training does."""
    facts = {"n_updates": step, "curve": [line(s) for s in range(10, step + 1, 10)]}
    write_checkpoint(folder, step, {run.run_id: RunState({"b": torch.zeros(1)}, facts) for run in runs})


@pytest.fixture
def folder(tmp_path):
    """The folder of a study of three runs, after 40 of their 100 or 200 steps."""
    out = tmp_path / "study"
    out.mkdir()
    write_study(out, {"stream": STREAM, "eval_tokens": 64, "runs": [run.describe() for run in RUNS]})
    save(out, RUNS, 40)
    return out


@pytest.fixture
def ask(folder):
    """Serves the study; returns a function that asks for a path and returns status, headers and content."""
    server = StudyServer(folder, 0)
    port = int(server.address.rstrip("/").rpartition(":")[2])
    thread = threading.Thread(target=server.serve)
    thread.start()

    def ask(path="/", method="GET", host=f"127.0.0.1:{port}", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.putrequest(method, path, skip_host=True)
        for name, value in ({"Host": host} if host is not None else {}).items():
            connection.putheader(name, value)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        content = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, content

    ask.port = port
    yield ask
    server.close()
    thread.join()


def data_of(page):
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


def progress(page):
    return {run["id"]: run["progress"] for run in data_of(page)["runs"]}


def state_of(folder):
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_progress_is_that_of_the_last_checkpoint(folder):
    found = unfinished_runs(folder)
    assert [(run.settings["run_id"], run.n_steps, run.n_steps_saved) for run in found] == [
        (RUNS[0].run_id, 100, 40), (RUNS[1].run_id, 100, 40), (RUNS[2].run_id, 200, 40),
    ]  # fmt: skip
    assert [row["step"] for row in found[0].curve] == [10, 20, 30, 40]
    write_results(folder, [record_of(RUNS[0])])
    write_failure(folder / RUNS[1].run_id, 50, "no memory")
    save(folder, RUNS[2:], 120)
    assert [(run.settings["run_id"], run.fraction) for run in unfinished_runs(folder)] == [(RUNS[2].run_id, 0.6)]


def test_a_damaged_checkpoint_leaves_the_one_before(folder):
    save(folder, RUNS, 50)
    (folder / "checkpoints" / "step-000000000050" / "checkpoint.json").write_text('{"half')
    assert {run.n_steps_saved for run in unfinished_runs(folder)} == {40}


def test_runs_in_groups(folder):
    group = folder / "groups" / "000"
    group.mkdir(parents=True)
    write_study(group, {"stream": STREAM, "runs": [run.describe() for run in RUNS[:2]]})
    save(group, RUNS[:1], 70)
    write_results(group, [record_of(RUNS[1])])
    (group / RUNS[1].run_id).mkdir()
    (group / RUNS[1].run_id / "metrics.jsonl").write_text(line(100))
    assert [run.fraction for run in unfinished_runs(folder)] == [0.7, 1.0, 0.2]
    assert progress(WatchedStudy(folder).page().text)[RUNS[0].run_id] == 0.7


def test_the_page_follows_the_files_and_leaves_them_alone(folder, ask):
    before = state_of(folder)
    with locked(folder):  # as the process that trains it
        status, headers, page = ask()
    assert status == 200
    assert set(progress(page).values()) == {0.4, 0.2}
    assert "alert(1)</script>" not in page
    assert data_of(page)["planes"] == []
    assert ask(If_None_Match=headers["ETag"])[0] == 304
    after = state_of(folder)
    assert after.keys() - before.keys() <= {str(folder / ".lock")}  # of this test
    assert all(after[path] == at for path, at in before.items() if path != str(folder))
    write_results(folder, [record_of(RUNS[0])])
    write_failure(folder / RUNS[1].run_id, 50, "no <b>memory</b>")
    status, _, page = ask(If_None_Match=headers["ETag"])
    assert status == 200
    assert progress(page) == {RUNS[0].run_id: None, RUNS[2].run_id: 0.2}
    assert len(data_of(page)["planes"][0]["points"]) == 1
    assert "no &lt;b&gt;memory" in page


@pytest.mark.parametrize("file", ["config.json", "results.jsonl"])
def test_half_a_file_leaves_the_last_page_and_says_so(folder, file):
    write_results(folder, [record_of(RUNS[0])])
    study = WatchedStudy(folder)
    whole = study.page().text
    text = (folder / file).read_text()
    (folder / file).write_text(text[: len(text) // 2])
    page = study.page().text
    assert "cannot be read" in page
    assert file in page
    assert data_of(page) == data_of(whole)
    (folder / file).write_text(text)
    assert "cannot be read" not in study.page().text


def test_a_study_that_is_not_there_yet(tmp_path):
    out = tmp_path / "a <b>"
    study = WatchedStudy(out)
    assert "There is no folder" in study.page().text
    assert "a &lt;b&gt; yet" in study.page().text
    assert not out.exists()
    out.mkdir()
    assert "holds no study yet" in study.page().text
    (out / "hook").mkdir()
    write_study(out / "hook", {"stream": STREAM, "runs": []})
    assert f"prolu watch {tmp_path}/a &lt;b&gt;/hook" in study.page().text
    write_study(out, {"stream": STREAM, "runs": [RUNS[0].describe()]})
    assert progress(study.page().text) == {RUNS[0].run_id: 0}


def test_only_this_machine_may_ask(ask):
    others = ("elsewhere.org", f"elsewhere.org:{ask.port}", "", None, f"127.0.0.1.elsewhere.org:{ask.port}", "[", "a@b")
    for host in others:
        assert ask(host=host)[0] == 403, host
    for host in (f"localhost:{ask.port}", "localhost", "127.0.0.1:9000", "[::1]:9000"):  # SSH forwards any port
        assert ask(host=host)[0] == 200, host
    status, headers, content = ask(method="HEAD")
    assert (status, content) == (200, "")
    assert int(headers["Content-Length"]) > 1000
    assert ask(method="POST")[0] == 501


def test_only_pages_of_latents_are_served_beside_it(folder, ask):
    write_results(folder, [record_of(RUNS[0])])
    features = folder / RUNS[0].run_id / "features"
    (features / "data").mkdir(parents=True)
    (features / "index.html").write_text("<!doctype html>latents")
    (features / "data" / "list.js").write_text("put()")
    (features / "notes.txt").write_text("mine")
    (folder / "secret.js").write_text("secret")
    os.symlink(folder / "secret.js", features / "link.js")
    _, _, page = ask()
    [finished] = [run for run in data_of(page)["runs"] if run["progress"] is None]
    assert ask("/" + finished["page"])[2] == "<!doctype html>latents"
    assert ask(f"/{RUNS[0].run_id}/features/data/list.js")[2] == "put()"
    outside = ("notes.txt", "link.js", "../../secret.js", "..%2f..%2fsecret.js", "data", "", "%00.js")
    for path in (f"/{RUNS[0].run_id}/features/{name}" for name in outside):
        assert ask(path)[0] == 404, path
    for path in ("/secret.js", "/config.json", "/../features/index.html", "/x"):
        assert ask(path)[0] == 404, path
    assert ask("/plotly.js")[0] == 200


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_wrong_port_is_refused(tmp_path, capsys, port):
    assert main(["watch", str(tmp_path / "x"), "--port", port]) == 2
    assert "from 0 to 65535" in capsys.readouterr().err


def test_a_port_that_is_taken_and_a_file_are_refused(ask, tmp_path, capsys):
    assert main(["watch", str(tmp_path / "x"), "--port", str(ask.port)]) == 2
    assert "choose another one with --port" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["watch", str(tmp_path / "file" / "study")]) == 2
    assert "name the folder of a study" in capsys.readouterr().err
