"""The command line: requests, the commands that they ask for, and exit codes.

- `entry_point`: from arguments to a request, to its work, to an exit code.
- `requests`: the requests as dataclasses, from which flags and help are made.
- `options`: options in two groups, those that matter first.
- `commands`: what each command checks and does.
- `scoring`: the options of `prolu eval`.
"""

from prolu.cli.entry_point import main

__all__ = ["main"]
