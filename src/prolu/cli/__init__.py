"""The command line: requests, the commands that they ask for, and exit codes."""

from prolu.cli.entry_point import main

__all__ = ["main"]
