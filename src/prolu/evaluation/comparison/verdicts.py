"""Verdicts: which of two families has the lower CE increase, or another metric, at an equal L0, with a 95% interval.

Every number of a comparison comes from `Comparisons`, whoever asks: `matched`, tables, sentences and claims.
"""

from collections.abc import Sequence

from prolu.evaluation.comparison.comparisons import Comparisons
from prolu.evaluation.comparison.curves import check_l0
from prolu.evaluation.comparison.metric_catalog import check_compared
from prolu.evaluation.comparison.replicates import FinishedStudy
from prolu.evaluation.comparison.wording import HIGHER, LOWER, Verdict, rows_for_tables
from prolu.runtime.notebooks import ShownRows

__all__ = ["HIGHER", "LOWER", "Verdict", "matched", "rows_for_tables", "verdict_table"]


def matched(
    studies: FinishedStudy | Sequence[FinishedStudy],
    challenger: str,
    baseline: str,
    l0: float,
    *,
    y: str = "",
    unconverged: bool = True,
    n_tokens: int | None = None,
) -> Verdict:
    """Return the change of CE increase, or of another metric, from a baseline to a challenger at one L0.

    A replicate is a (stream seed, init seed). In each, a family's curve goes through all its runs of one training
    budget, monotone between neighbours in (log L0, log CE increase) (Fritsch and Carlson's, scipy's PCHIP), and is read
    at `l0`, if a run lies within a factor of 1.5. With d the log CE increase that was read, change = exp(mean
    d_challenger - mean d_baseline) - 1, where the means are over replicates. A metric that the catalogue compares as a
    difference is read as it is, on a linear axis, and change = mean d_challenger - mean d_baseline.

    The 95% interval covers init seeds and held-out documents together; documents only of metrics that follow from sums
    over them (CE increase, KL divergence, MSE ...), and the verdict says so. It covers stream seeds (the order of
    training tokens) only where studies at several of them are pooled, and never the choice of language model, hook,
    training text and hyperparameters. With a = s^2 / n, the variance of a family's mean over its n replicates,

        variance = a_challenger + a_baseline + D,
        df = variance^2 / (a_challenger^2 / (n_c - 1) + a_baseline^2 / (n_b - 1) + D^2 / (m - 1)),

    and the interval is a t interval with these degrees of freedom, Welch's and Satterthwaite's. D is the variance over
    documents that all replicates share: the variance of the whole estimate over 2,000 resamples of the documents, the
    same for every run, less what the replicates' own disagreement about documents contributes to it, since s^2 contains
    that already. m is the effective number of documents, (sum w)^2 / sum w^2 with w their numbers of tokens.

    With one seed of either family, the interval covers held-out documents only, and the verdict is "not tested".

    Args:
        studies: one study, or several with the same language model, hook and held-out tokens.
        challenger: a family, for example `prolu_ste + l1`.
        baseline: another family.
        l0: the L0 at which the two are compared.
        y: the metric, by its name in results.jsonl; `metric_catalog.METRICS` has all of them. By default it is the CE
            increase, or the FVU of runs on rows that come from no language model.
        unconverged: whether runs that have not converged are used too. The verdict counts them.
        n_tokens: the number of training tokens of the runs that are compared; by default the largest that both
            families have.

    Raises:
        ValueError: several studies were scored with different models, at different hooks or on different tokens; or
            `l0` is not above 0; or `y` is no metric.
    """
    check_l0(l0)
    check_compared(y)
    return Comparisons(studies, unconverged=unconverged).verdict(challenger, baseline, l0, y, n_tokens=n_tokens)


def verdict_table(
    studies: FinishedStudy | Sequence[FinishedStudy],
    l0s: Sequence[float] | None = None,
    *,
    y: str = "",
    unconverged: bool = True,
) -> ShownRows[Verdict]:
    """Return the verdicts of every family against `relu + l1`, `relu + sqrt_l1` and its own random baselines.

    The list is shown as a table in a notebook, and its `to_pandas()` is a table with a row per verdict.

    Each interval is for its own comparison: of twenty 95% intervals, one misses the true value on average.

    Args:
        studies: one study, or several with the same language model, hook and held-out tokens.
        l0s: the L0s at which families are compared; by default the runs' target L0s, or without these three values
            that both families reach.
        y: the metric that is compared, by its name in results.jsonl; by default as in `matched`.
        unconverged: whether runs that have not converged are used too. Verdicts count them.

    Raises:
        ValueError: several studies were scored with different models, at different hooks or on different tokens;
            one of `l0s` is not above 0; or `y` is no metric.
    """
    for l0 in l0s or ():
        check_l0(l0)
    check_compared(y)
    return ShownRows(Comparisons(studies, unconverged=unconverged).table(l0s, y))
