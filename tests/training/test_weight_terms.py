"""Terms of the loss that depend on the weights alone, in every kind of step."""

from dataclasses import dataclass, replace

import pytest
import torch

from prolu import RunConfig, Trainer
from prolu.sae.scaling import normalise
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.objective import WeightTerm
from prolu.training.trainer_stack import TrainerStack
from support.steps import relative
from support.synthetic import sparse_activations

D_IN, BATCH, STEPS = 11, 24, 10
CONFIG = RunConfig(d_sae=30, n_tokens=STEPS * BATCH, lr=1e-2, coeff=0.01, nonlinearity="relu", penalty="l1")


def of(rows):
    """The mean of the squared cosines of different rows of unit norm."""
    n = len(rows)
    return ((rows @ rows.T) * (1 - torch.eye(n, dtype=rows.dtype))).square().sum() / (n * (n - 1))


@dataclass(frozen=True)
class Orthogonality(WeightTerm):
    coeff: float

    def add_gradients_(self, weights, gradients):
        rows = weights.decoder
        n = rows.shape[-2]
        cosines = rows @ rows.mT - torch.eye(n, dtype=rows.dtype)
        gradients.decoder.add_(cosines @ rows, alpha=4 * self.coeff / (n * (n - 1)))


def trained(kind, terms, limit=None):
    step_kind = "dense" if kind in ("gpu", "stacked") else kind
    trainer = Trainer(replace(CONFIG, step=step_kind, max_grad_norm=limit), D_IN, BATCH, dtype=torch.float64)
    trainer.objective = replace(trainer.objective, weight_terms=terms)
    if kind == "gpu":
        trainer.steps = {"dense": CudaStep(trainer.state.weights, BATCH)}
    step = TrainerStack([trainer]).step if kind == "stacked" else trainer.step
    for n in range(STEPS):
        step(normalise(sparse_activations(BATCH, D_IN, seed=n))[0])
    return trainer.state.weights


def test_the_gradient_is_autograds():
    weights = Trainer(CONFIG, D_IN, BATCH, dtype=torch.float64).state.weights
    leaf = weights.decoder.clone().requires_grad_()
    (3 * of(leaf)).backward()
    gradients = weights.zeros_like()
    Orthogonality(3.0).add_gradients_(weights, gradients)
    # Along a row they differ, since the term takes rows of unit norm for granted; the projection takes that away.
    along = (leaf.grad * weights.decoder).sum(1, keepdim=True) * weights.decoder
    ours = gradients.decoder - (gradients.decoder * weights.decoder).sum(1, keepdim=True) * weights.decoder
    assert relative(ours, leaf.grad - along) < 1e-12


@pytest.mark.parametrize("limit", [None, 0.05])
@pytest.mark.parametrize("kind", ["sparse", "sparse_torch", "gpu", "stacked"])
def test_every_kind_of_step_has_the_term(kind, limit):
    terms = (Orthogonality(5.0),)
    wanted = trained("dense", terms, limit)
    for ours, theirs in zip(trained(kind, terms, limit).tensors(), wanted.tensors(), strict=True):
        assert relative(ours, theirs) < 1e-9


def test_the_term_does_what_it_says():
    assert of(trained("sparse", (Orthogonality(50.0),)).decoder) < 0.9 * of(trained("sparse", ()).decoder)
