"""A stack of trainers against each of them alone."""

from dataclasses import replace

import pytest
import torch

from prolu import RunConfig, Trainer
from prolu.sae.scaling import normalise
from prolu.training.trainer_stack import TrainerStack, stack_key
from support.steps import relative
from support.synthetic import sparse_activations

BASE = RunConfig(d_sae=60, n_tokens=60 * 32, lr=3e-3, coeff=0.02, step="dense")
KINDS = {
    "relu": replace(BASE, nonlinearity="relu"),
    "prolu": replace(BASE, nonlinearity="prolu_ste", coeff_warmup_fraction=0.5, max_grad_norm=0.01),
    "target": replace(BASE, nonlinearity="prolu_relu", target_l0=6.0, coeff_warmup_fraction=0.2),
    "gated": replace(BASE, nonlinearity="gated", beta1=0.0),
    "jumprelu": replace(BASE, nonlinearity="jumprelu"),
    "jumprelu_ste": replace(BASE, nonlinearity="jumprelu_ste", aux_dead_tokens=200),
    "jumprelu_plain": replace(BASE, nonlinearity="jumprelu_plain(0.5)"),
    "topk": replace(BASE, nonlinearity="topk(4)", aux_dead_tokens=200),
    "batchtopk": replace(BASE, nonlinearity="batchtopk(4)", aux_dead_tokens=200),
    "resampled": replace(
        BASE, nonlinearity="relu", coeff=0.3, resample_fractions=(0.4,), resample_dead_below=0.42,
        resample_candidates=64, resample_count_fraction=0.2,
    ),
}  # fmt: skip


def batch(seed):
    return normalise(sparse_activations(32, 14, seed=seed))[0]


def configs(kind):
    base = KINDS[kind]
    target = None if base.target_l0 is None else 9.0
    return [
        base,
        replace(base, init_seed=1, lr=1e-3),
        replace(base, init_seed=2, coeff=base.coeff / 2, target_l0=target),
    ]


def resample_(trainer, n_updates):
    if trainer.resamples_now:
        resampler = trainer.resampler()
        resampler.offer(batch(1000 + n_updates), torch.ones(32, dtype=torch.float64))
        return trainer.resample_(resampler).n_reborn
    return 0


@pytest.mark.parametrize("kind", KINDS)
def test_each_sae_of_a_stack_is_trained_as_it_would_be_alone(kind):
    alone = [Trainer(config, 14, 32, dtype=torch.float64) for config in configs(kind)]
    members = [Trainer(config, 14, 32, dtype=torch.float64) for config in configs(kind)]
    stack = TrainerStack(members)
    n_reborn = 0
    for n in range(60):
        n_reborn += sum(resample_(trainer, n) for trainer in (*alone, *members))
        reports = stack.step(batch(n))
        for trainer, member, ours in zip(alone, members, reports, strict=True):
            theirs = trainer.step(batch(n))
            assert ours.lr == theirs.lr
            assert torch.equal(ours.n_active.double(), theirs.n_active.double())
            assert relative(ours.stats.mse, theirs.stats.mse) < 1e-9
            assert float(member.coeff) == pytest.approx(float(trainer.coeff), rel=1e-12)
        if n == 30:
            # A checkpoint of a member is one of the trainer alone: half of the rest is made after a restart.
            for i, (trainer, member) in enumerate(zip(alone, members, strict=True)):
                fresh = Trainer(trainer.config, 14, 32, dtype=torch.float64)
                fresh.restore_({k: t.clone() for k, t in member.whole_state().items()}, member.state.counters())
                alone[i] = fresh
    assert (n_reborn > 6) == (kind == "resampled")
    for trainer, member in zip(alone, members, strict=True):
        assert member.state.n_updates == trainer.state.n_updates == 60
        for name, tensor in trainer.state.tensors().items():
            assert relative(member.state.tensors()[name], tensor) < 1e-7, name
        assert member.losses_finite()
    with pytest.raises(ValueError, match="all are made"):
        stack.step(batch(0))


def test_one_sae_that_diverges_leaves_the_others_alone():
    members = [Trainer(config, 14, 32, dtype=torch.float64) for config in configs("relu")]
    alone = Trainer(configs("relu")[0], 14, 32, dtype=torch.float64)
    stack = TrainerStack(members)
    members[1].state.weights.encoder[0, 0] = torch.nan
    for n in range(5):
        stack.step(batch(n))
        alone.step(batch(n))
    assert [member.losses_finite() for member in members] == [True, False, True]
    assert relative(members[0].state.weights.encoder, alone.state.weights.encoder) < 1e-12


def test_only_trainers_that_are_alike_are_stacked():
    relu, wider = (Trainer(replace(KINDS["relu"], d_sae=n), 14, 32) for n in (60, 61))
    assert stack_key(relu) != stack_key(wider)
    for trainers in ([], [relu, wider], [relu, Trainer(KINDS["prolu"], 14, 32)]):
        with pytest.raises(ValueError, match="those of a stack may differ in"):
            TrainerStack(trainers)
