"""TopK (Gao et al. 2024, arXiv 2406.04093) and BatchTopK (Bussmann et al. 2024, arXiv 2412.06410)."""

from dataclasses import dataclass

from prolu.sae.nonlinearities.base import Auxiliary, Nonlinearity, Pullback, Selection

AUXK_COEFF = 1 / 32
"""Gao's alpha."""

MOST_AUXILIARY = 512
"""Gao's k_aux: dead latents, a token, that model the residual."""

HORIZON = 100
"""Batches over which BatchTopK's threshold is averaged."""


@dataclass(frozen=True)
class TopK(Nonlinearity):
    """f = TopK(ReLU(m + b_enc)): the k largest of a token, or the batch * k largest of a batch.

    With AuxK: the residual is reconstructed by the `MOST_AUXILIARY` largest among latents that have long been
    silent; alpha * mean (f_aux W_dec - (x - x_hat))^2, the residual a constant.
    """

    selection: Selection  # pyright: ignore[reportIncompatibleVariableOverride]
    has_auxiliary: bool = True

    def support(self, m, parameters):
        """[m + b > 0], of which `selection` leaves some."""
        return m + parameters["b_enc"] > 0

    def threshold(self, parameters):
        """-b."""
        return -parameters["b_enc"]

    def value(self, m, parameters):
        """M + b."""
        return m + parameters["b_enc"]

    def pullback(self, upstream, m, parameters):
        """1 with respect to both."""
        return Pullback(upstream, {"b_enc": upstream})

    @property
    def auxiliary(self):
        """AuxK."""
        if not self.has_auxiliary:
            return None
        dead = TopK(Selection(MOST_AUXILIARY), has_auxiliary=False)
        return Auxiliary(dead, target="residual", coeff=AUXK_COEFF, trains_decoder=True, of_dead=True)


@dataclass(frozen=True)
class BatchTopK(Nonlinearity):
    """Trained as TopK over a batch; used as f = z [z >= threshold], z = m + b_enc, one threshold for all latents.

    The threshold is the mean over batches of the smallest latent that was on, over about the last `HORIZON`.
    """

    k: int

    @property
    def parameter_names(self):
        """The threshold is no parameter that is trained, but belongs to the SAE."""
        return ("b_enc", "threshold")

    def support(self, m, parameters):
        """[z > 0] [z >= threshold]."""
        z = m + parameters["b_enc"]
        return (z > 0) & (z >= parameters["threshold"])

    def value(self, m, parameters):
        """M + b."""
        return m + parameters["b_enc"]

    def pullback(self, upstream, m, parameters):
        """1 with respect to m and b."""
        return Pullback(upstream, {"b_enc": upstream})

    @property
    def in_training(self):
        """The batch's own selection, with AuxK."""
        return TopK(Selection(self.k, over_batch=True))

    def observe_(self, parameters, smallest, n_updates):
        """A running mean that forgets."""
        rate = max(1 / n_updates, 1 / HORIZON)
        parameters["threshold"].lerp_(smallest.to(parameters["threshold"]), rate)
