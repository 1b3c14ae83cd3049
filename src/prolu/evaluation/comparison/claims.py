"""Claims that a study supports or not, as sentences with numbers: ProLU against ReLU, and the paper's own four.

A claim has no numbers of its own: it quotes the verdicts of `Comparisons`, which the table of verdicts shows too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from prolu.evaluation.comparison import reasons
from prolu.evaluation.comparison.claim_verdicts import (
    FAILS,
    HOLDS,
    NOT_TESTED,
    OF_ONE_SEED,
    UNDECIDED,
    Claim,
    deciding,
    scoped,
    side,
    together,
)
from prolu.evaluation.comparison.comparisons import Comparisons
from prolu.evaluation.comparison.frontiers import Record, at_hook, budget, family, grouped, replicate
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS
from prolu.evaluation.comparison.replicates import FinishedStudy
from prolu.evaluation.comparison.standings import Standing, standings_of
from prolu.evaluation.comparison.wording import (
    HIGHER,
    LOWER,
    NOT_DISTINGUISHABLE,
    NOT_OVER_SEEDS,
    ONE_SEED,
    Verdict,
    listed,
    not_converged,
    percent,
    qualifiers,
    shown_interval,
    shown_l0,
)

L0_BOUNDARY = 25
"""The L0 at which the paper's best family changes. The paper states it with low to medium confidence."""


class FamilyComparison(NamedTuple):
    """All that a study, or several together, say about how its families compare, at one hook or at several."""

    verdicts: list[Verdict]
    """Every family against its baselines, at equal L0."""
    against_relu: list[Claim]
    """The claims that a ProLU family has a lower CE increase than ReLU."""
    paper: list[Claim]
    """The four claims of Taggart 2024."""
    others: Sequence[Verdict] = ()
    """Every family against its baselines in other metrics that were asked for."""
    standings: Sequence[Standing] = ()
    """What every family reaches in several metrics at equal L0."""


def compare_families(studies: Sequence[FinishedStudy], metrics: Sequence[str] = ()) -> FamilyComparison:
    """Return how the families of some studies compare.

    Studies at several hooks are compared hook by hook, and families and claims are named with the hook: SAEs at two
    hooks reconstruct different activations, so their CE increases say nothing about each other.

    Args:
        studies: the studies.
        metrics: the metrics beside the CE increase by which families are compared, by their names in results.jsonl;
            without any, the standings have the usual ones. The cross-entropy with the SAE is one of them unasked where
            only it has intervals (`Comparisons.in_nats`).
    """
    by_hook = grouped(studies, lambda study: (study.config.get("stream") or {}).get("hook", ""))
    found = FamilyComparison([], [], [])
    others: list[Verdict] = []
    standings: list[Standing] = []
    for (hook,), some in by_hook.items():
        comparisons = Comparisons(some)
        table = comparisons.table()
        decided = [comparisons.in_nats(v) for v in table]
        claims = (prolu_against_relu(decided), paper_claims(comparisons))
        tables = [*metrics, "ce_recon"] if decided != table and "ce_recon" not in metrics else metrics
        table_of_others = [v for y in tables for v in comparisons.table(y=y)]
        names = list(dict.fromkeys([comparisons.main_metric, *metrics])) if metrics else None
        standing = standings_of(comparisons, names)
        if len(by_hook) > 1:
            table = [v._replace(challenger=at_hook(hook, v.challenger)) for v in table]
            table_of_others = [v._replace(challenger=at_hook(hook, v.challenger)) for v in table_of_others]
            standing = [s._replace(family=at_hook(hook, s.family)) for s in standing]
            claims = tuple([c._replace(statement=at_hook(hook, c.statement)) for c in part] for part in claims)
        found.verdicts.extend(table)
        found.against_relu.extend(claims[0])
        found.paper.extend(claims[1])
        others += table_of_others
        standings += standing
    return found._replace(others=others, standings=standings)


def prolu_against_relu(found: Sequence[Verdict]) -> list[Claim]:
    """Return, for each ProLU family, the claim that it has a lower CE increase than ReLU under the same penalty.

    Args:
        found: the table of verdicts, some of which may be in nats (`Comparisons.in_nats`).
    """
    pairs = [
        (f"{nonlinearity} + {penalty}", f"relu + {penalty}")
        for penalty in ("l1", "sqrt_l1")
        for nonlinearity in ("prolu_relu", "prolu_ste")
    ]
    by_pair = grouped(found, lambda v: v.challenger, lambda v: v.baseline)
    return [
        _claim(f"{pair[0]} has a lower {_words(by_pair[pair][0])} than {pair[1]} at equal L0", by_pair[pair])
        for pair in pairs
        if pair in by_pair
    ]


def _words(verdict: Verdict) -> str:
    """Return what a verdict compares, in words; the cross-entropy with the SAE stands for the CE increase in nats."""
    return METRICS[CE_INCREASE if verdict.metric == "ce_recon" else verdict.metric].words


def paper_claims(comparisons: Comparisons) -> list[Claim]:
    """Return the four claims of Taggart 2024, as far as the runs of some studies decide them."""
    return [
        _best_family("prolu_ste + l1", comparisons, 0, L0_BOUNDARY, f"below L0 {L0_BOUNDARY}"),
        _best_family("prolu_relu + sqrt_l1", comparisons, L0_BOUNDARY, math.inf, f"above L0 {L0_BOUNDARY}"),
        _relu_on_l1_mse_frontier(comparisons),
        _higher_l1(comparisons),
    ]


def _claim(statement: str, verdicts: Sequence[Verdict]) -> Claim:
    """Return the claim that the CE increase is lower in all of some verdicts on one pair of families."""
    with_number = [v for v in verdicts if math.isfinite(v.change)]
    if not with_number:
        why = dict.fromkeys(v.reason for v in verdicts)
        return Claim(statement, NOT_TESTED, f"{'; '.join(why)}.")
    common = _common_qualifiers(with_number)
    changes = [f"at L0 {shown_l0(v.l0)} {v.in_numbers(leave_out=common)}" for v in with_number]
    return Claim(statement, together(with_number, LOWER, HIGHER), f"{'; '.join([*changes, *common])}.")


def _common_qualifiers(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the qualifications that all of these verdicts have in common, so that a report says them once."""
    common = [q for q in qualifiers(verdicts[0]) if all(q in qualifiers(v) for v in verdicts[1:])]
    return common if any(v.is_tested for v in verdicts) else [*common, NOT_OVER_SEEDS]


def _best_family(name: str, comparisons: Comparisons, low: float, high: float, where: str) -> Claim:
    """Return the claim that a family has the lowest CE increase of all between two values of L0."""
    statement = f"{name} has the lowest {METRICS[comparisons.main_metric].words} {where}"
    own = [r["l0"] for r in comparisons.records if family(r) == name]
    bounds = where.replace("L0 ", "")
    target = f"a target_l0 {bounds}"
    if not own:
        how = _how_to_train(comparisons, name, low, high)
        return Claim(statement, NOT_TESTED, f"there is no run of {name}; train one with {target}{how}.")
    verdicts = [
        comparisons.verdict(name, rival, l0)
        for rival in comparisons.families
        if rival != name
        for l0 in comparisons.l0s(name, rival, low, high)
    ]
    in_nats = [comparisons.in_nats(v) for v in verdicts]
    if in_nats != verdicts:
        # All in nats: which family comes closest cannot be told from some changes in nats and others in percent.
        verdicts = [comparisons.verdict(name, v.baseline, v.l0, "ce_recon") for v in verdicts]
    found = {
        rival: same
        for (rival,), same in grouped([v for v in verdicts if math.isfinite(v.change)], lambda v: v.baseline).items()
    }
    if not found:
        others = [r["l0"] for r in comparisons.records if family(r) != name] or [math.nan]
        return Claim(
            statement,
            NOT_TESTED,
            f"{name} and another family cannot be read at the same L0 {bounds}: its runs have L0 {min(own):.3g} to "
            f"{max(own):.3g}, those of others {min(others):.3g} to {max(others):.3g}; train both with {target}"
            f"{_how_to_train(comparisons, name, low, high)}.",
        )
    everything = [v for verdicts in found.values() for v in verdicts]
    # The verdict that is quoted is the one on the family that comes closest, or that beats this one by most.
    closest = max(everything, key=lambda v: v.change)
    quoted = f"{name} against {closest.baseline} at L0 {shown_l0(closest.l0)} {closest.in_numbers()}"
    grounds = deciding(everything)
    if not grounds:
        return Claim(statement, NOT_TESTED, f"{ONE_SEED}; the closest: {quoted}.")
    if refuting := [v for v in grounds if side(v) == HIGHER]:
        better = listed(list(dict.fromkeys(v.baseline for v in refuting)))
        return Claim(statement, scoped(FAILS, grounds), f"lower is that of {better}; {quoted}.")
    by_rival = {together(verdicts, LOWER, HIGHER) for verdicts in found.values()}
    if by_rival <= {HOLDS, HOLDS + OF_ONE_SEED}:
        lower = f"lower than each of {listed(list(found))} at every L0 compared"
        # One rival of one seed is enough for the whole claim to rest on one seed.
        verdict = HOLDS if by_rival == {HOLDS} else "holds (one seed)"
        return Claim(statement, verdict, f"{lower}; the closest: {quoted}.")
    return Claim(statement, scoped(UNDECIDED, grounds), f"the closest: {quoted}.")


def _how_to_train(comparisons: Comparisons, name: str, low: float, high: float) -> str:
    """Return the command that trains a family at an L0 between two bounds as other runs were, if it is known.

    The L0 is the median of the other families' L0s between the bounds. If there are none, it lies a factor of 1.5
    within a bound.
    """
    config = comparisons.studies[0].config
    others = sorted(r["l0"] for r in comparisons.records if family(r) != name and low < r["l0"] < high)
    l0 = others[len(others) // 2] if others else high / 1.5 if high < math.inf else low * 1.5
    command = reasons.command_to_train(name, float(f"{l0:.2g}"), config, comparisons.records[0])
    return f", for example by `{command}`" if command else ""


def _relu_on_l1_mse_frontier(comparisons: Comparisons) -> Claim:
    """Return the claim that ReLU under L1 is Pareto-best in what its own loss is made of.

    No curve is interpolated here: each run is compared with the runs of other families that have the same seeds and
    budget.
    """
    statement = "every run of relu + l1 is on the frontier of MSE against L1"
    groups = grouped(_with_stream_seeds(comparisons), replicate, budget).values()
    groups = [some for some in groups if {"relu + l1"} < {family(r) for r in some}]
    if not groups:
        return Claim(
            statement, NOT_TESTED, "no seed has runs of relu + l1 and of another family, trained on as many tokens."
        )
    runs = [r for some in groups for r in some]
    relu = [r for r in runs if family(r) == "relu + l1"]
    beaten_by = [[o for o in runs if family(o) != "relu + l1" and _is_beside(o, r) and _beats(o, r)] for r in relu]
    n_beaten = sum(map(bool, beaten_by))
    n_seeds = len(set(map(replicate, relu)))
    unconverged = not_converged(sum(r["converged"] is False for r in runs), len(runs))
    tail = (f", {n_seeds} seeds" if n_seeds > 1 else f", {ONE_SEED}") + (f"; {unconverged}" if unconverged else "")
    if not n_beaten:
        verdict = HOLDS if n_seeds > 1 else "holds (one seed)"
        return Claim(statement, verdict, f"none of its {len(relu)} runs is beaten by a run of another family{tail}.")
    names = ", ".join(sorted({family(o) for better in beaten_by for o in better}))
    seeds_beaten = {replicate(r) for r, better in zip(relu, beaten_by, strict=True) if better}
    verdict = FAILS if len(seeds_beaten) == n_seeds else UNDECIDED
    if n_seeds < 2:
        verdict = "does not hold (one seed)"
    verb = "is" if n_beaten == 1 else "are"
    return Claim(statement, verdict, f"{n_beaten} of its {len(relu)} runs {verb} beaten, by {names}{tail}.")


def _with_stream_seeds(comparisons: Comparisons) -> list[Record]:
    return [{**r, "stream_seed": study.stream_seed} for study in comparisons.studies for r in study.records]


def _is_beside(a: Record, b: Record) -> bool:
    """Return whether two runs have the same seeds and the same number of training tokens."""
    return (replicate(a), budget(a)) == (replicate(b), budget(b))


def _beats(a: Record, b: Record) -> bool:
    """Return whether run a is at least as low as run b in both L1 and MSE, and lower in one of them."""
    return a["l1"] <= b["l1"] and a["mse"] <= b["mse"] and (a["l1"], a["mse"]) != (b["l1"], b["mse"])


def _higher_l1(comparisons: Comparisons) -> Claim:
    """Return the claim that ProLU SAEs suppress latents less than ReLU SAEs under the same penalty."""
    statement = "ProLU SAEs have a higher L1 than ReLU SAEs at equal L0"
    found: list[Verdict] = []
    for name in comparisons.families:
        nonlinearity, _, penalty = name.partition(" + ")
        baseline = f"relu + {penalty}"
        if nonlinearity.startswith("prolu") and baseline in comparisons.families:
            found += [comparisons.verdict(name, baseline, l0, "l1") for l0 in comparisons.l0s(name, baseline, y="l1")]
    found = [v for v in found if math.isfinite(v.change)]
    if not found:
        return Claim(
            statement,
            NOT_TESTED,
            "no ProLU family can be compared with ReLU under the same penalty at any L0; train both with the same "
            f"target_l0{_how_to_train(comparisons, 'prolu_ste + l1', 0, math.inf)}.",
        )
    changes: list[str] = []
    for (name,), verdicts in grouped(found, lambda v: v.challenger).items():
        common = [q for q in _common_qualifiers(verdicts) if q != NOT_OVER_SEEDS]
        numbers = [f"{percent(v.change)} at L0 {shown_l0(v.l0)}{_about_l1(v, common)}" for v in verdicts]
        changes.append(f"{name} {', '.join(numbers)}" + "".join(f"; {q}" for q in common))
    if not any(v.is_tested for v in found):
        changes.append(NOT_OVER_SEEDS)
    evidence = f"L1 relative to ReLU under the same penalty: {'; '.join(changes)}."
    return Claim(statement, together(found, HIGHER, LOWER), evidence)


def _about_l1(v: Verdict, common: Sequence[str]) -> str:
    interval = [f"95% interval {shown_interval(v)}"] if math.isfinite(v.low) else []
    doubt = [NOT_DISTINGUISHABLE] if v.verdict == NOT_DISTINGUISHABLE else []
    inside = [*interval, *doubt, *(q for q in qualifiers(v) if q not in common)]
    return f" ({'; '.join(inside)})" if inside else ""
