"""The entry point of the command line: from arguments to a request, to its work, to an exit code."""

import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import reduce
from io import StringIO
from operator import or_
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from prolu.activations.options import HarvestSource, Source
from prolu.cli.flags import add_helps, without_aliases
from prolu.cli.job import DONE, FAILED, WRONG_REQUEST
from prolu.cli.misspelt import no_such_name, no_such_option
from prolu.cli.options import LatentPageOptions, Scoring
from prolu.cli.own_requests import GRID, TRAIN_DESCRIPTION, Grid, Train
from prolu.cli.requests import Eval, Export, Harvest, Import, Latents, Probe, Pull, Push, Report
from prolu.cli.training_requests import Demo, Study, Sweep
from prolu.cli.watching import Watch
from prolu.runtime.files import FolderBusyError
from prolu.runtime.hub import HubError
from prolu.runtime.interrupts import INTERRUPTED
from prolu.runtime.names import shown
from prolu.runtime.version import package_version
from prolu.studies.groups.engine import Engine
from prolu.studies.recipes import RECIPES
from prolu.studies.settings import SweepSettings
from prolu.studies.widths import Multiple

DESCRIPTION = """Train many sparse autoencoders on one stream of language-model activations, and compare them.

Examples:
  prolu demo
  prolu train --lm gpt2 --hook blocks.6.hook_resid_pre --data my_text.parquet --coeff 1.2e-3 --out runs/one

`prolu COMMAND --help` lists the options of a command, `prolu --version` prints the version."""

RESUMES = "what was finished is saved; run the same command again to resume"

COMMANDS = {
    "demo": Demo,
    "train": Train,
    "sweep": Sweep,
    "harvest": Harvest,
    "eval": Eval,
    "latents": Latents,
    "probe": Probe,
    "report": Report,
    "watch": Watch,
    "export": Export,
    "import": Import,
    "push": Push,
    "pull": Pull,
}
"""The request of each command, by its name and in the order of the help."""

Command: Any = reduce(or_, [Annotated[request, subcommand(name)] for name, request in COMMANDS.items()])

# The dataclasses whose fields are options: first the commands, then what several of them share.
for request in (*COMMANDS.values(), Study, Grid):
    add_helps(request)
for options in (Source, HarvestSource, SweepSettings, Engine, LatentPageOptions, Scoring):
    add_helps(options)

registry = ConstructorRegistry()


@registry.primitive_rule
def _integers_with_exponents(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Accept `1e6` for an integer, as people write numbers of tokens."""
    if info.type is not int:
        return None

    def parse(words: list[str]) -> int:
        try:
            return int(words[0])
        except ValueError:
            # A ValueError from here is tyro's to report: it names the flag.
            return _whole(words[0])

    def is_int(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    return PrimitiveConstructorSpec(
        nargs=1, metavar="INT", instance_from_str=parse, is_instance=is_int, str_from_instance=lambda n: [str(n)]
    )


@registry.primitive_rule
def _multiples(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Multiple] | None:
    """Accept `8x` for a multiple of the width of the activations."""
    if info.type is not Multiple:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="8x",
        instance_from_str=lambda words: Multiple(words[0]),
        is_instance=lambda value: isinstance(value, Multiple),
        str_from_instance=lambda multiple: [str(multiple)],
    )


def _whole(word: str) -> int:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise ValueError(f"{word} is not a whole number, such as 1000000 or 1e6")
    return int(value)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code.

    - 0: The command is done.
    - 1: It failed while running. What was finished is kept.
    - 2: The request was wrong. One sentence says why, and nothing was written.
    - 130: It was interrupted. A checkpoint is saved.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"prolu {package_version()}")
        return DONE
    # tyro's own messages about an unknown command or study list the options of all of them.
    sentence = no_such_name("command", args, COMMANDS)
    if args[:1] == ["sweep"]:
        sentence = no_such_name("study", args[1:], (*RECIPES, GRID))
    if sentence:
        print(f"prolu: {shown(sentence)}", file=sys.stderr)
        return WRONG_REQUEST
    # tyro prints help and ends the process here. What follows needs PyTorch, which takes seconds to import.
    command = _parsed(args)
    from prolu.runtime.mesh import leave
    from prolu.runtime.stopping import StoppedError

    with _messages_on_stderr():
        try:
            job = command.prepare()
            # From here on the request is known to be valid, so the same exceptions mean that the work failed.
            try:
                exit_code = DONE
                for work in job:
                    exit_code = work() or exit_code
                return exit_code
            except BaseException as problem:
                return _failed(problem)
        except (ValueError, OSError) as problem:  # OSError: a file or folder of the request cannot be read
            # The disk may also be full, while text is tokenised: nothing is wrong with the request then.
            stopped = isinstance(problem, StoppedError)
            return _failed(problem) if stopped else _reported(str(problem), WRONG_REQUEST)
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            leave()


def _parsed(args: list[str]) -> Any:
    """Return the request that the arguments ask for; print help or an error and exit if they ask for none."""
    if args[:1] in (["train"], ["sweep"], ["harvest"]):
        args = without_aliases(args)
    problem = StringIO()
    try:
        with redirect_stderr(problem):
            return _read(args)
    except SystemExit as stop:
        if stop.code == WRONG_REQUEST and (sentence := _unknown_option(args)):
            print(f"prolu: {shown(sentence)}", file=sys.stderr)
        else:
            print(problem.getvalue(), file=sys.stderr, end="")
        raise
    except BrokenPipeError:
        # The program that reads the help, such as `head`, has closed its input. Python must not fail when it flushes
        # the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(DONE) from None


def _read(args: list[str]) -> Any:
    """Return the request that tyro reads from arguments; it prints help and errors itself, and exits."""
    # A parser of its own, since its description with examples would crowd the list of all commands.
    if args[:1] == ["train"]:
        return tyro.cli(Train, prog="prolu train", args=args[1:], description=TRAIN_DESCRIPTION, registry=registry)
    return tyro.cli(Command, prog="prolu", args=args, description=DESCRIPTION, registry=registry)


def _unknown_option(args: list[str]) -> str:
    """Return a sentence about an option that the command of these arguments does not have, or "" if it has all."""
    n_words = 2 if args[:1] == ["sweep"] else 1
    command, rest = args[:n_words], args[n_words:]
    help_text = StringIO()
    with suppress(SystemExit), redirect_stdout(help_text):
        _read([*command, "--help"])
    return no_such_option(" ".join(["prolu", *command]), rest, help_text.getvalue())


def _failed(problem: BaseException) -> int:
    """Report why work failed, and return the exit code.

    A full disk or a lost connection gets one sentence; an error in this package gets a traceback, for a bug report.
    """
    from prolu.runtime.stopping import StoppedError
    from prolu.studies.sweep import SweepFailedError

    match problem:
        case KeyboardInterrupt():
            return _reported(f"interrupted; {RESUMES}", INTERRUPTED)
        case FolderBusyError() | HubError():
            # Nothing has failed: another process has just locked the folder, or the hub refuses what it allowed before.
            return _reported(str(problem), WRONG_REQUEST)
        case StoppedError():
            # The end of its message is advice for Python code; on the command line, the same command is run again.
            return _reported(f"{problem.args[0]}; {RESUMES}", FAILED)
        case OSError() | FloatingPointError() | SweepFailedError():
            return _reported(f"{problem}; {RESUMES}", FAILED)
        case Exception():
            print(shown("".join(traceback.format_exception(problem))), file=sys.stderr, end="")
            return _reported(f"failed while running; {RESUMES}", FAILED)
    raise problem  # SystemExit and the like end the process as they would anywhere


def _reported(sentence: str, exit_code: int) -> int:
    """Print a sentence on standard error, once on a mesh, and return the exit code."""
    from prolu.runtime.mesh import is_first_process

    if is_first_process():
        print(f"prolu: {shown(sentence)}", file=sys.stderr)
    return exit_code


class _StderrHandler(logging.Handler):
    """Prints the library's messages as sentences, `prolu: ...`, on standard error."""

    # logging.StreamHandler would keep the stream of the moment in which it was made; a worker, a test or a notebook may
    # have replaced sys.stderr since.
    def emit(self, record: logging.LogRecord) -> None:
        print(f"prolu: {shown(record.getMessage())}", file=sys.stderr, flush=True)


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    messages = logging.getLogger("prolu")
    handler = _StderrHandler()
    messages.addHandler(handler)
    level = messages.level
    # Messages of the level INFO are shown too, for example the address of a run in W&B.
    messages.setLevel(logging.INFO)
    try:
        yield
    finally:
        messages.removeHandler(handler)
        messages.setLevel(level)
