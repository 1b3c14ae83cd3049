"""TopK (Gao et al. 2024, arXiv 2406.04093) and BatchTopK (Bussmann et al. 2024, arXiv 2412.06410)."""

from dataclasses import dataclass

from prolu.runtime.checks import at_least_1
from prolu.sae.nonlinearities.base import Auxiliary, Selection
from prolu.sae.nonlinearities.relu import Rectified, Shifted

AUXK_COEFF = 1 / 32
"""The coefficient of AuxK, called alpha by Gao et al."""

MOST_AUXILIARY = 512
"""The largest number of dead latents per token that reconstruct the residual, called k_aux by Gao et al."""

HORIZON = 100
"""The number of batches over which BatchTopK's threshold is averaged."""


@dataclass(frozen=True)
class TopK(Rectified):
    """f = ReLU(m + b_enc) for the k largest latents of a token, or the k * n_tokens largest of a batch, else 0.

    The derivatives with respect to m and b_enc are 1 where f is active, else 0: the choice itself has no gradient.

    It exists because L0 is then set directly, and needs no penalty, which would shrink latents.

    With AuxK, dead latents reconstruct the residual that the other latents leave, and so get gradients with which they
    can become active again: the loss gains alpha * mean (f_aux W_dec - (x - x_hat))^2, where f_aux are the
    `MOST_AUXILIARY` largest dead latents of each token.
    """

    usual_penalty = "none"  # k sets the L0

    selection: Selection  # pyright: ignore[reportIncompatibleVariableOverride]
    """How many latents are kept, per token or over a batch."""
    has_auxiliary: bool = True
    """Whether AuxK is part of the loss."""

    @property
    def auxiliary(self):
        """The auxiliary loss AuxK, in which dead latents reconstruct the error; None if `has_auxiliary` is False."""
        if not self.has_auxiliary:
            return None
        # The same kind of choice, but always per token, and without an auxiliary term of its own.
        dead = TopK(Selection(MOST_AUXILIARY), has_auxiliary=False)
        return Auxiliary(dead, target="residual", coeff=AUXK_COEFF, trains_decoder=True, of_dead=True)


@dataclass(frozen=True)
class BatchTopK(Shifted):
    """f = z [z > 0] [z >= threshold], z = m + b_enc, with one threshold for all latents; trained as TopK over a batch.

    The derivatives with respect to m and b_enc are 1 on the support. The threshold gets no gradient: it is the mean of
    the smallest active latent of a batch, over about the last `HORIZON` batches.

    It exists because tokens need different numbers of latents: only the mean of L0 is set. After training, a threshold
    takes the place of the choice, so that the latents of a token do not depend on the other tokens of its batch.
    """

    usual_penalty = "none"  # k sets the L0

    k: int
    """The mean number of latents that are kept per token in training."""

    def __post_init__(self):
        at_least_1("k", self.k)

    @property
    def parameter_names(self):
        """The bias and the threshold, which belongs to the SAE although it is not trained by gradients."""
        return ("b_enc", "threshold")

    def support(self, m, parameters):
        """Return a mask that is True where z = m + b_enc is above 0 and reaches the threshold."""
        z = self.value(m, parameters)
        # The smallest active latent of a batch was active, so a latent at the threshold is too.
        return (z > 0) & (z >= parameters["threshold"])

    @property
    def in_training(self):
        """The selection over a batch, with AuxK."""
        return TopK(Selection(self.k, over_batch=True))

    def observe_(self, parameters, smallest, n_updates):
        """Move the threshold towards `smallest`: by 1 / n_updates at first, by 1 / HORIZON later.

        So it is the plain mean of the first `HORIZON` batches, and from then on forgets older ones exponentially.
        """
        rate = max(1 / n_updates, 1 / HORIZON)
        parameters["threshold"].lerp_(smallest.to(parameters["threshold"]), rate)
