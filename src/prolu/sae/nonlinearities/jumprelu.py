"""JumpReLU: m + b passes unchanged above a learned threshold (Rajamanoharan et al. 2024b, arXiv 2407.14435).

Its threshold is trained as its logarithm, as in the paper, or as itself; and its pseudo-derivatives reach the threshold
only, as in the paper, or all weights.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prolu.sae.nonlinearities.base import Auxiliary, Nonlinearity, Parameters, Pullback

PRE_ACTIVATION_COEFF = 3e-6
"""The coefficient of the pre-activation loss, lambda_P of the January 2025 update."""


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
        jumprelu_ste      as jumprelu, and with the opposite pseudo-derivatives in z, since only z - theta decides

    Adam changes a parameter by about the learning rate at each step: a logarithm moves theta by a fraction of itself,
    which is little where theta is small. SAELens (from 6.48) and dictionary_learning therefore train theta itself.

    jumprelu_ste is that of Anthropic's Circuits Updates of January 2025, for the penalty tanh: the straight-through
    gradients reach all weights, the band is wide (e = 2 at inputs of norm sqrt(d_in)), theta starts at exp(0.1), and
    latents that have been silent for long are drawn towards their threshold by the pre-activation loss

        lambda_P * mean over batch of sum_i ReLU(theta_i - z_i) |W_dec_i|        / d_in

    whose last factor is that of our squared error, and whose norms are 1. The update has it for all latents; here, as
    in SAELens, for silent ones only, since all others get gradients when they are active. Of its other choices, the
    encoder's starting weights and biases that are fitted to data are not taken over.

    JumpReLU exists because the penalty can then be L0 itself, which does not shrink latents as L1 does. The paper does
    not subtract b_dec at the input; a shift of b_enc by b_dec W_enc makes the two forms equal.
    """

    bandwidth: float = 0.03
    """The width e of the kernel. The paper has 0.001 for inputs of norm 1, and the norm here is sqrt(d_in), about 28
    for GPT-2."""
    is_log: bool = True
    """Whether the parameter is the logarithm of theta."""
    reaches_all: bool = False
    """Whether z has the opposite of theta's pseudo-derivatives."""
    initial_fraction: float = 1.0
    """What theta starts at, as a fraction of the bandwidth."""
    pre_activation_coeff: float = 0.0
    """The coefficient lambda_P of the pre-activation loss; 0 for none."""

    def __post_init__(self):
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"bandwidth {self.bandwidth}: must be more than 0, and finite")

    @property
    def usual_penalty(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The penalty through which the threshold is trained, L0; tanh where all weights get a gradient."""
        return "tanh" if self.reaches_all else "l0"

    @property
    def auxiliary(self):
        """The pre-activation loss of dead latents; None if its coefficient is 0."""
        if not self.pre_activation_coeff:
            return None
        below = BelowThreshold(self)
        return Auxiliary(below, target=None, coeff=self.pre_activation_coeff, trains_decoder=False, of_dead=True)

    @property
    def parameter_names(self):
        """The bias, and the threshold or its logarithm, which keeps the threshold above 0 whatever a step does."""
        return ("b_enc", "log_threshold" if self.is_log else "threshold")

    def initial(self, name):
        """Return 0 for the bias; theta starts at the bandwidth, as in the paper, or at a fraction of it."""
        if name == "b_enc":
            return 0.0
        theta = self.initial_fraction * self.bandwidth
        return math.log(theta) if self.is_log else theta

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
        """Return upstream * [z > theta] for m and b, and -upstream * (theta / e) K((z - theta) / e) for theta.

        Where pseudo-derivatives reach all weights, m and b also get the opposite of what theta gets.
        """
        z = m + parameters["b_enc"]
        theta = self.theta(parameters)
        through = torch.where(z > theta, upstream, 0)
        in_band = self._in_band(z, theta)
        slope = -(theta * self.theta_slope(theta))
        to_threshold = torch.where(in_band, upstream * slope / self.bandwidth, 0)
        if self.reaches_all:
            through = through + torch.where(in_band, upstream * theta / self.bandwidth, 0)
        return Pullback(through, {"b_enc": through, self.parameter_names[1]: to_threshold})

    def gate_pullback(self, m, parameters):
        """Return -(1 / e) K((z - theta) / e) for theta, and for m and b the opposite or 0."""
        z = m + parameters["b_enc"]
        theta = self.theta(parameters)
        slope = (-self.theta_slope(theta) / self.bandwidth).expand_as(z)
        in_band = self._in_band(z, theta)
        back = {self.parameter_names[1]: torch.where(in_band, slope, 0)}
        if not self.reaches_all:
            return Pullback(torch.zeros_like(z), back)
        to_z = in_band.to(z.dtype) / self.bandwidth
        return Pullback(to_z, {"b_enc": to_z} | back)

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

    def theta_slope(self, theta: Tensor) -> Tensor:
        """Return the derivative of theta with respect to the parameter."""
        return theta if self.is_log else torch.ones_like(theta)

    def _in_band(self, z, theta):
        """Return K((z - theta) / e), as a mask."""
        return (z - theta).abs() < self.bandwidth / 2


@dataclass(frozen=True)
class BelowThreshold(Nonlinearity):
    """f_aux = ReLU(theta - z): how far a latent of a JumpReLU is below its threshold, for the pre-activation loss."""

    jump: JumpReLU
    """The JumpReLU, whose parameters these are."""

    def support(self, m, parameters):
        """Return a mask that is True where z is below theta."""
        return m + parameters["b_enc"] < self.jump.theta(parameters)

    def value(self, m, parameters):
        """Return theta - z."""
        return self.jump.theta(parameters) - (m + parameters["b_enc"])

    def pullback(self, upstream, m, parameters):
        """Return -upstream for m and b, and upstream for theta."""
        to_threshold = upstream * self.jump.theta_slope(self.jump.theta(parameters))
        return Pullback(-upstream, {"b_enc": -upstream, self.jump.parameter_names[1]: to_threshold})


JUMPRELU_STE = JumpReLU(
    bandwidth=2.0, reaches_all=True, initial_fraction=math.exp(0.1) / 2, pre_activation_coeff=PRE_ACTIVATION_COEFF
)
"""The JumpReLU of the January 2025 update."""
