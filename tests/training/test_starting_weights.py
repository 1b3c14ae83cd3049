"""A run may start from a saved SAE: its weights to the bit, its function exactly, and named by its content."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prolu import SAE, RunConfig, SAEConfig, Trainer, grid
from prolu.cli.entry_point import main
from prolu.evaluation.comparison.frontiers import family
from prolu.sae.saved_sae import WEIGHTS_FILE
from prolu.studies.request import check_runs
from prolu.training.starting_weights import initial_weights, starting_weights
from support.commands import text_flags
from support.interruptions import dies_at_step
from support.steps import same
from support.sweeps import contents, sweep
from support.synthetic import sparse_activations

D_IN, D_SAE = 16, 40
NONLINEARITIES = [
    "relu",
    "prolu_relu",
    "prolu_ste",
    "gated",
    "jumprelu",
    "jumprelu_plain",
    "jumprelu_ste",
    "topk(4)",
    "batchtopk(4)",
]


def some_sae(nonlinearity="prolu_ste", normalisation="per_token", seed=0):
    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, nonlinearity=nonlinearity, normalisation=normalisation)
    weights = initial_weights(config, seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (weights.b_dec, *weights.own.values()):
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return SAE(config, weights)


def config_from(folder, nonlinearity="prolu_ste", **settings):
    penalty = "none" if "topk" in nonlinearity else "l1"
    settings = {"d_sae": D_SAE, "n_tokens": 640, "coeff": 0.03, "lr": 0.02, "penalty": penalty} | settings
    return RunConfig(nonlinearity=nonlinearity, init_from=str(folder), **settings)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_before_the_first_step_it_is_that_sae(tmp_path, nonlinearity):
    sae = some_sae(nonlinearity)
    sae.save(tmp_path)
    trainer = Trainer(config_from(tmp_path, nonlinearity, init_seed=5), D_IN, 32)
    assert same(trainer.sae().weights, sae.weights)
    assert not any(t.any() for t in trainer.state.moments.tensors())
    trainer.step(sparse_activations(32, D_IN, dtype=torch.float32))
    assert same(SAE.load(tmp_path).weights, sae.weights)  # a copy was trained


@pytest.mark.parametrize("nonlinearity", ["relu", "prolu_ste", "gated", "jumprelu", "jumprelu_plain"])
def test_norms_of_decoder_rows_move_into_the_encoder(tmp_path, nonlinearity):
    sae = some_sae(nonlinearity)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.2, 3, D_SAE)[:, None]
    sae.double().save(tmp_path)
    weights = starting_weights(config_from(tmp_path, nonlinearity), D_IN, torch.float64)
    torch.testing.assert_close(weights.decoder.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))
    other, x = SAE(sae.config, weights), 3 * torch.randn(200, D_IN, dtype=torch.float64)
    latents = sae.encode(x)
    assert 0.02 < (latents > 0).double().mean() < 0.98
    torch.testing.assert_close(other.encode(x), latents * sae.W_dec.norm(dim=1))
    torch.testing.assert_close(other(x), sae(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("nonlinearity", ["prolu_ste", "topk(4)"])
def test_another_number_format_is_converted(tmp_path, dtype, nonlinearity):
    some_sae(nonlinearity).to(dtype).save(tmp_path)
    weights = starting_weights(config_from(tmp_path, nonlinearity), D_IN)
    assert same(weights, SAE.load(tmp_path).weights.map(torch.Tensor.float))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_sae": 41}, "d_sae 41: the SAE in '.*' has 40"),
        ({"normalisation": "none"}, "normalisation 'none': the SAE in '.*' has 'per_token'"),
        ({"nonlinearity": "relu"}, "nonlinearity 'relu': the SAE in '.*' has 'prolu_ste'"),
        ({"init_digest": "0" * 64}, "SHA-256 of its weights is [0-9a-f]{64}, but init_digest is 0000"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, settings, words):
    some_sae().save(tmp_path)
    with pytest.raises(ValueError, match=words):
        Trainer(config_from(tmp_path, **settings), D_IN, 32)


def test_wrong_requests(tmp_path):
    with pytest.raises(ValueError, match=r"init_from .*: no such file; a saved SAE has"):
        config_from(tmp_path)
    some_sae().save(tmp_path)
    with pytest.raises(ValueError, match="takes activations of width 16, these have 8"):
        Trainer(config_from(tmp_path), 8, 32)
    with pytest.raises(ValueError, match=r"initial_bias -1\.0: must be 0 with init_from"):
        config_from(tmp_path, initial_bias=-1.0)
    with pytest.raises(ValueError, match="init_digest ab: must be None where init_from is None"):
        RunConfig(init_digest="ab")


@pytest.mark.parametrize(("nonlinearity", "factor", "words"), [("topk(4)", 2.0, "size"), ("relu", 0.0, "row 0 is 0")])
def test_rows_that_cannot_be_made_unit_are_refused(tmp_path, nonlinearity, factor, words):
    sae = some_sae(nonlinearity)
    with torch.no_grad():
        sae.W_dec[0] *= factor
    sae.save(tmp_path)
    with pytest.raises(ValueError, match=words):
        starting_weights(config_from(tmp_path, nonlinearity), D_IN)


def test_its_synthetic_gradient_may_change(tmp_path):
    sae = some_sae("prolu_relu")
    sae.save(tmp_path)
    for nonlinearity in ("prolu_ste", "prolu(0.5,1,0)"):
        assert same(starting_weights(config_from(tmp_path, nonlinearity), D_IN), sae.weights)


def test_a_run_is_named_by_what_it_starts_from(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("elsewhere", 0)):
        some_sae(seed=seed).save(tmp_path / name)
    a, b, again = (config_from(tmp_path / name) for name in ("a", "b", "elsewhere"))
    fresh = replace(a, init_from=None, init_digest=None)
    assert a.run_id == again.run_id == f"{fresh.run_id}-from{a.init_digest[:8]}"
    assert len({a.run_id, b.run_id, fresh.run_id}) == 3
    assert replace(a, coeff=0.04).init_digest == a.init_digest


@pytest.fixture(scope="module")
def saved_sae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    some_sae().save(folder)
    return folder


def base(saved_sae):
    resampled = {"resample_fractions": (0.5,), "resample_candidates": 320, "resample_dead_below": 0.01}
    return config_from(saved_sae, n_tokens=1280, **resampled)


def test_in_a_sweep_it_is_what_it_is_alone(saved_sae, tiny_stream, tmp_path):
    run = base(saved_sae)
    fresh = replace(run, init_from=None, init_digest=None)
    found = sweep([fresh, run, replace(run, nonlinearity="prolu_relu")], tiny_stream, tmp_path / "all")
    sweep([run], tiny_stream, tmp_path / "one")
    for name in (WEIGHTS_FILE, "config.json", "metrics.jsonl"):
        files = [tmp_path / study / run.run_id / name for study in ("all", "one")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert found.records[1]["init_digest"] == run.init_digest
    saved = json.loads((tmp_path / "one" / run.run_id / "config.json").read_text())
    assert saved["provenance"]["run"]["init_digest"] == run.init_digest


def test_killed_and_moved_it_goes_on_to_the_same_bits(saved_sae, tiny_stream, tmp_path):
    """The SAE lies elsewhere when the sweep goes on; that it is the same is what counts."""
    sweep([base(saved_sae)], tiny_stream, tmp_path / "whole", checkpoint_seconds=0.0)
    elsewhere = tmp_path / "elsewhere"
    SAE.load(saved_sae).save(elsewhere)
    dies_at_step(13, lambda: sweep([base(saved_sae)], tiny_stream, tmp_path / "killed", checkpoint_seconds=0.0))
    sweep([base(elsewhere)], tiny_stream, tmp_path / "killed", checkpoint_seconds=0.0)
    ends = [contents(tmp_path / study) for study in ("whole", "killed")]
    moved = {
        name: content.replace(str(elsewhere).encode(), str(saved_sae).encode()) for name, content in ends[1].items()
    }
    assert moved == ends[0]


def test_another_sae_is_another_study(saved_sae, tiny_stream, tmp_path):
    sweep([base(saved_sae)], tiny_stream, tmp_path / "study")
    some_sae(seed=1).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds another study: runs\.0\.init_digest"):
        sweep([base(tmp_path / "other")], tiny_stream, tmp_path / "study")


def test_a_study_from_before_there_was_such_a_field_is_kept(tiny_stream, tmp_path):
    run = RunConfig(d_sae=D_SAE, n_tokens=640)
    sweep([run], tiny_stream, tmp_path / "study")
    file = tmp_path / "study" / "config.json"
    study = json.loads(file.read_text())
    for name in ("init_from", "init_digest"):
        del study["runs"][0][name]
    file.write_text(json.dumps(study))
    written = (tmp_path / "study" / run.run_id / WEIGHTS_FILE).stat().st_mtime_ns
    sweep([run], tiny_stream, tmp_path / "study")
    assert (tmp_path / "study" / run.run_id / WEIGHTS_FILE).stat().st_mtime_ns == written


def test_a_misfit_writes_nothing(saved_sae, tiny_stream, tmp_path):
    for runs in (grid(base(saved_sae), d_sae=[D_SAE, 24]), [replace(base(saved_sae), init_digest="0" * 64)]):
        with pytest.raises(ValueError, match=r"the SAE in|init_digest is"):
            sweep(runs, tiny_stream, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_the_command_line_takes_it(saved_sae, tiny_lm_folder, stories_file, tmp_path, capsys):
    size = {"n_tokens": 640, "batch_size": 64, "eval_tokens": 320, "latent_pages": "none", "threads": 2}
    command = ["train", *text_flags(tiny_lm_folder, stories_file, init_from=saved_sae, **size)]
    assert main([*command, "--out", str(tmp_path / "wrong")]) == 2
    assert "d_sae 12288: the SAE in" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
    assert main([*command, "--d-sae", str(D_SAE), "--out", str(tmp_path / "study")]) == 0
    run = RunConfig(d_sae=D_SAE, n_tokens=640, init_from=str(saved_sae))
    written = json.loads((tmp_path / "study" / run.run_id / "config.json").read_text())
    assert written["provenance"]["run"] | run.describe() == written["provenance"]["run"] | {"resample_fractions": ()}
    assert math.isfinite(written["provenance"]["run"]["d_in"])


def test_seeds_that_would_give_the_same_bits_are_refused(saved_sae, tiny_stream, tmp_path):
    alone = config_from(saved_sae)
    with pytest.raises(ValueError, match="init_seed 0 and 1: with init_from and without resampling"):
        sweep(grid(alone, coeff=[1e-3, 2e-3], init_seed=[0, 1]), tiny_stream, tmp_path / "study")
    assert not (tmp_path / "study").exists()
    check_runs(grid(base(saved_sae), init_seed=[0, 1]), batch_size=64)
    check_runs(grid(alone, coeff=[1e-3, 2e-3], init_seed=[5]), batch_size=64)


def test_a_fine_tuned_run_is_a_family_of_its_own(saved_sae):
    fresh, tuned = RunConfig(d_sae=D_SAE), config_from(saved_sae)
    assert tuned.family == f"{fresh.family}, fine-tuned"
    assert [family(run.describe()) for run in (fresh, tuned)] == [fresh.family, tuned.family]


def test_a_path_is_taken_as_its_text(tmp_path):
    some_sae().save(tmp_path)
    for path in (tmp_path, Path(os.path.relpath(tmp_path))):
        assert RunConfig(init_from=path, d_sae=D_SAE) == RunConfig(init_from=str(path), d_sae=D_SAE)
