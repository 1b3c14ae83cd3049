"""What is scored does not depend on how much is trained on, and studies from before that are scored as they were."""

import json
from itertools import chain

import numpy as np
import pytest
from datasets import Dataset

from prolu import HeldOut, Results, RunConfig, load_blocks
from prolu.activations.documents import is_held_out
from prolu.cli.entry_point import main
from prolu.evaluation.held_out import choose_blocks
from prolu.studies import request
from prolu.studies.results import pool
from support.sweeps import HOOK, contents, stream_over, sweep

CTX = 16
EVAL_TOKENS = 64
POOL = 8 * EVAL_TOKENS
WORDS = ["Lily", "had", "a", "red", "ball", "Tom", "saw", "it", "in", "the", "tree", "and", "it", "went", "up"]


def texts(n=3000):
    """Short documents, so that a batch of 64 of them is a small part of the text."""
    return [f"{i} " + " ".join(WORDS[(3 * i + j * (1 + i % 7)) % len(WORDS)] for j in range(9)) for i in range(n)]


def as_text(folder, tokenizer):
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return ["--data", folder / "text.jsonl"]


def as_saved_splits(folder, tokenizer):
    Dataset.from_dict({"text": texts()}).save_to_disk(str(folder / "saved"))
    return ["--data", folder / "saved", "--eval-split", "train[80%:]", "--split", "train[:80%]"]


def as_rows(folder, tokenizer, whole=False):
    ids = [tokenizer(text)["input_ids"] for text in texts()]
    if whole:
        ids = [list(chain(*ids[i : i + 4]))[: 16 if i % 3 else 32] for i in range(len(ids) - 4)]
    Dataset.from_dict({"input_ids": ids}).to_parquet(folder / "rows.parquet")
    return ["--data", folder / "rows.parquet", "--text-column", "input_ids"]


def as_whole_rows(folder, tokenizer):
    return as_rows(folder, tokenizer, whole=True)


@pytest.fixture
def train(tiny_lm_folder, tmp_path):
    """A function that trains a study of one SAE into a folder of that name, and returns it."""

    def run(name, data, n_tokens, *flags):
        model = ["--lm", tiny_lm_folder, "--hook", HOOK, "--ctx", CTX, "--window-tokens", "1024"]
        sizes = ["--d-sae", "24", "--batch-size", "64", "--n-tokens", n_tokens, "--eval-tokens", EVAL_TOKENS]
        command = ["train", *model, *data, *sizes, "--latent-pages", "none", "--out", tmp_path / name, *flags]
        assert main([str(word) for word in command]) == 0
        return Results.load(tmp_path / name)

    return run


@pytest.mark.parametrize("form", [as_text, as_saved_splits, as_rows, as_whole_rows])
def test_studies_of_any_length_are_scored_on_the_same_tokens(form, train, tiny_lm, tmp_path):
    data = form(tmp_path, tiny_lm.tokenizer)
    lengths = {"short": 640, "longer": 12_800, "all": 96_000}
    studies = [train(name, data, n) for name, n in lengths.items()]
    facts = [study.config for study in studies]
    assert len({config["held_out_digest"] for config in facts}) == 1
    assert {config["stream"]["held_out_pool"] for config in facts} == {POOL}
    sizes = [config["amounts"]["train_tokens"] for config in facts]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < lengths["all"]  # all there is
    held_out = [config["amounts"]["held_out_tokens"] for config in facts]
    assert held_out[0] >= POOL
    if form is not as_saved_splits:
        assert held_out[-1] > 2 * POOL
    assert len(pool(studies)) == 3
    # And by a command: the SAE of one has its own score on the text of another.
    run = studies[0].runs[0]
    command = ["eval", str(run.folder), "--like", str(studies[2].folder), "--out", str(tmp_path / "like")]
    assert main(command) == 0
    (record,) = Results.load(tmp_path / "like").records
    for name in ("l0", "mse", "ce_clean", "degradation"):
        assert record[name] == pytest.approx(run.record[name], rel=1e-5, abs=1e-6)


def test_the_pool_is_the_first_held_out_tokens_of_the_text(tiny_lm):
    tokenizer = tiny_lm.tokenizer
    held_out = [text for text in texts() if is_held_out(text)]
    ids = [id for text in held_out for id in [0, *tokenizer(text)["input_ids"]]]
    few = load_blocks(texts(), tokenizer, CTX, max_train_tokens=100, held_out_pool=POOL - 5)
    assert len(few.held_out) * CTX >= POOL
    everything = load_blocks(texts(), tokenizer, CTX, held_out_pool=POOL - 5)
    for blocks in (few, everything):
        wanted = np.array(ids[: blocks.held_out.size]).reshape(-1, CTX)
        assert np.array_equal(blocks.held_out[:, 1:], wanted[:, 1:])
        chosen = choose_blocks(blocks, EVAL_TOKENS)
        assert chosen.max() < POOL / CTX
        assert np.array_equal(chosen, choose_blocks(few, EVAL_TOKENS))
        # Fewer tokens are a subset of more, also of more than the pool.
        for n_tokens in (POOL - 5, POOL, POOL + 1, 2 * POOL):
            more = choose_blocks(blocks, n_tokens)
            assert set(chosen) <= set(more)
            assert len(more) == min(-(-n_tokens // CTX), len(blocks.held_out))
    assert np.array_equal(choose_blocks(everything, 3 * POOL), np.arange(3 * POOL // CTX))


def test_what_is_trained_on_does_not_depend_on_the_pool(tiny_lm):
    request_ = {"ctx": CTX, "max_train_tokens": 5000}
    blocks = [load_blocks(texts(), tiny_lm.tokenizer, held_out_pool=p, **request_) for p in (1, 3 * POOL, 9 * POOL)]
    assert len({len(some.held_out) for some in blocks}) == 3
    for some in blocks[1:]:
        assert np.array_equal(some.train, blocks[0].train)


def test_more_is_scored_than_the_pool_where_more_is_asked_for(train, tiny_lm, tmp_path, capsys):
    study = train("a", as_text(tmp_path, tiny_lm.tokenizer), 640)
    capsys.readouterr()
    assert main(["eval", str(study.runs[0].folder), "--eval-tokens", str(2 * POOL), "--out", str(tmp_path / "b")]) == 0
    (record,) = Results.load(tmp_path / "b").records
    assert record["eval_tokens"] == 2 * POOL


def test_pages_of_latents_need_the_pool_only(train, tiny_lm, tmp_path, monkeypatch):
    study = train("a", as_text(tmp_path, tiny_lm.tokenizer), 64_000)
    from prolu.report.latents import pages

    found = []
    plain = pages.open_source
    monkeypatch.setattr(pages, "open_source", lambda *args, **kw: found.append(plain(*args, **kw)) or found[-1])
    flags = ["--latent-pages", "all", "--examples", "2"]
    assert main(["report", str(study.folder), "--latent-tokens", str(POOL), *flags]) == 0
    assert main(["report", str(study.folder), "--latent-tokens", str(POOL + 1), *flags]) == 0
    (_, few), (_, everything) = found
    assert len(few.train) < len(everything.train) / 10
    for n_tokens in (EVAL_TOKENS, POOL):
        chosen = choose_blocks(few, n_tokens)
        assert np.array_equal(chosen, choose_blocks(everything, n_tokens))
        assert np.array_equal(few.held_out[chosen], everything.held_out[chosen])


def forget(folder, *names):
    """Take fields out of the configs of a study and of its runs, as if an earlier version had written them."""
    for file in [folder / "config.json", *folder.glob("*/config.json")]:
        config = json.loads(file.read_text())
        for part in (config, config.get("stream", {}), config.get("provenance", {})):
            for name in names:
                part.pop(name, None)
        file.write_text(json.dumps(config))


def test_a_study_of_an_earlier_version_is_resumed_and_scored_as_it_was(train, tiny_lm, tmp_path, monkeypatch, capsys):
    data = as_text(tmp_path, tiny_lm.tokenizer)
    new = train("new", data, 12_800)
    with monkeypatch.context() as patch:
        patch.setattr(request, "POOL_PER_SCORED_TOKEN", 0)
        old = train("old", data, 12_800)
    assert old.config["held_out_digest"] != new.config["held_out_digest"]
    forget(old.folder, "held_out_pool", "held_out_fraction", "amounts")
    before = contents(old.folder)
    train("old", data, 12_800)
    (old.folder / "results.jsonl").unlink()
    train("old", data, 12_800)
    after = contents(old.folder)
    run_id = old.records[0]["run_id"]
    for name in ("results.jsonl", "config.json", f"{run_id}/sae.safetensors", f"{run_id}/documents.safetensors"):
        assert after[name] == before[name], name
    capsys.readouterr()
    forget(old.folder, "held_out_pool", "held_out_fraction")
    assert main(["eval", str(old.folder / run_id), "--eval-tokens", str(EVAL_TOKENS), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["l0"] == pytest.approx(old.records[0]["l0"], rel=1e-6)
    assert scored["ce_recon"] == pytest.approx(old.records[0]["ce_recon"], abs=1e-6)


def test_from_python_an_earlier_study_is_resumed_with_its_own_rule_only(tiny_lm, tmp_path):
    runs = [RunConfig(d_sae=24, n_tokens=640)]

    def blocks(held_out_pool, **settings):
        return load_blocks(texts(), tiny_lm.tokenizer, 32, held_out_pool=held_out_pool, **settings)

    for name, settings in (("part", {"max_train_tokens": 3000}), ("all", {})):
        sweep(runs, stream_over(tiny_lm, blocks(0, **settings)), tmp_path / name)
        forget(tmp_path / name, "held_out_pool", "held_out_fraction", "amounts")
        with pytest.raises(ValueError, match="held_out_pool=0"):
            sweep(runs, stream_over(tiny_lm, blocks(POOL, **settings)), tmp_path / name)
        sweep(runs, stream_over(tiny_lm, blocks(0, **settings)), tmp_path / name)


def test_a_fraction_of_documents_is_recorded_and_read_again(tiny_lm, tmp_path):
    blocks = load_blocks(
        texts(), tiny_lm.tokenizer, 32, held_out_fraction=0.5, held_out_pool=POOL, folder=tmp_path / "b"
    )
    assert blocks.held_out_fraction == 0.5
    assert 0.8 < len(blocks.held_out) / len(blocks.train) < 1.25
    study = sweep([RunConfig(d_sae=24, n_tokens=640)], stream_over(tiny_lm, blocks), tmp_path / "a")
    assert study.config["stream"]["held_out_fraction"] == 0.5
    assert HeldOut(tiny_lm, blocks, 320).n_tokens == 320
