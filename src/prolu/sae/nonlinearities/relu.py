"""ReLU, and what all nonlinearities share whose latents are m plus a bias."""

from dataclasses import dataclass

from prolu.sae.nonlinearities.base import Nonlinearity, Pullback


class Shifted(Nonlinearity):
    """f = m + b on the support, which a subclass defines.

        df/dm = 1        df/db = 1

    These are the true derivatives on the support.
    """

    bias_name = "b_enc"
    """The name of b among the parameters."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of the own parameters: the bias alone."""
        return (self.bias_name,)

    def value(self, m, parameters):
        """Return the latent where it is active, m + b."""
        return m + parameters[self.bias_name]

    def pullback(self, upstream, m, parameters):
        """Return `upstream` for m and for b."""
        return Pullback(upstream, {self.bias_name: upstream})


class Rectified(Shifted):
    """f = m + b where m + b > 0, else 0."""

    def support(self, m, parameters):
        """Return a mask that is True where m + b > 0, which is where the latent is active."""
        return m + parameters[self.bias_name] > 0

    def threshold(self, parameters):
        """Return -b, the value that m must exceed for the latent to be active."""
        # Exact: a floating-point sum is rounded, but its sign is right, so m + b > 0 and m > -b are the same entries.
        return -parameters[self.bias_name]


@dataclass(frozen=True)
class ReLU(Rectified):
    """f = ReLU(m + b_enc), with df/dm = df/db_enc = [m + b_enc > 0].

    It is the nonlinearity of the first SAEs, and the baseline of all comparisons. Its one bias does two things: it sets
    a threshold, and it shifts every value above the threshold. ProLU drops the second.
    """
