"""Dead latents and their rebirth as directions that the SAE reconstructs badly (section 5 of the method)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.sae.weights import Weights

SECOND_MOMENTS = ("mean", "zero")


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """When latents are resampled, which, and how: the defaults are the author's."""

    steps: tuple[int, ...] = ()
    """Numbers of updates after which dead latents are resampled."""
    count_steps: int = 12_500
    """Firings are counted over so many steps before each of them."""
    dead_below: float = 3e-6
    """Dead: fires on a smaller share of those tokens."""
    n_candidates: int = 819_200
    """Fresh activations among which new directions are drawn."""
    max_raw_norm: float | None = None
    """Activations of this norm or more are left out; None: none are."""
    exponent: float = 1.0
    """An activation is drawn with probability proportional to its squared error to this power."""
    encoder_norm: float = 0.02
    """Norm of a new encoder column, as a share of the mean over living latents."""
    second_moment: str = "mean"
    """Adam's second moment of what is new: mean (over the living) or zero."""

    def restarts_count(self, n_updates: int) -> bool:
        """Whether firings are counted from here."""
        return any(n_updates == max(0, step - self.count_steps) for step in self.steps)


class Resampled(NamedTuple):
    """What one resampling did."""

    n_dead: int
    """Latents that were dead."""
    n_reborn: int
    """Latents that were given a new direction; fewer only if candidates ran out."""


class Rebirth:
    """One SAE's resampling at one step: sees candidates in chunks, then gives its dead latents new directions.

    Draws without replacement with probability proportional to loss^exponent, exactly: the n largest of
    exponent * log(loss) + Gumbel noise (Efraimidis and Spirakis). Only those n activations are held.
    """

    def __init__(
        self,
        config: Resampling,
        dead: Bool[Tensor, " d_sae"],
        reconstruct: Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_in"]],
        generator: torch.Generator,
        mesh: Mesh = ALONE,
    ):
        """Args: `reconstruct` is the SAE as it is now, in the space it works in.

        On a mesh, `dead` is of all latents; all ranks are shown the same activations, and draw the same.
        """
        self._mesh = mesh
        self._config, self._dead, self._reconstruct, self._generator = config, dead, reconstruct, generator
        self.n_dead, self._n_seen = int(dead.sum()), 0
        self._keys, self._rows = torch.empty(0, dtype=torch.float64), torch.empty(0)

    def offer(self, acts: Float[Tensor, "n d_in"], raw_norm: Float[Tensor, " n"]) -> None:
        """Shows it fresh activations, normalised, with their norms before; those beyond `n_candidates` are ignored."""
        acts, raw_norm = (t[: self._config.n_candidates - self._n_seen] for t in (acts, raw_norm))
        self._n_seen += len(acts)
        if not self.n_dead or not len(acts):
            return
        uniform = torch.rand(len(acts), generator=self._generator, dtype=torch.float64)
        acts = acts.to(self._dead.device)
        loss = (acts - self._reconstruct(acts)).double().square().sum(1).cpu()
        keys = self._config.exponent * loss.log() - (-uniform.log()).log()
        if self._config.max_raw_norm is not None:
            keys[raw_norm.cpu() >= self._config.max_raw_norm] = -torch.inf
        every = torch.cat([self._keys, keys])
        self._keys, best = every.topk(min(self.n_dead, len(every)))
        self._rows = torch.cat([self._rows.to(acts).view(-1, acts.shape[1]), acts])[best.to(acts.device)]

    def finish_(self, weights: Weights, first: Weights, second: Weights, starts: Mapping[str, float]) -> Resampled:
        """Writes the new directions into weights and moments, in place; of a mesh, into those of this rank's latents.

        With u the drawn activation scaled to unit norm: W_dec row u, W_enc column u times `encoder_norm`
        times the mean norm of the living columns, own parameters as in `starts` (b_enc 0), first moments 0.
        """
        for drawn in (self._keys, self._rows):  # equal on all ranks already, and must be to the bit
            self._mesh.broadcast_(drawn, 0)
        directions = self._rows[(self._keys > -torch.inf).to(self._rows.device)]
        dead = self._dead.nonzero().squeeze(1)[: len(directions)]
        if n_reborn := len(dead):
            here = self._mesh.latents(len(self._dead))
            living = (~self._dead if not self._dead.all() else torch.ones_like(self._dead))[here]
            norm = self._mesh.mean_over_latents(torch.linalg.vector_norm(weights.encoder[living], dim=1))
            unit = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)
            mine = (dead >= here.start) & (dead < here.stop)
            dead, unit = dead[mine] - here.start, unit[mine]
            weights.encoder[dead] = unit * (self._config.encoder_norm * norm)
            weights.decoder[dead] = unit
            for name, parameter in weights.own.items():
                parameter[dead] = starts[name]
            self._reset_moments_(dead, ~self._dead[here], first, second)
        return Resampled(self.n_dead, n_reborn)

    def _reset_moments_(self, dead: Tensor, living: Tensor, first: Weights, second: Weights) -> None:
        keeps_mean = self._config.second_moment == "mean" and not self._dead.all()
        moments = [(first.encoder, second.encoder), (first.decoder, second.decoder)]
        moments += [(first.own[name], second.own[name]) for name in first.own]
        for m, v in moments:
            m[dead] = 0
            v[dead] = self._mesh.mean_over_latents(v[living]) if keeps_mean else 0
