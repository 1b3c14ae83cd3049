"""A penalty's coefficient, steered so that a run's own L0 ends at a target."""

import math
from dataclasses import dataclass
from typing import NamedTuple

OFF_BY = math.log(2)
"""Of L0, in log: more than that counts as that, so that the fall from half of all latents does not wind it up."""

PROPORTIONAL = 1.0
"""Share of log(L0 / target) that acts at once."""

STEEPEST = 2.0
"""Power of the number of updates with which L0 is believed to fall, at most."""


class Steered(NamedTuple):
    """What a steering knows: all of it in a checkpoint."""

    coeff: float
    """The coefficient, without what acts at once."""
    l0: float = 0.0
    """Running mean of the batches' L0."""
    before: float = 0.0
    """That mean when the trial began."""
    fall: float = 0.0
    """Power of the number of updates with which L0 fell in the trial."""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """A controller of log(coeff) by a = log(L0 / aim), of a running mean of the run's own L0, cut to +-log 2.

        log(coeff) <- log(coeff) + a / steps      after each step;  the penalty gets  coeff * exp(PROPORTIONAL * a)

    At `end_step` the coefficient is frozen, and from there L0 falls further, by how much depends on the family. So the
    coefficient is held for a while earlier too, to see how L0 falls then, as a power of the number of updates; and
    after this trial the aim is the target and what it will fall by. Plain arithmetic on numbers that a checkpoint
    holds: a run that was resumed is steered like one that was not.
    """

    target: float
    start_step: int
    """Updates before it begins."""
    trial_steps: tuple[int, int, int]
    """Updates after which the coefficient is held, L0 is looked at, and L0 is looked at again and the trial ends."""
    end_step: int
    """Updates after which the coefficient is frozen."""
    remaining: float
    """Logarithm of how much longer the run is than `end_step`, counted in learning rate."""
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
        _, first, last = self.trial_steps
        if n_updates == first:
            state = state._replace(before=state.l0)
        if n_updates == last and state.before > 0 and state.l0 > 0:
            fall = math.log(state.before / state.l0) / math.log(last / first)
            state = state._replace(fall=min(max(fall, 0.0), STEEPEST))
        return state

    def _acts(self, n_updates: int) -> bool:
        """Whether the coefficient changes: neither held nor frozen."""
        held, _, free = self.trial_steps
        return self.start_step <= n_updates < held or free <= n_updates < self.end_step

    def _off(self, state: Steered) -> float:
        """The a above."""
        aim = self.target * math.exp(state.fall * self.remaining)
        return max(-OFF_BY, min(OFF_BY, math.log(max(state.l0, 1e-3) / aim)))
