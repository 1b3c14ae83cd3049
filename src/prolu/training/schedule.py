"""The learning rate over the steps of a run."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, constant rate, linear decay to a floor, as a factor on the learning rate (section 3)."""

    warmup_steps: int
    """The number of steps over which the factor rises from 0 to 1, at the start and after each of `restart_steps`."""
    restart_steps: tuple[int, ...] = ()
    """The numbers of updates after which the warm-up starts again: where latents are resampled."""
    decay_start_step: int
    """The last step at full rate."""
    decay_end_step: int
    """The step at which the decay would reach 0."""
    floor: float
    """The factor below which the decay does not go; a warm-up may."""

    def factor(self, step: int) -> float:
        """Return the factor of update number `step`, counted from 0.

        The k-th update after a start has k / warmup_steps, so that already the first one has a rate above 0.
        """
        since = step - max(start for start in (0, *self.restart_steps) if start <= step)
        warm = min(1.0, (since + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if step <= self.decay_start_step:
            return warm
        line = 1 - (step - self.decay_start_step) / (self.decay_end_step - self.decay_start_step)
        # The floor bounds the decay, but not a warm-up during the decay.
        return min(warm, max(line, self.floor))
