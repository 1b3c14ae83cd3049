"""Training curves in other people's trackers, beside metrics.jsonl: W&B and TensorBoard; none is imported unasked."""

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

TrackerName = Literal["wandb", "tensorboard"]

Figures = Mapping[str, float]

PATIENCE = 60.0
"""Seconds that a finished sweep waits for a tracker."""


class Followed(NamedTuple):
    """A run, as a tracker is told of it."""

    study: Path
    """Folder of its study."""
    group: str
    """Name of its study."""
    run_id: str
    key: str
    """Names it for ever: the same when it is resumed, another in another study."""
    config: dict[str, Any]


class TheirRun(Protocol):
    """One run as a tracker has it."""

    def log(self, line: Figures) -> None:
        """Takes a line of metrics.jsonl; of a resumed run, once more the lines before."""
        ...

    def finish(self, figures: Figures) -> None:
        """Takes the held-out figures, and ends the run."""
        ...

    def stop(self) -> None:
        """Ends a run that has no result: it failed, or was interrupted."""
        ...


class TensorBoardRun:
    """A run of TensorBoard: event files in STUDY/tensorboard/RUN_ID."""

    def __init__(self, of: Followed):
        from torch.utils.tensorboard import SummaryWriter

        # The whole curve is told again to a process that resumes; events of the ones before are to be forgotten.
        self._writer = SummaryWriter(str(of.study / "tensorboard" / of.run_id), purge_step=0)
        self._writer.add_text("config", f"```\n{json.dumps(of.config, indent=1)}\n```")
        self._step = 0

    def log(self, line: Figures) -> None:
        """A scalar a figure."""
        self._step = int(line["step"])
        self._write("", {name: value for name, value in line.items() if name != "step"})

    def finish(self, figures: Figures) -> None:
        """A scalar a figure, of one point each."""
        self._write("held_out/", figures)
        self.stop()

    def stop(self) -> None:
        """Closes the file."""
        self._writer.close()

    def _write(self, prefix: str, figures: Figures) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(prefix + name, value, self._step)
        self._writer.flush()


class WandbRun:
    """A run of W&B; its files lie in STUDY/wandb. Project, entity and mode are what W&B's own variables say."""

    def __init__(self, of: Followed):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "prolu"), group=of.group, name=of.run_id, id=of.key,
            dir=str(of.study), config=of.config, resume="allow", reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, finish_timeout=PATIENCE),
        )  # fmt: skip
        self._first = self._run.step  # earlier ones are on the server
        if self._run.url is not None:
            _say(f"{of.run_id}: {self._run.url}")

    def log(self, line: Figures) -> None:
        """A step."""
        if line["step"] >= self._first:
            self._run.log({name: value for name, value in line.items() if name != "step"}, step=int(line["step"]))

    def finish(self, figures: Figures) -> None:
        """Into the summary."""
        self._run.summary.update({f"held_out/{name}": value for name, value in figures.items()})
        self._run.finish()

    def stop(self) -> None:
        """As failed; resumed, it goes on."""
        self._run.finish(exit_code=1)


TRACKERS: dict[str, Callable[[Followed], TheirRun]] = {"wandb": WandbRun, "tensorboard": TensorBoardRun}
"""By the name of their package and of our extra."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError unless all of them are known, installed, and need ask nobody for a password."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"tracker {name!r}: choose among {', '.join(TRACKERS)}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without one: a folder of that name in the working directory
            raise ValueError(f"tracker {name!r}: not installed; pip install 'prolu[{name}]'")
    if "wandb" in names:
        import wandb  # pyright: ignore[reportMissingImports]

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ValueError("tracker 'wandb': nobody is logged in; run `wandb login`, or set WANDB_MODE=offline")


class Follower:
    """What one run tells the trackers, which each hear it in their own time."""

    def __init__(self, of: Followed, threads: Sequence["_TrackerThread"]):
        self._of, self._threads = of, threads

    def log(self, line: Figures) -> None:
        """A line of metrics.jsonl."""
        self._tell(lambda theirs: theirs.log(line))

    def finish(self, figures: Figures) -> None:
        """The held-out figures of a run that has ended."""
        self._tell(lambda theirs: theirs.finish(figures), is_last=True)

    def _tell(self, work: Callable[[TheirRun], None], *, is_last: bool = False) -> None:
        for thread in self._threads:
            thread.told.put((self._of, work, is_last))


class Trackers:
    """`with Trackers(["tensorboard"]) as trackers: trackers.follow(run).log(line)`; nothing here raises, once begun."""

    def __init__(self, names: Sequence[str]):
        """Raises ValueError as `check_trackers`."""
        check_trackers(names)
        self._threads = [_TrackerThread(name) for name in dict.fromkeys(names)]

    def __enter__(self) -> "Trackers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.told.put(None)
        for thread in self._threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                thread.is_left = True
                _say(f"tracker {thread.tracker}: not done after {PATIENCE:.0f} s; left alone")

    def follow(self, run: Followed) -> Follower:
        """A run that begins, or goes on."""
        return Follower(run, self._threads)


class _TrackerThread(threading.Thread):
    """Hands on to one tracker what it is told; once that fails, nothing more. Training neither waits nor fails."""

    def __init__(self, tracker: str):
        super().__init__(name=f"tracker {tracker}", daemon=True)
        self.tracker = tracker
        self.told: SimpleQueue[tuple[Followed, Callable[[TheirRun], None], bool] | None] = SimpleQueue()
        self.is_left = False
        """Nobody waits for it any more."""
        self._runs: dict[str, TheirRun] = {}

    def run(self) -> None:
        """Until None comes, or something fails."""
        try:
            for of, work, is_last in iter(self.told.get, None):
                if of.key not in self._runs:
                    self._runs[of.key] = TRACKERS[self.tracker](of)
                work(self._runs[of.key])
                if is_last:
                    del self._runs[of.key]
            for theirs in self._runs.values():
                theirs.stop()
        except (Exception, SystemExit) as problem:  # whatever a tracker may raise
            reason = " ".join(str(problem).split()) or type(problem).__name__
            if not self.is_left:
                _say(f"tracker {self.tracker}: dropped ({reason}); training goes on")


def _say(sentence: str) -> None:
    print(f"prolu: {sentence}", file=sys.stderr, flush=True)
