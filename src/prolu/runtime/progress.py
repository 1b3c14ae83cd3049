"""Progress with rates and the time left: a bar on a terminal, one line in a notebook, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from prolu.runtime.notebooks import in_notebook

SECONDS_BETWEEN_LINES = 15.0
"""The time between two lines of progress where standard error is not a terminal, in seconds."""

FRACTION_BEFORE_FORECAST = 0.02
"""The fraction of the work from which on a line gives the time left: the first batches are slower than the others."""

SECONDS_BEFORE_FORECAST = 60.0
"""The time from which on a line gives the time left whatever the fraction, in seconds."""

SECONDS_BETWEEN_REWRITES = 0.5
"""The time after which the line of progress in a notebook is written again, in seconds."""

WIDTH_OF_SAE_RATE = 100
"""The columns from which on a terminal also shows the rate in SAE-tokens."""

_seconds_of_compiling = 0.0
"""The time that this process has spent in compiling kernels, in seconds, which no later batch needs again."""

listeners: list[Callable[[str, int, int], None]] = []
"""Functions that every meter of this process calls when it advances, with the name of its work, the amount done and the
total. A worker on a cluster reports through them, since nobody sees its own terminal."""


class Meter:
    """Counts tokens towards a total, and shows the rate and the time left.

        with Meter("training", n_tokens, n_saes=18) as meter:
            meter.advance(512)

    It writes to standard error, because standard output is for results, which may be piped into another program. A
    meter that is started while another one runs has a line of its own below it, until it ends.
    """

    def __init__(
        self,
        what: str,
        n_tokens: int,
        n_saes: int = 1,
        *,
        unit: str = "tokens",
        shown: bool = True,
        figures: Callable[[], str] | None = None,
    ):
        """Start the clock.

        Args:
            what: The name of the work, as in "training".
            n_tokens: The total to count to.
            n_saes: The number of SAEs that see each token; the rate is then also given in SAE-tokens.
            unit: What is counted.
            shown: Whether anything is shown. Listeners are called in either case.
            figures: Returns what a notebook shows of the work besides, such as the L0 so far. It is called at most once
                each time that the line is written.
        """
        self._what = what
        self._total = n_tokens
        self._n_saes = n_saes
        self._unit = unit
        self._done = 0
        self._n_advances = 0
        self._start = time.monotonic()
        self._compiling_before = _seconds_of_compiling
        self._last_line = self._start
        is_terminal = Console(stderr=True).is_terminal
        self._in_notebook = shown and in_notebook()
        self._prints_lines = shown and not is_terminal and not self._in_notebook
        self._has_bar = shown and is_terminal and not self._in_notebook
        self._figures = figures
        self._shown_figures = ""
        self._bar: TaskID | None = None

    def __enter__(self) -> "Meter":
        if self._has_bar:
            self._bar = _bars.open(self._what, self._total, self._n_saes, self._unit)
        if self._in_notebook:
            _notebook_line.open(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            _bars.close(self._bar)
            self._bar = None
        if self._in_notebook:
            _notebook_line.close(self)

    def advance(self, n_tokens: int) -> None:
        """Count tokens that are done, each once however many SAEs saw it."""
        self._done += n_tokens
        self._n_advances += 1
        if self._bar is not None:
            _bars.update(self._bar, advance=n_tokens)
        for listener in listeners:
            listener(self._what, self._done, self._total)
        now = time.monotonic()
        if self._prints_lines and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self._line(now), file=sys.stderr, flush=True)
        if self._in_notebook:
            _notebook_line.advanced(now)

    def forget(self, n_tokens: int) -> None:
        """Take tokens out of the total that were done earlier. Counted as done now, they would raise the rate."""
        self._total -= n_tokens
        if self._bar is not None:
            _bars.update(self._bar, total=self._total)

    @property
    def seconds(self) -> float:
        """The time since the start, in seconds."""
        return time.monotonic() - self._start

    @property
    def tokens_per_second(self) -> float:
        """The mean rate since the start, in tokens per second."""
        return self._done / max(self.seconds, 1e-9)  # the very first call may find the clock unmoved

    def _line(self, now: float) -> str:
        compiling = self._seconds_of_compiling
        of_these = f" (of these {_duration(compiling)} compiling kernels)" if compiling >= 1 else ""
        passed = f"{_duration(now - self._start)} passed{of_these}"
        fraction = self._done / max(self._total, 1)
        if self._n_advances == 1:
            # Before the first batch a window of activations is read: a rate that counts this would be far too low.
            return f"{self._what} {fraction:.0%}  {passed}"
        rates = _rates(self._rate(now), self._n_saes, self._unit)
        is_known = fraction >= FRACTION_BEFORE_FORECAST or now - self._start >= SECONDS_BEFORE_FORECAST
        left = f", {_duration(self._seconds_left(now))} left" if is_known else ""
        return f"{self._what} {fraction:.0%}  {rates}  {passed}{left}"

    @property
    def _seconds_of_compiling(self) -> float:
        return _seconds_of_compiling - self._compiling_before

    def _rate(self, now: float) -> float:
        """Return the mean rate but for the time of compiling, which is not needed again, in tokens per second."""
        return self._done / max(now - self._start - self._seconds_of_compiling, 1e-9)

    def _seconds_left(self, now: float) -> float:
        return (self._total - self._done) / max(self._rate(now), 1e-9)

    def look(self) -> None:
        """Find out what a notebook shows besides. This may take computing, so the thread that does the work does it."""
        if self._figures is not None:
            self._shown_figures = self._figures()

    def line_of_notebook(self, now: float) -> str:
        """Return what the line in a notebook says of this work."""
        fraction = f"{self._what} {self._done / max(self._total, 1):.0%}"
        if self._done >= self._total:
            left = _duration(now - self._start)
        elif self._n_advances < 2:
            left = ""  # nothing is known yet of the rate
        else:
            left = f"{_duration(self._seconds_left(now))} left"
        return ", ".join(part for part in (fraction, left, self._shown_figures) if part)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Show what the running work waits for, such as "reading activations", in place of its rate."""
    _bars.note(what)
    _notebook_line.note(what)
    try:
        yield
    finally:
        _bars.note("")
        _notebook_line.note("")


@contextmanager
def compiling() -> Iterator[None]:
    """Show that kernels are being compiled. Rates leave out the time that this takes, since it does not recur."""
    global _seconds_of_compiling  # noqa: PLW0603 - one clock for all meters of the process
    start = time.monotonic()
    try:
        with doing("compiling kernels"):
            yield
    finally:
        _seconds_of_compiling += time.monotonic() - start


class _NotebookLine:
    """The one line of progress below a cell, on standard output, which is written over as work goes on.

    It is that of the newest work. When the last work ends, the next line begins. It needs no widgets, so it is the same
    in every notebook, and in the file that is saved.
    """

    def __init__(self):
        self._open: list[Meter] = []
        self._width = 0
        self._written = -SECONDS_BETWEEN_REWRITES

    def open(self, meter: Meter) -> None:
        """Show a meter in place of the one before."""
        self._open.append(meter)
        self._write(meter.line_of_notebook(time.monotonic()))

    def close(self, meter: Meter) -> None:
        """Show the last state of a meter, and then the one before it; or go to the next line if there is none."""
        self._write(meter.line_of_notebook(time.monotonic()))
        self._open.remove(meter)
        if not self._open:
            print(flush=True)
            self._width = 0

    def advanced(self, now: float) -> None:
        """Write the line again if it is time to."""
        if self._open and now - self._written >= SECONDS_BETWEEN_REWRITES:
            self._open[-1].look()
            self._write(self._open[-1].line_of_notebook(now))

    def note(self, text: str) -> None:
        """Show a text behind the newest work's own until it goes on; an empty one changes nothing."""
        if self._open and text:
            self._write(f"{self._open[-1].line_of_notebook(time.monotonic())}, {text}")

    def _write(self, text: str) -> None:
        # Spaces cover what a longer line has left. A line that ended with the carriage return would be cleared by the
        # next text that anybody prints.
        print("\r" + text.ljust(self._width), end="", flush=True)
        self._width = len(text)
        self._written = time.monotonic()


class _Bars:
    """The bars of all meters that run in this process, each on a line of its own.

    They share one display, because two displays would write over each other's lines.
    """

    def __init__(self):
        self._display: Progress | None = None
        self._open: list[TaskID] = []

    def open(self, what: str, total: int, n_saes: int, unit: str) -> TaskID:
        """Add a bar, and return its number."""
        if self._display is None:
            self._display = _new_display()
            self._display.start()
        bar = self._display.add_task(what, total=total, n_saes=n_saes, unit=unit, note="")
        self._open.append(bar)
        return bar

    def close(self, bar: TaskID) -> None:
        """Take a bar away, or leave it as it is if it is the last one."""
        assert self._display is not None
        self._open.remove(bar)
        if self._open:
            self._display.remove_task(bar)
            return
        self._display.stop()
        self._display = None

    def update(self, bar: TaskID, **changes: float) -> None:
        """Change the total of a bar, or advance it."""
        assert self._display is not None
        self._display.update(bar, **changes)  # pyright: ignore[reportArgumentType]

    def note(self, text: str) -> None:
        """Show a text in place of the newest bar's rate; an empty one shows the rate again."""
        if self._display is not None:
            # Drawn at once, because the work that follows may keep the drawing thread from running.
            self._display.update(self._open[-1], note=text, refresh=True)


def _new_display() -> Progress:
    console = Console(stderr=True)
    shows_saes = console.width >= WIDTH_OF_SAE_RATE
    # What is left of the line by the longest texts beside the bar, so that every bar stays on one line.
    bar_width = min(40, max(4, console.width - (84 if shows_saes else 58)))
    one_line = Column(no_wrap=True)
    return Progress(
        TextColumn("{task.description}", table_column=one_line.copy()),
        BarColumn(bar_width),
        TextColumn("{task.percentage:>3.0f}%", table_column=one_line.copy()),
        _Pace(shows_saes=shows_saes, table_column=one_line.copy()),
        console=console,
        # While a bar is drawn, rich would write what is printed to the bar's console. That is right for a terminal, but
        # results that are piped into another program must stay on standard output.
        redirect_stdout=sys.stdout.isatty(),
    )


class _Pace(ProgressColumn):
    """The column of a progress bar that shows the rates and the time left; rich's own know one unit only."""

    def __init__(self, *, shows_saes: bool, table_column: Column):
        super().__init__(table_column)
        self._shows_saes = shows_saes

    def render(self, task: Task) -> Text:
        if task.fields["note"]:
            return Text(task.fields["note"])
        elapsed = task.finished_time if task.finished else task.elapsed
        speed = task.completed / max(elapsed or 0.0, 1e-9) if task.finished else task.speed
        if speed is None or not task.completed:
            return Text()  # nothing is known yet, and a rate of 0 would be wrong
        seconds = elapsed if task.finished else task.time_remaining
        rates = _rates(speed, task.fields["n_saes"] if self._shows_saes else 1, task.fields["unit"])
        time_of = f", {_duration(seconds)}" if seconds is not None else ""
        return Text(f"{rates}{time_of}" + ("" if task.finished or not time_of else " left"))


_bars = _Bars()
_notebook_line = _NotebookLine()


def _rates(tokens_per_second: float, n_saes: int, unit: str) -> str:
    saes = f", {tokens_per_second * n_saes:,.0f} SAE-tokens/s" if n_saes > 1 else ""
    return f"{tokens_per_second:,.0f} {unit}/s{saes}"


def _duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds, as in 0:24:13."""
    return str(timedelta(seconds=int(seconds)))
