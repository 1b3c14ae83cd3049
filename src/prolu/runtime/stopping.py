"""What is raised in Python when the disk fails during long work: one sentence, as the command line says it."""

from collections.abc import Iterator
from contextlib import contextmanager


class StoppedError(OSError):
    """The disk, or a file that is read, failed during long work. All that was finished is kept."""

    resumes: str = "run the same again to resume"
    """What is kept, and how the work is resumed."""

    def __str__(self) -> str:
        return f"{self.args[0]}; {self.resumes}"


@contextmanager
def one_sentence(error: type[StoppedError]) -> Iterator[None]:
    """Raise `error`, with one sentence, in place of an OSError: the disk was full, or a file could not be read."""
    try:
        yield
    except OSError as problem:
        stopped = error(str(problem))
        stopped.errno, stopped.strerror, stopped.filename = problem.errno, problem.strerror, problem.filename
        # Without the original traceback, because the place in the code where it happened is not the cause.
        raise stopped from None
