"""What a notebook shows of SAEs while they train: L0, MSE and CE increase on a little held-out text."""

import logging
import math
import time
from collections.abc import Sequence

from prolu.evaluation.held_out import AnyHeldOut, held_out_of
from prolu.evaluation.scoring import score_prefix
from prolu.studies.run_in_training import RunInTraining
from prolu.studies.study_in_training import StudyInTraining

logger = logging.getLogger(__name__)

LOOK_TOKENS = 1024
"""The number of held-out tokens on which an SAE is measured, of the 32,768 of the final scores."""

LARGEST_FRACTION = 0.03
"""The largest fraction of the time that may be spent on these figures. No result depends on them."""


class LiveFigures:
    """The figures of the SAEs of some studies, as a text that is at most seconds old.

    Each call measures at most one SAE, the one that was measured least often, and only if measuring has taken less than
    `LARGEST_FRACTION` of the time so far. The text has the last figures of each SAE, as a range if there are several.
    """

    def __init__(self, studies: Sequence[StudyInTraining]):
        self._studies = studies
        self._held_out: dict[int, AnyHeldOut] = {}
        self._looks: dict[tuple[int, str], dict[str, float]] = {}
        self._n_looks: dict[tuple[int, str], int] = {}
        self._start = time.monotonic()
        self._spent = 0.0
        self._goes_on = True

    def __call__(self) -> str:
        """Return the text; empty as long as no SAE was looked at."""
        begun = time.monotonic()
        in_training = [(i, run) for i, study in enumerate(self._studies) for run in study.runs if run.n_updates]
        if in_training and self._goes_on and self._spent <= LARGEST_FRACTION * (begun - self._start):
            self._look(*min(in_training, key=lambda place: self._n_looks.get((place[0], place[1].run_id), 0)))
        return self._text()

    def _look(self, i: int, run: RunInTraining) -> None:
        try:
            if i not in self._held_out:
                self._held_out[i] = held_out_of(self._studies[i].stream, LOOK_TOKENS)
            # Opening the held-out text is not counted, or short trainings would be measured only once.
            begun = time.monotonic()
            sae = run.trainer.sae()
            figures = score_prefix(sae, self._held_out[i], sae.d_sae)
        except (MemoryError, RuntimeError, ValueError) as problem:
            # Training must not stop because figures could not be shown.
            logger.warning("no figures are shown during training (%s)", problem)
            self._goes_on = False
            return
        self._spent += time.monotonic() - begun
        place = (i, run.run_id)
        self._looks[place] = figures
        self._n_looks[place] = self._n_looks.get(place, 0) + 1

    def _text(self) -> str:
        if not self._looks:
            return ""
        parts = [f"L0 {self._range('l0', '.1f')}", f"MSE {self._range('mse', '.3f')}"]
        if any(math.isfinite(figures["degradation"]) for figures in self._looks.values()):
            parts.append(f"CE increase {self._range('degradation', '.3f')} nats")
        return ", ".join(parts)

    def _range(self, name: str, form: str) -> str:
        values = [figures[name] for figures in self._looks.values()]
        ends = dict.fromkeys(format(end, form) for end in (min(values), max(values)))
        return " to ".join(ends)
