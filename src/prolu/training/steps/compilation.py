"""Shows on the terminal that numba compiles kernels, for which the first sparse steps of a training wait."""

from contextlib import ExitStack
from functools import cache

from numba.core import event

from prolu.runtime.progress import doing


class _Listener(event.Listener):
    """Is told by numba when a kernel begins to be compiled, and when it is; kernels that are kept on the disk are not.

    While a kernel is compiled, those that it calls are compiled too.
    """

    def __init__(self):
        self._depth = 0
        self._shown = ExitStack()

    def on_start(self, event: event.Event) -> None:
        self._depth += 1
        if self._depth == 1:
            self._shown.enter_context(doing("compiling kernels"))

    def on_end(self, event: event.Event) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._shown.close()


@cache
def show_compilation() -> None:
    """Show from now on that kernels are being compiled, whenever they are; calling it again changes nothing."""
    event.register("numba:compile", _Listener())
