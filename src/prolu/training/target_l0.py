"""The L0 controller: it adjusts a penalty's coefficient so that a run's own L0 ends at a target."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

# The command line makes its help from a file that imports this one, so PyTorch is not imported here.
if TYPE_CHECKING:
    from torch import Tensor

CONTROLLED_FRACTION = 0.7
"""The fraction of the run after which the L0 controller freezes the coefficient."""

INTEGRATION_FRACTION = 0.025
"""The integration time of the L0 controller, as a fraction of the run."""

FEWEST_CONTROLLED_STEPS = 200
"""The number of steps below which a run may miss its target L0 widely, so that a warning is given."""

MISSED_TARGET = 0.1
"""The relative distance of the final held-out L0 from the target above which a run says that it missed it."""

LARGEST_DEVIATION = math.log(2)
"""The clamp on log(L0 / target). A new SAE has half of all latents active, far above any target: without the clamp the
integral would wind up while L0 falls from there."""

PROPORTIONAL_GAIN = 1.0
"""The proportional gain: the fraction of log(L0 / target) that is added to log(coeff) at once, beside the integral."""

BRAKING_GAIN = 2.0
"""The proportional gain of a controller that brakes, at any distance from the target."""

NEAR_GAIN = 3.0
"""What is added to `BRAKING_GAIN` near the target, so that L0 does not fall through it."""

NEAR = math.log(4)
"""How near, as |log(L0 / target)|, L0 must be to its target for `NEAR_GAIN` to be added."""

SMALLEST_L0 = 1e-3
"""The L0 that is assumed where no latent is active, whose logarithm would be infinite."""


class L0ControllerState(NamedTuple):
    """What the controller remembers between steps; a checkpoint holds both numbers.

    On a GPU they are tensors, because reading a number from there would wait until the step is done; for a stack of
    SAEs they hold one number for each.
    """

    coeff: "float | Tensor"
    """The coefficient; without its proportional part, which `L0Controller.coeff` adds, where the controller does not
    brake."""
    l0: "float | Tensor" = 0.0
    """The running mean of the batches' L0."""


@dataclass(frozen=True, kw_only=True)
class L0Controller:
    """A proportional and integral controller of log(coeff).

    With d = log(L0 / target), where L0 is a running mean of the run's own, and a = d clamped to +-log 2:

        after each step:           log(coeff) <- log(coeff) + a / steps
        what the penalty gets:     coeff * exp(PROPORTIONAL_GAIN * a)

    From `end_step` on the coefficient is frozen, and L0 may still change until the end of the run. Freezing it earlier
    for a while, to estimate this change, was tried and made runs miss their targets by more.

    Under the penalty l0 this was not enough. Its gradient reaches thresholds alone, which rise by the learning rate at
    most, in their logarithm, at any coefficient: on SmolLM2 L0 falls to its target in 700 updates, and meanwhile the
    integral raises the coefficient hundreds of times. L0 then falls far below its target, and does not come back even
    where the coefficient is lowered at once, since Adam's moments still hold the large gradients and make the
    thresholds' steps small. So for this penalty the controller brakes: a change of L0 changes the coefficient at any
    distance from the target, and most of all near it,

        after each step:           log(coeff) <- log(coeff) + a / steps + the step's change of
                                                 BRAKING_GAIN * d + NEAR_GAIN * (d clamped to +-NEAR)
        what the penalty gets:     coeff

    Far above the target the coefficient then rises only while L0 takes longer than BRAKING_GAIN * steps to halve.
    """

    target: "float | Tensor"
    """The L0 to reach; a tensor for a stack of SAEs."""
    start_step: int
    """The number of updates before the controller begins to act."""
    end_step: int
    """The number of updates after which the coefficient is frozen."""
    steps: float
    """The integration time: the number of updates in which the coefficient changes by the factor L0 / target."""
    brakes: bool = False
    """Whether a change of L0 changes the coefficient at any distance from the target; for the penalty l0."""

    def coeff(self, state: L0ControllerState, n_updates: int) -> "float | Tensor":
        """Return the coefficient for the update that follows `n_updates` updates."""
        if self.brakes or not self._acts(n_updates):
            return state.coeff
        return state.coeff * _exp(PROPORTIONAL_GAIN * _clamped(self._deviation(state.l0), LARGEST_DEVIATION))

    def after(self, state: L0ControllerState, l0: "float | Tensor", n_updates: int) -> L0ControllerState:
        """Return the state after update number `n_updates` (counted from 1), whose batch had this L0."""
        # A plain mean at first, then an exponential one whose time is a fifth of the integration time. The mean must
        # follow L0 faster than the controller acts, or L0 would oscillate about the target.
        rate = max(1 / n_updates, min(1.0, 5 / self.steps))
        before, mean = state.l0, state.l0 + rate * (l0 - state.l0)
        if not self._acts(n_updates):
            return state._replace(l0=mean)
        change = _clamped(self._deviation(mean), LARGEST_DEVIATION) / self.steps
        # Before the first update there is no L0 that could have changed.
        if self.brakes and n_updates > 1:
            change = change + (self._proportional(mean) - self._proportional(before))
        return L0ControllerState(state.coeff * _exp(change), mean)

    def _acts(self, n_updates: int) -> bool:
        return self.start_step <= n_updates < self.end_step

    def _deviation(self, l0: "float | Tensor") -> "float | Tensor":
        """Return d = log(L0 / target)."""
        if isinstance(l0, float | int):
            return math.log(max(l0, SMALLEST_L0) / self.target)
        return (l0.clamp(min=SMALLEST_L0) / self.target).log()

    def _proportional(self, l0: "float | Tensor") -> "float | Tensor":
        """Return the proportional part of log(coeff), of a controller that brakes."""
        deviation = self._deviation(l0)
        return BRAKING_GAIN * deviation + NEAR_GAIN * _clamped(deviation, NEAR)


def _clamped(deviation: "float | Tensor", largest: float) -> "float | Tensor":
    if isinstance(deviation, float | int):
        return max(-largest, min(largest, deviation))
    return deviation.clamp(-largest, largest)


def _exp(x: "float | Tensor") -> "float | Tensor":
    return math.exp(x) if isinstance(x, float | int) else x.exp()
