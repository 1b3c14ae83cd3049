"""Studies are pooled only if they were scored with one model, at one hook, on the same tokens."""

import hashlib
import json

import numpy as np
import pytest

from prolu import ActivationStream, Results, RunConfig, load_blocks, run_sweep
from prolu.activations.harvesting import Harvest
from prolu.cli.entry_point import main
from prolu.evaluation.comparison.claims import compare_families
from prolu.evaluation.comparison.frontiers import family
from prolu.evaluation.comparison.points import points, summaries
from prolu.evaluation.comparison.styles import pareto_points
from prolu.evaluation.comparison.verdicts import matched
from prolu.report.writer import write_report
from prolu.studies.results import pool
from support.sweeps import sweep

RUNS = [
    RunConfig(nonlinearity=name, d_sae=40, n_tokens=1280, coeff=coeff, init_seed=seed)
    for name in ("relu", "prolu_ste")
    for coeff in (0.01, 0.04)
    for seed in (0, 1)
]


def stream_of(lm, blocks, **settings):
    return ActivationStream(lm, blocks, batch_size=64, window_tokens=2048, **settings)


@pytest.fixture(scope="module")
def first(tiny_lm, tiny_blocks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pooling") / "first"
    return sweep(RUNS, stream_of(tiny_lm, tiny_blocks, seed=1), folder)


def refused(capsys, *command):
    code = main([str(word) for word in command])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(said) == 1
    return said[0]


def other_text(tiny_lm, stories_file, tmp_path):
    """The stories in another order, with other documents left out, so that other tokens are scored."""
    stories = stories_file.read_text().split("<|endoftext|>")[::-1]
    (tmp_path / "other.txt").write_text("<|endoftext|>".join(stories[: len(stories) // 2]))
    return load_blocks(str(tmp_path / "other.txt"), tiny_lm.tokenizer, ctx=32)


def test_the_digest_is_of_the_tokens_that_are_scored(first, tiny_blocks):
    import torch

    from prolu.runtime.rng import keyed_generator

    n = 320 // tiny_blocks.ctx
    chosen = sorted(torch.randperm(len(tiny_blocks.held_out), generator=keyed_generator("held-out"))[:n].tolist())
    ids = [id for block in chosen for id in tiny_blocks.held_out[block].tolist()]
    by_hand = hashlib.sha256(f"({n}, {tiny_blocks.ctx})".encode() + np.array(ids, "<u4").tobytes()).hexdigest()
    assert first.config["held_out_digest"] == by_hand


@pytest.mark.parametrize("kind", ["text", "fewer tokens", "hook", "number format", "ctx", "model"])
def test_what_was_scored_on_something_else_is_refused(
    kind, first, tiny_lm, tiny_blocks, stories_file, tmp_path, capsys
):
    lm, blocks, n_tokens = tiny_lm, tiny_blocks, 320
    if kind == "text":
        blocks = other_text(tiny_lm, stories_file, tmp_path)
    if kind == "fewer tokens":
        n_tokens = 160
    if kind == "hook":
        lm = tiny_lm.at("blocks.2.hook_resid_pre")
    if kind == "ctx":
        blocks = load_blocks(str(stories_file), tiny_lm.tokenizer, ctx=16)
    other = sweep(RUNS[:1], stream_of(lm, blocks), tmp_path / "other", eval_tokens=n_tokens)
    if kind in ("number format", "model"):
        config = json.loads((other.folder / "config.json").read_text())
        config["stream"] |= {"lm_dtype": "bf16"} if kind == "number format" else {"lm_digest": "f" * 64}
        (other.folder / "config.json").write_text(json.dumps(config))
        other = Results.load(other.folder)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    fields = {"hook": "hook is", "number format": "lm_dtype", "ctx": "ctx is", "model": "lm_digest"}
    for pair in ([first, other], [other, first]):
        said = refused(capsys, "report", *(results.folder for results in pair), "--out", tmp_path / "both")
        assert fields.get(kind, "held_out_digest") in said
        for compare in (pool, lambda s: matched(s, "relu + l1", "prolu_ste + l1", 5), write_report):
            with pytest.raises(ValueError, match="cannot be compared"):
                compare(pair)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_with_a_split_for_evaluation_the_length_of_training_does_not_matter(tiny_lm, stories_file, tmp_path):
    rows = [{"text": story} for story in stories_file.read_text().split("<|endoftext|>") if story.strip()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for n_tokens in (2048, 20_480):
        blocks = load_blocks(
            str(tmp_path / "rows.jsonl"), tiny_lm.tokenizer, ctx=32, max_train_tokens=n_tokens,
            split="train[0:80%]", eval_split="train[80:100%]",
        )  # fmt: skip
        found.append(sweep(RUNS, stream_of(tiny_lm, blocks, seed=n_tokens), tmp_path / str(n_tokens)))
    assert found[0].config["stream"]["data_digest"] != found[1].config["stream"]["data_digest"]
    l0 = float(np.exp(np.mean([np.log(r["l0"]) for r in found[0].records])))
    verdict = matched(found, "prolu_ste + l1", "relu + l1", l0, unconverged=True)
    # The same documents have other numbers where more was read before them, and are resampled all the same.
    assert verdict.n_documents > 1
    assert "held-out documents" in verdict.covers


def test_an_sae_scored_like_a_study_is_compared_with_it(first, tiny_lm, stories_file, tmp_path, capsys):
    blocks = other_text(tiny_lm, stories_file, tmp_path)
    other = sweep(RUNS[:1], stream_of(tiny_lm, blocks), tmp_path / "other")
    assert "--like" in refused(capsys, "report", first.folder, other.folder)
    command = ["eval", str(other.runs[0].folder), "--like", str(first.folder), "--out", str(tmp_path / "scored")]
    assert main(command) == 0
    assert len(pool([first, Results.load(tmp_path / "scored")])) == len(RUNS) + 1


def test_hooks_of_one_sweep_are_shown_together_and_compared_apart(tiny_lm, tiny_blocks, tmp_path):
    hooks = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    shared = Harvest(tiny_lm, tiny_blocks, hooks)
    found = []
    for hook in hooks:
        stream = stream_of(tiny_lm.at(hook), tiny_blocks, source=shared)
        found.append(run_sweep(RUNS, stream, tmp_path / hook, eval_tokens=320, progress=False))
    with pytest.raises(ValueError, match=r"hook is 'blocks\.1\.hook_resid_pre' there"):
        pool(found)
    records = [r | {"converged": True} for r in pool(found, hooks_apart=True)]
    alone = [[r | {"converged": True} for r in results.records] for results in found]
    assert {family(r) for r in records} == {f"{h}: {f} + l1" for h in hooks for f in ("relu", "prolu_ste")}
    # Everything is what each hook by itself gives: families in numbers, frontiers, claims.
    assert [s.n_runs for s in summaries(records)[1]] == [4] * 4
    together = compare_families(found)
    for part in ("against_relu", "paper"):
        at_hooks = [
            (h, claim) for h, one in zip(hooks, found, strict=True) for claim in getattr(compare_families([one]), part)
        ]
        assert getattr(together, part) == [c._replace(statement=f"{hook}: {c.statement}") for hook, c in at_hooks]
    best = sorted((p.x, p.y) for p in pareto_points(points(records)))
    assert best == sorted((p.x, p.y) for some in alone for p in pareto_points(points(some)))
    drawn = write_report(found, tmp_path / "all", hooks_apart=True)
    assert {v.challenger for v in drawn.comparison.verdicts} == {f"{hook}: prolu_ste + l1" for hook in hooks}
    assert drawn.page.is_file()
