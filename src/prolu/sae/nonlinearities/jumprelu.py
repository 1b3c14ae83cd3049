"""JumpReLU: m + b passes unchanged above a learned threshold (Rajamanoharan et al. 2024b, arXiv 2407.14435)."""

import math
from dataclasses import dataclass

import torch

from prolu.sae.nonlinearities.base import Nonlinearity, Pullback


@dataclass(frozen=True)
class JumpReLU(Nonlinearity):
    """f = z [z > theta], z = m + b_enc, theta = exp(log_threshold).

    The derivative with respect to z is the true one, [z > theta]. The true derivative with respect to theta is 0
    almost everywhere, so theta is learned from pseudo-derivatives in a band around it. With e the bandwidth and K the
    rectangle kernel, K(u) = 1 where |u| < 1/2 and 0 elsewhere,

        df/dtheta = -(theta / e) K((z - theta) / e)        d[z > theta]/dtheta = -(1 / e) K((z - theta) / e)

    The second is for the L0 penalty; [z > theta] gets no gradient in z. Both are multiplied by theta here, since the
    parameter is log theta.

    It exists because the penalty can then be L0 itself, which does not shrink latents as L1 does. The paper does not
    subtract b_dec at the input; a shift of b_enc by b_dec W_enc makes the two forms equal.
    """

    usual_penalty = "l0"  # through which its threshold is trained

    bandwidth: float = 0.03
    """The width e of the kernel. The paper has 0.001 for inputs of norm 1, and the norm here is sqrt(d_in), about 28
    for GPT-2."""

    def __post_init__(self):
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"bandwidth {self.bandwidth}: must be more than 0, and finite")

    @property
    def parameter_names(self):
        """The bias and the logarithm of the threshold, which keeps the threshold above 0 whatever a step does."""
        return ("b_enc", "log_threshold")

    def initial(self, name):
        """Return 0 for the bias and log(bandwidth) for log_threshold: in the paper, theta starts at the bandwidth."""
        return math.log(self.bandwidth) if name == "log_threshold" else 0.0

    def support(self, m, parameters):
        """Return a mask that is True where z = m + b is above theta - e / 2, with e the bandwidth.

        A latent is active only above theta. In the band of width e around theta, theta has a pseudo-gradient, so the
        half of the band that lies below theta belongs to the support too.
        """
        # By the threshold, so that every kind of step rounds it alike.
        return m > self.threshold(parameters)

    def threshold(self, parameters):
        """Return theta - e / 2 - b, the value that m must exceed to be on the support; e is the bandwidth."""
        return parameters["log_threshold"].exp() - self.bandwidth / 2 - parameters["b_enc"]

    def value(self, m, parameters):
        """Return z [z > theta]."""
        z = m + parameters["b_enc"]
        # The lower half of the band is on the support for its gradient; its latents are 0.
        return torch.where(z > parameters["log_threshold"].exp(), z, 0)

    def pullback(self, upstream, m, parameters):
        """Return upstream * [z > theta] for m and b, and -upstream * (theta^2 / e) K((z - theta) / e) for log theta."""
        z = m + parameters["b_enc"]
        theta = parameters["log_threshold"].exp()
        through = torch.where(z > theta, upstream, 0)
        to_threshold = torch.where(self._in_band(z, theta), upstream * -theta.square() / self.bandwidth, 0)
        return Pullback(through, {"b_enc": through, "log_threshold": to_threshold})

    def gate_pullback(self, m, parameters):
        """Return 0 for m and -(theta / e) K((z - theta) / e) for log theta."""
        z = m + parameters["b_enc"]
        theta = parameters["log_threshold"].exp()
        slope = (-theta / self.bandwidth).expand_as(z)
        return Pullback(torch.zeros_like(z), {"log_threshold": torch.where(self._in_band(z, theta), slope, 0)})

    def rescaled(self, parameters, factor):
        """Return b times `factor`, and log theta plus its logarithm; the bandwidth has no part in the value."""
        return {"b_enc": factor * parameters["b_enc"], "log_threshold": parameters["log_threshold"] + factor.log()}

    def _in_band(self, z, theta):
        """Return K((z - theta) / e), as a mask."""
        return (z - theta).abs() < self.bandwidth / 2
