"""Random baselines: what is frozen stays, to the bit, in every kind of step; all else is trained as the loss says."""

from dataclasses import replace

import pytest
import torch

from prolu import RunConfig, Trainer
from prolu.evaluation.comparison.frontiers import family
from prolu.sae.scaling import normalise
from prolu.training.frozen_parts import LEAST_COSINE, FrozenParts
from prolu.training.steps.cuda import CudaStep
from prolu.training.trainer_stack import TrainerStack, stack_key
from support.steps import random_weights, relative
from support.synthetic import sparse_activations

D_IN, BATCH, STEPS = 13, 30, 40
BASE = RunConfig(
    d_sae=37, n_tokens=STEPS * BATCH, lr=2e-2, coeff=0.01, nonlinearity="relu", penalty="l1", step="dense",
    resample_fractions=(0.5,), resample_dead_below=0.45, resample_count_fraction=0.4, resample_candidates=200,
)  # fmt: skip
STEP_KINDS = ["dense", "sparse", "sparse_torch", "stacked", "gpu"]
FAMILIES = [("relu", "l1"), ("prolu_ste", "sqrt_l1"), ("gated", "l1"), ("jumprelu", "l0"), ("topk(5)", "none")]


def batch(seed):
    return normalise(sparse_activations(BATCH, D_IN, seed=seed))[0]


def trainer_of(config, step_kind):
    config = replace(config, step="dense" if step_kind == "gpu" else step_kind)
    trainer = Trainer(config, D_IN, BATCH, dtype=torch.float64)
    if step_kind == "gpu":
        # The GPU's equations, which run on a CPU too.
        trainer.steps = {"dense": CudaStep(trainer.state.weights, BATCH)}
    return trainer


def train(trainer, step_kind, steps=range(STEPS)):
    step = TrainerStack([trainer]).step if step_kind == "stacked" else trainer.step
    n_reborn = 0
    for n in steps:
        if trainer.resamples_now:
            resampler = trainer.resampler()
            fresh = batch(1000)
            resampler.offer(fresh, fresh.norm(dim=1))
            n_reborn += trainer.resample_(resampler).n_reborn
        step(batch(n))
    return n_reborn


def cosines(weights, start):
    return (weights.decoder * start.decoder).sum(1)


@pytest.mark.parametrize("step_kind", STEP_KINDS)
@pytest.mark.parametrize(("nonlinearity", "penalty"), FAMILIES)
@pytest.mark.parametrize(("frozen", "trained"), [("decoder", "encoder"), ("encoder", "decoder")])
def test_a_frozen_matrix_stays_to_the_bit_and_all_else_moves(frozen, trained, nonlinearity, penalty, step_kind):
    config = replace(BASE, nonlinearity=nonlinearity, penalty=penalty, freeze=frozen, aux_dead_tokens=100)
    trainer = trainer_of(config, step_kind)
    start = trainer.state.weights.map(torch.clone).named()
    assert train(trainer, step_kind) > 0
    for name, tensor in trainer.state.weights.named().items():
        if name == frozen:
            assert torch.equal(tensor, start[name])
        elif name == trained:
            assert (tensor != start[name]).any(1).all()
        else:
            assert not torch.equal(tensor, start[name]), name


@pytest.mark.parametrize("step_kind", STEP_KINDS)
def test_rows_of_a_soft_frozen_decoder_stay_near_their_start(step_kind):
    free = trainer_of(BASE, step_kind)
    soft = trainer_of(replace(BASE, freeze="soft_decoder"), step_kind)
    start = soft.state.weights.map(torch.clone)
    for trainer in (free, soft):
        assert train(trainer, step_kind) > 0
    assert cosines(free.state.weights, start).min() < 0.5
    found = cosines(soft.state.weights, start)
    assert found.min() > LEAST_COSINE - 1e-12
    assert (found < LEAST_COSINE + 1e-12).sum() >= 5  # they would have gone further
    assert (found > LEAST_COSINE + 1e-3).sum() >= 5
    torch.testing.assert_close(soft.state.weights.decoder.norm(dim=1), torch.ones(37, dtype=torch.float64))


def test_a_row_is_brought_back_to_the_nearest_one_that_is_allowed():
    start, found = random_weights(6, 200), random_weights(6, 200).map(torch.clone)
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[0] = -start.decoder[0]
    rows[1] = start.decoder[1]
    found.decoder.copy_(rows / rows.norm(dim=1, keepdim=True))
    before = found.decoder.clone()
    FrozenParts("soft_decoder", start).hold_(found)
    assert torch.equal(found.decoder[0], start.decoder[0])
    inside = cosines(found.map(lambda t: t), start) > LEAST_COSINE + 1e-9
    assert torch.equal(found.decoder[inside][1:], before[inside][1:])
    # No unit vector of a dense sample of the cone is nearer.
    others = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    others /= others.norm(dim=1, keepdim=True)
    for row in range(2, 40):
        allowed = others[others @ start.decoder[row] >= LEAST_COSINE]
        assert len(allowed) > 50
        assert (allowed @ before[row]).max() <= found.decoder[row] @ before[row] + 1e-12


@pytest.mark.parametrize("step_kind", STEP_KINDS[:4])
def test_the_rest_is_trained_as_by_autograd_with_a_constant_decoder(step_kind):
    """Several updates of Adam from the plain loss, with the clip over what is trained only."""
    limit = 0.05
    config = replace(BASE, freeze="decoder", resample_fractions=(), max_grad_norm=limit, warmup_fraction=0.0)
    trainer = trainer_of(config, step_kind)
    theirs = trainer.state.weights.map(lambda t: t.clone().requires_grad_())
    trained = [theirs.encoder, theirs.b_dec, theirs.own["b_enc"]]
    adam = torch.optim.Adam(trained, lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
    step = TrainerStack([trainer]).step if step_kind == "stacked" else trainer.step
    for n in range(20):
        x = batch(n)
        f = torch.relu((x - theirs.b_dec) @ theirs.encoder.T + theirs.own["b_enc"])
        recon = f @ theirs.decoder.detach() + theirs.b_dec
        adam.zero_grad()
        ((x - recon).square().mean() + config.coeff * f.sum(1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained, limit)
        adam.step()
        step(x)
    for ours, expected in zip(trainer.state.weights.tensors(), theirs.tensors(), strict=True):
        assert relative(ours, expected.detach()) < 1e-5  # the clip of torch adds 1e-6 to the norm


@pytest.mark.parametrize("freeze", ["decoder", "encoder", "soft_decoder"])
def test_a_resumed_run_is_held_where_it_began(freeze):
    config = replace(BASE, freeze=freeze)
    whole = trainer_of(config, "sparse")
    train(whole, "sparse")
    first = trainer_of(config, "sparse")
    train(first, "sparse", range(25))
    second = trainer_of(config, "sparse")
    second.restore_({name: t.clone() for name, t in first.whole_state().items()}, first.state.counters())
    train(second, "sparse", range(25, STEPS))
    for ours, expected in zip(second.state.tensors().values(), whole.state.tensors().values(), strict=True):
        assert torch.equal(ours, expected)


def test_only_runs_with_the_same_frozen_part_are_stacked():
    kinds = {stack_key(Trainer(replace(BASE, freeze=f), D_IN, BATCH)) for f in ("none", "decoder", "soft_decoder")}
    assert len(kinds) == 3


def test_it_is_part_of_the_name_and_of_the_record_only_where_it_is_used():
    plain = replace(BASE, coeff=0.01)
    assert plain.run_id == "relu-l1-0.01-lr0.02-d37-s0"
    assert plain.family == "relu + l1"
    assert "freeze" not in plain.describe()
    named = {
        "decoder": "relu + l1, frozen decoder",
        "encoder": "relu + l1, frozen encoder",
        "soft_decoder": "relu + l1, soft-frozen decoder",
    }
    for freeze, name in named.items():
        run = replace(plain, freeze=freeze)
        assert run.family == name
        assert family(run.describe()) == name
        assert run.run_id == f"{plain.run_id}-frozen_{freeze}"
        assert run.describe()["freeze"] == freeze
        assert RunConfig.recorded(run.describe()).describe() == run.describe()
    assert RunConfig.recorded(plain.describe()).freeze == "none"
    assert family(plain.describe() | {"freeze": "both"}) == "relu + l1, both frozen"
