"""Work that is cut off, at a step or at a disk operation, in this process or in one of its own."""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prolu import ActivationStream
from prolu.runtime.files import before_operation


class PowerCutError(Exception):
    """Nothing that the library expects."""


@contextlib.contextmanager
def before_disk_operations(observe: Callable[[str, Path], object]) -> Iterator[None]:
    """Call `observe(name, path)` before every disk operation."""
    before_operation.append(observe)
    try:
        yield
    finally:
        before_operation.remove(observe)


def disk_operations(work: Callable[[], object]) -> list[str]:
    """Do work, and return the names of its disk operations."""
    names = []
    with before_disk_operations(lambda name, path: names.append(name)):
        work()
    return names


def dies_at_disk_operation(operation: int, work: Callable[[], object]) -> None:
    """Do work that is cut off just before that disk operation, counted from 0, and can do none after it."""
    left = itertools.count(operation, -1)

    def cut(name: str, path: Path) -> None:
        if next(left) <= 0:
            raise PowerCutError

    with before_disk_operations(cut):
        _cut_off(work)


def dies_at_step(step: int, work: Callable[[], object]) -> None:
    """Do work that is cut off when it asks a stream for the batch of that step, counted from 0."""
    plain = ActivationStream.__getitem__

    def cut(self, index):
        if index == step:
            raise PowerCutError
        return plain(self, index)

    ActivationStream.__getitem__ = cut
    try:
        _cut_off(work)
    finally:
        ActivationStream.__getitem__ = plain


def _cut_off(work: Callable[[], object]) -> None:
    with contextlib.suppress(PowerCutError):
        work()
        raise AssertionError("the work came to its end")


def in_a_process(work: Callable[[], object]) -> int:
    """Start work in a process of its own, and return its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        code = 0
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    """Wait for a process, and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Raise TimeoutError unless the condition comes true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)
