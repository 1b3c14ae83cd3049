"""Which latents an auxiliary term revives, found without keeping a GPU waiting."""

import math
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from prolu.runtime.mesh import Mesh
from prolu.sae.nonlinearities import Auxiliary

STEPS_BETWEEN_LOOKS = 100
"""The number of steps, once some latent is dead, after which a GPU is asked again whether that is still so."""


class DeadLatents:
    """Finds the dead latents of an SAE, or of each SAE of a stack, for the auxiliary loss term that revives them.

    A latent is dead if it has not been active on any of the last `dead_tokens` tokens.
    """

    def __init__(self, term: Auxiliary | None, dead_tokens: int, batch_size: int, mesh: Mesh):
        """Args:
        term: the auxiliary term of the loss, if there is one.
        dead_tokens: the number of tokens without activity after which a latent is dead.
        batch_size: the number of tokens per step.
        mesh: the ranks that share the SAE.
        """
        self._term = term
        self._silent_steps = math.ceil(dead_tokens / batch_size)
        self._mesh = mesh
        self._next_look = 0
        self._may_be_some = False

    def term_now(self, last_fired: Int[Tensor, "*stack d_sae"], n_updates: int) -> Auxiliary | None:
        """Return the auxiliary term of the next update; None if there is none, or if it needs dead latents and none is.

        On a GPU it may also be a term in which no latent takes part, whose value and gradients are 0.

        Args:
            last_fired: the number of updates after which each latent was last active.
            n_updates: the number of updates made.
        """
        if self._term is None or not self._term.of_dead:
            return self._term
        dead = n_updates - last_fired >= self._silent_steps
        return replace(self._term, among=dead) if self._are_some(dead, last_fired, n_updates) else None

    def forget(self) -> None:
        """Look again at the next step, because the latents were restored from elsewhere."""
        self._next_look = 0

    def _are_some(self, dead: Tensor, last_fired: Tensor, n_updates: int) -> bool:
        """Return whether some latent is dead or, on a GPU, may be. All ranks get the same answer."""
        if not dead.is_cuda:
            return self._mesh.any(bool(dead.any()))
        return self._some_on_gpu(last_fired, n_updates)

    def _some_on_gpu(self, last_fired: Tensor, n_updates: int) -> bool:
        # Reading a number from a GPU waits until its work is done. So it is read only at steps at which it can matter:
        # a latent that has been silent for some steps needs the rest of `_silent_steps` to be dead.
        if n_updates >= self._next_look:
            silent = n_updates - int(last_fired.min())
            self._may_be_some = self._mesh.any(silent >= self._silent_steps)
            wait = STEPS_BETWEEN_LOOKS if self._may_be_some else self._silent_steps - silent
            self._next_look = n_updates + (1 if self._mesh.n_ranks > 1 else wait)
        return self._may_be_some
