"""The GPU's sparse step in Triton's interpreter on the CPU. On a GPU it is checked by benchmarks/gpu_sparse.py."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are for this machine's GPU, and tests have tensors of the CPU", allow_module_level=True)

from prolu.sae.nonlinearities import NONLINEARITIES, GeneralisedProLU, Selection, TopK
from prolu.sae.penalties import PENALTIES
from prolu.sae.weights import Weights
from prolu.training.moments import Moments
from prolu.training.steps import AdamConfig, DenseStep, Objective, Update
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.cuda_graphs import CudaGraphs
from prolu.training.steps.sparse_torch import SparseTorchStep
from prolu.training.steps.sparse_triton import SparseTritonStep
from prolu.training.steps.triton_pairs import Places
from support.graphs import emulate_graphs
from support.steps import random_weights, relative
from support.synthetic import sparse_activations

SLOW = pytest.mark.slow  # the interpreter takes some 30 ms for one latent's row
FAMILIES = [
    ("prolu_ste", "sqrt_l1"),
    ("jumprelu", "l0"),
    pytest.param("relu", "sqrt_l1", marks=SLOW),
    pytest.param("prolu_relu", "l1", marks=SLOW),
    pytest.param("jumprelu", "l1", marks=SLOW),
    pytest.param("thresholded", "l1", marks=SLOW),
]


def problem(nonlinearity, batch, d_in, d_sae, dtype=torch.float64, bias=0.0):
    """Weights, one latent of which is always on and the last tenth never, and a batch."""
    weights = random_weights(d_in, d_sae, dtype, own=nonlinearity.parameter_names)
    first = nonlinearity.parameter_names[0]
    weights.own[first].add_(bias)
    weights.own[first][3] = 50.0
    weights.own[first][-1 - d_sae // 10 :] = -1e4
    return weights, sparse_activations(batch, d_in, dtype=dtype)


def check_gradients(step, weights, x, objective, limit, reference=None):
    reference, theirs = (reference or DenseStep(weights, len(x))).gradients(weights, x, objective)
    gradients, ours = step.gradients(weights, x, objective)
    for a, b in zip(gradients.tensors(), reference.tensors(), strict=True):
        assert relative(a, b) < limit
    assert relative(ours.mse, theirs.mse) < limit
    assert relative(ours.penalty, theirs.penalty) < limit
    assert torch.equal(ours.fired, theirs.fired)
    assert ours.auxiliary == theirs.auxiliary
    assert relative(ours.smallest, theirs.smallest) < limit or ours.smallest == theirs.smallest
    return ours


@pytest.mark.parametrize(("name", "penalty"), FAMILIES)
def test_it_gives_the_dense_steps_gradients(name, penalty):
    objective = Objective(NONLINEARITIES[name], PENALTIES[penalty], 0.03)
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        weights, x = problem(objective.nonlinearity, 31, 13, 97, dtype, bias=-0.5)
        check_gradients(SparseTritonStep(weights, 31), weights, x, objective, limit)


@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 5, 33), (7, 63, 20), (270, 16, 9)])
def test_other_sizes_and_stretches_of_one_latent(batch, d_in, d_sae):
    """In the largest batch, the latent that is always on has a whole stretch of pairs, and others around it."""
    objective = Objective(NONLINEARITIES["relu"], PENALTIES["l1"], 0.03)
    weights, x = problem(objective.nonlinearity, batch, d_in, d_sae, bias=-0.8)
    stats = check_gradients(SparseTritonStep(weights, batch), weights, x, objective, 1e-13)
    assert batch < 270 or stats.fired.max() > 128


@pytest.mark.parametrize("bias", [-1e6, -1.6, 1e3])
def test_no_pair_few_pairs_and_all_pairs(bias):
    objective = Objective(NONLINEARITIES["relu"], PENALTIES["l1"], 0.03)
    weights, x = problem(objective.nonlinearity, 9, 8, 12)
    weights.own["b_enc"].fill_(bias)
    stats = check_gradients(SparseTritonStep(weights, 9), weights, x, objective, 1e-13)
    assert stats.fired.sum() == {-1e6: 0, 1e3: 9 * 12}.get(bias, stats.fired.sum())


@SLOW
def test_more_latents_than_one_block():
    objective = Objective(NONLINEARITIES["relu"], PENALTIES["l1"], 0.03)
    weights, x = problem(objective.nonlinearity, 3, 4, 1100, bias=-1.5)
    check_gradients(SparseTritonStep(weights, 3), weights, x, objective, 1e-13)


def test_another_straight_through_estimator_reaches_latents_that_are_off():
    objective = Objective(GeneralisedProLU(0.5, 1.0, 0.5, torch.exp), PENALTIES["sqrt_l1"], 0.03)
    weights, x = problem(objective.nonlinearity, 11, 9, 30)
    check_gradients(SparseTritonStep(weights, 11), weights, x, objective, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("selection", "bias"), [(Selection(4), 0.0), (Selection(4), -1.0), (Selection(3, True), 0.0)])
def test_selections(selection, bias, dtype):
    """The second leaves many tokens with fewer than k entries of the support."""
    objective = Objective(TopK(selection, has_auxiliary=False), PENALTIES["none"], 0.0)
    weights, x = problem(objective.nonlinearity, 23, 13, 25, dtype, bias=bias)
    stats = check_gradients(
        SparseTritonStep(weights, 23), weights, x, objective, 1e-13 if dtype == torch.float64 else 1e-5
    )
    assert bias or stats.fired.sum() == selection.k * 23


def test_a_selection_keeps_ties():
    objective = Objective(TopK(Selection(2), has_auxiliary=False), PENALTIES["none"], 0.0)
    weights, x = problem(objective.nonlinearity, 6, 5, 12)
    for matrix in (weights.encoder, weights.decoder, weights.own["b_enc"]):
        matrix[4:8] = matrix[3]
    stats = check_gradients(SparseTritonStep(weights, 6), weights, x, objective, 1e-13)
    assert stats.fired.sum() > 12


@pytest.mark.parametrize(
    ("name", "penalty", "dtype", "clip"),
    [
        ("prolu_ste", "l1", torch.float64, None),
        pytest.param("prolu_ste", "l1", torch.float32, None, marks=SLOW),
        pytest.param("prolu_ste", "l1", torch.float64, 1e-3, marks=SLOW),
        pytest.param("jumprelu", "l0", torch.float64, None, marks=SLOW),
        pytest.param("jumprelu", "l0", torch.float32, None, marks=SLOW),
        pytest.param("relu", "l1", torch.float32, None, marks=SLOW),
    ],
)
def test_twenty_updates_follow_another_sparse_step(name, penalty, dtype, clip):
    objective = Objective(NONLINEARITIES[name], PENALTIES[penalty], 0.02)
    ends = []
    for step_class in (SparseTritonStep, SparseTorchStep):
        weights, _ = problem(objective.nonlinearity, 1, 13, 11, dtype, bias=-0.6)
        moments, step = Moments.zeros_like(weights), step_class(weights, 7)
        for n in range(20):
            x = sparse_activations(7, 13, seed=n, dtype=dtype)
            step.update_(weights, moments, x, objective, Update(n, lr=1e-3, adam=AdamConfig(max_grad_norm=clip)))
        ends.append((*weights.tensors(), *moments.tensors()))
    for ours, theirs in zip(*ends, strict=True):
        assert relative(ours, theirs) < (1e-10 if dtype == torch.float64 else 2e-5)


def test_bf16_rounds_rows_that_are_gathered_and_what_multiplies_them():
    """Against the same equations on whole matrices; and near the dense step, which rounds the error once more."""
    objective = Objective(NONLINEARITIES["prolu_ste"], PENALTIES["l1"], 0.02)
    weights, x = problem(objective.nonlinearity, 31, 13, 41, torch.float32, bias=-0.5)
    reference = in_bf16(weights, x, objective)
    gradients, _ = SparseTritonStep(weights, 31, "bf16").gradients(weights, x, objective)
    for a, b in zip(gradients.tensors(), reference.tensors(), strict=True):
        assert relative(a, b) < 1e-5
    check_gradients(SparseTritonStep(weights, 31, "bf16"), weights, x, objective, 5e-3, CudaStep(weights, 31, "bf16"))


def in_bf16(weights, x, objective):
    def rounded(a):
        return a.bfloat16().float()

    centred = rounded(x - weights.b_dec)
    m = centred @ rounded(weights.encoder).T
    support = objective.nonlinearity.support(m, weights.own)
    f = torch.where(support, objective.nonlinearity.value(m, weights.own), 0)
    error = (rounded(f) @ rounded(weights.decoder) + weights.b_dec - x) * (2 / x.numel())
    back, _ = objective.pull_back(error @ rounded(weights.decoder).T, f, m, weights.own, len(x))
    to_m = torch.where(support, back.m, 0)
    own = {name: torch.where(support, gradient, 0).sum(0) for name, gradient in back.parameters.items()}
    b_dec = error.sum(0) - to_m.sum(0) @ weights.encoder
    return Weights(rounded(to_m).T @ centred, rounded(f).T @ rounded(error), b_dec, own)


def test_tf32_is_fp32_on_a_cpu_and_there_is_no_fp8():
    objective = Objective(NONLINEARITIES["relu"], PENALTIES["l1"], 0.02)
    weights, x = problem(objective.nonlinearity, 8, 13, 30, torch.float32)
    check_gradients(SparseTritonStep(weights, 8, "tf32"), weights, x, objective, 1e-5)
    with pytest.raises(ValueError, match="choose one of fp32, tf32, bf16"):
        SparseTritonStep(weights, 8, "fp8")


def test_the_places_for_pairs_change_no_number():
    """A step that has just seen a dense batch, one that has just seen a sparse one, and a new one: the same bits."""
    objective = Objective(NONLINEARITIES["prolu_ste"], PENALTIES["sqrt_l1"], 0.1)
    weights, x = problem(objective.nonlinearity, 12, 8, 40, torch.float32, bias=-0.7)
    fresh, stats = SparseTritonStep(weights, 12).gradients(weights, x, objective)
    expected = (*(g.clone() for g in fresh.tensors()), *stats)
    for bias in (1e3, -1e3):
        step = SparseTritonStep(weights, 12)
        others = Weights(weights.encoder, weights.decoder, weights.b_dec, {"b_enc": torch.full((40,), bias)})
        step.gradients(others, x[:9], objective)
        gradients, stats = step.gradients(weights, x, objective)
        for a, b in zip((*gradients.tensors(), *stats), expected, strict=True):
            assert torch.equal(a, b)


def test_places_grow_at_once_and_shrink_when_most_are_empty():
    places = Places(0, 0).after(60, 40_000)
    assert places.hold(60, 40_000)
    assert places.after(59, 39_000) == places
    assert places.after(70, places.in_all) == places
    grown = places.after(60, places.in_all + 1)
    assert grown.hold(60, places.in_all + 1)
    assert grown.per_token == places.per_token
    assert places.after(60, 3000).in_all < places.in_all / 2
    assert all(Places(0, 0).after(9, n).in_all % 128 == 0 for n in range(1, 5000, 37))


def test_replayed_graphs_change_no_number(monkeypatch):
    """Two SAEs take turns; rates, coefficients, batches and the number of pairs change, and one batch is shorter."""
    objective = Objective(NONLINEARITIES["relu"], PENALTIES["sqrt_l1"], 0.1)
    steps = [SparseTritonStep(problem(objective.nonlinearity, 1, 5, 9, torch.float32)[0], 16) for _ in range(2)]
    emulate_graphs(steps[1], monkeypatch)
    captured = []
    monkeypatch.setattr(CudaGraphs, "_capture", counting(CudaGraphs._capture, captured))
    ends = []
    for step in steps:
        saes = [problem(objective.nonlinearity, 1, 5, 9, torch.float32, bias)[0] for bias in (-1.5, -0.5)]
        all_moments = [Moments.zeros_like(weights) for weights in saes]
        seen = []
        for n in range(7):
            x = sparse_activations(16 if n != 2 else 11, 5, seed=n, dtype=torch.float32)
            if n == 4:
                # All of 144 pairs are on the support from now on, and have places once there are more of them.
                saes[0].own["b_enc"].fill_(1e3)
            for weights, moments in zip(saes, all_moments, strict=True):
                now = replace(objective, coeff=0.1 / (n + 1))
                seen += step.update_(weights, moments, x, now, Update(n, lr=1e-3 * (n + 1)))
            for finder, _ in step._of_saes.values():
                if n == 0:
                    finder.places = Places(9, 128)
        ends.append([*seen, *(t for w, m in zip(saes, all_moments, strict=True) for t in (*w.tensors(), *m.tensors()))])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert len(captured) == 2 * 3 + 3


def counting(function, calls):
    def counted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return counted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gated_has_an_auxiliary_term_of_the_same_pairs(dtype):
    nonlinearity = NONLINEARITIES["gated"]
    objective = Objective(nonlinearity, PENALTIES["l1"], 0.03, nonlinearity.auxiliary)
    weights, x = problem(nonlinearity, 11, 9, 30, dtype)
    step = SparseTritonStep(weights, 11)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    reference, theirs = DenseStep(weights, len(x)).gradients(weights, x, objective)
    gradients, ours = step.gradients(weights, x, objective)
    assert all(relative(a, b) < limit for a, b in zip(gradients.tensors(), reference.tensors(), strict=True))
    assert relative(ours.auxiliary, theirs.auxiliary) < limit
    assert relative(ours.penalty, theirs.penalty) < limit
    assert "_dense" not in vars(step)


def test_what_it_does_not_know_is_left_to_the_dense_step():
    nonlinearity = TopK(Selection(3))
    term = replace(nonlinearity.auxiliary, among=torch.arange(30) % 5 == 0)
    objective = Objective(nonlinearity, PENALTIES["none"], 0.0, term)
    weights, x = problem(nonlinearity, 11, 9, 30)
    reference, theirs = DenseStep(weights, 11).gradients(weights, x, objective)
    step = SparseTritonStep(weights, 11)
    gradients, ours = step.gradients(weights, x, objective)
    assert all(relative(a, b) < 1e-12 for a, b in zip(gradients.tensors(), reference.tensors(), strict=True))
    assert relative(ours.auxiliary, theirs.auxiliary) < 1e-12
    assert "_dense" in vars(step)


FOR_A_GPU = """
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from prolu.training.steps import triton_kernels as kernels

INTEGERS = {"starts", "counts", "latents", "tokens", "by_latent", "sorted_latents", "tokens_out", "latents_out"}
SIZES = {"d_in", "d_sae", "capacity", "n_places", "n_columns", "n"}
ROWS = {"decoder", "values", "to_m", "centred", "error"}
CONSTANTS = {"ACC": tl.float32, "PAIRS": 4, "STRETCH": 128, "HAS_BOUND": True, "UPDATE": True, "COLUMNS": 4}

def type_of(kernel, name, rows):
    if name in SIZES:
        return "i32"
    if name in INTEGERS:
        return "*i32"
    # A gradient row is gathered from rows in bf16; other kernels write or update matrices of these names in fp32.
    gathered = {"decode": {"decoder", "values"}, "partial_rows": ROWS, "latent_rows": ROWS - {"decoder"}}
    return rows if name in gathered.get(kernel.__name__, ()) else "*fp32"

for kernel in ("compact", "join", "decode", "latent_sums", "partial_rows", "latent_rows", "adam_vector"):
    kernel = getattr(kernels, kernel)
    for rows in ("*bf16", "*fp32"):
        constants = {name: CONSTANTS.get(name, 1024) for name in kernel.arg_names if name.isupper()}
        types = {n: "constexpr" if n in constants else type_of(kernel, n, rows) for n in kernel.arg_names}
        compiled = compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32))
        assert "ptx" in compiled.asm, kernel
"""


@SLOW
def test_the_compiler_for_a_gpu_takes_every_kernel(tmp_path):
    """It needs no GPU. In a process of its own, which has the compiler and not the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", FOR_A_GPU], check=True, timeout=600, env=environment)
