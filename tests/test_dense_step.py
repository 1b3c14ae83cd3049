"""The step by hand against autograd and torch.optim.Adam, and the interface proved on three test doubles."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from prolu.nonlinearities import NONLINEARITIES, Nonlinearity, Pullback, prolu
from prolu.penalties import L1, PENALTIES, Penalty
from prolu.sae import SAEConfig, initial_weights
from prolu.steps import Auxiliary, DenseStep, Objective, adam_update_, dense
from prolu.weights import Weights
from synthetic import sparse_activations

COMBINATIONS = list(itertools.product(["relu", "prolu_relu", "prolu_ste"], ["l1", "sqrt_l1"]))


def plain_loss(weights, x, nonlinearity, penalty, coeff):
    """Section 1 of the method, written out."""
    m = (x - weights.b_dec) @ weights.encoder.T
    b = weights.own["b_enc"]
    f = torch.relu(m + b) if nonlinearity == "relu" else prolu(m, b, nonlinearity.removeprefix("prolu_"))
    x_hat = f @ weights.decoder + weights.b_dec
    p = f.sum(-1) if penalty == "l1" else torch.sqrt(f + 1e-6).sum(-1)
    return ((x - x_hat) ** 2).mean(), p.mean(), ((x - x_hat) ** 2).mean() + coeff * p.mean()


def random_weights(d_in, d_sae, dtype=torch.float64, own=("b_enc",)):
    weights = initial_weights(SAEConfig(d_in=d_in, d_sae=d_sae), 5, dtype)
    g = torch.Generator().manual_seed(6)
    weights.b_dec.copy_(0.1 * torch.randn(d_in, generator=g, dtype=dtype))
    return Weights(
        weights.encoder, weights.decoder, weights.b_dec,
        {name: 0.2 * torch.randn(d_sae, generator=g, dtype=dtype) - 0.1 for name in own},
    )  # fmt: skip


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize(("nonlinearity", "penalty"), COMBINATIONS)
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(1, 5, 9), (7, 63, 100), (130, 16, 33)])
def test_one_step_gives_autograds_gradients(monkeypatch, nonlinearity, penalty, batch, d_in, d_sae):
    monkeypatch.setattr(dense, "ROWS_PER_CHUNK", 50)
    monkeypatch.setattr(dense, "ENTRIES_PER_SLAB", 7 * d_sae)
    weights = random_weights(d_in, d_sae)
    x = sparse_activations(batch, d_in)
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    mse, p, loss = plain_loss(leaves, x, nonlinearity, penalty, 0.03)
    loss.backward()
    objective = Objective(NONLINEARITIES[nonlinearity], PENALTIES[penalty], 0.03)
    gradients, stats = DenseStep(weights, batch).gradients(weights, x, objective)
    for ours, theirs in zip(gradients.tensors(), leaves.tensors(), strict=True):
        assert theirs.grad is not None
        assert relative(ours, theirs.grad) < 1e-13
    assert stats.mse.item() == pytest.approx(mse.item(), rel=1e-13)
    assert stats.penalty.item() == pytest.approx(p.item(), rel=1e-13)
    assert stats.fired.sum() > 0


@pytest.mark.parametrize(("nonlinearity", "penalty"), COMBINATIONS)
def test_twenty_updates_follow_torchs_adam_with_projection(nonlinearity, penalty):
    weights, batches = random_weights(16, 48), [sparse_activations(64, 16, seed=s) for s in range(20)]
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    adam = torch.optim.Adam(leaves.tensors(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    first, second = weights.zeros_like(), weights.zeros_like()
    step, objective = (
        DenseStep(weights, 64),
        Objective(NONLINEARITIES[nonlinearity], PENALTIES[penalty], 0.02),
    )
    for n, x in enumerate(batches):
        adam.zero_grad()
        plain_loss(leaves, x, nonlinearity, penalty, 0.02)[2].backward()
        rows, g = leaves.decoder, leaves.decoder.grad
        assert g is not None
        with torch.no_grad():
            g -= (g * rows).sum(1, keepdim=True) * rows
            adam.step()
            rows /= rows.norm(dim=1, keepdim=True)
        gradients, _ = step.gradients(weights, x, objective)
        adam_update_(weights, gradients, first, second, n_updates=n, lr=1e-3)
    for ours, theirs in zip(weights.tensors(), leaves.tensors(), strict=True):
        assert relative(ours, theirs.detach()) < 1e-10


def test_buffers_keep_nothing_between_calls():
    weights, objective = (
        random_weights(8, 20),
        Objective(NONLINEARITIES["prolu_ste"], PENALTIES["sqrt_l1"], 0.1),
    )
    shared = DenseStep(weights, 64)
    shared.gradients(weights, sparse_activations(64, 8, seed=1), objective)
    x = sparse_activations(40, 8, seed=2)
    again = shared.gradients(weights, x, objective)[0].map(torch.clone)
    for a, b in zip(again.tensors(), DenseStep(weights, 40).gradients(weights, x, objective)[0].tensors(), strict=True):
        assert torch.equal(a, b)


def test_infinite_activations_off_the_gate_do_not_poison_other_latents():
    weights = random_weights(4, 6)
    weights.own["b_enc"].fill_(-1e9)
    gradients, _ = DenseStep(weights, 3).gradients(
        weights, sparse_activations(3, 4), Objective(NONLINEARITIES["prolu_ste"], L1(), 0.1)
    )
    assert all(t.isfinite().all() for t in gradients.tensors())
    assert gradients.encoder.count_nonzero() == 0


# Test doubles: other people's activation functions through the same interface.

BAND = 0.4


@dataclass(frozen=True)
class JumpReLU(Nonlinearity):
    """f = z [z > theta] with z = m + b; theta learns from a rectangle kernel of width BAND around it."""

    parameter_names = ("b_enc", "theta")

    def support(self, m, parameters):
        z = m + parameters["b_enc"]
        return (z > parameters["theta"]) | ((z - parameters["theta"]).abs() < BAND / 2)

    def value(self, m, parameters):
        z = m + parameters["b_enc"]
        return torch.where(z > parameters["theta"], z, 0)

    def pullback(self, upstream, m, parameters):
        z, theta = m + parameters["b_enc"], parameters["theta"]
        to_z = torch.where(z > theta, upstream, 0)
        inside = ((z - theta).abs() < BAND / 2).to(m.dtype)
        return Pullback(to_z, {"b_enc": to_z, "theta": -theta / BAND * inside * upstream})


@dataclass(frozen=True)
class L0Penalty(Penalty):
    """P = sum [z > theta], whose only gradient is the kernel's on theta."""

    def value(self, latents, m, parameters):
        return (m + parameters["b_enc"] > parameters["theta"]).to(m.dtype)

    def pullback(self, m, parameters):
        inside = ((m + parameters["b_enc"] - parameters["theta"]).abs() < BAND / 2).to(m.dtype)
        return Pullback(torch.zeros_like(m), {"theta": -inside / BAND})


class Heaviside(torch.autograd.Function):
    """[z > theta], with the kernel's pseudo-gradient on theta (Rajamanoharan 2024b), by plain autograd."""

    @staticmethod
    def forward(ctx, z, theta):
        ctx.save_for_backward(z, theta)
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        return torch.zeros_like(z), (-((z - theta).abs() < BAND / 2).to(z.dtype) / BAND * g).sum(0)


class Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, theta):
        ctx.save_for_backward(z, theta)
        return z * (z > theta)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        inside = ((z - theta).abs() < BAND / 2).to(z.dtype)
        return g * (z > theta), (-theta / BAND * inside * g).sum(0)


def check(objective, own, batch, loss_of):
    """The interface's gradients of a test double equal plain autograd's of `loss_of`; all tensors move."""
    weights, x = random_weights(12, 40, own=own), sparse_activations(batch, 12)
    if "theta" in own:
        weights.own["theta"].abs_()
    leaves = weights.map(lambda t: t.clone().requires_grad_())
    loss_of(leaves, x).backward()
    gradients, _ = DenseStep(weights, batch).gradients(weights, x, objective)
    for ours, theirs in zip(gradients.tensors(), leaves.tensors(), strict=True):
        assert theirs.grad is not None
        assert relative(ours, theirs.grad) < 1e-12
        assert ours.abs().max() > 0


def test_jumprelu_with_its_kernel_band_goes_through_the_interface():
    def loss_of(w, x):
        z = (x - w.b_dec) @ w.encoder.T + w.own["b_enc"]
        x_hat = Jump.apply(z, w.own["theta"]) @ w.decoder + w.b_dec
        return ((x - x_hat) ** 2).mean() + 0.01 * Heaviside.apply(z, w.own["theta"]).sum(-1).mean()

    check(Objective(JumpReLU(), L0Penalty(), 0.01), ("b_enc", "theta"), 32, loss_of)


@dataclass(frozen=True)
class TopK(Nonlinearity):
    """The k largest of a row of ReLU(m + b)."""

    k: int

    def support(self, m, parameters):
        z = m + parameters["b_enc"]
        chosen = torch.zeros_like(z, dtype=torch.bool).scatter(-1, z.topk(self.k).indices, True)
        return chosen & (z > 0)

    def value(self, m, parameters):
        return m + parameters["b_enc"]

    def pullback(self, upstream, m, parameters):
        return Pullback(upstream, {"b_enc": upstream})


def top_k(z, k):
    best = z.topk(k)
    return torch.zeros_like(z).scatter(-1, best.indices, torch.relu(best.values))


def test_topk_goes_through_the_interface():
    def loss_of(w, x):
        f = top_k((x - w.b_dec) @ w.encoder.T + w.own["b_enc"], 5)
        return ((x - f @ w.decoder - w.b_dec) ** 2).mean()

    check(Objective(TopK(5), L1(), 0.0), ("b_enc",), 32, loss_of)


@dataclass(frozen=True, eq=False)
class TopKOf(TopK):
    """TopK among some latents only: AuxK's dead ones."""

    dead: torch.Tensor

    def support(self, m, parameters):
        return super().support(m.masked_fill(~self.dead, -1e9), parameters)


@pytest.mark.parametrize("batch", [16, 40])
def test_an_auxiliary_loss_on_latents_that_are_off_moves_them(batch):
    dead = torch.arange(40) % 3 == 0
    aux = Auxiliary(TopKOf(4, dead), "residual", 1 / 32, trains_decoder=True)

    def loss_of(w, x):
        z = (x - w.b_dec) @ w.encoder.T + w.own["b_enc"]
        residual = x - top_k(z, 3) @ w.decoder - w.b_dec
        second = top_k(z.masked_fill(~dead, -1e9), 4) @ w.decoder
        return (residual**2).mean() + ((second - residual.detach()) ** 2).mean() / 32

    check(Objective(TopK(3), L1(), 0.0, aux), ("b_enc",), batch, loss_of)


def test_an_auxiliary_loss_with_a_frozen_decoder_leaves_it_alone():
    aux = Auxiliary(NONLINEARITIES["relu"], "centred_input", 0.7, trains_decoder=False)

    def loss_of(w, x):
        z = (x - w.b_dec) @ w.encoder.T + w.own["b_enc"]
        main = ((x - top_k(z, 3) @ w.decoder - w.b_dec) ** 2).mean()
        frozen = torch.relu(z) @ w.decoder.detach() + w.b_dec.detach()
        return main + 0.7 * ((x - frozen) ** 2).mean()

    check(Objective(TopK(3), L1(), 0.0, aux), ("b_enc",), 24, loss_of)
