"""A JumpReLU whose thresholds are numbers, kept as they are: what SAEs of other libraries come to."""

from dataclasses import dataclass

from prolu.sae.nonlinearities.base import Nonlinearity, Pullback


@dataclass(frozen=True)
class Thresholded(Nonlinearity):
    """f = ReLU(z) [z > threshold], z = m + b_enc.

    `JumpReLU` keeps log(threshold), which has no 0 and no bit-exact exponential; here any threshold will do. It has no
    gradient, so training leaves it alone.
    """

    @property
    def parameter_names(self):
        """A bias, and the threshold."""
        return ("b_enc", "threshold")

    def support(self, m, parameters):
        """[z > threshold] [z > 0]."""
        z = m + parameters["b_enc"]
        return (z > parameters["threshold"]) & (z > 0)

    def value(self, m, parameters):
        """M + b."""
        return m + parameters["b_enc"]

    def pullback(self, upstream, m, parameters):
        """1 with respect to m and b."""
        return Pullback(upstream, {"b_enc": upstream})
