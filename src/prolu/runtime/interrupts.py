"""Ctrl-C and SIGTERM as a wish: the first is noted, so that work can be saved; the second ends the process."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType

INTERRUPTED = 130
"""Exit code."""


class Interrupt:
    """`with Interrupt() as interrupt: ... if interrupt.requested: save`. Does nothing outside the main thread."""

    def __init__(self, *, patient: bool = False):
        """Args: `patient`: the second one does not end the process; torchrun passes on what the terminal sent too."""
        self.requested, self._patient = False, patient
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
            os._exit(INTERRUPTED)
        self.requested = True
        print("prolu: saving a checkpoint after this step; again to exit at once", file=sys.stderr, flush=True)
