"""The command line: requests, the commands that they ask for, and exit codes.

- `entry_point`: from arguments to a request, to its work, to an exit code.
- `training_requests`: the requests `demo`, `train` and `sweep`, as dataclasses from which flags and help are made.
- `requests`: the requests of all other commands, likewise.
- `options`: parts of dataclasses as groups of options, and the names that other libraries give to our flags.
- `commands`: what each command checks and does.
- `scoring`: the options and the work of `prolu eval`.
"""

from prolu.cli.entry_point import main

__all__ = ["main"]
