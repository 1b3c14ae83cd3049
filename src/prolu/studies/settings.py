"""How a sweep scores and saves its runs: one typed value from the command line down to the loop."""

from dataclasses import dataclass

from prolu.runtime.checks import at_least_1
from prolu.studies.trackers import TrackerName, check_trackers

MAX_EPOCHS = 4.0
"""How many times a run may see its text, unless more is allowed. Beyond that it is likely that the text is not what was
meant: too short by orders of magnitude."""

MIN_EVAL_FRACTION = 0.1
"""The least fraction of the evaluation tokens asked for, unless less is allowed."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """How runs are scored and saved. Of these options only --eval-tokens changes a result."""

    eval_tokens: int = 32_768
    """The number of held-out tokens on which every finished SAE is scored."""
    max_epochs: float = MAX_EPOCHS
    """How many times a run may see its text at most. A run that would see it more often is refused; one that sees it
    more than once is reported."""
    min_eval_fraction: float = MIN_EVAL_FRACTION
    """The least fraction of the --eval-tokens that the text must have. A study that would be scored on fewer is
    refused; any that are missing are reported."""
    checkpoint_minutes: float | None = None
    """The time between two checkpoints, in minutes. By default 1, or more where writing a checkpoint takes so long that
    checkpoints would cost more than 3% of the time."""
    keep_state: bool = False
    """Keep the Adam moments of finished runs (twice the size of their weights), so that the runs can be extended to
    more tokens."""
    tracker: tuple[TrackerName, ...] = ()
    """Trackers to send training curves to as well. They need pip install 'prolu[wandb]' or 'prolu[tensorboard]'."""

    @property
    def checkpoint_seconds(self) -> float | None:
        """The seconds between two checkpoints; None leaves the interval to the time that writing one takes."""
        return None if self.checkpoint_minutes is None else 60 * self.checkpoint_minutes

    def check(self) -> None:
        """Raise ValueError if a field has no meaning, or a tracker cannot be used."""
        at_least_1("eval_tokens", self.eval_tokens)
        if not self.max_epochs > 0:
            raise ValueError(f"max_epochs {self.max_epochs}: must be more than 0")
        if not 0 <= self.min_eval_fraction <= 1:
            raise ValueError(f"min_eval_fraction {self.min_eval_fraction}: must be between 0 and 1")
        if self.checkpoint_minutes is not None and self.checkpoint_minutes < 0:
            raise ValueError(f"checkpoint_minutes {self.checkpoint_minutes}: must be 0 or more")
        check_trackers(self.tracker)
