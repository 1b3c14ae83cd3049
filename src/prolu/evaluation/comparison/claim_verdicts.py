"""What intervals decide about a claim: whether it holds, does not hold or is undecided, and on how many seeds."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from prolu.evaluation.comparison.wording import HIGHER, LOWER, NOT_DISTINGUISHABLE, ONE_SEED, Verdict

HOLDS = "holds"
FAILS = "does not hold"
UNDECIDED = "undecided"
NOT_TESTED = "not tested"

OF_ONE_SEED = f" ({ONE_SEED})"
"""What follows the verdict on a claim where one family has one seed: its interval covers held-out documents only, so
that another seed may say something else."""

ClaimVerdict = Literal[
    "holds",
    "does not hold",
    "undecided",
    "holds (one seed)",
    "does not hold (one seed)",
    "undecided (one seed)",
    "not tested",
]


class Claim(NamedTuple):
    """A statement, whether it holds in a study, and why."""

    statement: str
    verdict: ClaimVerdict
    """Undecided where intervals contain 0 or contradict each other. Where there are none over seeds, those over
    held-out documents decide, and the verdict says that it is of one seed. Not tested where there are none at all."""
    evidence: str
    """The numbers behind the verdict, as one sentence that can follow a semicolon."""


def together(verdicts: Sequence[Verdict], confirming: str, refuting: str) -> ClaimVerdict:
    """Return what several verdicts say together about one claim.

    One L0 at which the interval contains 0, or two that contradict each other, leave the claim undecided.
    """
    kinds = {side(v) for v in deciding(verdicts)}
    if not kinds:
        return NOT_TESTED
    return scoped(HOLDS if kinds == {confirming} else FAILS if kinds == {refuting} else UNDECIDED, verdicts)


def deciding(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts that decide: those over seeds, or where there are none those over held-out documents."""
    tested = [v for v in verdicts if v.is_tested]
    return tested or [v for v in verdicts if math.isfinite(v.low)]


def side(v: Verdict) -> str:
    """Return on which side of 0 the interval of a verdict lies, whatever it covers."""
    return LOWER if v.high < 0 else HIGHER if v.low > 0 else NOT_DISTINGUISHABLE


def scoped(word: Literal["holds", "does not hold", "undecided"], verdicts: Sequence[Verdict]) -> ClaimVerdict:
    """Return the verdict on a claim, which says so where no interval over seeds decides."""
    if any(v.is_tested for v in verdicts):
        return word
    of_one_seed: dict[str, ClaimVerdict] = {
        HOLDS: "holds (one seed)",
        FAILS: "does not hold (one seed)",
        UNDECIDED: "undecided (one seed)",
    }
    return of_one_seed[word]
