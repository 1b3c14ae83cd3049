"""Every family that a step must know: small SAEs of it, and the loss that it is trained by."""

from dataclasses import replace

import torch

from prolu import SAEConfig
from prolu.sae.nonlinearities import nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.training.starting_weights import initial_weights
from prolu.training.steps import Objective

BASELINES = {
    "gated": ("gated", "l1"),
    "gated_sqrt": ("gated", "sqrt_l1"),
    "jumprelu": ("jumprelu(0.4)", "l0"),
    "jumprelu_l1": ("jumprelu(0.4)", "l1"),
    "jumprelu_plain": ("jumprelu_plain(0.4)", "l0"),
    "jumprelu_plain_l1": ("jumprelu_plain(0.4)", "l1"),
    "jumprelu_ste_tanh": ("jumprelu_ste(0.4)", "tanh"),
    "jumprelu_ste_l0": ("jumprelu_ste(0.4)", "l0"),
    "topk": ("topk(5)", "none"),
    "topk_l1": ("topk(5)", "l1"),
    "batchtopk": ("batchtopk(3)", "none"),
}
COEFF = 0.02

REVIVED = [name for name in BASELINES if "topk" in name or "ste" in name]
"""Those with an auxiliary term for dead latents."""


def weights_for(name, d_in=12, d_sae=40, dtype=torch.float64):
    nonlinearity = BASELINES[name][0]
    weights = initial_weights(SAEConfig(d_in=d_in, d_sae=d_sae, nonlinearity=nonlinearity), 5, dtype)
    g = torch.Generator().manual_seed(6)
    for parameter in (weights.b_dec, *weights.own.values()):
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=g, dtype=dtype))
    if "threshold" in weights.own:
        weights.own["threshold"].abs_()  # as trainers keep it
    return weights


def objective_for(name, coeff=COEFF, dead=None):
    code = nonlinearity_named(BASELINES[name][0]).in_training
    term = code.auxiliary
    if term is not None and term.of_dead:
        term = None if dead is None else replace(term, among=dead)
    return Objective(code, penalty_named(BASELINES[name][1]), coeff, term)
