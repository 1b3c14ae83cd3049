"""The windows of activations that a stream holds: one that is trained on, and one that a thread may fill meanwhile."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Literal, get_args

import torch

from prolu.activations.windows import WindowNumber
from prolu.runtime.checks import one_of
from prolu.runtime.progress import doing

ReadAhead = Literal["auto", "on", "off"]
"""Whether a stream reads the next window while one is trained on; with `auto`, it does where that saves time."""


def reads_ahead(wanted: str, *, pays: bool, n_hooks: int, n_ranks: int) -> bool:
    """Return whether the next window is filled while one is trained on.

    Args:
        wanted: One of `ReadAhead`; `auto` is on where it pays and is possible.
        pays: Whether reading ahead saves time, which `auto` follows. It does if a GPU trains, and a store or a language
            model on another device fills windows. On a CPU, filling and training would compete for the same cores.
        n_hooks: The number of hooks that share each pass of the language model; 1 for a store.
        n_ranks: The number of processes that train together.

    Raises:
        ValueError: `wanted` is none of these, or it is `on` where reading ahead is not possible.
    """
    one_of("read_ahead", wanted, get_args(ReadAhead))
    refusal = ""
    if n_ranks > 1:
        refusal = "not on a mesh, whose processes swap the rows of a window before they train on it"
    elif n_hooks > 1:
        refusal = "not for a language model that is read at several hooks in one pass; harvest them into a store"
    if wanted == "on" and refusal:
        raise ValueError(f"read_ahead 'on': {refusal}")
    return wanted == "on" or (wanted == "auto" and pays and not refusal)


class HeldWindow:
    """Memory for one window of activations."""

    def __init__(self, n_rows: int, d_in: int, device: torch.device):
        self.acts = torch.empty(n_rows, d_in, device=device)
        """The normalised activations, [n_rows, d_in]."""
        self.norms = torch.empty(n_rows, device=device)
        """The norm of each row before it was normalised, [n_rows]."""
        self.order = torch.empty(0, dtype=torch.int64)
        """The rows in the order in which batches take them."""
        self.number: WindowNumber | None = None
        """Which window this is; None while it is not whole."""


class WindowReader:
    """Holds the window that is asked for and, if it reads ahead, fills the following one in a thread of its own.

    The thread takes the same steps in the same order as the caller would, so that no bit depends on it. What it raises
    is raised to the caller when the window is asked for. It ends with its window, or soon after `close` or the end of
    the main thread. On a GPU it works on a CUDA stream of its own, so that training waits for it only when it needs the
    window.
    """

    def __init__(
        self,
        fill: Callable[[HeldWindow, WindowNumber], Iterator[object]],
        announce: Callable[[WindowNumber], None],
        new_window: Callable[[], HeldWindow],
        *,
        ahead: bool,
    ):
        """Take memory for a window. Memory for a second one is taken when the first is read ahead.

        Args:
            fill: Fills a window in steps, between which a thread may be told to stop.
            announce: Tells the source of activations which window comes next, some time before that window is filled.
            new_window: Makes memory for a window.
            ahead: Whether to fill the following window meanwhile.
        """
        self._fill = fill
        self._announce = announce
        self._new_window = new_window
        self._ahead = ahead
        self._held = new_window()
        self._spare: HeldWindow | None = None
        self._reading: _Reading | None = None
        device = self._held.acts.device
        self._cuda_stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None

    def get(self, number: WindowNumber, following: WindowNumber) -> HeldWindow:
        """Return a window, and prepare for the following one.

        Raises:
            Exception: Whatever filling the window raises.
        """
        if self._held.number == number:
            return self._held
        with doing("reading activations"):
            if not self._take(number):
                self._held.number = None  # should filling fail halfway, this is no window at all
                for _ in self._fill(self._held, number):
                    pass
                self._held.number = number
        if self._ahead:
            self._begin(following)
        else:
            self._announce(following)
        return self._held

    def close(self) -> None:
        """Stop the thread, if there is one, and wait for its end. The next window asked for is filled as the first."""
        if self._reading is not None:
            self._reading.stop()
            self._meet()
        self._reading = None

    def _take(self, number: WindowNumber) -> bool:
        """Put the window of the thread in place of the held one, and return True, if it is the one asked for."""
        reading = self._reading
        if reading is None or reading.number != number:
            self.close()
            return False
        reading.wait()  # if a signal ends this, the thread is still ours to stop
        self._reading = None
        self._meet()
        arrived = reading.result()
        self._spare = self._held
        self._held = arrived
        return True

    def _begin(self, number: WindowNumber) -> None:
        """Start a thread that fills the spare window."""
        self._spare = self._spare or self._new_window()
        if self._cuda_stream is not None:
            # The GPU may not yet have copied the last batches out of the window that the spare memory held.
            self._cuda_stream.wait_stream(torch.cuda.current_stream(self._cuda_stream.device))
            # If the stream is deleted while the thread reads, PyTorch must not reuse the memory before the thread ends.
            self._spare.acts.record_stream(self._cuda_stream)
            self._spare.norms.record_stream(self._cuda_stream)
        self._reading = _Reading(self._steps(self._spare, number), self._spare, number, self._cuda_stream)

    def _steps(self, window: HeldWindow, number: WindowNumber) -> Iterator[object]:
        window.number = None
        self._announce(number)
        yield from self._fill(window, number)

    def _meet(self) -> None:
        """Make all later work on the GPU wait for the work that the thread has queued there."""
        if self._cuda_stream is not None:
            torch.cuda.current_stream(self._cuda_stream.device).wait_stream(self._cuda_stream)


class _Reading:
    """A thread that fills one window."""

    def __init__(
        self,
        steps: Iterator[object],
        window: HeldWindow,
        number: WindowNumber,
        cuda_stream: torch.cuda.Stream | None,
    ):
        self.number = number
        self._steps = steps
        self._window = window
        self._cuda_stream = cuda_stream
        self._stopped = threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="reading activations ahead")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def result(self) -> HeldWindow:
        """Return the window, once the thread has ended, or raise what kept it from being filled."""
        if self._problem is not None:
            raise self._problem
        return self._window

    def stop(self) -> None:
        """Let the thread end after the step that it is at, and wait for that."""
        self._stopped.set()
        self.wait()

    def _work(self) -> None:
        try:
            with nullcontext() if self._cuda_stream is None else torch.cuda.stream(self._cuda_stream):
                for _ in self._steps:
                    # Python waits at its end for all threads, and nobody needs the window then.
                    if self._stopped.is_set() or not threading.main_thread().is_alive():
                        return
                self._window.number = self.number
        except BaseException as problem:  # raised where the window is asked for
            self._problem = problem
