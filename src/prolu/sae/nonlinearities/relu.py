"""ReLU(m + b)."""

from dataclasses import dataclass

from prolu.sae.nonlinearities.base import Nonlinearity, Pullback


@dataclass(frozen=True)
class ReLU(Nonlinearity):
    """ReLU(m + b)."""

    def support(self, m, parameters):
        """[m + b > 0]."""
        return m + parameters["b_enc"] > 0

    def threshold(self, parameters):
        """-b: the sign of a floating-point sum is exact."""
        return -parameters["b_enc"]

    def value(self, m, parameters):
        """M + b."""
        return m + parameters["b_enc"]

    def pullback(self, upstream, m, parameters):
        """1 with respect to both."""
        return Pullback(upstream, {"b_enc": upstream})
