"""The request `watch`, as a dataclass from which flags and help are made."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from prolu.cli.job import Job


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Show the report of a study in a browser on this machine while it trains. It is read only, and refreshes itself.

    Start it before, during or after the training, and end it with Ctrl-C; it does not affect the training.
    """

    out: Positional[Path]
    """The folder of the study. It need not exist yet."""
    port: int = 8642
    """The port on 127.0.0.1 at which the page is served; 0 takes any that is free."""

    def prepare(self) -> Job:
        """Check the request, and return the functions that carry it out. Raise ValueError if it is wrong."""
        from prolu.report.server import StudyServer

        server = StudyServer(self.out, self.port)
        absent = "" if self.out.exists() else " (there is no such folder yet)"
        return [lambda: print(f"{self.out}{absent} at {server.address}; end with Ctrl-C", flush=True), server.serve]
