"""Command-line options that choose which processes train the runs of a study."""

import importlib.util
import re
from dataclasses import dataclass
from typing import Literal

from prolu.activations.options import Source
from prolu.runtime.checks import at_least_1
from prolu.studies.settings import SweepSettings


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Which processes train the runs."""

    engine: Literal["local", "ray"] = "local"
    """local: this process trains all runs. ray: groups of runs are trained by tasks on a Ray cluster, with results that
    are equal to the bit; it needs pip install 'prolu[ray]'."""
    address: str = ""
    """With --engine ray: the address of the cluster, `auto` or HOST:PORT. By default a cluster is started on this
    machine for this sweep."""
    workers: int = 2
    """With --engine ray: the number of groups that train at the same time, each with --threads CPUs. There are more
    groups, which train one after the other, if that many would not fit into memory."""
    gpus_per_group: float = 0.0
    """With --engine ray: the number of GPUs per group. With a fraction such as 0.5, groups share a GPU."""
    group: str = ""
    """I/N: train only group I of N, counted from 0, without Ray: one task of a job array. The task that finishes last
    gathers the results and draws the report."""

    @property
    def in_groups(self) -> bool:
        """Whether runs are dealt into groups."""
        return self.engine == "ray" or bool(self.group)

    def check(self, source: Source, settings: SweepSettings) -> None:
        """Raise ValueError if the options contradict one another, or the source or the settings."""
        if self.engine == "local":
            for name in ("address", "workers", "gpus_per_group"):
                if getattr(self, name) != getattr(Engine, name):
                    raise ValueError(f"{name} {getattr(self, name)}: only with --engine ray")
        if self.group:
            self.group_and_count()
            if self.engine != "local":
                raise ValueError(f"group {self.group!r}: not with --engine ray, which trains all groups itself")
        if not self.in_groups:
            return
        if len(source.hook) > 1:
            raise ValueError(
                f"hook {' '.join(source.hook)}: runs in groups are trained at one hook; several share the passes of "
                "one process"
            )
        if source.mesh:
            raise ValueError(f"mesh {source.mesh!r}: the processes of one SAE; runs in groups have one process each")
        if settings.tracker:
            raise ValueError(f"tracker {' '.join(settings.tracker)}: follows one process; not with runs in groups")
        if self.engine == "ray":
            self._check_ray(source)

    def _check_ray(self, source: Source) -> None:
        at_least_1("workers", self.workers)
        gpus = self.gpus_per_group
        if not (0 <= gpus <= 1 or (gpus > 1 and gpus == int(gpus))):
            raise ValueError(f"gpus_per_group {gpus}: must be between 0 and 1, or a whole number")
        for flag, device in (("--device", source.device), ("--lm-device", source.lm_device)):
            if device.startswith("cuda") and gpus == 0:
                raise ValueError(
                    f"gpus_per_group 0: with {flag} {device} a group needs a GPU, or a fraction of one as in 0.5"
                )
        if importlib.util.find_spec("ray") is None:
            raise ValueError("engine 'ray': is not installed; pip install 'prolu[ray]'")

    def group_and_count(self) -> tuple[int, int]:
        """Return the group that --group names, and the number of groups.

        Raises:
            ValueError: it is not I/N with 0 <= I < N.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", self.group)
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError(f"group {self.group!r}: write I/N with I from 0 to N - 1, as in 0/8")
        return int(found[1]), int(found[2])
