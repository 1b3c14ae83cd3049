"""Families of SAEs compared at equal L0, with intervals.

- `frontiers`: Pareto-best runs, groups of runs, curves of families, the convergence rule.
- `intervals`: the arithmetic of 95% intervals.
- `points`: the points of a figure, which are means over seeds, and hypervolumes.
- `same_text`: which studies may be compared.
- `replicates`: runs by family and seed, and resamples of the held-out documents.
- `verdicts`: which of two families has the lower CE increase, with a 95% interval.
- `claims`: the claims of the paper as sentences with numbers.
- `styles`: planes, axis titles, colours and markers, for figures and the HTML page.
- `figures`: the figures, drawn with matplotlib.
"""
