"""Runs that are trained in one step together: their numbers, their resume, and a failure among them."""

import json
from dataclasses import replace

import pytest

from prolu import RunConfig
from prolu.training import trainer_stack
from prolu.training.trainer_stack import stacks_pay
from support.interruptions import dies_at_step
from support.sweeps import contents, stream_over, sweep

RELU = RunConfig(
    nonlinearity="relu", d_sae=40, n_tokens=2560, coeff=0.03, lr=0.02, step="stacked",
    resample_fractions=(0.5,), resample_candidates=320, resample_dead_below=0.01,
)  # fmt: skip
TOPK = RunConfig(nonlinearity="topk(5)", d_sae=40, n_tokens=2560, lr=0.01, step="stacked", aux_dead_tokens=300)
RUNS = [RELU, TOPK, replace(RELU, init_seed=1), replace(TOPK, init_seed=1, lr=0.02), replace(RELU, coeff=0.01)]


@pytest.fixture(scope="module")
def whole(tiny_lm, tiny_blocks, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "a"
    sweep(RUNS, stream_over(tiny_lm, tiny_blocks), out, checkpoint_seconds=1e9)
    return out


@pytest.mark.parametrize("step", [1, 21, 39])
def test_a_stack_that_died_goes_on_to_the_same_bits(whole, tiny_stream, tmp_path, step):
    dies_at_step(step, lambda: sweep(RUNS, tiny_stream, tmp_path / "a", checkpoint_seconds=0.0))
    sweep(RUNS, tiny_stream, tmp_path / "a", checkpoint_seconds=0.0)
    assert contents(tmp_path / "a") == contents(whole)


def test_its_runs_are_those_of_dense_steps_and_say_with_whom_they_were_trained(whole, tiny_stream, tmp_path):
    dense = sweep([replace(run, step="dense") for run in RUNS], tiny_stream, tmp_path / "a").records
    stacked = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    for ours, theirs in zip(stacked, dense, strict=True):
        assert ours["run_id"] == theirs["run_id"]
        assert ours["l0"] == pytest.approx(theirs["l0"], rel=0.02)
        assert ours["mse"] == pytest.approx(theirs["mse"], rel=0.02)
    relus = [run.run_id for run in RUNS if run.nonlinearity == "relu"]
    for run in RUNS:
        recorded = json.loads((whole / run.run_id / "config.json").read_text())["provenance"]["run"]["stack"]
        assert recorded == (relus if run.nonlinearity == "relu" else [r.run_id for r in RUNS if r.run_id not in relus])


def test_a_run_that_fails_leaves_the_others_of_its_stack_alone(whole, tiny_stream, tmp_path):
    broken = replace(RELU, init_seed=1, lr=1e30)
    others = [run for run in RUNS if run != RUNS[2]]
    results = sweep([RELU, TOPK, broken, *others[2:]], tiny_stream, tmp_path / "a")
    assert list(results.failures) == [broken.run_id]
    lines = {json.loads(line)["run_id"]: line for line in (whole / "results.jsonl").read_text().splitlines()}
    found = {json.loads(line)["run_id"]: line for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines()}
    # To the bit: the stack has the same size, and the one that failed stays in it.
    assert found == {run.run_id: lines[run.run_id] for run in others}


def test_whether_a_stack_pays_is_looked_up_at_the_nearest_shape(tmp_path, monkeypatch):
    table = tmp_path / "speedups.json"
    table.write_text(json.dumps([
        {"device": "cuda", "d_in": 64, "d_sae": 1024, "speedup": 20.0},
        {"device": "cuda", "d_in": 768, "d_sae": 12288, "speedup": 1.0},
    ]))  # fmt: skip
    monkeypatch.setattr(trainer_stack, "SPEEDUPS", table)
    assert stacks_pay("cuda", 128, 1024)
    assert not stacks_pay("cuda", 768, 16384)
    assert not stacks_pay("cpu", 64, 1024)
