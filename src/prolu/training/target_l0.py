"""A penalty's coefficient, steered so that a run's own L0 ends at a target."""

import math
from dataclasses import dataclass
from typing import NamedTuple

OFF_BY = math.log(2)
"""Of L0, in log: more than that counts as that, so that the fall from half of all latents does not wind it up."""

PROPORTIONAL = 1.0
"""Share of log(L0 / target) that acts at once."""


class Steered(NamedTuple):
    """What a steering knows: all of it in a checkpoint."""

    coeff: float
    """The coefficient, without what acts at once."""
    l0: float = 0.0
    """Running mean of the batches' L0."""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """A controller of log(coeff) by a = log(L0 / target), of a running mean of the run's own L0, cut to +-log 2.

        log(coeff) <- log(coeff) + a / steps      after each step;  the penalty gets  coeff * exp(PROPORTIONAL * a)

    until `end_step`; then the coefficient is frozen, and L0 ends where the rest of the run takes it. Plain arithmetic
    on numbers that a checkpoint holds: a run that was resumed is steered like one that was not.
    """

    target: float
    start_step: int
    """Updates before it begins."""
    end_step: int
    """Updates after which the coefficient is frozen."""
    steps: float
    """Updates in which the coefficient changes by as much as L0 is off."""

    def coeff(self, state: Steered, n_updates: int) -> float:
        """The coefficient for the next update."""
        return state.coeff * math.exp(PROPORTIONAL * self._off(state)) if self._acts(n_updates) else state.coeff

    def after(self, state: Steered, l0: float, n_updates: int) -> Steered:
        """What it knows after update number `n_updates` (from 1), whose batch had this L0."""
        rate = max(1 / n_updates, min(1.0, 5 / self.steps))
        state = state._replace(l0=state.l0 + rate * (l0 - state.l0))
        if self._acts(n_updates):
            state = state._replace(coeff=state.coeff * math.exp(self._off(state) / self.steps))
        return state

    def _acts(self, n_updates: int) -> bool:
        """Whether the coefficient changes."""
        return self.start_step <= n_updates < self.end_step

    def _off(self, state: Steered) -> float:
        """The a above."""
        return max(-OFF_BY, min(OFF_BY, math.log(max(state.l0, 1e-3) / self.target)))
