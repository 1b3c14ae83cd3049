"""A penalty's coefficient, steered so that a run's own L0 reaches a target."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Steering:
    """An integral controller of log(coeff), by the run's own L0 and nothing else.

    After each step, with a = log(L0 / target) of a running mean of the batches' L0, cut to +-`most`:

        log(coeff) <- log(coeff) + a / steps

    until `end_step`; then the coefficient stays. Plain arithmetic on numbers that a checkpoint holds, so a run that
    was resumed is steered like one that was not.
    """

    target: float
    start_step: int
    """Updates before it begins: L0 falls from half of all latents at first, whatever the coefficient."""
    end_step: int
    """Updates after which the coefficient is frozen."""
    steps: float
    """Updates in which the coefficient changes by as much as L0 is off."""
    most: float = math.log(2)

    def average(self, average: float, l0: float, n_updates: int) -> float:
        """The running mean with one more batch: over a tenth of `steps`."""
        rate = max(1 / (n_updates + 1), min(1.0, 10 / self.steps))
        return average + rate * (l0 - average)

    def next(self, coeff: float, average: float, n_updates: int) -> float:
        """The coefficient after update number `n_updates` (from 1), of which L0's running mean is known."""
        if not self.start_step <= n_updates < self.end_step:
            return coeff
        off = math.log(max(average, 1e-3) / self.target)
        return coeff * math.exp(max(-self.most, min(self.most, off)) / self.steps)
