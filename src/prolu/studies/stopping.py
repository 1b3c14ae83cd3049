"""What is raised when the disk fails while a sweep is running: one sentence, as the command line says it."""

from collections.abc import Iterator
from contextlib import contextmanager


class SweepStoppedError(OSError):
    """The disk, or a file that is read, failed while a sweep was running. All that was finished is kept."""

    def __str__(self) -> str:
        return f"{self.args[0]}; finished runs are saved; run the same sweep again to resume"


@contextmanager
def one_sentence() -> Iterator[None]:
    """Say in one sentence, as the command line does, that the disk was full or a file could not be read."""
    try:
        yield
    except OSError as problem:
        stopped = SweepStoppedError(str(problem))
        stopped.errno, stopped.strerror, stopped.filename = problem.errno, problem.strerror, problem.filename
        # Not where in the loop it happened: nothing is wrong there.
        raise stopped from None
