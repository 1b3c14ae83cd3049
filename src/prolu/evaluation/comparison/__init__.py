"""Families of SAEs compared at equal L0, with intervals.

- `frontiers`: Pareto-best runs, curves of a family, the convergence rule.
- `points`: means over seeds, and hypervolumes.
- `replicates`: runs by family and seed, and held-out documents resampled.
- `verdicts`: which of two families is better, with a 95% interval.
- `claims`: the claims of the paper as sentences with numbers.
- `figures`: the figures.
"""
