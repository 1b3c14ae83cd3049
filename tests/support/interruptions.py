"""Sweeps that are interrupted at a chosen step."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from prolu import ActivationStream


def stop_at(step, monkeypatch):
    """The sweep dies when it has made so many steps."""
    plain = ActivationStream.__getitem__

    def failing(self, index):
        if index == step:
            raise KeyError("power cut")
        return plain(self, index)

    monkeypatch.setattr(ActivationStream, "__getitem__", failing)


def in_a_process(work: Callable[[], object]) -> int:
    """Starts work in a process of its own; returns its number."""
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
    """Waits for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(out: Path) -> dict[str, bytes]:
    """Everything in a study's folder but its clock."""
    return {
        str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file() and f.name != "log.jsonl"
    }
