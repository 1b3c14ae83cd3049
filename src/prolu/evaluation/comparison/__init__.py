"""Families of SAEs compared at equal L0, with intervals.

- `metric_catalog`: the metrics that may be compared: words, units, which direction is better, ratio or difference.
- `frontiers`: Pareto-best runs, groups of runs, the convergence rule.
- `curves`: a family's runs as one curve, the only interpolation there is.
- `intervals`: the arithmetic of 95% intervals.
- `points`: the points of a figure, which are means over seeds, and hypervolumes.
- `prefixes`: the scores of the shorter SAEs of nested losses.
- `same_text`: which studies may be compared.
- `replicates`: the curves of every family and seed, and resamples of the held-out documents.
- `comparisons`: the engine, from which all numbers of a comparison come.
- `verdicts`: which of two families has the lower CE increase, or another metric, with a 95% interval.
- `standings`: families by metrics at one L0, and the probability that each is the best.
- `standing_wording`: standings in words.
- `seed_agreement`: whether SAEs that differ in their seed only find the same latents.
- `wording`, `reasons`: those numbers in words, and why there is none, the same wherever they are shown.
- `claim_verdicts`: what intervals decide about a claim.
- `claims`: the claims of the paper as sentences with numbers.
- `styles`: planes, colours and markers, for figures and the HTML page.
- `figures`: the figures, drawn with matplotlib.
"""
