"""Studies with a mask: resumed to the bit, at several hooks, from a store, in groups, said wherever they are shown."""

import json

import pytest

from prolu import ActivationStream, RunConfig, TokenMask, run_sweeps
from prolu.cli.entry_point import main
from prolu.sae.saved_sae import read_provenance
from support.commands import text_flags
from support.interruptions import dies_at_step
from support.sweeps import HOOK, contents, sweep

MASK = TokenMask(exclude_special_tokens=True, exclude_positions=2, max_norm_multiple=1.2)
RUNS = [
    RunConfig(nonlinearity=name, d_sae=32, n_tokens=64 * 40, lr=5e-3, resample_fractions=(0.5,), coeff=0.01)
    for name in ("relu", "prolu_ste")
]


def stream_of(lm, blocks, mask=MASK, **more):
    return ActivationStream(lm, blocks, 64, 3, 2048, mask=mask, **more)


@pytest.fixture(scope="module")
def wanted(tiny_lm, tiny_blocks, tmp_path_factory):
    out = tmp_path_factory.mktemp("masked") / "a"
    sweep(RUNS, stream_of(tiny_lm, tiny_blocks), out)
    return out


@pytest.mark.parametrize("step", [7, 21])
def test_a_sweep_that_died_goes_on_to_the_same_bits(wanted, tiny_lm, tiny_blocks, tmp_path, step):
    def work():
        sweep(RUNS, stream_of(tiny_lm, tiny_blocks), tmp_path / "a", checkpoint_seconds=0.0)

    dies_at_step(step, work)
    work()
    assert contents(tmp_path / "a") == contents(wanted)


def test_the_mask_is_recorded_and_another_one_is_another_study(wanted, tiny_lm, tiny_blocks):
    config = json.loads((wanted / "config.json").read_text())
    assert TokenMask.recorded(config["stream"]).exclude_special_tokens
    assert config["stream"]["max_norm"] > 0
    n_trained = config["amounts"]["train_tokens"] - config["amounts"]["tokens_left_out"]
    assert n_trained == (tiny_blocks.train[:, 2:] != 0).sum()
    provenance = read_provenance(wanted / RUNS[0].run_id)
    assert TokenMask.recorded(provenance) == TokenMask.recorded(config["stream"])
    record = json.loads((wanted / "results.jsonl").read_text().splitlines()[0])
    assert record["eval_tokens"] < 320
    before = contents(wanted)
    with pytest.raises(ValueError, match=r"stream.exclude_positions is 2 there, None here"):
        sweep(RUNS, stream_of(tiny_lm, tiny_blocks, TokenMask(exclude_special_tokens=True)), wanted)
    assert contents(wanted) == before


def test_several_hooks_have_thresholds_of_their_own(wanted, tiny_lm, tiny_blocks, tmp_path):
    hooks = (HOOK, "blocks.2.hook_resid_pre")
    streams = [stream_of(tiny_lm.at(hook), tiny_blocks) for hook in hooks]
    run_sweeps(RUNS[:1], streams, tmp_path, eval_tokens=320, progress=False)
    first, second = (json.loads((tmp_path / hook / "config.json").read_text())["stream"]["max_norm"] for hook in hooks)
    assert first != second
    name = f"{RUNS[0].run_id}/sae.safetensors"
    assert contents(tmp_path / HOOK)[name] == contents(wanted)[name]


def test_commands_train_score_and_tell(tiny_lm_folder, stories_file, tmp_path, capsys):
    out = tmp_path / "a"
    trained = [
        *text_flags(tiny_lm_folder, stories_file, out=out, d_sae=32, n_tokens=2560, batch_size=64, window_tokens=2048),
        *("--lr", "5e-3", "--coeff", "0.01", "--eval-tokens", "320", "--threads", "1", "--latent-pages", "none"),
        *("--exclude-special-tokens", "--exclude-positions", "2", "--max-norm-multiple", "1.2"),
    ]
    assert main(["train", *trained]) == 0
    (run,) = (p.parent for p in out.glob("*/sae.safetensors"))
    record = json.loads((out / "results.jsonl").read_text())
    page = (out / "report.html").read_text()
    assert "Left out of training and scores: special tokens, the first 2 positions of every block, activations" in page
    capsys.readouterr()
    assert main(["eval", str(run), "--json", "--eval-tokens", "320"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == {name: record[name] for name in scores}
    assert main(["eval", str(run), "--json", "--eval-tokens", "320", "--exclude-positions", "9"]) == 0
    assert json.loads(capsys.readouterr().out)["l0"] != record["l0"]
    assert main(["eval", str(run), "--like", str(out), "--exclude-positions", "9"]) == 2
    assert "the study sets exclude_positions itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--exclude-positions", "32"],
            "leaves out the first 32 positions of every block, and so all training",
        ),
        (["--max-norm-multiple", "0.3"], "max_norm_multiple 0.3: must be 1 or more"),
        (["--max-norm", "1e-9"], "so all held-out tokens; leave less out"),
        (["--activations", "synthetic:easy", "--exclude-positions", "1"], "exclude_positions: not with --activations"),
    ],
)
def test_bad_masks_end_with_one_sentence_and_nothing_written(
    flags, words, tiny_lm_folder, stories_file, tmp_path, capsys
):
    out = tmp_path / "a"
    asked = text_flags(tiny_lm_folder, stories_file, out=out, d_sae=32, n_tokens=2560, batch_size=64)
    assert main(["train", *asked, "--threads", "1", "--eval-tokens", "320", *flags]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.strip().count("\n") == 0
    assert not out.exists()
