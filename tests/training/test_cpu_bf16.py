"""The steps on a CPU in bf16: what is rounded, what is not, and that the process is left as it was."""

from dataclasses import replace

import pytest
import torch

from prolu import RunConfig, Trainer
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.training.moments import Moments
from prolu.training.steps import DenseStep, Objective, Steps, Update
from prolu.training.steps.cpu_bf16 import Bf16Step, bf16_products
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.sparse_numba import SparseNumbaStep
from prolu.training.steps.stacked import gradients_of_stack, member, stack_of_one
from support.steps import random_weights, relative
from support.sweeps import contents, sweep
from support.synthetic import sparse_activations

D_IN, D_SAE, BATCH = 64, 256, 96
FAMILIES = [("relu", "l1"), ("prolu_ste", "sqrt_l1"), ("batchtopk(7)", "none"), ("topk(7)", "none")]


def rounded(t):
    """Return the numbers as a product here takes them: in bf16 where the CPU multiplies those, else as is."""
    a, b = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0))
    with bf16_products():
        product = a @ b
    in_bf16 = relative(product, a.bfloat16().double() @ b.bfloat16().double()) < 1e-6
    assert in_bf16 or relative(product, a.double() @ b.double()) < 1e-6
    return t.bfloat16().float() if in_bf16 else t


def problem(name, penalty):
    weights = random_weights(D_IN, D_SAE, torch.float32)
    objective = Objective(nonlinearity_named(name).in_training, penalty_named(penalty), 0.03)
    return weights, sparse_activations(BATCH, D_IN, dtype=torch.float32), replace(objective, auxiliary=None)


@pytest.mark.parametrize("kind", ["sparse", "sparse_torch"])
@pytest.mark.parametrize(("name", "penalty"), FAMILIES)
def test_a_sparse_step_rounds_what_the_encoder_multiplies_and_nothing_else(kind, name, penalty):
    weights, x, objective = problem(name, penalty)
    gradients, stats = Steps(weights, BATCH, "bf16")[kind].gradients(weights, x, objective)
    stack = stack_of_one(weights.map(torch.Tensor.double))
    centred = (x - weights.b_dec)[None]
    with bf16_products():
        m = (centred[0] @ weights.encoder.T)[None].double()
    assert relative(m, rounded(centred).double() @ rounded(weights.encoder).double().T) < 1e-6
    # From here on with the product that was found: Sqrt(L1) makes a rounding of a small latent a hundred times larger.
    selection = objective.nonlinearity.selection
    bound = None if selection is None else selection.bound((m + stack.own["b_enc"])[0]).view(1, -1, 1)
    of_stack = (stack, x.double(), centred.double(), m, (bound, None))
    wanted, expected = gradients_of_stack(*of_stack, replace(objective, coeff=torch.full((1, 1, 1), 0.03)), "fp32")
    assert torch.equal(stats.fired, expected.fired[0])
    assert relative(stats.mse, expected.mse[0]) < 1e-5
    for ours, theirs in zip(gradients.tensors(), member(wanted, 0).tensors(), strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(("name", "penalty"), FAMILIES)
def test_the_dense_step_rounds_as_a_gpu_does(name, penalty):
    weights, x, objective = problem(name, penalty)
    precision = "fp32" if rounded(weights.encoder) is weights.encoder else "bf16"
    gradients, _ = Steps(weights, BATCH, "bf16")["dense"].gradients(weights, x, objective)
    wanted, _ = CudaStep(weights, BATCH, precision).gradients(weights, x, objective)
    for ours, theirs in zip(gradients.tensors(), wanted.tensors(), strict=True):
        assert relative(ours, theirs) < 2e-3  # that of the GPU's script: sums in another order are rounded again


def test_an_update_is_that_of_the_step_within():
    weights, x, objective = problem("prolu_ste", "sqrt_l1")
    ends = []
    for once in (True, False):
        w = weights.map(torch.clone)
        moments = Moments.zeros_like(w)
        step = SparseNumbaStep(w, BATCH)
        if once:
            Bf16Step(step).update_(w, moments, x, objective, Update(0, 1e-2))
        else:
            with bf16_products():
                step.update_(w, moments, x, objective, Update(0, 1e-2))
        ends.append(w)
    assert all(torch.equal(a, b) for a, b in zip(ends[0].tensors(), ends[1].tensors(), strict=True))


def test_products_elsewhere_stay_in_fp32():
    a, b = torch.randn(2, 128, 128)
    before = a @ b
    with pytest.raises(ZeroDivisionError), bf16_products():
        _ = 1 / 0
    assert torch.equal(a @ b, before)


def test_the_kind_of_step_follows_the_density_as_in_fp32():
    config = RunConfig(nonlinearity="topk(4)", d_sae=1024, n_tokens=64 * 20, precision="bf16")
    in_fp32 = replace(config, precision="fp32")
    kinds = []
    for each in (config, in_fp32):
        trainer = Trainer(each, 64, 64)
        for n in range(3):
            trainer.step(sparse_activations(64, 64, seed=n, dtype=torch.float32).mul(8))
        kinds.append(trainer.state.step)
        assert isinstance(trainer.steps["dense"], Bf16Step if each is config else DenseStep)
    assert kinds == ["sparse", "sparse"]


def test_a_gpus_sparse_step_is_refused_before_anything_is_trained():
    config = RunConfig(d_sae=32, n_tokens=640, precision="bf16", step="sparse")
    with pytest.raises(ValueError, match="precision 'bf16': on a GPU the sparse step computes in fp32; choose"):
        Trainer(config, 16, 64, device="cuda")
    with pytest.raises(ValueError, match="precision 'tf32': the sparse step computes in fp32 or bf16; choose"):
        replace(config, precision="tf32")


def test_a_study_in_bf16_is_the_same_twice(tiny_stream, tmp_path):
    runs = [
        RunConfig(d_sae=40, n_tokens=1920, nonlinearity=name, precision="bf16") for name in ("relu", "batchtopk(4)")
    ]
    sweep(runs, tiny_stream, tmp_path / "a")
    sweep(runs, tiny_stream, tmp_path / "b")
    first, second = (
        {name: text for name, text in contents(tmp_path / which).items() if str(name).endswith("safetensors")}
        for which in "ab"
    )
    assert first
    assert first == second
