"""What a study says: ProLU against ReLU at matched L0, and the paper's four claims, each as a sentence."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from prolu.evaluation.comparison.frontiers import Comparison, Curve, Record, compare, curves, family
from prolu.evaluation.comparison.verdicts import LESS, MORE, Verdict

CANNOT = "cannot be said"
L0_BOUNDARY = 25
"""Where the paper's best family changes (low to medium confidence there)."""


class Claim(NamedTuple):
    """A statement and what this study makes of it."""

    statement: str
    verdict: Literal["holds", "does not hold", "cannot be said"]
    evidence: str
    """One sentence, with the numbers."""


def verdicts(records: Sequence[Record], found: Sequence[Verdict] = ()) -> list[Claim]:
    """ProLU against ReLU under each penalty, by degradation at matched L0, over converged runs.

    Args:
        records: the runs.
        found: their `statistics.verdict_table`; where it has an interval for a pair, that decides instead.
    """
    return [
        _better(f"{nonlinearity} + {penalty}", f"relu + {penalty}", records, found)
        for penalty in ("l1", "sqrt_l1")
        for nonlinearity in ("prolu_relu", "prolu_ste")
        if any(family(r) == f"{nonlinearity} + {penalty}" for r in records)
    ]


def paper_claims(records: Sequence[Record]) -> list[Claim]:
    """The claims of Taggart 2024 on converged runs; where those are too few, also what all runs would say."""
    decided, all_runs = _claims(records), _claims([{**r, "converged": True} for r in records])
    return [
        claim._replace(evidence=f"{claim.evidence} All runs, converged or not: {so_far.verdict}; {so_far.evidence}")
        if claim.verdict == CANNOT and so_far.evidence != claim.evidence
        else claim
        for claim, so_far in zip(decided, all_runs, strict=True)
    ]


def _claims(records: Sequence[Record]) -> list[Claim]:
    return [
        _best_family("prolu_ste + l1", records, 0, L0_BOUNDARY, f"below L0 {L0_BOUNDARY}"),
        _best_family("prolu_relu + sqrt_l1", records, L0_BOUNDARY, np.inf, f"above L0 {L0_BOUNDARY}"),
        _relu_on_l1_mse_frontier(records),
        _higher_l1(records),
    ]


def _better(challenger: str, baseline: str, records: Sequence[Record], measured: Sequence[Verdict]) -> Claim:
    statement = f"{challenger} loses less than {baseline} at equal L0"
    own = [v for v in measured if (v.challenger, v.baseline) == (challenger, baseline) and not math.isnan(v.low)]
    if own:
        agreed = {v.verdict for v in own}
        verdict = "holds" if agreed == {LESS} else "does not hold" if agreed == {MORE} else CANNOT
        return Claim(statement, verdict, "; ".join(map(str, own)) + ".")
    found = _compared(challenger, baseline, curves(records))
    if isinstance(found, str):
        anyhow = _compared(challenger, baseline, curves(records, unconverged=True))
        so_far = "" if isinstance(anyhow, str) else f" All runs, converged or not: {_in_numbers(anyhow)}."
        return Claim(statement, CANNOT, found + so_far)
    verdict = "holds" if found.largest < 0 else "does not hold" if found.smallest > 0 else CANNOT
    mixed = "; the sign changes within the range" if verdict == CANNOT else ""
    return Claim(statement, verdict, f"{challenger} against {baseline}: {_in_numbers(found)}{mixed}.")


def _in_numbers(found: Comparison) -> str:
    reach = f"from {found.smallest:+.0%} to {found.largest:+.0%} over L0 {found.low:.3g}-{found.high:.3g}"
    return f"{found.change:+.0%} degradation at matched L0 ({reach})"


def _compared(challenger: str, baseline: str, by_family: dict[str, Curve]) -> Comparison | str:
    """The comparison, or why there is none."""
    for name in (challenger, baseline):
        if name not in by_family:
            return f"{name} has fewer than two converged runs."
    return compare(by_family[challenger], by_family[baseline]) or (
        f"the converged runs of {challenger} and {baseline} share no range of L0."
    )


def _best_family(name: str, records: Sequence[Record], low: float, high: float, where: str) -> Claim:
    statement = f"{name} loses least {where}"
    by_family = curves(records)
    if name not in by_family:
        return Claim(statement, CANNOT, f"{name} has fewer than two converged runs.")
    own = by_family.pop(name)
    rivals = {n: c for n, c in by_family.items() if min(c.x[-1], own.x[-1], high) > max(c.x[0], own.x[0], low)}
    if not rivals:
        return Claim(statement, CANNOT, f"no other family has converged runs at the same L0 {where}.")
    worst: tuple[float, str, float] | None = None
    for rival, c in rivals.items():
        grid = np.geomspace(max(c.x[0], own.x[0], low), min(c.x[-1], own.x[-1], high), 33)
        excess = own.at(grid) / c.at(grid) - 1
        i = int(excess.argmax())
        if worst is None or excess[i] > worst[0]:
            worst = float(excess[i]), rival, float(grid[i])
    assert worst is not None
    excess, rival, l0 = worst
    if excess <= 0:
        closest = f"the closest is {rival} ({excess:+.0%} at L0 {l0:.3g})"
        evidence = f"at matched L0 it loses less than each of {', '.join(rivals)}; {closest}."
        return Claim(statement, "holds", evidence)
    figures = f"{own.at(l0):.3f} nats against {by_family[rival].at(l0):.3f}"
    return Claim(statement, "does not hold", f"at L0 {l0:.3g} {rival} loses less ({figures}).")


def _relu_on_l1_mse_frontier(records: Sequence[Record]) -> Claim:
    statement = "relu + l1 is on the frontier of MSE against L1 everywhere"
    rows = [r for r in records if r["converged"]]
    relu, others = ([r for r in rows if (family(r) == "relu + l1") is own] for own in (True, False))
    if len(relu) < 2 or not others:
        return Claim(statement, CANNOT, "fewer than two converged runs of relu + l1, or of nothing else.")
    beaten = [(r, better) for r in relu if (better := [o for o in others if _beats(o, r)])]
    if not beaten:
        return Claim(statement, "holds", f"no run of another family beats any of its {len(relu)}.")
    by = ", ".join(sorted({family(o) for _, better in beaten for o in better}))
    return Claim(statement, "does not hold", f"{len(beaten)} of its {len(relu)} runs are beaten, by {by}.")


def _beats(a: Record, b: Record) -> bool:
    """Whether run a is as low as b in both L1 and MSE, and lower in one."""
    return a["l1"] <= b["l1"] and a["mse"] <= b["mse"] and (a["l1"], a["mse"]) != (b["l1"], b["mse"])


def _higher_l1(records: Sequence[Record]) -> Claim:
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
        return Claim(statement, CANNOT, "no ProLU family shares a range of L0 with ReLU among converged runs.")
    changes = ", ".join(f"{name} {change:+.0%}" for name, change in found.items())
    verdict = "holds" if min(found.values()) > 0 else "does not hold" if max(found.values()) <= 0 else CANNOT
    return Claim(statement, verdict, f"L1 at matched L0 against ReLU under the same penalty: {changes}.")
