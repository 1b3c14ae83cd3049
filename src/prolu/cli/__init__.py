"""The command line: requests, the commands that they ask for, and exit codes.

- `entry_point`: from arguments to a request, to its work, to an exit code.
- `training_requests`: the requests `demo` and `sweep`, as dataclasses from which flags and help are made.
- `own_requests`: the requests `train` and `sweep grid`, whose settings are all the user's, likewise.
- `watching`: the request `watch`; `requests`: those of all other commands, likewise.
- `options`: groups of options that several commands share, or that are long.
- `flags`: how dataclasses become flags, and the names that other libraries give to our flags.
- `misspelt`: what is answered where a command, a study or an option does not exist.
- `commands`: what each command checks and does; of `report` in `drawing`, of `eval` in `scoring`, of `latents` in
  `latents`, of `probe` in `probing`.
- `drawing`: pages of latents and reports.
- `scoring`: saved SAEs scored on held-out text; `row_scoring`: on rows; `score_table`: their scores side by side.
- `latents`: the latents of a saved SAE on texts of the user's own.
- `probing`: probes of the latents of finished studies.
- `job`: the work that a command hands back, and its exit codes.

The requests and options import PyTorch, and what needs it, in their `prepare` only: `--help` must not wait for it.
"""

from prolu.cli.entry_point import main

__all__ = ["main"]
