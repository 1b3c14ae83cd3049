"""What a worker elsewhere is told of a group, does, and says; any cluster's, for none is imported here."""

import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prolu.activations.source import Source, open_streams
from prolu.runtime.files import patiently
from prolu.runtime.progress import listeners
from prolu.studies.folder import MOVABLE
from prolu.studies.groups.dealing import PATIENCE, train_group
from prolu.studies.request import StudyRequest
from prolu.training.config import RunConfig

SECONDS_BETWEEN_LOOKS = 1.0


class StoppedError(Exception):
    """A worker got a signal, as on a node that is taken away: its group has a checkpoint, and is tried again."""


class GroupTask(NamedTuple):
    """One group, as a worker on another machine can be told of it."""

    source: Source
    n_tokens: int
    batch_size: int
    stream: dict[str, Any]
    """What the worker's stream must be."""
    out: Path
    eval_tokens: int
    number: int
    runs: list[RunConfig]
    settings: dict[str, Any]

    def sae_tokens(self, position: int) -> int:
        """Tokens that its runs have seen when so many have gone by, each run's counted."""
        return sum(min(run.n_steps(self.batch_size) * self.batch_size, position) for run in self.runs)

    @property
    def length(self) -> int:
        """Tokens of its longest run."""
        return max(run.n_steps(self.batch_size) for run in self.runs) * self.batch_size

    def __str__(self) -> str:
        return f"group {self.number} ({', '.join(run.run_id for run in self.runs)})"


def portable(source: Source) -> Source:
    """The same with absolute paths, and its text, if it has been written as token blocks, as it is there."""
    data = _absolute(source.data) if source.tokens is None else str(source.tokens.resolve())
    return replace(
        source, lm=_absolute(source.lm), data=data, tokens=None, store=source.store and source.store.resolve()
    )


def _absolute(name: str) -> str:
    """Of a file or folder that is there; other names stay."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "builtin" and path.exists() else name


class Board:
    """Where workers say how far they are; an actor, and the one place where the driver looks."""

    def __init__(self):
        self._positions: dict[int, tuple[int, int]] = {}
        self._sentences: list[str] = []

    def tell(self, index: int, start: int, position: int) -> None:
        """A group that went on from token `start` is at `position`."""
        self._positions[index] = start, position

    def say(self, sentence: str) -> None:
        """Something for the user."""
        self._sentences.append(sentence)

    def read(self) -> tuple[dict[int, tuple[int, int]], list[str]]:
        """Positions of all groups, and what was said since the last time."""
        said, self._sentences = self._sentences, []
        return self._positions, said


class Voice:
    """A worker's progress and its sentences on stderr, told to the board; whatever else is written there is dropped."""

    def __init__(self, task: GroupTask, board: Any):
        self._task, self._board, self._last = task, board, 0.0
        self._sentences: list[str] = []

    def hear(self, what: str, done: int, total: int) -> None:
        """Of a meter."""
        now = time.monotonic()
        if what == "training" and (done == total or now - self._last > SECONDS_BETWEEN_LOOKS):
            self._last, length = now, self._task.length
            self._board.tell.remote(self._task.number, length - total, length - total + done)
            self.pass_on()

    def write(self, text: str) -> int:
        """As a file has it. Nothing is told yet: this may be a signal's handler, in the midst of telling."""
        if text.startswith("prolu: "):
            self._sentences.append(f"group {self._task.number}: {text.removeprefix('prolu: ').strip()}")
        return len(text)

    def pass_on(self) -> None:
        """Tells what was written."""
        while self._sentences:
            self._board.say.remote(self._sentences.pop(0))

    def flush(self) -> None:
        """As a file has it."""


def work_on(task: GroupTask, board: Any) -> None:
    """What a worker does."""
    voice = Voice(task, board)
    torch.set_num_threads(task.source.threads)
    listeners.append(voice.hear)
    try:
        with redirect_stderr(voice):  # pyright: ignore[reportArgumentType]
            (stream,) = open_streams(task.source, task.n_tokens, task.batch_size)
            for name, value in stream.describe().items():
                if name not in MOVABLE and value != task.stream[name]:
                    raise ValueError(f"{name} is {task.stream[name]!r} where the sweep began, {value!r} on this node")
            request = StudyRequest(task.runs, stream, task.out, task.eval_tokens)
            # Its worker before this one may still be dying.
            patiently(lambda: train_group(request, task.number, task.runs, progress=False, **task.settings), PATIENCE)
    except KeyboardInterrupt:
        raise StoppedError from None
    finally:
        listeners.remove(voice.hear)
        voice.pass_on()
