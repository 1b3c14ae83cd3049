"""The page of a study that is being trained, made from its files without a lock and without writing anything."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from prolu.evaluation.comparison.claims import FamilyComparison, compare_families
from prolu.report.assets import render
from prolu.report.latents.browser import FEATURES_FOLDER
from prolu.report.page import render_page
from prolu.report.page_data import LiveState, PageContent
from prolu.report.writer import page_content
from prolu.runtime.files import nearest_existing
from prolu.studies.folder import STUDY_FILE
from prolu.studies.progress import unfinished_runs, watched_files
from prolu.studies.records import RESULTS_FILE
from prolu.studies.results import Results

Signature = Mapping[str, tuple[int, int]]
"""When each file of a study was last written, and its size."""


class ServedPage(NamedTuple):
    """A page as it is sent to the browser."""

    text: str
    tag: str
    """A digest of the text, by which a browser asks whether it has changed."""


class WatchedStudy:
    """A study whose page is made anew whenever its files have changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._signature: Signature | None = None
        self._page = _waiting("")
        self._content: PageContent | None = None
        self._comparison: tuple[tuple[int, int] | None, FamilyComparison] | None = None

    def page(self) -> ServedPage:
        """Return the page of the newest state that can be read.

        If the files cannot be read, as while they are copied, it is the page of the last state that could, with a
        sentence that says so. As long as there is no study, it is a page that waits for one.
        """
        try:
            signature = watched_files(self.folder)
            if signature != self._signature or not signature:
                self._content = self._read(signature) if signature else None
                self._page = _served(render_page(self._content)) if self._content else _waiting(self._reason())
                self._signature = signature
        except (OSError, ValueError) as problem:
            self._signature = None  # the next look reads again
            return self._page_with(f"The newest state cannot be read: {problem}. The next look tries again.")
        return self._page

    def latents_folder(self, run_id: str) -> Path | None:
        """Return the folder of the pages of latents of a finished run; None if there are none."""
        runs = self._content.records if self._content else ()
        if run_id not in {record["run_id"] for record in runs}:
            return None
        folder = self.folder / run_id / FEATURES_FOLDER
        return folder if folder.is_dir() else None

    def _read(self, signature: Signature) -> PageContent:
        results = Results.load(self.folder) if RESULTS_FILE in signature else Results(self.folder, [])
        in_training = unfinished_runs(self.folder)
        content = page_content([results], results.records, self.folder, self._compared(results, signature))
        changed = max(modified for modified, _ in signature.values()) / 1e9
        return replace(
            content,
            headline=None if in_training else content.headline,
            # The path is as the user gave it, because Python or a shell will probably be started in the same folder as
            # the server.
            folders={run_id: str(self.folder / run_id) for run_id in content.folders},
            live=LiveState(in_training, changed),
        )

    def _compared(self, results: Results, signature: Signature) -> FamilyComparison:
        """Return how families compare, which takes seconds in large studies, once for each state of the results."""
        state = signature.get(RESULTS_FILE)
        if self._comparison is None or self._comparison[0] != state:
            found = compare_families([results]) if results.records else FamilyComparison([], [], [])
            self._comparison = (state, found)
        return self._comparison[1]

    def _page_with(self, notice: str) -> ServedPage:
        if self._content is None or self._content.live is None:
            return _waiting(notice)
        return _served(render_page(replace(self._content, live=self._content.live._replace(notice=notice))))

    def _reason(self) -> str:
        """Return why there is nothing to show yet."""
        if not self.folder.exists():
            return f"There is no folder {self.folder} yet; the page appears when training begins."
        inside = sorted(file.parent for file in self.folder.glob(f"*/{STUDY_FILE}"))
        if inside:
            return f"{self.folder} holds studies at several hooks. Watch one of them: prolu watch {inside[0]}"
        return f"{self.folder} holds no study yet; the page appears when training begins."


def check_watchable(folder: Path) -> None:
    """Raise ValueError if a path is a file, or lies in one, so that no study will ever be there."""
    if not (nearest := nearest_existing(folder)).is_dir():
        raise ValueError(f"out {str(folder)!r}: {nearest} is a file; name the folder of a study")


def _waiting(reason: str) -> ServedPage:
    return _served(render("waiting.html", reason=reason))


def _served(text: str) -> ServedPage:
    return ServedPage(text, hashlib.sha256(text.encode()).hexdigest())
