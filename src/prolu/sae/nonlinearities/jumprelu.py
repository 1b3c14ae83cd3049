"""JumpReLU: m + b passes unchanged above a learned threshold (Rajamanoharan et al. 2024b, arXiv 2407.14435).

Its threshold is trained as its logarithm, as in the paper, or as itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prolu.sae.nonlinearities.base import Nonlinearity, Parameters, Pullback


@dataclass(frozen=True)
class JumpReLU(Nonlinearity):
    """f = z [z > theta], z = m + b_enc, with a threshold theta of each latent.

    The derivative with respect to z is the true one, [z > theta]. The true derivative with respect to theta is 0
    almost everywhere, so theta is learned from pseudo-derivatives in a band around it. With e the bandwidth and K the
    rectangle kernel, K(u) = 1 where |u| < 1/2 and 0 elsewhere,

        df/dtheta = -(theta / e) K((z - theta) / e)        d[z > theta]/dtheta = -(1 / e) K((z - theta) / e)

    The second is for the L0 penalty; [z > theta] gets no gradient in z.

        jumprelu          theta = exp(log_threshold), and log_threshold is trained, as in the paper
        jumprelu_plain    theta = max(0, threshold), and threshold is trained, and put back to 0 where it falls below

    Adam changes a parameter by about the learning rate at each step: a logarithm moves theta by a fraction of itself,
    which is little where theta is small. SAELens (from 6.48) and dictionary_learning therefore train theta itself.

    JumpReLU exists because the penalty can then be L0 itself, which does not shrink latents as L1 does. The paper does
    not subtract b_dec at the input; a shift of b_enc by b_dec W_enc makes the two forms equal.
    """

    usual_penalty = "l0"  # through which its threshold is trained

    bandwidth: float = 0.03
    """The width e of the kernel. The paper has 0.001 for inputs of norm 1, and the norm here is sqrt(d_in), about 28
    for GPT-2."""
    is_log: bool = True
    """Whether the parameter is the logarithm of theta."""

    def __post_init__(self):
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"bandwidth {self.bandwidth}: must be more than 0, and finite")

    @property
    def parameter_names(self):
        """The bias, and the threshold or its logarithm, which keeps the threshold above 0 whatever a step does."""
        return ("b_enc", "log_threshold" if self.is_log else "threshold")

    def initial(self, name):
        """Return 0 for the bias; theta starts at the bandwidth, as in the paper."""
        if name == "b_enc":
            return 0.0
        return math.log(self.bandwidth) if self.is_log else self.bandwidth

    def theta(self, parameters: Parameters) -> Tensor:
        """Return the threshold of each latent, above which it is active; never below 0, where values are negative."""
        return parameters["log_threshold"].exp() if self.is_log else torch.relu(parameters["threshold"])

    def support(self, m, parameters):
        """Return a mask that is True where z = m + b is above theta - e / 2, with e the bandwidth.

        A latent is active only above theta. In the band of width e around theta, theta has a pseudo-gradient, so the
        half of the band that lies below theta belongs to the support too.
        """
        # By the threshold, so that every kind of step rounds it alike.
        return m > self.threshold(parameters)

    def threshold(self, parameters):
        """Return theta - e / 2 - b, the value that m must exceed to be on the support; e is the bandwidth."""
        return self.theta(parameters) - self.bandwidth / 2 - parameters["b_enc"]

    def value(self, m, parameters):
        """Return z [z > theta]."""
        z = m + parameters["b_enc"]
        # The lower half of the band is on the support for its gradient; its latents are 0.
        return torch.where(z > self.theta(parameters), z, 0)

    def pullback(self, upstream, m, parameters):
        """Return upstream * [z > theta] for m and b, and -upstream * (theta / e) K((z - theta) / e) for theta."""
        z = m + parameters["b_enc"]
        theta = self.theta(parameters)
        through = torch.where(z > theta, upstream, 0)
        slope = -(theta * self._theta_slope(theta))
        to_threshold = torch.where(self._in_band(z, theta), upstream * slope / self.bandwidth, 0)
        return Pullback(through, {"b_enc": through, self.parameter_names[1]: to_threshold})

    def gate_pullback(self, m, parameters):
        """Return 0 for m and -(1 / e) K((z - theta) / e) for theta."""
        z = m + parameters["b_enc"]
        theta = self.theta(parameters)
        slope = (-self._theta_slope(theta) / self.bandwidth).expand_as(z)
        to_threshold = torch.where(self._in_band(z, theta), slope, 0)
        return Pullback(torch.zeros_like(z), {self.parameter_names[1]: to_threshold})

    def rescaled(self, parameters, factor):
        """Return b and theta times `factor`; the bandwidth has no part in the value."""
        b = factor * parameters["b_enc"]
        if self.is_log:
            return {"b_enc": b, "log_threshold": parameters["log_threshold"] + factor.log()}
        return {"b_enc": b, "threshold": factor * parameters["threshold"]}

    def observe_(self, parameters, smallest, n_updates):
        """Put a threshold that an update has made negative back to 0, as SAELens does, so that it can rise again."""
        if not self.is_log:
            parameters["threshold"].clamp_(min=0)

    def _theta_slope(self, theta: Tensor) -> Tensor:
        """Return the derivative of theta with respect to the parameter."""
        return theta if self.is_log else torch.ones_like(theta)

    def _in_band(self, z, theta):
        """Return K((z - theta) / e), as a mask."""
        return (z - theta).abs() < self.bandwidth / 2
