"""What a command hands to the entry point: its work, and the exit codes that the work may return."""

from collections.abc import Callable

DONE = 0
"""The exit code of a command that did what was asked."""

FAILED = 1
"""The exit code of a command that failed while it was running."""

WRONG_REQUEST = 2
"""The exit code of a request that cannot be carried out as it stands."""

Job = list[Callable[[], int | None]]
"""Work that has been checked, in parts to be done in order. Each part returns an exit code; None stands for 0."""
