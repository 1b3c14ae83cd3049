"""Claims that a study supports or not, as sentences with numbers: ProLU against ReLU, and the paper's own four."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from prolu.evaluation.comparison.frontiers import Comparison, Curve, Record, at_hook, by_hook, compare, curves, family
from prolu.evaluation.comparison.verdicts import HIGHER, LOWER, UNDECIDED, Verdict

HOLDS = "holds"
FAILS = "does not hold"

L0_BOUNDARY = 25
"""The L0 at which the paper's best family changes. The paper states it with low to medium confidence."""


class Claim(NamedTuple):
    """A statement, whether it holds in a study, and why."""

    statement: str
    verdict: Literal["holds", "does not hold", "undecided"]
    evidence: str
    """The numbers behind the verdict, as one sentence that can follow a semicolon."""


def prolu_against_relu(records: Sequence[Record], found: Sequence[Verdict] = ()) -> list[Claim]:
    """Return, for each ProLU family, the claim that it has a lower CE increase than ReLU under the same penalty.

    Args:
        records: the runs; those that have not converged decide nothing.
        found: the result of `verdict_table` for these runs. Where it has intervals for a pair of families, they
            decide; otherwise the curves through the converged runs do, without an interval.
    """
    claims: list[Claim] = []
    for hook, some in by_hook(records).items():
        prefix = at_hook(hook, "") if hook else ""
        here = [
            v._replace(challenger=v.challenger.removeprefix(prefix)) for v in found if v.challenger.startswith(prefix)
        ]
        claims += _named(
            [
                _better(f"{nonlinearity} + {penalty}", f"relu + {penalty}", some, here)
                for penalty in ("l1", "sqrt_l1")
                for nonlinearity in ("prolu_relu", "prolu_ste")
                if any(family(r) == f"{nonlinearity} + {penalty}" for r in some)
            ],
            hook,
        )
    return claims


def paper_claims(records: Sequence[Record]) -> list[Claim]:
    """Return the four claims of Taggart 2024, decided by the converged runs.

    Where a claim is undecided, its evidence also says what all runs, converged or not, would decide.
    """
    return [claim for hook, some in by_hook(records).items() for claim in _named(_paper_claims(some), hook)]


def _named(claims: Sequence[Claim], hook: str) -> list[Claim]:
    """Return claims whose statements name the hook that they are about, where there are several."""
    return [claim._replace(statement=at_hook(hook, claim.statement)) if hook else claim for claim in claims]


def _paper_claims(records: Sequence[Record]) -> list[Claim]:
    decided = _claims(records)
    of_all_runs = _claims([{**r, "converged": True} for r in records])
    return [
        claim._replace(evidence=f"{claim.evidence} All runs, converged or not: {so_far.verdict}; {so_far.evidence}")
        if claim.verdict == UNDECIDED and so_far.evidence != claim.evidence
        else claim
        for claim, so_far in zip(decided, of_all_runs, strict=True)
    ]


def _claims(records: Sequence[Record]) -> list[Claim]:
    return [
        _best_family("prolu_ste + l1", records, 0, L0_BOUNDARY, f"below L0 {L0_BOUNDARY}"),
        _best_family("prolu_relu + sqrt_l1", records, L0_BOUNDARY, np.inf, f"above L0 {L0_BOUNDARY}"),
        _relu_on_l1_mse_frontier(records),
        _higher_l1(records),
    ]


def _better(challenger: str, baseline: str, records: Sequence[Record], found: Sequence[Verdict]) -> Claim:
    """Return the claim that a challenger has a lower CE increase than a baseline."""
    statement = f"{challenger} has a lower CE increase than {baseline} at equal L0"
    with_interval = [v for v in found if (v.challenger, v.baseline) == (challenger, baseline) and np.isfinite(v.low)]
    if with_interval:
        # One L0 at which the interval contains 0, or two that contradict each other, leave the claim undecided.
        kinds = {v.verdict for v in with_interval}
        verdict = HOLDS if kinds == {LOWER} else FAILS if kinds == {HIGHER} else UNDECIDED
        evidence = "; ".join(f"at L0 {v.l0:.3g} {v.in_numbers()}" for v in with_interval)
        return Claim(statement, verdict, f"{evidence}.")
    comparison = _compared(challenger, baseline, curves(records))
    if isinstance(comparison, str):
        of_all_runs = _compared(challenger, baseline, curves(records, unconverged=True))
        if isinstance(of_all_runs, str):
            return Claim(statement, UNDECIDED, comparison)
        return Claim(statement, UNDECIDED, f"{comparison} All runs, converged or not: {_in_numbers(of_all_runs)}.")
    verdict = HOLDS if comparison.largest < 0 else FAILS if comparison.smallest > 0 else UNDECIDED
    mixed = "; the sign changes within the range" if verdict == UNDECIDED else ""
    return Claim(statement, verdict, f"{_in_numbers(comparison)}{mixed}.")


def _in_numbers(found: Comparison) -> str:
    mean = f"{found.change:+.0%} on average over L0 {found.low:.3g} to {found.high:.3g}"
    return f"{mean}, where it lies between {found.smallest:+.0%} and {found.largest:+.0%} (no interval)"


def _compared(challenger: str, baseline: str, by_family: dict[str, Curve]) -> Comparison | str:
    """Return the comparison of two families, or a sentence that says why there is none."""
    for name in (challenger, baseline):
        if name not in by_family:
            return f"{name} has fewer than two converged runs."
    return compare(by_family[challenger], by_family[baseline]) or (
        f"the converged runs of {challenger} and {baseline} have no L0 in common."
    )


def _best_family(name: str, records: Sequence[Record], low: float, high: float, where: str) -> Claim:
    """Return the claim that a family has the lowest CE increase of all between two values of L0."""
    statement = f"{name} has the lowest CE increase {where}"
    rivals = curves(records)
    own = rivals.pop(name, None)
    if own is None:
        return Claim(statement, UNDECIDED, f"{name} has fewer than two converged runs.")
    ranges = {rival: (max(c.x[0], own.x[0], low), min(c.x[-1], own.x[-1], high)) for rival, c in rivals.items()}
    ranges = {rival: ends for rival, ends in ranges.items() if ends[0] < ends[1]}
    if not ranges:
        return Claim(statement, UNDECIDED, f"no other family has converged runs at the same L0 {where}.")
    closest: tuple[float, str, float] | None = None
    for rival, ends in ranges.items():
        grid = np.geomspace(*ends, 33)
        excess = own.at(grid) / rivals[rival].at(grid) - 1
        i = int(excess.argmax())
        if closest is None or excess[i] > closest[0]:
            closest = (float(excess[i]), rival, float(grid[i]))
    assert closest is not None
    excess, rival, l0 = closest
    if excess <= 0:
        lower = f"at equal L0 it has a lower CE increase than each of {', '.join(ranges)}"
        return Claim(statement, HOLDS, f"{lower}; the closest is {rival} ({excess:+.0%} at L0 {l0:.3g}).")
    figures = f"{rivals[rival].at(l0):.3f} nats against {own.at(l0):.3f}"
    return Claim(statement, FAILS, f"at L0 {l0:.3g} {rival} has a lower CE increase ({figures}).")


def _relu_on_l1_mse_frontier(records: Sequence[Record]) -> Claim:
    """Return the claim that ReLU under L1 is Pareto-best in what its own loss is made of."""
    statement = "every run of relu + l1 is on the frontier of MSE against L1"
    converged = [r for r in records if r["converged"]]
    relu = [r for r in converged if family(r) == "relu + l1"]
    others = [r for r in converged if family(r) != "relu + l1"]
    if len(relu) < 2 or not others:
        reason = "relu + l1 has fewer than two converged runs, or no other family has any."
        return Claim(statement, UNDECIDED, reason)
    # Other families only: of its own runs, whose seeds differ, one may well be a little worse than another.
    beaten_by = [[o for o in others if _beats(o, r)] for r in relu]
    n_beaten = sum(bool(better) for better in beaten_by)
    if not n_beaten:
        return Claim(statement, HOLDS, f"no run of another family beats any of its {len(relu)}.")
    names = ", ".join(sorted({family(o) for better in beaten_by for o in better}))
    return Claim(statement, FAILS, f"{n_beaten} of its {len(relu)} runs are beaten, by {names}.")


def _beats(a: Record, b: Record) -> bool:
    """Return whether run a is at least as low as run b in both L1 and MSE, and lower in one of them."""
    return a["l1"] <= b["l1"] and a["mse"] <= b["mse"] and (a["l1"], a["mse"]) != (b["l1"], b["mse"])


def _higher_l1(records: Sequence[Record]) -> Claim:
    """Return the claim that ProLU SAEs suppress latents less than ReLU SAEs under the same penalty."""
    statement = "ProLU SAEs have a higher L1 than ReLU SAEs at equal L0"
    by_family = curves(records, "l0", "l1")
    found: dict[str, float] = {}
    for name in by_family:
        nonlinearity, _, penalty = name.partition(" + ")
        if nonlinearity.startswith("prolu"):
            comparison = _compared(name, f"relu + {penalty}", by_family)
            if not isinstance(comparison, str):
                found[name] = comparison.change
    if not found:
        reason = "no ProLU family has converged runs at the same L0 as ReLU under the same penalty."
        return Claim(statement, UNDECIDED, reason)
    verdict = HOLDS if min(found.values()) > 0 else FAILS if max(found.values()) <= 0 else UNDECIDED
    changes = ", ".join(f"{name} {change:+.0%}" for name, change in found.items())
    return Claim(statement, verdict, f"L1 at equal L0, relative to ReLU under the same penalty: {changes}.")
