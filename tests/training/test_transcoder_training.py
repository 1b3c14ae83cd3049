"""A transcoder in a trainer: it learns its map, is resumed to the bit, resampled, stacked, and checked."""

import pytest
import torch

from prolu import RunConfig, Trainer
from prolu.training.moments import Moments
from prolu.training.resampling import Resampler, Resampling
from prolu.training.trainer_stack import TrainerStack
from support.steps import same
from support.synthetic import sparse_activations
from support.transcoders import targets_of, transcoder_weights

FAMILIES = ["relu", "prolu_relu", "prolu_ste", "gated", "jumprelu", "topk(4)", "batchtopk(4)"]


def batch_of(seed, d_in=16, d_out=9):
    """A batch of sparse x, and y, which is a fixed map of x through a ReLU."""
    x = sparse_activations(64, d_in, seed=seed, dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(d_in, 30, generator=g) / d_in**0.5, torch.randn(30, d_out, generator=g) / 30**0.5
    return x, torch.relu(x @ first) @ second


def trainer_of(nonlinearity="relu", *, n_steps=60, skip=False, **settings):
    coeff = {} if "topk" in nonlinearity else {"coeff": 1e-3}
    config = RunConfig(
        nonlinearity=nonlinearity, d_sae=64, n_tokens=64 * n_steps, lr=1e-2, skip=skip, **coeff, **settings
    )
    return Trainer(config, 16, 64, d_out=9)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("nonlinearity", FAMILIES)
def test_it_learns_the_map(nonlinearity, skip):
    trainer = trainer_of(nonlinearity, n_steps=150, skip=skip)
    losses = [float(trainer.step(*batch_of(n)).stats.mse) for n in range(150)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert trainer.sae()(torch.randn(3, 16)).shape == (3, 9)
    x, y = batch_of(200)
    out = trainer.sae().reconstruct_normalised(trainer.sae().encode_normalised(x), x)
    assert (y - out).square().mean() < 2 * losses[-1]
    assert trainer.describe()["d_out"] == 9


@pytest.mark.parametrize("step", ["auto", "dense", "sparse", "sparse_torch"])
def test_resumed_it_ends_with_the_same_bits(step):
    whole, first, second = (trainer_of(skip=True, step=step, n_steps=20) for _ in range(3))
    for n in range(20):
        whole.step(*batch_of(n))
    for n in range(8):
        first.step(*batch_of(n))
    second.restore_({k: t.clone() for k, t in first.whole_state().items()}, first.state.counters())
    for n in range(8, 20):
        second.step(*batch_of(n))
    assert same(whole.state.weights, second.state.weights)
    assert {"weights.b_out", "weights.skip", "first.skip", "second.b_out"} <= whole.whole_state().keys()


def test_stacked_it_is_trained_as_alone():
    alone = [trainer_of(skip=True, init_seed=seed, n_steps=12) for seed in range(3)]
    members = [trainer_of(skip=True, init_seed=seed, n_steps=12) for seed in range(3)]
    stack = TrainerStack(members)
    for n in range(12):
        stack.step(*batch_of(n))
        for trainer in alone:
            trainer.step(*batch_of(n))
    for ours, theirs in zip(members, alone, strict=True):
        for a, b in zip(ours.state.weights.tensors(), theirs.state.weights.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    with pytest.raises(ValueError, match="may differ in"):
        TrainerStack([trainer_of(skip=True), trainer_of(skip=False)])


def test_a_target_l0_is_reached():
    trainer = trainer_of("prolu_relu", n_steps=1500, target_l0=6.0)
    for n in range(1500):
        report = trainer.step(*batch_of(n))
    assert float(report.n_active) / 64 == pytest.approx(6, rel=0.2)


def test_resampled_latents_read_the_input_and_write_the_target():
    weights = transcoder_weights("relu", 12, 40, 17, skip=True)
    moments = Moments.zeros_like(weights)
    for tensor in moments.tensors():
        tensor.fill_(1.0)
    dead = torch.zeros(40).bool()
    dead[[3, 20]] = True
    x, y = sparse_activations(50, 12), targets_of(50, 17)
    # The error of one row is far larger than all others, and that of another one has no direction to write.
    y[7] *= 1e6
    y[9] = 0

    def reconstruct(rows):
        out = torch.zeros(len(rows), 17, dtype=rows.dtype)
        out[(rows == x[9]).all(1)] = 1e9
        return out

    config = Resampling(n_candidates=50, encoder_norm=0.2, exponent=2)
    resampler = Resampler(config, dead, reconstruct, torch.Generator().manual_seed(0))
    for start in range(0, 50, 25):
        resampler.offer(x[start : start + 25], torch.ones(25), y[start : start + 25])
    before = weights.map(torch.clone)
    assert resampler.finish_(weights, moments, {"b_enc": 0.0}).n_reborn == 2
    norm = before.encoder[~dead].norm(dim=1).mean()
    drawn = [int(torch.nn.functional.cosine_similarity(x, weights.encoder[j][None]).argmax()) for j in (3, 20)]
    assert 7 in drawn
    assert 9 not in drawn
    for j, row in zip((3, 20), drawn, strict=True):
        torch.testing.assert_close(weights.encoder[j], 0.2 * norm * x[row] / x[row].norm())
        torch.testing.assert_close(weights.decoder[j], y[row] / y[row].norm())
    for name in ("b_out", "skip", "b_dec"):
        assert torch.equal(weights.shared()[name], before.shared()[name])
    assert torch.equal(weights.encoder[~dead], before.encoder[~dead])


def test_its_starting_weights_may_be_those_of_a_saved_transcoder(tmp_path):
    trainer = trainer_of(skip=True, n_steps=5)
    for n in range(5):
        trainer.step(*batch_of(n))
    trainer.sae().save(tmp_path)
    again = trainer_of(skip=True, init_from=str(tmp_path))
    assert same(again.state.weights, trainer.state.weights)
    with pytest.raises(ValueError, match="is a skip transcoder into activations of width 9, and the run trains a tr"):
        trainer_of(skip=False, init_from=str(tmp_path))
    with pytest.raises(ValueError, match="and the run trains an SAE"):
        Trainer(RunConfig(nonlinearity="relu", d_sae=64, n_tokens=64, init_from=str(tmp_path)), 16, 64)


def test_what_does_not_fit_is_refused():
    trainer = trainer_of()
    x, y = batch_of(0)
    with pytest.raises(ValueError, match="a transcoder needs one"):
        trainer.step(x)
    with pytest.raises(ValueError, match="target has 60 rows"):
        trainer.checked(x, y[:60])
    with pytest.raises(ValueError, match=r"must be \[batch, d_out\] with d_out = 9"):
        trainer.step(x, x)
    with pytest.raises(ValueError, match=r"target are torch\.float64"):
        trainer.step(x, y.double())
    sae = Trainer(RunConfig(d_sae=64, n_tokens=640), 16, 64)
    with pytest.raises(ValueError, match="only a transcoder"):
        sae.step(x, x)
    with pytest.raises(ValueError, match="only a transcoder"):
        Trainer(RunConfig(d_sae=64, n_tokens=640, skip=True), 16, 64)


def test_a_run_without_a_skip_is_recorded_as_before():
    plain, skip = RunConfig(), RunConfig(skip=True)
    assert "skip" not in plain.describe()
    assert skip.describe()["skip"] is True
    assert skip.run_id == f"{plain.run_id}-skip"
