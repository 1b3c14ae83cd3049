"""Studies of transcoders: two hooks of one pass, resumed to the bit, scored in the model, stored, from commands."""

import json
import math

import pytest
import torch

from prolu import SAE, ActivationStream, HeldOut, RunConfig, evaluate, grid, harvest, run_sweep, run_sweeps, splice
from prolu.cli.entry_point import main
from prolu.evaluation.held_out import choose_blocks
from prolu.studies.results import Results
from support.commands import text_flags
from support.interruptions import dies_at_step
from support.sweeps import contents, sweep

READ = "transformer.h.1.mlp.c_fc.output"
"""A hook of width 64: wider than what is written, which is 16."""
WRITE = "blocks.1.hook_mlp_out"
BASE = RunConfig(
    d_sae=40, n_tokens=2560, coeff=0.03, lr=0.02, skip=True,
    resample_fractions=(0.5,), resample_candidates=320, resample_dead_below=0.01,
)  # fmt: skip
RUNS = [
    *grid(BASE, nonlinearity=["relu", "prolu_ste", "gated"], step=["dense"]),
    *grid(BASE, nonlinearity=["jumprelu"], step=["sparse"], skip=[False]),
    RunConfig(nonlinearity="topk(4)", d_sae=40, n_tokens=2560, normalisation="none", step="sparse_torch"),
]


def stream_of(lm, blocks, **settings):
    return ActivationStream(
        lm.at(READ), blocks, **({"batch_size": 64, "seed": 3, "window_tokens": 2048, "hook_out": WRITE} | settings)
    )


def held_out_of(lm, blocks):
    return HeldOut(lm.at(READ), blocks, 320, hook_out=WRITE)


@pytest.fixture(scope="module")
def wanted(tiny_lm, tiny_blocks, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "a"
    sweep(RUNS, stream_of(tiny_lm, tiny_blocks), out, checkpoint_seconds=1e9)
    return out


def raw_rows(lm, blocks, stream, index):
    """The activations of a batch at both hooks, found by their inputs among those of all blocks."""
    everywhere = [lm.at(hook).activations(blocks.train).flatten(0, 1) for hook in (READ, WRITE)]
    batch = stream[index]
    scaled = everywhere[0] * (8 / everywhere[0].norm(dim=1, keepdim=True))
    rows = torch.cdist(batch.acts.double(), scaled.double()).argmin(1)
    return batch, [side[rows] for side in everywhere]


@pytest.mark.parametrize("index", [0, 31, 40, 200])
def test_a_batch_has_both_activations_of_the_same_tokens(tiny_lm, tiny_blocks, index):
    stream = stream_of(tiny_lm, tiny_blocks)
    batch, (x, y) = raw_rows(tiny_lm, tiny_blocks, stream, index)
    torch.testing.assert_close(batch.target, y, rtol=1e-4, atol=1e-4)
    acts, target = batch.scaled("none")
    torch.testing.assert_close(acts, x, rtol=1e-4, atol=1e-4)
    assert torch.equal(target, batch.target)
    acts, target = batch.scaled("per_token")
    factor = math.sqrt(64) / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(acts, x * factor, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target, y * factor, rtol=1e-4, atol=1e-4)
    # The inputs are those of a stream without targets, and jumping gives what reading in order gives.
    alone = ActivationStream(tiny_lm.at(READ), tiny_blocks, batch_size=64, seed=3, window_tokens=2048)
    assert torch.equal(alone[index].acts, batch.acts)
    assert alone[index].scaled("per_token")[1] is None
    assert torch.equal(stream_of(tiny_lm, tiny_blocks)[index].target, batch.target)


def test_zeros_are_scaled_to_zeros(tiny_lm, tiny_blocks):
    batch = stream_of(tiny_lm, tiny_blocks)[0]
    batch.acts[0] = 0
    batch.raw_norm[0] = 0
    for normalisation in ("per_token", "none"):
        acts, target = batch.scaled(normalisation)
        assert not acts[0].any()
        assert target.isfinite().all()
    assert not batch.scaled("per_token")[1][0].any()


def test_fresh_activations_have_their_targets(tiny_lm, tiny_blocks):
    stream = stream_of(tiny_lm, tiny_blocks)
    both = list(stream.fresh(600, "x"))
    alone = list(ActivationStream(tiny_lm.at(WRITE), tiny_blocks, batch_size=64, seed=3).fresh(600, "x"))
    for batch, other in zip(both, alone, strict=True):
        assert batch.acts.shape[1] == 64
        torch.testing.assert_close(batch.target, other.acts * other.raw_norm[:, None] / 4, rtol=1e-5, atol=1e-5)


def test_one_pass_serves_both_hooks(tiny_lm, tiny_blocks, monkeypatch):
    n_passes = []
    read = type(tiny_lm).activations_at

    def counted(self, hooks, tokens):
        n_passes.append(tuple(hooks))
        return read(self, hooks, tokens)

    monkeypatch.setattr(type(tiny_lm), "activations_at", counted)
    stream = stream_of(tiny_lm, tiny_blocks)
    for index in range(stream.batches_per_epoch):
        _ = stream[index]
    per_pass = max(1, tiny_lm.batch_tokens // tiny_blocks.ctx)
    windows = -(-len(tiny_blocks.train) * tiny_blocks.ctx // stream.window_tokens)
    assert len(n_passes) <= windows * -(-(stream.window_tokens // tiny_blocks.ctx) // per_pass)
    assert set(n_passes) == {(READ, WRITE)}


@pytest.mark.parametrize("step", [7, 20, 21])
def test_a_sweep_that_died_goes_on_to_the_same_bits(wanted, tiny_lm, tiny_blocks, tmp_path, step):
    def work():
        sweep(RUNS, stream_of(tiny_lm, tiny_blocks), tmp_path / "a", checkpoint_seconds=0.0)

    dies_at_step(step, work)
    work()
    assert contents(tmp_path / "a") == contents(wanted)


def test_a_run_in_a_sweep_is_the_run_alone(wanted, tiny_lm, tiny_blocks, tmp_path):
    sweep(RUNS[1:2], stream_of(tiny_lm, tiny_blocks), tmp_path / "a")
    name = f"{RUNS[1].run_id}/sae.safetensors"
    assert contents(tmp_path / "a")[name] == contents(wanted)[name]


def test_scores_are_those_of_the_model_with_the_transcoder_in_it(wanted, tiny_lm, tiny_blocks):
    """Once more by hand: the transcoder runs inside the model's forward pass."""
    tokens = torch.from_numpy(tiny_blocks.held_out[choose_blocks(tiny_blocks, 320)].astype("int64"))
    x, y = (tiny_lm.at(hook).activations(tokens) for hook in (READ, WRITE))

    def ce():
        logits = tiny_lm.model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()

    with torch.no_grad():
        clean = ce()
        for record in Results.load(wanted).records:
            sae = SAE.load(wanted / record["run_id"])
            assert (sae.hook, sae.hook_out, sae.d_out) == (READ, WRITE, 16)
            with splice(tiny_lm.model, sae, READ, hook_out=WRITE):
                spliced = ce()
            assert record["degradation"] == pytest.approx(spliced - clean, abs=2e-5)
            y_hat = sae(x)
            fvu = (y - y_hat).square().sum() / (y - y.flatten(0, 1).mean(0)).square().sum()
            assert record["fvu_raw"] == pytest.approx(fvu.item(), rel=1e-4)
            c = 8 / x.norm(dim=-1, keepdim=True) if sae.config.normalisation == "per_token" else 1.0
            assert record["mse"] == pytest.approx((c * (y - y_hat)).square().mean().item(), rel=1e-4)
            assert record["l0"] == pytest.approx((sae.encode(x) > 0).sum(-1).float().mean().item())
            with splice(tiny_lm.model, sae, READ, hook_out=WRITE, keep_error=True):
                assert ce() == pytest.approx(clean, abs=1e-5)
            assert record["encoder_decoder_cosine"] is None or math.isnan(record["encoder_decoder_cosine"])
            found = evaluate(sae, held_out_of(tiny_lm, tiny_blocks))
            assert found["degradation"] == record["degradation"]
    config = json.loads((wanted / "config.json").read_text())
    assert (config["stream"]["hook"], config["stream"]["hook_out"]) == (READ, WRITE)
    families = {r["run_id"]: r.get("skip") for r in Results.load(wanted).records}
    assert sum(value is True for value in families.values()) == 3


def test_training_brings_the_error_down(tiny_lm, tiny_blocks, tmp_path):
    runs = [
        RunConfig(nonlinearity="topk(8)", d_sae=64, n_tokens=n, lr=0.01, skip=skip, normalisation=normalisation)
        for n in (640, 64_000)
        for skip in (False, True)
        for normalisation in ("per_token", "none")
    ]
    by_length = {}
    for n in (640, 64_000):
        for normalisation in ("per_token", "none"):
            some = [run for run in runs if (run.n_tokens, run.normalisation) == (n, normalisation)]
            out = tmp_path / f"{n}{normalisation}"
            for record in sweep(some, stream_of(tiny_lm, tiny_blocks), out, max_epochs=1e9).records:
                by_length[n, normalisation, bool(record.get("skip"))] = record["fvu_raw"]
    for normalisation in ("per_token", "none"):
        for skip in (False, True):
            assert by_length[64_000, normalisation, skip] < 0.6 * by_length[640, normalisation, skip]
            assert by_length[64_000, normalisation, skip] < 0.5


def test_a_store_of_both_hooks_gives_the_same_bits(wanted, tiny_lm, tiny_blocks, tmp_path):
    store = harvest(tiny_lm, tiny_blocks, tmp_path / "store", hooks=[READ, WRITE], dtype="fp32", progress=False)
    sweep(RUNS, stream_of(tiny_lm, tiny_blocks, source=store), tmp_path / "a")
    assert contents(tmp_path / "a") == contents(wanted)
    with pytest.raises(ValueError, match=r"hook 'blocks\.2\.hook_mlp_out': the store"):
        stream_of(tiny_lm, tiny_blocks, source=store, hook_out="blocks.2.hook_mlp_out")


def test_transcoders_at_several_hooks(tiny_lm, tiny_blocks, tmp_path):
    from prolu import Harvest

    hooks = {"blocks.1.hook_resid_pre": WRITE, READ: WRITE, WRITE: "blocks.2.hook_resid_post"}
    every = Harvest(tiny_lm, tiny_blocks, tuple(dict.fromkeys([*hooks, *hooks.values()])))
    streams = [
        ActivationStream(tiny_lm.at(a), tiny_blocks, 64, 3, 2048, source=every, hook_out=b) for a, b in hooks.items()
    ]
    found = run_sweeps(RUNS[:1], streams, tmp_path / "all", eval_tokens=320, progress=False)
    assert list(found) == list(hooks)
    alone = sweep(RUNS[:1], stream_of(tiny_lm, tiny_blocks), tmp_path / "alone").folder
    assert contents(alone) == contents(tmp_path / "all" / READ)


def test_what_does_not_fit_is_refused(tiny_lm, tiny_blocks, tiny_stream, wanted, tmp_path):
    with pytest.raises(ValueError, match="only a transcoder has a skip connection; name the hook_out"):
        run_sweep(RUNS[:1], tiny_stream, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="is the hook itself"):
        stream_of(tiny_lm, tiny_blocks, hook_out=READ)
    with pytest.raises(ValueError, match=r"hook 'blocks\.9\.hook_mlp_out': this model has blocks 0-2"):
        stream_of(tiny_lm, tiny_blocks, hook_out="blocks.9.hook_mlp_out")
    with pytest.raises(ValueError, match=r"holds another study: stream\.hook_out"):
        sweep(RUNS, stream_of(tiny_lm, tiny_blocks, hook_out="blocks.2.hook_mlp_out"), wanted)
    transcoder = SAE.load(wanted / RUNS[0].run_id)
    with pytest.raises(ValueError, match="a transcoder needs a hook_out"):
        evaluate(transcoder, HeldOut(tiny_lm.at(READ), tiny_blocks, 320))
    with (
        pytest.raises(ValueError, match="hook_out '': a transcoder needs one"),
        splice(tiny_lm.model, transcoder, READ),
    ):
        pass
    for format in ("dictionary_learning",):
        assert main(["export", str(wanted / RUNS[0].run_id), "--format", format, "--out", str(tmp_path / "e")]) == 2
    assert not (tmp_path / "e").exists()


def test_from_the_command_line(tiny_lm_folder, stories_file, tmp_path, capsys):
    hooks = ["--hook", READ, "--hook-out", WRITE]
    flags = [*text_flags(tiny_lm_folder, stories_file), "--eval-tokens", "640", *hooks]
    run = ["--nonlinearity", "topk", "--target-l0", "4", "--d-sae", "40", "--n-tokens", "2560", "--batch-size", "64"]
    command = ["train", *flags, *run, "--skip", "--out", str(tmp_path / "a")]
    assert main(command) == 0
    (record,) = Results.load(tmp_path / "a").records
    assert record["skip"] is True
    assert (tmp_path / "a" / record["run_id"] / "features" / "index.html").is_file()
    page = (tmp_path / "a" / "report.html").read_text()
    assert f"at {READ}, written at {WRITE}" in page
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "a" / record["run_id"]), "--eval-tokens", "640", "--json"]) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["degradation"] == record["degradation"]
    # Beside a study of SAEs on what it replaces, on that study's tokens.
    flags_of_saes = text_flags(tiny_lm_folder, stories_file, hook=WRITE, eval_tokens=640)
    assert main(["train", *flags_of_saes, *run, "--out", str(tmp_path / "sae"), "--latent-pages", "none"]) == 0
    capsys.readouterr()
    beside = ["eval", str(tmp_path / "a" / record["run_id"]), "--like", str(tmp_path / "sae"), "--json"]
    assert main(beside) == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["degradation"] == record["degradation"]
    assert main(["train", *flags, "--hook-out", WRITE, WRITE, *run, "--out", str(tmp_path / "b")]) == 2
    assert "name one for each hook" in capsys.readouterr().err
    without = text_flags(tiny_lm_folder, stories_file, hook=READ, eval_tokens=640)
    assert main(["train", *without, *run, "--skip", "--out", str(tmp_path / "b")]) == 2
    assert "name the hook_out" in capsys.readouterr().err
    sae = next((tmp_path / "sae").glob("topk*"))
    assert main(["eval", str(sae), "--hook-out", WRITE]) == 2
    assert "is no transcoder" in capsys.readouterr().err


def test_a_named_study_of_transcoders(tiny_lm_folder, stories_file, tmp_path, capsys):
    flags = text_flags(tiny_lm_folder, stories_file, hook=READ, hook_out=WRITE, eval_tokens=640)
    small = ["--scale", "0.002", "--batch-size", "64", "--d-sae", "24", "--target-l0", "4", "--latent-pages", "none"]
    command = ["sweep", "demo", *flags, *small, "--skip", "--out", str(tmp_path / "a")]
    assert main(command) == 0
    records = Results.load(tmp_path / "a").records
    assert len(records) >= 3
    assert all(record["skip"] and record["run_id"].endswith("-skip") for record in records)
    summary = capsys.readouterr().out
    assert f"to {WRITE}" in summary
    assert ", skip" in (tmp_path / "a" / "report.html").read_text()
