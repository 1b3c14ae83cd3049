"""Progress with rates and the time left: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 15.0
"""The time between two lines of progress where standard error is not a terminal, in seconds."""

listeners: list[Callable[[str, int, int], None]] = []
"""Functions that every meter of this process calls when it advances, with the name of its work, the amount done and the
total. A worker on a cluster reports through them, since its own terminal is seen by nobody."""


class Meter:
    """Counts tokens towards a total, and shows the rate and the time left.

        with Meter("training", n_tokens, n_saes=18) as meter:
            meter.advance(512)

    It writes to standard error, because standard output is for results, which may be piped into another program.
    """

    def __init__(self, what: str, n_tokens: int, n_saes: int = 1, *, unit: str = "tokens", shown: bool = True):
        """Start the clock.

        Args:
            what: The name of the work, as in "training".
            n_tokens: The total to count to.
            n_saes: The number of SAEs that see each token; the rate is then also given in SAE-tokens.
            unit: What is counted.
            shown: Whether anything is shown. Listeners are called in either case.
        """
        self._what = what
        self._total = n_tokens
        self._n_saes = n_saes
        self._unit = unit
        self._done = 0
        self._start = time.monotonic()
        self._last_line = self._start
        console = Console(stderr=True)
        self._prints_lines = shown and not console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            _Rate(n_saes, unit),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or self._prints_lines,
        )
        self._task = self._bar.add_task(what, total=n_tokens)

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, n_tokens: int) -> None:
        """Count tokens that are done, each once however many SAEs saw it."""
        self._done += n_tokens
        self._bar.advance(self._task, n_tokens)
        for listener in listeners:
            listener(self._what, self._done, self._total)
        now = time.monotonic()
        if self._prints_lines and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self._line(now), file=sys.stderr, flush=True)

    def forget(self, n_tokens: int) -> None:
        """Take tokens out of the total that were done earlier. Counted as done now, they would raise the rate."""
        self._total -= n_tokens
        self._bar.update(self._task, total=self._total)

    @property
    def seconds(self) -> float:
        """The time since the start, in seconds."""
        return time.monotonic() - self._start

    @property
    def tokens_per_second(self) -> float:
        """The mean rate since the start, in tokens per second."""
        return self._done / max(self.seconds, 1e-9)  # the very first call may find the clock unmoved

    def _line(self, now: float) -> str:
        seconds_left = (self._total - self._done) / max(self.tokens_per_second, 1e-9)
        fraction = self._done / max(self._total, 1)
        return (
            f"{self._what} {fraction:.0%}  {_rates(self.tokens_per_second, self._n_saes, self._unit)}  "
            f"{now - self._start:.0f} s passed, {seconds_left:.0f} s left"
        )


class _Rate(ProgressColumn):
    """The column of a progress bar that shows rates; rich's own know one unit only."""

    def __init__(self, n_saes: int, unit: str):
        super().__init__()
        self._n_saes = n_saes
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(_rates(task.speed or 0.0, self._n_saes, self._unit))


def _rates(tokens_per_second: float, n_saes: int, unit: str) -> str:
    saes = f", {tokens_per_second * n_saes:,.0f} SAE-tokens/s" if n_saes > 1 else ""
    return f"{tokens_per_second:,.0f} {unit}/s{saes}"
