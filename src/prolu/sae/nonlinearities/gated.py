"""Gated SAEs: one half decides what is on, the other how much (Rajamanoharan et al. 2024a, arXiv 2404.16014)."""

from dataclasses import dataclass

import torch

from prolu.sae.nonlinearities.base import Auxiliary, Nonlinearity, Pullback


@dataclass(frozen=True)
class Gate(Nonlinearity):
    """ReLU(m + b_gate): the gate's pre-activation, which the sparsity penalty and the auxiliary term see."""

    @property
    def parameter_names(self):
        """The gate's bias."""
        return ("b_gate",)

    def support(self, m, parameters):
        """[m + b_gate > 0]."""
        return m + parameters["b_gate"] > 0

    def threshold(self, parameters):
        """-b_gate."""
        return -parameters["b_gate"]

    def value(self, m, parameters):
        """M + b_gate."""
        return m + parameters["b_gate"]

    def pullback(self, upstream, m, parameters):
        """1 with respect to both."""
        return Pullback(upstream, {"b_gate": upstream})


@dataclass(frozen=True)
class Gated(Nonlinearity):
    """f = [m + b_gate > 0] ReLU(exp(r_mag) m + b_mag).

    The gate passes no gradient of the reconstruction. It learns from the penalty, P(ReLU(m + b_gate)), and from
    an auxiliary term: ReLU(m + b_gate) must reconstruct the input through a frozen decoder. ProLU is the case
    r_mag = b_mag = 0, another gradient aside.
    """

    gate: Gate = Gate()

    @property
    def parameter_names(self):
        """The gate's bias; logarithm of the scale, and bias, of the magnitude."""
        return ("b_gate", "r_mag", "b_mag")

    def support(self, m, parameters):
        """Where the gate is open."""
        return self.gate.support(m, parameters)

    def threshold(self, parameters):
        """-b_gate."""
        return self.gate.threshold(parameters)

    def value(self, m, parameters):
        """ReLU(exp(r_mag) m + b_mag)."""
        return torch.relu(parameters["r_mag"].exp() * m + parameters["b_mag"])

    def pullback(self, upstream, m, parameters):
        """Through the magnitude alone."""
        scaled = parameters["r_mag"].exp() * m
        through = torch.where(scaled + parameters["b_mag"] > 0, upstream, 0)
        return Pullback(parameters["r_mag"].exp() * through, {"r_mag": through * scaled, "b_mag": through})

    def penalised(self, latents, m, parameters):
        """ReLU(m + b_gate)."""
        return torch.relu(self.gate.value(m, parameters))

    def penalised_pullback(self, upstream, m, parameters):
        """Through the gate."""
        return self.gate.pullback(upstream, m, parameters)

    def rescaled(self, parameters, factor):
        """Both biases; the scale of the magnitude stays."""
        return super().rescaled(parameters, factor) | {"r_mag": parameters["r_mag"]}

    @property
    def auxiliary(self):
        """Mean of (x - b_dec - ReLU(m + b_gate) W_dec)^2, both frozen but m and b_gate."""
        return Auxiliary(self.gate, target="centred_input", coeff=1.0, trains_decoder=False)
