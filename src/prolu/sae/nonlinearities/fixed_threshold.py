"""A JumpReLU whose thresholds are given numbers: the form in which SAEs of other libraries are read."""

from dataclasses import dataclass

from prolu.sae.nonlinearities.relu import Shifted


@dataclass(frozen=True)
class Thresholded(Shifted):
    """f = z [z > threshold] [z > 0], z = m + b_enc, with df/dm = df/db_enc = 1 on the support.

    `JumpReLU` keeps log(threshold), which cannot express 0, and exp(log(t)) is not t to the bit. Here any threshold is
    kept as it was read. It gets no gradient, so training leaves it as it is.
    """

    @property
    def parameter_names(self):
        """The bias and the threshold."""
        return ("b_enc", "threshold")

    def support(self, m, parameters):
        """Return a mask that is True where z, the pre-activation with its bias, is above the threshold and above 0."""
        z = self.value(m, parameters)
        return (z > parameters["threshold"]) & (z > 0)
