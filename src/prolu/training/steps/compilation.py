"""Shows on the terminal that numba compiles kernels, for which the first sparse steps of a training wait."""

from contextlib import ExitStack
from functools import cache

from numba.core import event

from prolu.runtime.progress import compiling


class _Listener(event.Listener):
    """numba calls it when the compilation of a kernel begins and ends. Kernels that are on the disk are not compiled.

    While a kernel is compiled, those that it calls are compiled too.
    """

    def __init__(self):
        self._depth = 0
        self._shown = ExitStack()

    def on_start(self, event: event.Event) -> None:
        self._depth += 1
        if self._depth == 1:
            self._shown.enter_context(compiling())

    def on_end(self, event: event.Event) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._shown.close()


@cache
def show_compilation() -> None:
    """Show from now on that kernels are being compiled, whenever they are; calling it again changes nothing."""
    event.register("numba:compile", _Listener())
