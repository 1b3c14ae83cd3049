"""The GPU's step: its equations on the CPU against the dense step; compiled, captured and fast where a GPU is."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from prolu.sae.nonlinearities import NONLINEARITIES
from prolu.sae.penalties import PENALTIES
from prolu.sae.weights import Weights
from prolu.training.moments import Moments
from prolu.training.steps import AdamConfig, DenseStep, Objective, Update
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.stacked import member
from support.baselines import BASELINES, objective_for, weights_for
from support.graphs import emulate_graphs
from support.steps import COMBINATIONS, random_weights, relative
from support.synthetic import sparse_activations


@pytest.mark.parametrize(("nonlinearity", "penalty"), COMBINATIONS)
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 5, 9), (7, 63, 100), (130, 16, 33)])
def test_it_gives_the_dense_steps_gradients(nonlinearity, penalty, batch, d_in, d_sae):
    objective = Objective(NONLINEARITIES[nonlinearity], PENALTIES[penalty], 0.03)
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        weights, x = random_weights(d_in, d_sae, dtype), sparse_activations(batch, d_in, dtype=dtype)
        reference, theirs = DenseStep(weights, batch).gradients(weights, x, objective)
        gradients, ours = CudaStep(weights, batch).gradients(weights, x, objective)
        for a, b in zip(gradients.tensors(), reference.tensors(), strict=True):
            assert relative(a, b) < limit
        assert relative(ours.mse, theirs.mse) < limit
        assert relative(ours.penalty, theirs.penalty) < limit
        assert torch.equal(ours.fired, theirs.fired)


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_twenty_updates_follow_the_dense_step(limit):
    objective, ends = Objective(NONLINEARITIES["prolu_ste"], PENALTIES["sqrt_l1"], 0.02), []
    for step_class in (DenseStep, CudaStep):
        weights = random_weights(20, 90)
        moments, step = Moments.zeros_like(weights), step_class(weights, 64)
        for n in range(20):
            x, adam = sparse_activations(64, 20, seed=n), AdamConfig(max_grad_norm=limit)
            step.update_(weights, moments, x, objective, Update(n, lr=1e-3, adam=adam))
        ends.append((*weights.tensors(), *moments.tensors()))
    for ours, theirs in zip(*ends, strict=True):
        assert relative(ours, theirs) < 1e-10


def test_bf16_rounds_what_goes_into_a_matmul_and_nothing_else():
    objective = Objective(NONLINEARITIES["prolu_ste"], PENALTIES["l1"], 0.02)
    weights, x = random_weights(32, 100, torch.float32), sparse_activations(64, 32, dtype=torch.float32)
    weights.b_dec.zero_()
    rounded = weights.map(torch.clone)
    rounded.encoder.copy_(weights.encoder.bfloat16())
    exact = x.bfloat16().float()
    reference, theirs = DenseStep(rounded, 64).gradients(rounded, exact, objective)
    gradients, ours = CudaStep(weights, 64, "bf16").gradients(weights, x, objective)
    assert torch.equal(ours.fired, theirs.fired)  # the gate saw m in fp32
    for a, b in zip(gradients.tensors(), reference.tensors(), strict=True):
        assert 1e-5 < relative(a, b) < 2e-2
    with pytest.raises(ValueError, match="choose one of fp32, tf32, bf16"):
        CudaStep(weights, 64, "fp8")


@pytest.mark.parametrize("limit", [None, 1e-3])
@pytest.mark.parametrize("name", BASELINES)
def test_a_stack_is_trained_as_each_of_its_saes_alone(name, limit):
    n, batch = 3, 30
    coeffs = torch.tensor([0.01, 0.03, 0.0], dtype=torch.float64)
    rates = [1e-3, 3e-4, 2e-3]
    amongs = torch.stack([torch.arange(40) % 3 == 0, torch.zeros(40).bool(), torch.arange(40) < 8])
    adam = AdamConfig(beta1=0.5, max_grad_norm=limit)
    alone = [weights_for(name, 12, 40) for _ in range(n)]
    for i, weights in enumerate(alone):
        weights.encoder.mul_(1 + 0.1 * i)
    stack = Weights(
        torch.stack([w.encoder for w in alone]),
        torch.stack([w.decoder for w in alone]),
        torch.stack([w.b_dec for w in alone]),
        {p: torch.stack([w.own[p] for w in alone]) for p in alone[0].own},
    )
    moments_alone = [Moments.zeros_like(w) for w in alone]
    moments = Moments.zeros_like(stack)
    dense = DenseStep(alone[0], batch)
    stacked = CudaStep(alone[0], batch, n_saes=n)
    together = objective_for(name, dead=amongs)
    together = replace(together, coeff=coeffs)
    for step in range(20):
        x = sparse_activations(batch, 12, seed=step)
        updates = [Update(step, rate, adam) for rate in rates]
        stats = stacked.update_stack_(stack, moments, x, together, updates)
        for i in range(n):
            # A term in which no latent takes part is left out, as trainers do.
            objective = objective_for(name, float(coeffs[i]), amongs[i] if amongs[i].any() else None)
            expected = dense.update_(alone[i], moments_alone[i], x, objective, updates[i])
            for ours, theirs in zip(stats.of_member(i), expected, strict=True):
                assert relative(ours, theirs) < 1e-10
    for i in range(n):
        for ours, theirs in zip(member(stack, i).tensors(), alone[i].tensors(), strict=True):
            assert relative(ours, theirs) < 1e-9


@pytest.mark.parametrize("name", ["gated", "jumprelu", "batchtopk"])
def test_replayed_graphs_change_no_number(name, monkeypatch):
    """Two stacks take turns, with other rates, coefficients, dead latents and batches at every update."""
    like = weights_for(name, 12, 40)
    steps = [CudaStep(like, 30, n_saes=2) for _ in range(2)]
    emulate_graphs(steps[1], monkeypatch)
    ends = []
    for step in steps:
        stacks = [like.map(lambda t, i=i: torch.stack([t * (1 + 0.1 * i), t])) for i in range(2)]
        all_moments = [Moments.zeros_like(stack) for stack in stacks]
        seen = []
        for n in range(5):
            x = sparse_activations(30 if n != 2 else 17, 12, seed=n)
            dead = torch.arange(80).view(2, 40) % (n + 2) == 0
            objective = replace(objective_for(name, dead=dead), coeff=torch.tensor([0.1, 0.2]).double() / (n + 1))
            updates = [Update(n, rate * (n + 1)) for rate in (1e-3, 2e-3)]
            for stack, moments in zip(stacks, all_moments, strict=True):
                seen += step.update_stack_(stack, moments, x, objective, updates)
        ends.append(
            [*seen, *(t for w, m in zip(stacks, all_moments, strict=True) for t in (*w.tensors(), *m.tensors()))]
        )
    assert all(map(torch.equal, *ends))
    assert len(steps[1]._graphs) == 2


COMPILED = """
import torch
import torch._dynamo
torch._dynamo.config.recompile_limit = 64  # a variant for each family
from dataclasses import replace
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.training.moments import Moments
from prolu.training.steps import AdamConfig, Objective
from prolu.runtime.mesh import ALONE
from prolu.training.steps.stacked import (
    activate, decode_and_send_back, encode, gradients_of_stack, pull_back, stack_of_one, update_stack_
)
from prolu.sae.saved_sae import SAEConfig
from prolu.training.starting_weights import initial_weights
torch._dynamo.config.recompile_limit = 64  # one compiled variant for each family
FAMILIES = [("relu", "l1"), ("prolu_relu", "sqrt_l1"), ("prolu_ste", "sqrt_l1"), ("gated", "sqrt_l1"),
            ("jumprelu", "l0"), ("jumprelu_plain", "l0"), ("jumprelu_ste", "tanh"),
            ("jumprelu", "quadratic_l0(5)"), ("relu", "frequency_tanh"), ("topk(5)", "none"), ("batchtopk(3)", "none")]
x = torch.randn(40, 24, dtype=torch.float64)
coeff = torch.full((1, 1, 1), 0.02, dtype=torch.float64)
TRANSCODERS = [("gated", "l1"), ("topk(5)", "none")]
for name, penalty, transcodes in [(*f, False) for f in FAMILIES] + [(*f, True) for f in TRANSCODERS]:
    sides = {"d_out": 18, "skip": True} if transcodes else {}
    config = SAEConfig(d_in=24, d_sae=96, nonlinearity=name, **sides)
    nonlinearity = nonlinearity_named(name).in_training
    term = nonlinearity.auxiliary
    if term is not None and term.of_dead:
        term = replace(term, among=torch.arange(96)[None] % 3 == 0)
    weights = stack_of_one(initial_weights(config, 1, torch.float64))
    # One of them with a nested loss, whose blocks are part of what is compiled.
    prefixes = (10, 50) if name == "relu" else ()
    objective = Objective(nonlinearity, penalty_named(penalty), coeff, term, prefixes)
    centred, m = encode(weights, x, "fp32")
    compiled = torch.compile(encode, dynamic=False, fullgraph=True)(weights, x, "fp32")
    torch.testing.assert_close(compiled[1], m, rtol=1e-11, atol=1e-13)
    bounds = None, None
    if nonlinearity.selection is not None:
        above = m - nonlinearity.threshold(weights.own)
        bounds = nonlinearity.selection.bound(above[0]).view(1, -1, 1), torch.zeros(1, 40, 1, dtype=torch.float64)
    target = x[:, :18] ** 2 if transcodes else None
    arguments = weights, x, centred, m, bounds, objective, "fp32", ALONE, target
    plain, stats = gradients_of_stack(*arguments)
    fused, also = torch.compile(gradients_of_stack, dynamic=False, fullgraph=True)(*arguments)
    for a, b in zip((*plain.tensors(), *stats), (*fused.tensors(), *also), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-13)
    # In three parts, as where prefixes are drawn: the first and the last are compiled, and know no prefixes.
    blocks = objective.blocks(96)
    objective = replace(objective, prefixes=())
    code = torch.compile(activate, dynamic=False, fullgraph=True)(weights, m, bounds[0], objective)
    decoded = decode_and_send_back(weights, x, code.latents, blocks, "fp32", ALONE, target)
    last = torch.compile(pull_back, dynamic=False, fullgraph=True)
    parted, also = last(weights, x, centred, m, bounds[1], code, decoded, objective, "fp32", ALONE, target)
    for a, b in zip((*plain.tensors(), *stats), (*parted.tensors(), *also), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-13)
ends = []
for update_ in (update_stack_, torch.compile(update_stack_, dynamic=False, fullgraph=True)):
    w, moments = weights.map(torch.clone), Moments.zeros_like(weights)
    numbers = torch.tensor([[1e-3], [30.0], [0.5]], dtype=torch.float64)
    update_(w, plain.map(torch.clone), moments, numbers[:2], numbers[2], AdamConfig())
    ends.append((*w.tensors(), *moments.tensors()))
for a, b in zip(*ends, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with g++")
@pytest.mark.slow  # compiles; in a process of its own, because signatures that are checked cannot be compiled
def test_torch_compile_takes_it_whole_and_keeps_the_numbers():
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=600)
