"""What is asked of a text, and what it has: recorded, said, and refused where the two are far apart."""

import json
import logging

import numpy as np
import pytest
from datasets import Dataset

from prolu import ActivationStream, RunConfig, load_blocks, run_sweep
from prolu.cli.entry_point import main
from support.sweeps import HOOK, contents, stream_over, sweep

CTX = 16


def ragged_rows(lengths, seed=0):
    """Rows of token ids of these lengths, in which neither 0 (BOS) nor a repeated id occurs."""
    g = np.random.default_rng(seed)
    return [g.permutation(np.arange(1, 290))[:n].tolist() for n in lengths]


def amounts(study):
    return json.loads((study / "config.json").read_text())["amounts"]


def refused(capsys, *command):
    assert main([str(word) for word in command]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    return said[0]


@pytest.fixture
def short_rows(tmp_path):
    """400 rows of 3 to 15 ids: none fills a block."""
    rows = ragged_rows(3 + np.arange(400) % 13)
    Dataset.from_dict({"input_ids": rows}).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet", rows


@pytest.fixture
def command(tiny_lm_folder, short_rows, tmp_path):
    file, _ = short_rows
    source = ["--lm", tiny_lm_folder, "--hook", HOOK, "--data", file, "--text-column", "input_ids", "--ctx", CTX]
    sizes = ["--d-sae", "24", "--batch-size", "64", "--window-tokens", "1024", "--latent-pages", "none"]
    return ["train", *source, *sizes, "--out", tmp_path / "study"]


def test_short_rows_are_used_in_full_and_the_amounts_are_recorded(command, short_rows, tmp_path, caplog):
    _, rows = short_rows
    wanted = ["--n-tokens", "6400", "--eval-tokens", "512"]
    with caplog.at_level(logging.WARNING, "prolu"):
        assert main([str(word) for word in [*command, *wanted]]) == 0
    found = amounts(tmp_path / "study")
    n_ids = sum(map(len, rows)) + len(rows)  # a BOS before each
    assert found["documents"] == 400
    assert found["train_tokens"] + found["held_out_tokens"] + found["tokens_dropped"] == n_ids
    assert found["tokens_dropped"] < 2 * CTX
    assert found["epochs"] == pytest.approx(6400 / (found["train_tokens"] - found["tokens_dropped_per_epoch"]))
    assert 1 < found["epochs"] < 2
    assert found["eval_tokens"] == min(512, found["held_out_tokens"]) < 512
    (record,) = [json.loads(line) for line in (tmp_path / "study" / "results.jsonl").read_text().splitlines()]
    assert record["eval_tokens"] == found["eval_tokens"]
    text = caplog.text
    assert f"the text has {found['train_tokens']:,} training tokens, so runs of 6,400 tokens see it 1." in text
    assert f"SAEs are scored on {found['eval_tokens']:,} held-out tokens, not on 512" in text


@pytest.mark.parametrize(
    ("asked", "flag", "allowed", "words"),
    [
        (["--n-tokens", "64000", "--eval-tokens", "320"], "--max-epochs", "20", "which would be seen 1"),
        (["--n-tokens", "1280", "--eval-tokens", "32768"], "--min-eval-fraction", "0.001", "has only"),
    ],
)
def test_what_is_short_by_orders_of_magnitude_needs_a_flag(command, tmp_path, capsys, asked, flag, allowed, words):
    said = refused(capsys, *command, *asked)
    assert words in said
    assert flag in said
    assert not (tmp_path / "study").exists()
    assert main([str(word) for word in [*command, *asked, flag, allowed]]) == 0
    before = contents(tmp_path / "study")
    # What was begun is never refused afterwards, without the flag either.
    assert main([str(word) for word in [*command, *asked]]) == 0
    assert contents(tmp_path / "study").keys() == before.keys()


@pytest.mark.parametrize("changed", [{"max_epochs": 0}, {"min_eval_fraction": 1.5}, {"min_eval_fraction": -0.1}])
def test_limits_without_a_meaning_are_refused(tiny_stream, tmp_path, changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        sweep([RunConfig(d_sae=24, n_tokens=1280)], tiny_stream, tmp_path / "study", **changed)


def test_from_python_too(tiny_lm, tiny_blocks, tmp_path):
    runs = [RunConfig(d_sae=24, n_tokens=1280)]
    with pytest.raises(ValueError, match=r"min_eval_fraction 0\.1"):
        run_sweep(runs, stream_over(tiny_lm, tiny_blocks), tmp_path / "a", progress=False)
    many = [*runs, RunConfig(d_sae=32, n_tokens=1_280_000)]
    with pytest.raises(ValueError, match=r"n_tokens 1280000: .* max_epochs 4"):
        sweep(many, stream_over(tiny_lm, tiny_blocks), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_extension_is_a_new_request_and_a_resumed_study_is_not(tiny_lm, tiny_blocks, tmp_path):
    def run(n_tokens):
        fixed = {"warmup_fraction": 0.0, "decay_start_fraction": 1.0, "decay_end_fraction": 2.0}
        return [RunConfig(d_sae=24, n_tokens=n_tokens, coeff_warmup_fraction=0.0, **fixed)]

    def again(n_tokens, **settings):
        return sweep(run(n_tokens), stream_over(tiny_lm, tiny_blocks), tmp_path / "a", keep_state=True, **settings)

    n_train = tiny_blocks.train.size
    again(5 * n_train, max_epochs=6)
    assert amounts(tmp_path / "a")["epochs"] > 4
    again(5 * n_train)
    with pytest.raises(ValueError, match="max_epochs 4"):
        again(8 * n_train)
    again(8 * n_train, max_epochs=9)
    assert amounts(tmp_path / "a")["epochs"] > 7


def test_a_study_without_amounts_is_read_resumed_and_not_refused(tiny_lm, tiny_blocks, tmp_path):
    runs = [RunConfig(d_sae=24, n_tokens=5 * tiny_blocks.train.size)]
    sweep(runs, stream_over(tiny_lm, tiny_blocks), tmp_path / "a", max_epochs=9, eval_tokens=32768, min_eval_fraction=0)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["amounts"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "results.jsonl").unlink()  # so that there is something left to do
    assert len(sweep(runs, stream_over(tiny_lm, tiny_blocks), tmp_path / "a", eval_tokens=32768).records) == 1


def test_a_stream_says_once_that_it_begins_anew(tiny_lm, tiny_blocks, caplog):
    stream = ActivationStream(tiny_lm, tiny_blocks, 64, window_tokens=2048)
    assert stream.epochs(64 * stream.batches_per_epoch) == 1.0
    with caplog.at_level(logging.WARNING, "prolu"):
        _ = stream[stream.batches_per_epoch - 1]
        assert not caplog.records
        for index in (0, 1, 2):
            _ = stream[stream.batches_per_epoch + index]
    (record,) = caplog.records
    assert "the text is read again" in record.getMessage()
    assert f"{tiny_blocks.train.size:,}" in record.getMessage()


def test_a_saved_sae_is_not_scored_on_a_tenth_of_what_was_asked(command, tmp_path, capsys):
    assert main([str(word) for word in [*command, "--n-tokens", "1280", "--eval-tokens", "320"]]) == 0
    (run,) = [path.parent for path in (tmp_path / "study").glob("*/sae.safetensors")]
    capsys.readouterr()
    said = refused(capsys, "eval", run, "--eval-tokens", "100000")
    assert "min_eval_fraction" in said
    assert main(["eval", str(run), "--eval-tokens", "100000", "--min-eval-fraction", "0"]) == 0
    assert main(["eval", str(run)]) == 0  # the usual number is a wish


def test_the_range_of_ids_is_not_the_number_of_entries(tiny_lm_folder, tmp_path):
    """A tokenizer of 301 entries, whose added token has the id 70,000."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads((tiny_lm_folder / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 70_000, "content": "<|far|>"})
    content["model"]["vocab"]["<|far|>"] = 70_000
    backend = Tokenizer.from_str(json.dumps(content))
    holes = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert len(holes) == 301
    rows = [[1, 2, 70_000, 3, *range(4, 16)] for _ in range(3)] + [[*range(100 + i, 116 + i)] for i in range(100)]
    blocks = load_blocks(Dataset.from_dict({"ids": rows}), holes, CTX, text_column="ids", held_out_pool=320)
    assert blocks.train.dtype == np.uint32
    assert 70_000 in blocks.train or 70_000 in blocks.held_out
    rows[0][0] = 70_001
    with pytest.raises(ValueError, match="the tokenizer has the ids 0-70000"):
        load_blocks(Dataset.from_dict({"ids": rows}), holes, CTX, text_column="ids")
