"""The state of a trainer: all that its steps change, and all that a checkpoint holds."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prolu.runtime.mesh import Mesh
from prolu.sae.nonlinearities import Nonlinearity
from prolu.sae.weights import Weights
from prolu.training.config import RunConfig
from prolu.training.moments import Moments
from prolu.training.resampling import Resampling
from prolu.training.steps import StepStats, check_step_kind
from prolu.training.target_l0 import L0ControllerState


class TrainerState(NamedTuple):
    """All that a trainer changes. On a mesh it is that of this rank's latents.

    The state of a stack of SAEs (`TrainerStack`) has tensors with one dimension more, in front.
    """

    weights: Weights
    moments: Moments
    last_fired: Int[Tensor, "*stack d_sae"]
    """The number of updates after which each latent was last seen active; 0 if it never was."""
    fired: Float[Tensor, "*stack d_sae"]
    """The number of tokens on which each latent was active since the count for the next resampling began."""
    n_updates: int
    """The number of updates made so far."""
    step: str
    """The step kind of the next update."""
    l0_controller: L0ControllerState
    """The penalty's coefficient, and what the L0 controller remembers where there is a target L0."""

    @classmethod
    def start(cls, weights: Weights, config: RunConfig) -> "TrainerState":
        """Return the state before the first update of these weights."""
        never = torch.zeros(weights.d_sae, dtype=torch.int64, device=weights.encoder.device)
        return cls(
            weights,
            Moments.zeros_like(weights),
            last_fired=never,
            # fp64, which counts tokens exactly: fp32 stops at 16 million.
            fired=never.double(),
            n_updates=0,
            # At the start half of all latents are active.
            step="dense" if config.step in ("auto", "stacked") else config.step,
            l0_controller=L0ControllerState(config.coeff),
        )

    def observe_(self, stats: StepStats, nonlinearity: Nonlinearity, resampling: Resampling) -> None:
        """Note, in place, which latents were active in the update that has just been made.

        The nonlinearity sees it too: BatchTopK moves its threshold.
        """
        n_updates = self.n_updates + 1
        # Filled by a mask and not by indices, because the CPU would wait for a GPU to report the number of indices.
        self.last_fired.masked_fill_(stats.fired > 0, n_updates)
        nonlinearity.observe_(self.weights.own, stats.smallest.unsqueeze(-1), n_updates)
        if resampling.steps:
            if resampling.restarts_count(self.n_updates):
                self.fired.zero_()
            self.fired.add_(stats.fired)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names that checkpoints use."""
        parts = {"weights": self.weights, "first": self.moments.first, "second": self.moments.second}
        named = {}
        for part, weights in parts.items():
            named |= {f"{part}.{name}": t for name, t in weights.named().items()}
        return named | {"last_fired": self.last_fired, "fired": self.fired}

    def counters(self) -> dict[str, Any]:
        """Return the numbers and names beside the tensors, by the names that checkpoints use."""
        # "steered" is the key of checkpoints since the first version; it stays, so that they can still be resumed.
        return {
            "n_updates": self.n_updates,
            "step": self.step,
            "steered": [float(number) for number in self.l0_controller],
        }

    def whole_tensors(self, mesh: Mesh) -> dict[str, Tensor]:
        """Return `tensors` of all latents. All ranks ask together; only the first gets any."""
        tensors = self.tensors()
        if mesh.n_ranks == 1:
            return tensors
        found = {name: mesh.whole(t) if _is_split(name) else t for name, t in tensors.items()}
        return {name: t for name, t in found.items() if t is not None} if mesh.is_first else {}

    def restored_(
        self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any], n_steps: int, mesh: Mesh
    ) -> "TrainerState":
        """Copy a whole state into this one's tensors, each rank its part, and return this one with its counters.

        Everything is checked before anything is copied.

        Args:
            tensors: what `whole_tensors` returned.
            counters: what `counters` returned.
            n_steps: the number of steps of the run.
            mesh: the ranks that share the SAE; it need not be the mesh that the state was saved from.

        Raises:
            ValueError: it is not a state of this run.
        """
        own = self.tensors()
        d_sae = len(self.fired) * mesh.n_latent
        if tensors.keys() != own.keys():
            raise ValueError(
                f"the state is not one of this run: it lacks the tensors {sorted(own.keys() - tensors.keys())} and has "
                f"{sorted(tensors.keys() - own.keys())}, which do not belong to it"
            )
        for name, here in own.items():
            found = tensors[name]
            shape = torch.Size([d_sae, *here.shape[1:]]) if _is_split(name) else here.shape
            if found.shape != shape or found.dtype != here.dtype:
                raise ValueError(
                    f"{name} is {found.dtype} {tuple(found.shape)}: it must be {here.dtype} {tuple(shape)}"
                )
            if not found.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite")
        n_updates = counters["n_updates"]
        step = counters["step"]
        controller = counters["steered"]
        if not isinstance(n_updates, int) or not 0 <= n_updates <= n_steps:
            raise ValueError(f"n_updates {n_updates!r}: must be a whole number from 0 to {n_steps}")
        check_step_kind(step)
        if len(controller) != len(L0ControllerState._fields) or not all(0 <= value < math.inf for value in controller):
            raise ValueError(f"the state of the L0 controller is {controller!r}: must be two finite numbers")
        latents = mesh.latents(d_sae)
        for name, here in own.items():
            here.copy_(tensors[name][latents] if _is_split(name) else tensors[name])
        return self._replace(n_updates=n_updates, step=step, l0_controller=L0ControllerState(*controller))


def _is_split(name: str) -> bool:
    """Return whether a tensor of a state has a row for each latent: all but those of b_dec, b_out and W_skip."""
    return not name.endswith((".b_dec", ".b_out", ".skip"))
