"""Training curves in trackers, W&B and TensorBoard, in addition to metrics.jsonl.

A tracker gets the lines that metrics.jsonl gets, through a queue, in a thread of its own. So a tracker decides nothing
and can harm nothing: training does not wait for it, and whatever it raises stays in its thread, is logged once, and
ends its work. A package is imported only if somebody asks for its tracker.
"""

import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

logger = logging.getLogger(__name__)

TrackerName = Literal["wandb", "tensorboard"]
"""The trackers, by the names of their packages, which are also the names of our extras."""

Figures = Mapping[str, float]
"""Numbers by name: a line of metrics.jsonl, or the scores of a finished run."""

PATIENCE = 60.0
"""The number of seconds that a finished sweep waits for a tracker."""


class TrackedRun(NamedTuple):
    """What a tracker is told of a run when it begins."""

    study: Path
    """The folder of its study."""
    group: str
    """The name of its study."""
    run_id: str
    """The name of the run in its study."""
    key: str
    """An identifier of the run in the tracker. It is the same when the run is resumed, and another in another study."""
    config: dict[str, Any]
    """The settings of the run."""


class TrackerRun(Protocol):
    """One run in a tracker."""

    def log(self, line: Figures) -> None:
        """Take a line of metrics.jsonl. A resumed run starts with its earlier lines again."""
        ...

    def finish(self, figures: Figures) -> None:
        """Take the scores on held-out text, and end the run."""
        ...

    def stop(self) -> None:
        """End a run without scores, because it failed or was interrupted."""
        ...


class TensorBoardRun:
    """One run in TensorBoard: event files in STUDY/tensorboard/RUN_ID."""

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        # A process that resumes writes the whole curve again, because steps after the checkpoint are made twice. This
        # lets TensorBoard forget the events of earlier processes, so that it shows each step once.
        self._writer = SummaryWriter(str(run.study / "tensorboard" / run.run_id), purge_step=0)
        self._writer.add_text("config", f"```\n{json.dumps(run.config, indent=1)}\n```")
        self._step = 0

    def log(self, line: Figures) -> None:
        """Write a scalar for each figure."""
        self._step = int(line["step"])
        self._write("", {name: value for name, value in line.items() if name != "step"})

    def finish(self, figures: Figures) -> None:
        """Write a scalar with one point for each score."""
        self._write("held_out/", figures)
        self.stop()

    def stop(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, prefix: str, figures: Figures) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(prefix + name, value, self._step)
        self._writer.flush()


class WandbRun:
    """One run in W&B, with its files in STUDY/wandb. W&B's own environment variables decide entity and mode."""

    def __init__(self, run: TrackedRun):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "prolu"),
            group=run.group,
            name=run.run_id,
            id=run.key,
            dir=str(run.study),
            config=run.config,
            resume="allow",
            reinit="create_new",  # a sweep has many runs at once in one process
            settings=wandb.Settings(console="off", silent=True, finish_timeout=PATIENCE),
        )
        # W&B takes no step twice: those before this one are on its server already.
        self._first_step = self._run.step
        if self._run.url is not None:
            logger.info("%s: %s", run.run_id, self._run.url)

    def log(self, line: Figures) -> None:
        """Add a step to the history."""
        if line["step"] >= self._first_step:
            self._run.log({name: value for name, value in line.items() if name != "step"}, step=int(line["step"]))

    def finish(self, figures: Figures) -> None:
        """Add the scores to the summary, and end the run."""
        self._run.summary.update({f"held_out/{name}": value for name, value in figures.items()})
        self._run.finish()

    def stop(self) -> None:
        """End the run as failed. If it is resumed, it continues under the same id."""
        self._run.finish(exit_code=1)


TRACKERS: dict[str, Callable[[TrackedRun], TrackerRun]] = {"wandb": WandbRun, "tensorboard": TensorBoardRun}
"""The trackers, by name."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError unless all trackers are known, are installed, and can start without asking for a password."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"tracker {name!r}: choose among {', '.join(TRACKERS)}")
        spec = importlib.util.find_spec(name)
        # A spec without an origin is a folder of that name in the working directory, such as W&B's own `wandb`.
        if spec is None or spec.origin is None:
            raise ValueError(f"tracker {name!r}: not installed; pip install 'prolu[{name}]'")
    if "wandb" in names:
        import wandb  # pyright: ignore[reportMissingImports]

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ValueError("tracker 'wandb': nobody is logged in; run `wandb login`, or set WANDB_MODE=offline")


class Follower:
    """One run's connection to all trackers. Its methods return at once and raise nothing."""

    def __init__(self, run: TrackedRun, threads: Sequence["_TrackerThread"]):
        self._run = run
        self._threads = threads

    def log(self, line: Figures) -> None:
        """Pass on a line of metrics.jsonl."""
        self._pass_on(lambda theirs: theirs.log(line))

    def finish(self, figures: Figures) -> None:
        """Pass on the scores of the run, which has finished."""
        self._pass_on(lambda theirs: theirs.finish(figures), is_last=True)

    def _pass_on(self, work: Callable[[TrackerRun], None], *, is_last: bool = False) -> None:
        for thread in self._threads:
            thread.queue.put((self._run, work, is_last))


class Trackers:
    """The trackers of a sweep: `with Trackers(["tensorboard"]) as trackers: trackers.follow(run).log(line)`.

    Inside the `with` nothing of this class raises. At its end, runs that have not finished are stopped.
    """

    def __init__(self, names: Sequence[str]):
        """Prepare the trackers.

        Raises:
            ValueError: A tracker cannot be used, as `check_trackers` says.
        """
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
            thread.queue.put(None)
        for thread in self._threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                thread.is_abandoned = True
                logger.warning("tracker %s: not done after %.0f s; left alone", thread.tracker, PATIENCE)

    def follow(self, run: TrackedRun) -> Follower:
        """Connect a run that begins or is resumed."""
        return Follower(run, self._threads)


class _TrackerThread(threading.Thread):
    """The thread in which one tracker works off its queue, until it has failed once."""

    def __init__(self, tracker: str):
        # A daemon, so that a tracker that hangs does not keep the process from ending.
        super().__init__(name=f"tracker {tracker}", daemon=True)
        self.tracker = tracker
        self.queue: SimpleQueue[tuple[TrackedRun, Callable[[TrackerRun], None], bool] | None] = SimpleQueue()
        self.is_abandoned = False
        """Whether the sweep has ended without waiting for it any longer."""
        self._runs: dict[str, TrackerRun] = {}

    def run(self) -> None:
        """Do what the queue says, until it says None or something fails."""
        try:
            for run, work, is_last in iter(self.queue.get, None):
                # A run is opened here and not where it begins, because opening may wait for a server.
                if run.key not in self._runs:
                    self._runs[run.key] = TRACKERS[self.tracker](run)
                work(self._runs[run.key])
                if is_last:
                    del self._runs[run.key]
            for theirs in self._runs.values():
                theirs.stop()
        except (Exception, SystemExit) as problem:  # whatever a tracker may raise; some call sys.exit
            reason = " ".join(str(problem).split()) or type(problem).__name__
            if not self.is_abandoned:
                logger.warning("tracker %s: dropped (%s); training goes on", self.tracker, reason)
