"""One sweep at several hooks: each hook's study is the one-hook study to the bit, and the model runs once for all."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest

from prolu import ActivationStore, ActivationStream, Harvest, LanguageModel, RunConfig, grid, harvest, run_sweeps
from prolu import run_sweep as run_one
from prolu.cli.entry_point import main
from prolu.studies.checkpoints import read_checkpoint
from prolu.studies.recipe import Recipe
from prolu.studies.recipes import BUILTIN, RECIPES
from prolu.studies.sweep import SweepFailedError
from support.commands import text_flags
from support.interruptions import PowerCutError, before_disk_operations, dies_at_step
from support.sweeps import contents

HOOKS = ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "transformer.h.0.mlp.c_fc.output")
"""The last one's width is four times that of the others."""

BASE = RunConfig(
    d_sae=40, n_tokens=2560, coeff=0.03, lr=0.02,
    resample_fractions=(0.5,), resample_candidates=640, resample_dead_below=0.01,
)  # fmt: skip
SETTINGS = {"eval_tokens": 320, "progress": False}
WINDOW = 1024


def runs_at(d_in):
    """Other runs at another width."""
    base = replace(BASE, d_sae=40 + d_in, n_tokens=2560 if d_in == 16 else 1920)
    return grid(base, nonlinearity=["relu", "prolu_ste"])


@pytest.fixture(scope="module")
def lm(many_passes_lm):
    return many_passes_lm


@pytest.fixture
def streams(lm, tiny_blocks):
    shared = Harvest(lm, tiny_blocks, HOOKS)
    return [ActivationStream(lm.at(hook), tiny_blocks, 64, 3, WINDOW, source=shared) for hook in HOOKS]


@pytest.fixture(scope="module")
def wanted(lm, tiny_blocks, tmp_path_factory):
    """What a sweep at each hook alone gives."""
    out = tmp_path_factory.mktemp("alone")
    for hook in HOOKS:
        stream = ActivationStream(lm.at(hook), tiny_blocks, 64, 3, WINDOW)
        results = run_one(runs_at(stream.d_in), stream, out / hook, **SETTINGS)
        assert any(entry["n_reborn"] for record in results.records for entry in record["resampled"])
    return contents(out)


def test_each_hooks_study_is_the_study_at_that_hook_alone(wanted, streams, tmp_path):
    results = run_sweeps(runs_at, streams, tmp_path / "a", **SETTINGS)
    assert contents(tmp_path / "a") == wanted
    assert list(results) == list(HOOKS)
    assert [len(found.records) for found in results.values()] == [2, 2, 2]
    run_sweeps(runs_at, streams[:2], tmp_path / "a", **SETTINGS)  # some again: nothing to do
    assert contents(tmp_path / "a") == wanted


def test_every_window_and_every_candidate_is_harvested_once_for_all_hooks(streams, tmp_path, monkeypatch):
    asked = []
    plain = LanguageModel.activations_at
    monkeypatch.setattr(LanguageModel, "activations_at", lambda *a: asked.append(a[1]) or plain(*a))
    run_sweeps(runs_at, streams, tmp_path / "a", **SETTINGS)
    shared = [hooks for hooks in asked if hooks == HOOKS]
    # windows: 2,560 of 1,024 tokens; candidates: 640, once at step 20 for two hooks and once at 15 for the third
    assert len(shared) == 3 * WINDOW // 256 + 2 * -(-640 // 256)
    # each hook's held-out text: 320 tokens, read at that hook alone
    assert [hooks for hooks in asked if hooks != HOOKS] == [[hook] for hook in HOOKS for _ in range(2)]


def test_from_one_store(wanted, lm, tiny_blocks, tmp_path):
    store = harvest(lm, tiny_blocks, tmp_path / "s", hooks=HOOKS, dtype="fp32", shard_tokens=1024, progress=False)
    streams = [ActivationStream(lm.at(hook), tiny_blocks, 64, 3, WINDOW, source=store) for hook in store.hooks]
    run_sweeps(runs_at, streams, tmp_path / "a", **SETTINGS)
    assert contents(tmp_path / "a") == wanted
    assert ActivationStore(tmp_path / "s").verify() == []


def die_at(operation, hook, step):
    """Before that operation of that hook's checkpoint of that step."""
    seen = {"checkpoints": 0, "operations": -1}

    def observe(name, path):
        seen["checkpoints"] += name == "unlink" and path.name == ".partial" and hook in path.parts
        seen["operations"] += seen["checkpoints"] >= step
        if seen["operations"] == operation:
            raise PowerCutError

    return observe


@pytest.mark.parametrize(  # 16 and 21: some hooks have just resampled
    ("hook", "operation", "step"), [(0, 7, 3), (1, 0, 3), (1, 4, 16), (2, 0, 2), (2, 0, 21), (2, 8, 3)]
)
def test_a_sweep_that_dies_within_or_between_the_hooks_checkpoints_goes_on(
    wanted, streams, tmp_path, hook, operation, step
):
    with before_disk_operations(die_at(operation, HOOKS[hook], step)), pytest.raises(PowerCutError):
        run_sweeps(runs_at, streams, tmp_path / "a", checkpoint_seconds=0.0, **SETTINGS)
    steps = [read_checkpoint(tmp_path / "a" / name).step for name in HOOKS]
    assert steps == sorted(steps, reverse=True)
    assert operation > 0 or steps == [step] * hook + [step - 1] * (3 - hook)
    run_sweeps(runs_at, streams, tmp_path / "a", **SETTINGS)
    assert contents(tmp_path / "a") == wanted


def test_a_hook_that_lost_its_checkpoints_starts_anew_beside_the_others(wanted, streams, tmp_path):
    dies_at_step(30, lambda: run_sweeps(runs_at, streams, tmp_path / "a", checkpoint_seconds=0.0, **SETTINGS))
    shutil.rmtree(tmp_path / "a" / HOOKS[1] / "checkpoints")
    run_sweeps(runs_at, streams, tmp_path / "a", **SETTINGS)
    assert contents(tmp_path / "a") == wanted


def test_a_signal_saves_at_every_hook(wanted, streams, tmp_path):
    def interrupt(name, path):
        if name == "rename" and path.name == "step-000000000007" and HOOKS[1] in path.parts:
            os.kill(os.getpid(), signal.SIGTERM)

    with before_disk_operations(interrupt), pytest.raises(KeyboardInterrupt):
        run_sweeps(runs_at, streams, tmp_path / "a", checkpoint_seconds=0.0, **SETTINGS)
    assert [read_checkpoint(tmp_path / "a" / hook).step for hook in HOOKS] == [8, 8, 8]
    run_sweeps(runs_at, streams, tmp_path / "a", **SETTINGS)
    assert contents(tmp_path / "a") == wanted


def test_a_run_that_fails_takes_nothing_with_it(wanted, streams, tmp_path):
    def runs(d_in):
        return [*runs_at(d_in), replace(runs_at(d_in)[0], lr=1e38, coeff=1e30)]

    results = run_sweeps(runs, streams, tmp_path / "a", **SETTINGS)
    found = contents(tmp_path / "a")
    for hook in HOOKS:
        assert list(results[hook].failures) == [runs(16 if "c_fc" not in hook else 64)[2].run_id]
    for name, content in wanted.items():
        if not name.endswith(("config.json", "results.jsonl")) or "/" in name.partition("/")[2]:
            assert found[name] == content


def test_a_hook_at_which_all_fails_is_left_out(streams, tmp_path):
    bad = replace(BASE, lr=1e38, coeff=1e30)
    results = run_sweeps(lambda d_in: [bad if d_in == 64 else BASE], streams, tmp_path / "a", **SETTINGS)
    assert list(results) == list(HOOKS[:2])
    with pytest.raises(SweepFailedError, match="every run failed; the first: the loss is not finite"):
        run_sweeps([bad], streams, tmp_path / "b", **SETTINGS)


def test_wrong_requests_write_nothing(streams, lm, tiny_blocks, tmp_path):
    other = ActivationStream(lm.at(HOOKS[1]), tiny_blocks, 64, 4, WINDOW)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    run_one([BASE], streams[0], tmp_path / "one", **SETTINGS)
    before = contents(tmp_path)
    for runs, some, out, words in (
        ([BASE], [], "a", "no streams"),
        ([], streams, "a", "no runs"),
        ([BASE, BASE], streams, "a", "listed twice"),
        ([BASE], [streams[0], streams[0]], "a", "hooks .* one is listed twice"),
        ([BASE], [streams[0], other], "a", "streams at several hooks: seed is 3 and 4"),
        (lambda d_in: [replace(BASE, n_tokens=63 if d_in == 64 else 640)], streams, "a", "fewer than one batch"),
        ([BASE], streams, "mine", "not empty, and holds no studies"),
        ([BASE], streams, "mine/thesis.txt", "is a file"),
        ([BASE], streams, "one", "holds a study at one hook"),
    ):
        with pytest.raises(ValueError, match=words):
            run_sweeps(runs, some, tmp_path / out, **SETTINGS)
    assert contents(tmp_path) == before


@pytest.fixture
def command(tiny_lm_folder, stories_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "demo", Recipe(runs_at, batch_size=64, n_tokens=2560, source=BUILTIN))
    size = {"eval_tokens": 320, "batch_size": 64}
    return ["sweep", "demo", *text_flags(tiny_lm_folder, stories_file, hook=HOOKS[:2], **size, out="a")]


def test_from_the_command_line(command, tmp_path, capsys):
    assert main([*command, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["hooks"] == list(HOOKS[:2])
    assert (said["estimate"]["n_hooks"], said["estimate"]["n_runs"], len(said["runs"])) == (2, 4, 2)
    assert main([*command, "--dry-run"]) == 0
    assert "2 runs at each of 2 hooks" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main(command) == 0
    said = capsys.readouterr().out
    for hook in HOOKS[:2]:
        assert f"a/{hook}: 2 SAEs" in said
        assert (tmp_path / "a" / hook / "report.html").exists()
    assert (tmp_path / "a/report.html").exists()
    assert main(command) == 0  # again: nothing to do but the reports
    for wrong, words in (
        ([*command, "--out", f"a/{HOOKS[0]}"], "holds a study at one hook"),
        ([*command, "--hook", HOOKS[0]], "not empty, and not a study"),
        ([*command, "--hook", HOOKS[0], HOOKS[0], "--out", "b"], "one is listed twice"),
        ([*command, "--hook", HOOKS[0], "blocks.9.hook_resid_pre", "--out", "b"], "this model has blocks 0-2"),
    ):
        capsys.readouterr()
        assert main(wrong) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "b").exists()
