"""The task that a worker receives, runs and reports on. No cluster library is imported here."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prolu.activations.options import Source
from prolu.activations.resolving import absolute_path
from prolu.activations.source import open_streams
from prolu.runtime.files import retry_while_busy
from prolu.runtime.progress import listeners
from prolu.studies.folder import PATH_FIELDS
from prolu.studies.groups.dealing import PATIENCE, train_group
from prolu.studies.request import StudyRequest
from prolu.studies.settings import SweepSettings
from prolu.training.config import RunConfig

SECONDS_BETWEEN_LOOKS = 1.0


class StoppedError(Exception):
    """A worker got a signal, for example because its node stops. Its group has a checkpoint, and is tried again."""


class GroupTask(NamedTuple):
    """One group, in a form that can be sent to a worker on another machine."""

    source: Source
    batch_size: int
    stream: dict[str, Any]
    """The description that the worker's stream must have."""
    out: Path
    settings: SweepSettings
    number: int
    runs: list[RunConfig]

    def sae_tokens(self, position: int) -> int:
        """Return the SAE-tokens trained once the stream has advanced by `position` tokens (runs may end earlier)."""
        return sum(min(run.n_steps(self.batch_size) * self.batch_size, position) for run in self.runs)

    @property
    def length(self) -> int:
        """The number of training tokens of the longest run."""
        return max(run.n_steps(self.batch_size) for run in self.runs) * self.batch_size

    def __str__(self) -> str:
        return f"group {self.number} ({', '.join(run.run_id for run in self.runs)})"


def portable(source: Source) -> Source:
    """Return the source with absolute paths, and with token blocks that are written already in place of their text.

    A worker on another machine of the cluster, which sees the same disk, can open it.
    """
    data = tuple(map(absolute_path, source.data)) if source.tokens is None else (str(source.tokens.absolute()),)
    store = None if source.store is None else source.store.absolute()
    # The name of synthetic rows stays as it is: there is no such path.
    rows = absolute_path(source.activations) if source.activations else ""
    return replace(source, lm=absolute_path(source.lm), data=data, tokens=None, store=store, activations=rows)


class ProgressBoard:
    """Where workers write how far they are and what the user should know. It runs as an actor; the driver reads it."""

    def __init__(self):
        self._positions: dict[int, tuple[int, int]] = {}
        self._sentences: list[str] = []

    def tell(self, index: int, start: int, position: int) -> None:
        """Note that a group, which began or resumed at token `start`, is at token `position`."""
        self._positions[index] = start, position

    def say(self, sentence: str) -> None:
        """Note a sentence for the user."""
        self._sentences.append(sentence)

    def read(self) -> tuple[dict[int, tuple[int, int]], list[str]]:
        """Return the positions of all groups, and the sentences since the last call."""
        sentences = self._sentences
        self._sentences = []
        return self._positions, sentences


class WorkerVoice(logging.Handler):
    """Sends a worker's progress and its log messages to the board."""

    def __init__(self, task: GroupTask, board: Any):
        super().__init__()
        self._task = task
        self._board = board
        self._last = 0.0
        self._sentences: list[str] = []

    def hear(self, what: str, done: int, total: int) -> None:
        """Take the progress of a meter, and send it on now and then."""
        now = time.monotonic()
        if what == "training" and (done == total or now - self._last > SECONDS_BETWEEN_LOOKS):
            self._last = now
            start = self._task.length - total
            self._board.tell.remote(self._task.number, start, start + done)
            self.pass_on()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message until `pass_on`, because a signal handler may log it during a call to the board."""
        self._sentences.append(f"group {self._task.number}: {record.getMessage()}")

    def pass_on(self) -> None:
        """Send the messages that were kept."""
        while self._sentences:
            self._board.say.remote(self._sentences.pop(0))


def work_on(task: GroupTask, board: Any) -> None:
    """Train one group: what a worker does.

    Raises:
        StoppedError: a signal came; a checkpoint is written.
        ValueError: the model or the text on this node are not those of the sweep.
    """
    voice = WorkerVoice(task, board)
    messages = logging.getLogger("prolu")
    messages.setLevel(logging.INFO)  # the address of a run in W&B is no warning
    torch.set_num_threads(task.source.threads)
    messages.addHandler(voice)
    listeners.append(voice.hear)
    try:
        described = task.stream
        amounts = (described["max_train_tokens"], described["held_out_pool"])
        (stream,) = open_streams(task.source, *amounts, task.batch_size)
        for name, value in stream.describe().items():
            if name not in PATH_FIELDS and value != task.stream[name]:
                raise ValueError(f"{name} is {task.stream[name]!r} where the sweep began, {value!r} on this node")
        request = StudyRequest(task.runs, stream, task.out, task.settings, progress=False)
        # The worker that had this group before may not have ended yet.
        retry_while_busy(lambda: train_group(request, task.number), PATIENCE)
    except KeyboardInterrupt:
        raise StoppedError from None
    finally:
        listeners.remove(voice.hear)
        messages.removeHandler(voice)
        voice.pass_on()
