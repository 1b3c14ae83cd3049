"""Gated SAEs: one half decides which latents are active, the other their values (Rajamanoharan et al. 2024a).

The source is arXiv 2404.16014.
"""

from dataclasses import dataclass

import torch

from prolu.sae.nonlinearities.base import Auxiliary, Nonlinearity, Pullback
from prolu.sae.nonlinearities.relu import Rectified


@dataclass(frozen=True)
class Gate(Rectified):
    """ReLU(m + b_gate), the gate's own activation, which the penalty and the auxiliary term see.

    Its derivatives with respect to m and b_gate are [m + b_gate > 0].
    """

    bias_name = "b_gate"


@dataclass(frozen=True)
class Gated(Nonlinearity):
    """f = [m + b_gate > 0] ReLU(exp(r_mag) m + b_mag).

    With h = [exp(r_mag) m + b_mag > 0], the derivatives on the open gate are

        df/dm = exp(r_mag) h        df/dr_mag = exp(r_mag) m h        df/db_mag = h        df/db_gate = 0

    So the gate learns nothing from the reconstruction. It learns from the penalty, which acts on ReLU(m + b_gate)
    instead of f, and from an auxiliary term, in which ReLU(m + b_gate) reconstructs the input through a frozen decoder.

    It exists because an L1 penalty on f shrinks f: here the penalty acts on the gate only, and the magnitude is free.
    ProLU has the values of a Gated SAE with r_mag = b_mag = 0 and b_gate = b_enc, and another gradient.
    """

    gate: Gate = Gate()
    """The half that decides which latents are active."""

    @property
    def parameter_names(self):
        """The bias of the gate, and the logarithm of the scale and the bias of the magnitude."""
        return ("b_gate", "r_mag", "b_mag")

    def support(self, m, parameters):
        """Return a mask that is True where m + b_gate > 0, that is, where the gate is open."""
        return self.gate.support(m, parameters)

    def threshold(self, parameters):
        """Return -b_gate, the value that m must exceed for the gate to be open."""
        return self.gate.threshold(parameters)

    def value(self, m, parameters):
        """Return ReLU(exp(r_mag) m + b_mag)."""
        return torch.relu(parameters["r_mag"].exp() * m + parameters["b_mag"])

    def pullback(self, upstream, m, parameters):
        """Return the gradient through the magnitude."""
        scaled = parameters["r_mag"].exp() * m
        # The magnitude has a ReLU of its own: an open gate may stand before a magnitude of 0.
        through = torch.where(scaled + parameters["b_mag"] > 0, upstream, 0)
        return Pullback(parameters["r_mag"].exp() * through, {"r_mag": through * scaled, "b_mag": through})

    def penalised(self, latents, m, parameters):
        """Return the quantity that the penalty acts on, ReLU(m + b_gate), instead of the latent."""
        return torch.relu(self.gate.value(m, parameters))

    def penalised_pullback(self, upstream, m, parameters):
        """Return the gradient through the gate."""
        return self.gate.pullback(upstream, m, parameters)

    def rescaled(self, parameters, factor):
        """Return both biases times `factor`, and r_mag as it is."""
        # exp(r_mag) multiplies m, which carries the factor already.
        return super().rescaled(parameters, factor) | {"r_mag": parameters["r_mag"]}

    @property
    def auxiliary(self):
        """The mean over batch and d_in of (ReLU(m + b_gate) W_dec - (x - b_dec))^2, with W_dec and the target frozen.

        It keeps the gate's direction useful: without it only the penalty would move the gate, and would shut it.
        """
        return Auxiliary(self.gate, target="centred_target", coeff=1.0, trains_decoder=False)
