"""Which processes train a study's runs, as requests say it."""

import importlib.util
import re
from dataclasses import dataclass
from typing import Literal

from prolu.activations.source import Source


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Which processes train the runs."""

    engine: Literal["local", "ray"] = "local"
    """local: this process trains all runs. ray: groups of runs, each a task on a Ray cluster, to the same bits;
    pip install 'prolu[ray]'."""
    address: str = ""
    """With --engine ray: of the cluster, `auto` or HOST:PORT; empty: one is started here, for this sweep."""
    workers: int = 2
    """With --engine ray: groups to train at once, each with --threads CPUs; there are more if memory asks for it."""
    gpus_per_group: float = 0.0
    """With --engine ray: GPUs of a group; groups share one at a fraction, as in 0.5."""
    group: str = ""
    """I/N: train only group I of N, from 0, without Ray, as a task of a job array; the last to finish gathers all."""

    def check(self, source: Source) -> None:
        """Raises ValueError if it cannot be so."""
        if self.engine == "local":
            for name in ("address", "workers", "gpus_per_group"):
                if getattr(self, name) != getattr(Engine, name):
                    raise ValueError(f"{name} {getattr(self, name)}: only with --engine ray")
        if self.group:
            self.place  # noqa: B018
            if self.engine != "local":
                raise ValueError(f"group {self.group!r}: without Ray; Ray deals and trains all groups")
        if not self.in_groups:
            return
        if len(source.hook) > 1:
            raise ValueError(
                f"hook {' '.join(source.hook)}: runs in groups are trained at one hook; several share the passes of "
                "one process"
            )
        if source.mesh:
            raise ValueError(f"mesh {source.mesh!r}: the processes of one SAE; runs in groups have one process each")
        if source.tracker:
            raise ValueError(f"tracker {' '.join(source.tracker)}: follows one process; not with runs in groups")
        if self.engine == "ray":
            self._check_ray(source)

    def _check_ray(self, source: Source) -> None:
        if self.workers < 1:
            raise ValueError(f"workers {self.workers}: must be at least 1")
        share = self.gpus_per_group
        if not (0 <= share <= 1 or (share > 1 and share == int(share))):
            raise ValueError(f"gpus_per_group {share}: must be between 0 and 1, or a whole number")
        if source.device == "cuda" and share == 0:
            raise ValueError("gpus_per_group 0: with --device cuda a group needs a GPU, or a fraction of one as in 0.5")
        if importlib.util.find_spec("ray") is None:
            raise ValueError("engine 'ray': is not installed; pip install 'prolu[ray]'")

    @property
    def in_groups(self) -> bool:
        """Whether runs are dealt into groups."""
        return self.engine == "ray" or bool(self.group)

    @property
    def place(self) -> tuple[int, int]:
        """Of --group: which, of how many.

        Raises:
            ValueError: not I/N with 0 <= I < N.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", self.group)
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError(f"group {self.group!r}: write I/N with I from 0 to N - 1, as in 0/8")
        return int(found[1]), int(found[2])
