"""Ctrl-C and SIGTERM: the first one asks the program to save its work and stop, the second one ends the process."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

INTERRUPTED = 130
"""The exit code of an interrupted command, by the convention of shells: 128 plus the number of SIGINT."""


class Interrupt:
    """Notes the first signal to stop, so that a loop can save and leave at a good moment.

        with Interrupt() as interrupt:
            while not interrupt.requested:
                step()
        save()

    Outside the main thread it does nothing, because Python lets only the main thread handle signals.
    """

    def __init__(self, *, patient: bool = False):
        """Prepare to note signals; they are noted inside the `with` block.

        Args:
            patient: Whether the second signal is ignored too. Needed under torchrun, which passes on to its processes
                the Ctrl-C that the terminal has sent them already, while they may be writing a checkpoint.
        """
        self.requested = False
        """Whether a signal to stop has come."""
        self._patient = patient
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if self._patient:
                return
            # `sys.exit` is not used, because its exception could be caught, or held up by whatever does not end. Files
            # are safe, since each gets its name only when it is complete.
            os._exit(INTERRUPTED)
        self.requested = True
        sentence = "saving a checkpoint after this step; a second signal exits at once"
        print(f"prolu: {sentence}", file=sys.stderr, flush=True)
