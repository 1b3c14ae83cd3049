"""Learning rate over steps."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, constant, linear decay to a floor; as a factor on the learning rate (section 3)."""

    warmup_steps: int
    """Steps over which the factor rises from 0 to 1, at the start and after each of `restart_steps`."""
    restart_steps: tuple[int, ...] = ()
    """Numbers of updates after which the warm-up begins anew: where latents are resampled."""
    decay_start_step: int
    """Last step at full rate."""
    decay_end_step: int
    """Step at which the decay line would reach 0."""
    floor: float
    """The factor never falls below this after the decay has started, but for a warm-up."""

    def factor(self, step: int) -> float:
        """Factor of update number `step`, counted from 0: the k-th update after a start has k / warmup_steps."""
        since = step - max(start for start in (0, *self.restart_steps) if start <= step)
        warm = min(1.0, (since + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if step <= self.decay_start_step:
            return warm
        line = 1 - (step - self.decay_start_step) / (self.decay_end_step - self.decay_start_step)
        return min(warm, max(line, self.floor))
