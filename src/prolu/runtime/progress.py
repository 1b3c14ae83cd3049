"""Progress with rates and time left: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 15.0

listeners: list[Callable[[str, int, int], None]] = []
"""Told at every advance what is done, how much of it, and of how much. For a process whose progress another shows."""


class Meter:
    """Counts tokens towards a total: `with Meter("training", n_tokens, n_saes=18) as meter: meter.advance(512)`."""

    def __init__(self, what: str, n_tokens: int, n_saes: int = 1, *, unit: str = "tokens", shown: bool = True):
        self._what, self._total, self._n_saes, self._unit = what, n_tokens, n_saes, unit
        self._done, self._start, self._last_line = 0, time.monotonic(), time.monotonic()
        console = Console(stderr=True)
        self._lines = shown and not console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            _Rate(n_saes, unit), TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not shown or self._lines,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=n_tokens)

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, n_tokens: int) -> None:
        """Counts tokens done (once, however many SAEs saw them)."""
        self._done += n_tokens
        self._bar.advance(self._task, n_tokens)
        for tell in listeners:
            tell(self._what, self._done, self._total)
        now = time.monotonic()
        if self._lines and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self._line(now), file=sys.stderr, flush=True)

    def forget(self, n_tokens: int) -> None:
        """Takes tokens out of the total: they were done before."""
        self._total -= n_tokens
        self._bar.update(self._task, total=self._total)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    @property
    def tokens_per_second(self) -> float:
        """Since the start."""
        return self._done / max(self.seconds, 1e-9)

    def _line(self, now: float) -> str:
        left, share = (self._total - self._done) / max(self.tokens_per_second, 1e-9), self._done / max(self._total, 1)
        return (
            f"{self._what} {share:.0%}  {_rates(self.tokens_per_second, self._n_saes, self._unit)}  "
            f"{now - self._start:.0f} s gone, {left:.0f} s left"
        )


class _Rate(ProgressColumn):
    def __init__(self, n_saes: int, unit: str):
        super().__init__()
        self._n_saes, self._unit = n_saes, unit

    def render(self, task: Task) -> Text:
        return Text(_rates(task.speed or 0.0, self._n_saes, self._unit))


def _rates(tokens_per_second: float, n_saes: int, unit: str) -> str:
    saes = f", {tokens_per_second * n_saes:,.0f} SAE-tokens/s" if n_saes > 1 else ""
    return f"{tokens_per_second:,.0f} {unit}/s{saes}"
