"""One SAE on several processes: the numbers of one, bytes as the formula says, and wrong meshes refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mesh_ranks import BATCH, D_IN, D_SAE
from prolu.mesh import Mesh, check_shape, parse_mesh

HERE = Path(__file__).parent
RESAMPLED = {"resample_fractions": [0.5], "resample_count_fraction": 0.2, "resample_dead_below": 0.5}


def launched(n, command):
    """So many processes, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": f"{HERE.parent / 'src'}:{HERE}"}
    ranks = []
    for rank in range(n):
        own = {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        ranks.append(
            subprocess.Popen(
                [sys.executable, *command], env=os.environ | own, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    return ranks


def ended(ranks):
    """Each one's exit code, and what it wrote."""
    try:
        said = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(ranks, said, strict=True)]


def start(n, command):
    """Both."""
    return ended(launched(n, command))


def on_ranks(n, cases):
    """What tests/mesh_ranks.py finds."""
    found = start(n, [str(HERE / "mesh_ranks.py"), json.dumps(cases)])
    assert all(code == 0 for code, *_ in found), "\n".join(text for _, *texts in found for text in texts)
    return json.loads(found[0][1].splitlines()[-1])


def case(mesh, nonlinearity="prolu_ste", penalty="l1", *, n_steps=50, dtype="float64", family=None, **run):
    run = {"nonlinearity": nonlinearity, "penalty": penalty, "coeff": 0.01} | run
    return {"mesh": mesh, "run": run, "n_steps": n_steps, "dtype": dtype, "family": family}


def formula(n_data, n_latent, *, size):
    """Bytes of the tensors in one step's collectives, as docs/scaling.md has them; `size` of a number."""
    rows, latents = BATCH // n_data, D_SAE // n_latent
    sent = {"latent": rows * D_IN * size, "all": D_IN * size + 4 * 8}
    if n_data > 1:
        sent["data"] = (2 * D_IN + 2) * latents * size  # both matrices, b_enc, and the count of firings
    return {axis: n for axis, n in sent.items() if {"latent": n_latent, "data": n_data, "all": 2}[axis] > 1}


def holds(found, *, figure=1e-10):
    """Whether the mesh's numbers are the single process's."""
    return found["difference"] <= figure and found["figures"] <= figure and found["n_dead"] != 0


def test_two_ranks_give_what_one_process_gives_and_send_what_the_formula_says():
    cases = [
        case([1, 2], step="dense", **RESAMPLED),
        case([2, 1], step="dense", **RESAMPLED),
        case([1, 2], step="dense", n_steps=1, dtype="float32"),
        case([1, 2], "topk(4)", "none", step="sparse_torch", aux_dead_tokens=320),
        {"meshes": [[1, 2], [1, 1]]} | case([1, 2], step="dense", **RESAMPLED),
    ]
    latent, data, single, topk, resumed = on_ranks(2, cases)
    assert holds(latent), latent
    assert holds(data), data
    assert holds(topk), topk
    assert holds(single, figure=1e-5), single
    assert latent["sent"] == formula(1, 2, size=8)
    assert data["sent"] == formula(2, 1, size=8)
    assert single["sent"] == formula(1, 2, size=4)
    assert resumed["same"]
    assert resumed["difference"] <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[1, 2], [2, 1]])
def test_every_family_of_steps_and_every_nonlinearity(mesh):
    cases = [case(mesh, step="sparse", **RESAMPLED), case(mesh, step="dense", family="cuda", **RESAMPLED)]
    for step in ("dense", "sparse_torch", "sparse"):
        cases += [
            case(mesh, "relu", "sqrt_l1", step=step, max_grad_norm=0.01),
            case(mesh, "gated", step=step),
            case(mesh, "jumprelu", "l0", step=step, target_l0=8.0),
            case(mesh, "topk(4)", "none", step=step, aux_dead_tokens=320),
            case(mesh, "batchtopk(4)", "none", step=step, aux_dead_tokens=320),
        ]
    for asked, found in zip(cases, on_ranks(2, cases), strict=True):
        assert holds(found), (asked, found)


@pytest.mark.slow
def test_four_ranks_and_resuming_on_others():
    cases = [case([2, 2], step="sparse", **RESAMPLED), case([1, 4], step="sparse"), case([4, 1], step="dense")]
    meshes = [[[1, 4], [1, 1]], [[2, 2], [1, 4]], [[1, 4], [2, 2]], [[1, 1], [1, 4]]]
    asked = cases + [{"meshes": pair} | case([1, 4], step="sparse", **RESAMPLED) for pair in meshes]
    *trained, a, b, c, d = on_ranks(4, asked)
    for shape, found in zip(([2, 2], [1, 4], [4, 1]), trained, strict=True):
        assert holds(found), found
        assert found["sent"] == formula(*shape, size=8)
    for found in (a, b, c, d):
        assert found["same"]
        assert found["difference"] <= 1e-10


@pytest.mark.parametrize(
    ("text", "started", "words"),
    [
        ("latent=3", 2, "3 ranks, but torchrun started 2 processes"),
        ("latent=2", 1, "torchrun --nproc-per-node 2"),
        ("", 2, "--mesh latent=2"),
        ("latent", 2, "write it as data=2,latent=4"),
        ("latent=0", 2, "write it as"),
        ("rows=2", 2, "write it as"),
    ],
)
def test_wrong_meshes_are_told_why(text, started, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(started))
    with pytest.raises(ValueError, match=words):
        check_shape(text, parse_mesh(text), "cpu")


def test_more_ranks_than_gpus_and_what_cannot_be_shared_out(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 ranks on a machine of 1 GPUs"):
        check_shape("latent=2", parse_mesh("latent=2"), "cuda")
    two = Mesh()
    two.latent = two.data = 2
    with pytest.raises(ValueError, match="must divide d_sae, which is 41"):
        two.latents(41)
    with pytest.raises(ValueError, match="must divide batch_size, which is 33"):
        two.rows(33)


TRAIN = ["-m", "prolu", "train", "--batch-size", "64", "--ctx", "32", "--coeff", "0.02", "--threads", "1"]


@pytest.fixture
def train(tiny_lm_folder, stories_file):
    source = ["--lm", str(tiny_lm_folder), "--data", str(stories_file), "--hook", "blocks.1.hook_resid_pre"]
    return [*TRAIN, *source, "--n-tokens", "3840", "--eval-tokens", "640", "--features", "none"]


@pytest.mark.slow
def test_the_command_gives_the_same_results_on_two_ranks(train, tmp_path):
    train += ["--d-sae", "40", "--resample-fractions", "0.5", "--resample-dead-below", "0.5"]
    results = []
    for n, mesh in ((1, []), (2, ["--mesh", "latent=2"]), (2, ["--mesh", "data=2"])):
        out = tmp_path / f"{n}{''.join(mesh)}"
        found = start(n, [*train, "--out", str(out), *mesh])
        assert [code for code, *_ in found] == [0] * n, found
        assert all(not text for _, *texts in found[1:] for text in texts)
        results.append(json.loads((out / "results.jsonl").read_text()))
    alone, *others = results
    assert alone["resampled"][0]["n_dead"] > 0
    for other in others:
        assert other["resampled"] == alone["resampled"]
        for name in ("mse", "l0", "degradation"):
            assert other[name] == pytest.approx(alone[name], rel=1e-3)


@pytest.mark.slow
def test_a_run_that_is_stopped_on_two_ranks_goes_on_in_one_process(train, tmp_path):
    train += ["--d-sae", "40", "--n-tokens", "64000"]
    assert [code for code, *_ in start(1, [*train, "--out", str(tmp_path / "whole")])] == [0]
    out = tmp_path / "stopped"
    ranks = launched(2, [*train, "--out", str(out), "--mesh", "latent=2", "--checkpoint-minutes", "0"])
    while not list(out.glob("checkpoints/step-*/checkpoint.json")):
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    assert [code for code, *_ in ended(ranks)] == [130, 0]
    assert not (out / "results.jsonl").exists()
    assert [code for code, *_ in start(1, [*train, "--out", str(out)])] == [0]
    whole, stopped = (json.loads((folder / "results.jsonl").read_text()) for folder in (tmp_path / "whole", out))
    assert "resumed" in (out / "log.jsonl").read_text()
    for name in ("mse", "l0", "degradation"):
        assert stopped[name] == pytest.approx(whole[name], rel=1e-2)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(train, tmp_path):
    out = tmp_path / "dead"
    train += ["--d-sae", "40", "--n-tokens", "1920000", "--checkpoint-minutes", "0", "--mesh", "latent=2"]
    ranks = launched(2, [*train, "--out", str(out)])
    while not list(out.glob("checkpoints/step-*/checkpoint.json")):
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)
    ranks[1].kill()
    (code, _, told), _ = ended(ranks)
    assert code == 1
    assert "another rank is gone" in told
    assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--d-sae", "41", "--mesh", "latent=2"], "must divide d_sae, which is 41"),
        (["--d-sae", "40", "--mesh", "latent=3"], "3 ranks"),
        (["--d-sae", "40", "--mesh", "latent=2", "--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_refusals_are_said_once_and_end_every_rank(args, words, train, tmp_path):
    out = tmp_path / "refused"
    (first, _, told), (second, *nothing) = start(2, [*train, "--out", str(out), *args])
    assert (first, second) == (2, 2)
    assert nothing == ["", ""]
    assert told.count("prolu:") == 1, told
    assert words in told
    assert not out.exists()
