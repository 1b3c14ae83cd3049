"""Resampling: dead latents get new directions, drawn from activations that the SAE reconstructs badly.

This is section 5 of the method's document.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.weights import Weights
from prolu.training.choices import SecondMoment
from prolu.training.moments import Moments


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """When latents are resampled, which of them, and how. The defaults are those of `RunConfig`."""

    steps: tuple[int, ...] = ()
    """The numbers of updates after which dead latents are resampled."""
    count_steps: int = 12_500
    """The number of steps, before each resampling, over which the activity of latents is counted."""
    dead_below: float = 3e-6
    """A latent is dead if it was active on less than this fraction of the counted tokens."""
    n_candidates: int = 819_200
    """The number of fresh activations among which new directions are drawn."""
    max_raw_norm: float | None = None
    """Activations whose norm before scaling is this large or larger are no candidates; None: all are."""
    exponent: float = 1.0
    """A candidate is drawn with probability proportional to its squared error to the power of this exponent."""
    encoder_norm: float = 0.02
    """The norm of a resampled encoder column, as a fraction of the mean norm over living latents."""
    second_moment: SecondMoment = "mean"
    """What Adam's second moment of a resampled latent is set to."""

    def restarts_count(self, n_updates: int) -> bool:
        """Return whether the count of activity starts anew after `n_updates` updates."""
        return any(n_updates == max(0, step - self.count_steps) for step in self.steps)


class ResampledCounts(NamedTuple):
    """What one resampling did. Files hold these names."""

    n_dead: int
    """The number of latents that were dead."""
    n_reborn: int
    """The number of latents that were given a new direction; fewer than `n_dead` only if candidates ran out."""


class Resampler:
    """One SAE's resampling at one step: it sees candidates in chunks, then gives dead latents new directions.

    It draws without replacement and with probability proportional to loss^exponent, exactly: it takes the n largest of
    exponent * log(loss) + Gumbel noise (Efraimidis and Spirakis 2006). Only those n activations are held at a time.
    """

    def __init__(
        self,
        config: Resampling,
        dead: Bool[Tensor, " d_sae"],
        reconstruct: Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_out"]],
        generator: torch.Generator,
        mesh: Mesh = ALONE,
    ):
        """Args:
        config: how latents are resampled.
        dead: which of the latents of all ranks are dead.
        reconstruct: the SAE as it is now, from normalised activations to the reconstruction of their targets.
        generator: the source of the Gumbel noise.
        mesh: the ranks that share the SAE. All are shown the same activations, and draw the same ones.
        """
        self._config = config
        self._dead = dead
        self._reconstruct = reconstruct
        self._generator = generator
        self._mesh = mesh
        self.n_dead = int(dead.sum())
        self._n_seen = 0
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows = torch.empty(0)
        self._targets: Tensor | None = None

    def offer(
        self,
        acts: Float[Tensor, "n d_in"],
        raw_norm: Float[Tensor, " n"],
        target: Float[Tensor, "n d_out"] | None = None,
    ) -> None:
        """Consider fresh activations as candidates; those beyond `n_candidates` are ignored.

        Args:
            acts: normalised activations.
            raw_norm: their norms before they were normalised.
            target: the targets of a transcoder, scaled as its inputs are; None for an SAE.
        """
        n_wanted = self._config.n_candidates - self._n_seen
        acts = acts[:n_wanted]
        raw_norm = raw_norm[:n_wanted]
        self._n_seen += len(acts)
        if not self.n_dead or not len(acts):
            return
        # Noise and keys are fp64 on the CPU, so that every device and every rank draws the same activations.
        uniform = torch.rand(len(acts), generator=self._generator, dtype=torch.float64)
        acts = acts.to(self._dead.device)
        wanted = acts if target is None else target[:n_wanted].to(self._dead.device)
        loss = (wanted - self._reconstruct(acts)).double().square().sum(1).cpu()
        # With an exponent of 0 all are drawn alike, also those that are reconstructed perfectly: log(0) times 0 is NaN.
        log_weight = self._config.exponent * loss.log() if self._config.exponent else torch.zeros_like(loss)
        keys = log_weight - (-uniform.log()).log()
        if self._config.max_raw_norm is not None:
            keys[raw_norm.cpu() >= self._config.max_raw_norm] = -torch.inf
        # A row of zeros has no direction that an encoder column or a decoder row could get.
        keys[~(acts.any(1) & wanted.any(1)).cpu()] = -torch.inf
        # The largest of all keys so far: the draw does not depend on how candidates were cut into chunks.
        every = torch.cat([self._keys, keys])
        self._keys, best = every.topk(min(self.n_dead, len(every)))
        best = best.to(acts.device)
        self._rows = torch.cat([self._rows.to(acts).view(-1, acts.shape[1]), acts])[best]
        if target is not None:
            kept = wanted[:0] if self._targets is None else self._targets
            self._targets = torch.cat([kept, wanted])[best]

    def finish_(self, weights: Weights, moments: Moments, starts: Mapping[str, float]) -> ResampledCounts:
        """Write the new directions into weights and moments, in place; on a mesh, into those of this rank's latents.

        With u the drawn activation scaled to unit norm, and v its target, which for an SAE is u too:

            W_dec row     <- v
            W_enc column  <- u * encoder_norm * (mean norm of the living columns)
            own parameters <- `starts` (b_enc: 0),  first moments <- 0,  second moments <- `second_moment`
        """
        # Equal on all ranks already, but weights that ranks share must be equal to the bit.
        targets = self._rows if self._targets is None else self._targets
        for drawn in (self._keys, self._rows, *([] if targets is self._rows else [targets])):
            self._mesh.broadcast_(drawn, 0)
        # A key of -inf is a candidate that may not be drawn: one of too large a norm, or reconstructed without error.
        may_be_drawn = (self._keys > -torch.inf).to(self._rows.device)
        directions = self._rows[may_be_drawn]
        dead = self._dead.nonzero().squeeze(1)[: len(directions)]
        if n_reborn := len(dead):
            here = self._mesh.latents(len(self._dead))
            living = ~self._dead if not self._dead.all() else torch.ones_like(self._dead)
            norms = torch.linalg.vector_norm(weights.encoder[living[here]], dim=1)
            norm = self._mesh.mean_over_latents(norms)
            unit = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)
            written = targets[may_be_drawn]
            unit_written = written / torch.linalg.vector_norm(written, dim=1, keepdim=True)
            mine = (dead >= here.start) & (dead < here.stop)
            dead = dead[mine] - here.start
            unit = unit[mine]
            weights.encoder[dead] = unit * (self._config.encoder_norm * norm)
            weights.decoder[dead] = unit_written[mine]
            for name, parameter in weights.own.items():
                parameter[dead] = starts[name]
            self._reset_moments_(dead, ~self._dead[here], moments)
        return ResampledCounts(self.n_dead, n_reborn)

    def _reset_moments_(self, dead: Tensor, living: Tensor, moments: Moments) -> None:
        # If all latents are dead, there is no mean over living ones.
        takes_mean = self._config.second_moment == "mean" and not self._dead.all()
        first, second = moments
        pairs = [(first.encoder, second.encoder), (first.decoder, second.decoder)]
        pairs += [(first.own[name], second.own[name]) for name in first.own]
        for m, v in pairs:
            m[dead] = 0
            v[dead] = self._mesh.mean_over_latents(v[living]) if takes_mean else 0
