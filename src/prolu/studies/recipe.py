"""What a study trains before the width of the activations is known, and how options change it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from prolu.runtime.checks import at_least_1, one_of
from prolu.studies.widths import DSae, n_latents
from prolu.training.config import RunConfig


class Recipe(NamedTuple):
    """What a named study trains, before the width of the activations is known."""

    runs_at: Callable[[int], list[RunConfig]]
    """The runs to train on activations of width d_in. Only coefficients and d_sae may depend on the width."""
    batch_size: int
    """The number of tokens per training step."""
    n_tokens: int
    """The number of training tokens of the longest run."""
    source: Mapping[str, Any]
    """The default options of the source of activations: lm, hook, data and the fields that belong to the data."""

    def changed(self, change: Callable[[list[RunConfig]], list[RunConfig]]) -> "Recipe":
        """Return the same study with its list of runs changed."""
        return self._replace(runs_at=lambda d_in: change(self.runs_at(d_in)))

    def scaled(self, factor: float) -> "Recipe":
        """Return the same study on `factor` times the tokens; schedule, resampling and its candidates shrink with it.

        Raises:
            ValueError: `factor` is not positive and finite.
        """
        if not 0 < factor < float("inf"):
            raise ValueError(f"scale {factor}: must be more than 0, and finite")
        if factor == 1:
            return self

        # Schedule and resampling are fractions of a run, so they follow; the number of candidates is a count.
        def shortened(run: RunConfig) -> RunConfig:
            n_candidates = max(1, round(factor * run.resample_candidates))
            return replace(run, n_tokens=round(factor * run.n_tokens), resample_candidates=n_candidates)

        shorter = self.changed(lambda runs: [shortened(run) for run in runs])
        return shorter._replace(n_tokens=round(factor * self.n_tokens))

    def of_length(self, n_tokens: int) -> "Recipe":
        """Return the same study, scaled so that its longest run has this number of tokens."""
        at_least_1("n_tokens", n_tokens)
        scaled = self.scaled(n_tokens / self.n_tokens)
        # The product may be rounded to a neighbour of the number that was asked for.
        exact = scaled.changed(
            lambda runs: [replace(run, n_tokens=n_tokens) if run.n_tokens == scaled.n_tokens else run for run in runs]
        )
        return exact._replace(n_tokens=n_tokens)

    def of_width(self, d_sae: DSae) -> "Recipe":
        """Return the same study with SAEs of another width: a number of latents, or a multiple of d_in such as "8x".

        The prefixes of nested losses stay the same fractions.
        """

        def widened(run: RunConfig, width: int) -> RunConfig:
            prefixes = tuple(round(n * width / run.d_sae) for n in run.matryoshka)
            return replace(run, d_sae=width, matryoshka=prefixes)

        return self._replace(runs_at=lambda d_in: [widened(run, n_latents(d_sae, d_in)) for run in self.runs_at(d_in)])

    def at_targets(self, target_l0s: Sequence[float]) -> "Recipe":
        """Return each family once at each target L0, instead of at its grid of coefficients.

        The L0 controller starts from the middle coefficient of the family's grid.
        """
        return self.changed(
            lambda runs: [replace(run, target_l0=float(l0)) for run in middle_of_families(runs) for l0 in target_l0s]
        )

    def with_penalties(self, penalties: Sequence[str]) -> "Recipe":
        """Return only the runs with one of these penalties, such as "l1".

        Raises:
            ValueError: No run of the study has one of them (when the runs are made).
        """

        def chosen(runs: list[RunConfig]) -> list[RunConfig]:
            there = dict.fromkeys(run.resolved_penalty for run in runs)
            for penalty in penalties:
                one_of("penalty", penalty, there)
            return [run for run in runs if run.resolved_penalty in penalties]

        return self.changed(chosen)

    def at_coeffs(self, coeffs: Sequence[float]) -> "Recipe":
        """Return each family once at each coefficient, instead of at its own grid of coefficients.

        Of a study with target L0s, the one coefficient is where the L0 controller starts, and that of penalties that
        draw L0 to the target themselves. Families without a penalty stay as they are.

        Raises:
            ValueError: There are several coefficients, and the runs have target L0s (when the runs are made).
        """

        def at_each_coeff(runs: list[RunConfig]) -> list[RunConfig]:
            if any(run.target_l0 is not None for run in runs):
                check_one_start(coeffs)
                return [_weighed(run, coeffs[0]) for run in runs]
            every = [_weighed(run, coeff) for run in middle_of_families(runs) for coeff in coeffs]
            return list(dict.fromkeys(every))

        return self.changed(at_each_coeff)


def check_one_start(coeffs: Sequence[float]) -> None:
    """Raise ValueError if several coefficients are given for runs whose L0 controller adjusts the coefficient."""
    if len(coeffs) > 1:
        raise ValueError(
            f"coeff {' '.join(f'{coeff:g}' for coeff in coeffs)}: the L0 controller adjusts the coefficient to the "
            "target L0, so give one, from which it starts"
        )


def middle_of_families(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """Return one run of each family, that with the middle coefficient."""
    families: dict[str, list[RunConfig]] = {}
    for run in runs:
        families.setdefault(run.family, []).append(run)
    return [sorted(grid, key=lambda run: run.coeff)[len(grid) // 2] for grid in families.values()]


def _weighed(run: RunConfig, coeff: float) -> RunConfig:
    return run if run.resolved_penalty == "none" else replace(run, coeff=coeff)
