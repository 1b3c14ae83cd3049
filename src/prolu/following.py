"""The ranks that are led: each holds its share of an SAE and does what the first rank's trainer does.

The first rank alone has the language model, the stream, the disk and the user, so that a sweep is one code, alone or
on a mesh. What its trainer does, it says by `Mesh.tell` before it does it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from prolu.config import RunConfig
from prolu.mesh import Mesh, RefusedElsewhereError
from prolu.resampling import Rebirth
from prolu.sweeps import SweepFailedError
from prolu.training import StepReport, Trainer

STOP = "stop"
"""The last word."""


@contextmanager
def led(mesh: Mesh) -> Iterator[None]:
    """On the first rank: says STOP after the work, unless it broke off where the others wait for something else."""
    try:
        yield
    except (KeyboardInterrupt, OSError, SweepFailedError):
        mesh.tell(STOP)
        raise
    mesh.tell(STOP)


def follow(config: RunConfig, batch_size: int, mesh: Mesh) -> None:
    """Trains this rank's share until the first rank says STOP.

    Raises:
        LostRankError: another rank is gone.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # the first rank saves a checkpoint, and then says STOP
            signal.signal(number, signal.SIG_IGN)
    task, tensors = mesh.told()
    if task == STOP:
        return
    assert task == "begin", task
    follower = _Follower(Trainer(config, int(tensors[0]), batch_size, device=mesh.device, mesh=mesh))
    while (told := mesh.told())[0] != STOP:
        getattr(follower, told[0])(*told[1])


class _Follower:
    """A trainer with what its leader holds between two words; a method for each word."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._rebirth: Rebirth | None = None
        self._report: StepReport | None = None
        self.tensors, self.sae = trainer.tensors, trainer.sae

    def step(self, acts: Tensor) -> None:
        self._report = self._trainer.step(acts)

    def summary(self) -> None:
        assert self._report is not None
        self._trainer.summary(self._report)

    def rebirth(self) -> None:
        self._rebirth = self._trainer.rebirth()

    def offer(self, acts: Tensor, raw_norm: Tensor) -> None:
        assert self._rebirth is not None
        self._rebirth.offer(acts, raw_norm)

    def resample_(self) -> None:
        assert self._rebirth is not None
        self._trainer.resample_(self._rebirth)

    def restore_(self) -> None:
        try:
            self._trainer.restore_({}, {})
        except RefusedElsewhereError:
            return  # the first rank says so, and trains anew
