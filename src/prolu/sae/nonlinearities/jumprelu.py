"""JumpReLU: passes z = m + b above a learned threshold (Rajamanoharan et al. 2024b, arXiv 2407.14435)."""

import math
from dataclasses import dataclass

import torch

from prolu.sae.nonlinearities.base import Nonlinearity, Pullback


@dataclass(frozen=True)
class JumpReLU(Nonlinearity):
    """f = z [z > theta], z = m + b_enc, theta = exp(log_threshold).

    With K the rectangle kernel, K(u) = 1 where |u| < 1/2, and e the bandwidth, theta has the pseudo-gradients

        d f / d theta = -(theta / e) K((z - theta) / e)      d [z > theta] / d theta = -(1 / e) K((z - theta) / e)

    and z the plain one, [z > theta]; the gate gives none to z. The paper does not subtract b_dec at the input;
    b_enc makes up for it.
    """

    bandwidth: float = 0.03
    """The paper's 0.001 is for inputs of norm 1; here they have norm sqrt(d_in), 28 for GPT-2."""

    def __post_init__(self):
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"bandwidth {self.bandwidth}: must be more than 0, and finite")

    @property
    def parameter_names(self):
        """A bias, and the logarithm of the threshold."""
        return ("b_enc", "log_threshold")

    def initial(self, name):
        """The threshold starts at the bandwidth, as in the paper."""
        return math.log(self.bandwidth) if name == "log_threshold" else 0.0

    def support(self, m, parameters):
        """[z > theta - e / 2]: the gate, and the kernel's band below it."""
        return m > self.threshold(parameters)

    def threshold(self, parameters):
        """Theta - e / 2 - b."""
        return parameters["log_threshold"].exp() - self.bandwidth / 2 - parameters["b_enc"]

    def value(self, m, parameters):
        """Z above theta."""
        z = m + parameters["b_enc"]
        return torch.where(z > parameters["log_threshold"].exp(), z, 0)

    def pullback(self, upstream, m, parameters):
        """[z > theta] with respect to m and b, the kernel with respect to log theta (theta times as much)."""
        z, theta = m + parameters["b_enc"], parameters["log_threshold"].exp()
        through = torch.where(z > theta, upstream, 0)
        to_threshold = torch.where(self._in_band(z, theta), upstream * -theta.square() / self.bandwidth, 0)
        return Pullback(through, {"b_enc": through, "log_threshold": to_threshold})

    def gate_pullback(self, m, parameters):
        """The kernel's, with respect to log theta alone."""
        z, theta = m + parameters["b_enc"], parameters["log_threshold"].exp()
        slope = (-theta / self.bandwidth).expand_as(z)
        return Pullback(torch.zeros_like(z), {"log_threshold": torch.where(self._in_band(z, theta), slope, 0)})

    def rescaled(self, parameters, factor):
        """The bias, and theta by its logarithm; the bandwidth stays, it is no part of the latent's value."""
        return {"b_enc": factor * parameters["b_enc"], "log_threshold": parameters["log_threshold"] + factor.log()}

    def _in_band(self, z, theta):
        return (z - theta).abs() < self.bandwidth / 2
