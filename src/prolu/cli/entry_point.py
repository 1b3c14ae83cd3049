"""The command line: requests as dataclasses, their help, and exit codes. What they do is in `commands.py`."""

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import tyro
from tyro.conf import subcommand

from prolu.cli.commands import (
    DONE,
    FAILED,
    WRONG_REQUEST,
    Job,
)
from prolu.cli.requests import Demo, Eval, Export, Harvest, Import, Pull, Push, Report, Sweep, Train
from prolu.runtime.files import FolderBusyError
from prolu.runtime.hub import HubError
from prolu.runtime.interrupts import INTERRUPTED
from prolu.runtime.mesh import is_first_process, leave
from prolu.studies.recipes import RECIPES
from prolu.studies.sweep import SweepFailedError

DESCRIPTION = "Sparse autoencoders with ProLU, compared. `prolu --version` says which prolu this is."


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Harvest, subcommand("harvest")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Import, subcommand("import")]
    | Annotated[Push, subcommand("push")]
    | Annotated[Pull, subcommand("pull")]
)


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed while running, 2 wrong request, 130 interrupted."""
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["sweep"] and args[1:] and not args[1].startswith("-") and args[1] not in RECIPES:
        print(f"prolu: study {args[1]!r}: choose one of {', '.join(RECIPES)}", file=sys.stderr)
        return WRONG_REQUEST
    if list(args) == ["--version"]:
        print(f"prolu {version('prolu')}")
        return DONE
    command = tyro.cli(Command, prog="prolu", args=args, description=DESCRIPTION)
    try:
        return _finish(command.prepare())
    except (ValueError, OSError) as problem:  # OSError: a file or folder of the request cannot be read
        if is_first_process():
            print(f"prolu: {problem}", file=sys.stderr)
        return WRONG_REQUEST
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        leave()


def _finish(job: Job) -> int:
    """Does the work; a failure is one sentence where it is the world's, a traceback where it is ours."""
    kept = "what was finished is kept, the same command goes on"
    try:
        return job() or DONE
    except KeyboardInterrupt:
        sentence, code = f"interrupted; {kept}", INTERRUPTED
    except (FolderBusyError, HubError) as problem:
        sentence, code = str(problem), WRONG_REQUEST
    except (OSError, FloatingPointError, SweepFailedError) as problem:
        sentence, code = f"{problem}; {kept}", FAILED
    except Exception:
        traceback.print_exc()
        sentence, code = f"failed while running; {kept}", FAILED
    if is_first_process():
        print(f"prolu: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
