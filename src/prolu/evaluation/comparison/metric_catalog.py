"""The metrics by which families may be compared: what each is called, which direction is better, how it is compared.

This is the one place where a metric's direction and scale stand. A metric is a numeric field of results.jsonl, null or
absent where it does not apply. A new one is a line in one of the lists below.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from prolu.evaluation.document_sums import DocumentSums
from prolu.evaluation.python_labels import LABELS
from prolu.runtime.checks import one_of

CE_INCREASE = "degradation"
"""The metric that is compared unless another is asked for."""


class ByDocument(NamedTuple):
    """How a metric follows from the sums over documents: sum of the numerator / sum of the denominator.

    A constant factor does not matter where a metric is compared as a ratio, so a numerator may omit one.
    """

    numerator: Callable[[DocumentSums], np.ndarray]
    """The part of each document in the numerator, [n_documents]."""
    denominator: Literal["n_tokens", "n_predicted"]
    """The number that is divided by: the tokens scored, or the tokens predicted."""
    gives_values: bool = True
    """Whether the value itself follows, up to that constant. Otherwise only ratios between SAEs follow, because a
    factor is omitted that depends on the documents but is the same for all SAEs."""


class Metric(NamedTuple):
    """What must be known of a metric in order to compare families by it."""

    name: str
    """The field in results.jsonl."""
    words: str
    """What it is called in sentences and at the heads of columns."""
    label: str
    """The title of its axis in figures, with the unit."""
    unit: str
    """The unit of its values in sentences; empty for a number without a unit, such as a fraction."""
    better: Literal["lower", "higher", "neither"]
    """Which of two values is better at an equal L0; neither where that is a matter of opinion."""
    compared_as: Literal["ratio", "difference"]
    """How two values are compared. As a ratio: the values are above 0, are read from curves in their log, and a change
    is a percentage. As a difference: they may be 0, negative or bounded, and a change is in their own unit."""
    scale: Literal["log", "linear"]
    """The scale of its axis in figures; a logarithmic one is drawn only where values are far apart."""
    by_document: ByDocument | None = None
    """How it follows from the sums over documents; None where these do not determine it. Its intervals then cover
    seeds only."""
    tolerance: float | None = None
    """The error of reading a curve between two runs, in units of `height`, as a multiple of the product of the
    distances in log L0 to the runs on both sides. Nine of ten errors are smaller, by `benchmarks/interpolation.py`
    (docs, What the error bars mean); None where nobody has measured it."""
    in_nats: str = ""
    """The metric, by its name, whose differences between SAEs are those of this one in nats, with a place on a curve
    where this one is not above 0; empty if there is none."""

    def height(self, value: float) -> float:
        """Return the height of a value on a family's curve: its log if it is compared as a ratio, else itself."""
        return math.log(value) if self.compared_as == "ratio" else value

    def value(self, height: float) -> float:
        """Return the value of a height, the inverse of `height`."""
        return math.exp(height) if self.compared_as == "ratio" else height

    def change(self, difference: float) -> float:
        """Return what a difference of two heights is: a relative change, or the difference itself."""
        return math.expm1(difference) if self.compared_as == "ratio" else difference

    def has_place(self, record: Mapping[str, Any]) -> bool:
        """Return whether a run has a place on a curve: an L0 above 0, and a value that has a height."""
        lowest = 0.0 if self.compared_as == "ratio" else -math.inf
        return _is_above(record.get("l0"), 0.0) and _is_above(record.get(self.name), lowest)


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return _is_above(value, -math.inf)


def _is_above(value: Any, lowest: float) -> bool:
    """Return whether a value is a finite number above another."""
    return isinstance(value, int | float) and bool(lowest < value < math.inf)


_OF_CODE = (
    Metric("l0", "L0", "L0 (active latents per token)", "latents per token", "lower", "ratio", "log",
           ByDocument(lambda s: s.l0, "n_tokens")),
    Metric("l1", "L1", "L1 (sum of latents per token)", "", "neither", "ratio", "log", tolerance=0.16),
    Metric("sqrt_l1", "sqrt-L1", "sqrt-L1 (sum of square roots of latents per token)", "", "neither", "ratio", "log",
           tolerance=0.087),
    Metric("dead_fraction", "dead latents", "dead latents (fraction)", "", "lower", "difference", "linear",
           tolerance=0.13),
    Metric("dense_fraction", "dense latents", "dense latents (fraction)", "", "lower", "difference", "linear",
           tolerance=0.065),
    Metric("frequent_fraction", "frequent latents", "latents active on more than 1% of tokens (fraction)", "",
           "neither", "difference", "linear"),
)  # fmt: skip
"""The metrics of the code, that is, of the latents on held-out tokens."""

_OF_RECONSTRUCTION = (
    # Its mean over dimensions as well as over tokens is a constant factor of all SAEs at one hook.
    Metric("mse", "MSE", "MSE (per dimension, normalised activations)", "", "lower", "ratio", "log",
           ByDocument(lambda s: s.squared_error, "n_tokens"), tolerance=0.31),
    # The variance that it is divided by is the same for all SAEs, in every resample of the documents too.
    Metric("fvu", "FVU", "fraction of variance unexplained", "", "lower", "ratio", "log",
           ByDocument(lambda s: s.squared_error, "n_tokens", gives_values=False), tolerance=0.31),
    Metric("norm_ratio", "norm ratio", "norm ratio (of reconstructions to activations)", "", "neither", "ratio",
           "linear", tolerance=0.025),
    Metric("relative_bias", "relative bias", "relative bias (below 1: shrinkage)", "", "neither", "ratio", "linear",
           tolerance=0.022),
    Metric("fvu_raw", "FVU, raw", "fraction of variance unexplained, unnormalised activations", "", "lower", "ratio",
           "log", tolerance=0.31),
)  # fmt: skip
"""The metrics of the reconstruction."""

_OF_PREDICTIONS = (
    Metric(CE_INCREASE, "CE increase", "CE increase (nats)", "nats", "lower", "ratio", "log",
           ByDocument(lambda s: s.ce_recon - s.ce_clean, "n_predicted"), tolerance=0.41, in_nats="ce_recon"),
    Metric("degradation_bits", "CE increase in bits", "CE increase (bits)", "bits", "lower", "ratio", "log",
           ByDocument(lambda s: (s.ce_recon - s.ce_clean) / math.log(2), "n_predicted"), tolerance=0.41,
           in_nats="ce_recon"),
    Metric("ce_recon", "CE with the SAE", "cross-entropy with the SAE (nats)", "nats", "lower", "difference", "linear",
           ByDocument(lambda s: s.ce_recon, "n_predicted"), tolerance=0.076),
    Metric("recovered", "loss recovered", "fraction of the loss recovered", "", "higher", "difference", "linear",
           tolerance=0.0103),
    Metric("kl", "KL divergence", "KL divergence (nats)", "nats", "lower", "ratio", "log",
           ByDocument(lambda s: s.kl, "n_predicted"), tolerance=0.35),
)  # fmt: skip
"""The metrics of the language model's predictions with the SAE in place."""

_OF_LATENTS = (
    Metric("encoder_decoder_cosine", "encoder-decoder cosine", "cosine of encoder and decoder", "", "neither",
           "difference", "linear", tolerance=0.033),
    Metric("negative_bias_fraction", "negative biases", "negative biases (fraction of latents)", "", "neither",
           "difference", "linear"),
    Metric("scale_gain_half", "gain at half scale", "gain of latents at half scale", "", "neither", "ratio", "linear",
           tolerance=0.063),
    Metric("scale_gain_double", "gain at double scale", "gain of latents at double scale", "", "neither", "ratio",
           "linear", tolerance=0.077),
    Metric("scale_on_half", "active at half scale", "active latents that stay active at half scale (fraction)", "",
           "neither", "difference", "linear", tolerance=0.076),
    Metric("scale_on_double", "active at double scale", "active latents that stay active at double scale (fraction)",
           "", "neither", "difference", "linear", tolerance=0.00134),
)  # fmt: skip
"""The metrics of single latents, as means over them."""

_OF_THE_RIGHT_L0 = (
    Metric("decoder_cosine", "decoder cosine", "mean cosine between decoder rows", "", "lower", "ratio", "linear"),
    Metric("decoder_projection_half", "decoder projection, n = 1/2", "n-th decoder projection, n = d_sae / 2", "",
           "lower", "difference", "linear"),
    Metric("decoder_projection_quarter", "decoder projection, n = 1/4", "n-th decoder projection, n = d_sae / 4", "",
           "lower", "difference", "linear"),
)  # fmt: skip
"""Proxies of whether the L0 is the right one; `l0_proxies` defines them."""

_OF_TRUTH = (
    Metric("truth_cosine", "cosine with true features", "cosine with the matched true features (mean)", "", "higher",
           "difference", "linear"),
    Metric("truth_found", "features found", "true features found (fraction)", "", "higher", "difference", "linear"),
    Metric("truth_f1", "F1 of firing", "F1 of firing (mean over true features)", "", "higher", "difference", "linear"),
    Metric("truth_precision", "precision of firing", "precision of firing (mean over true features)", "", "higher",
           "difference", "linear"),
    Metric("truth_recall", "recall of firing", "recall of firing (mean over true features)", "", "higher",
           "difference", "linear"),
    Metric("truth_slope", "slope of magnitudes", "slope of latents over true magnitudes", "", "neither", "difference",
           "linear"),
    Metric("truth_suppression", "suppression", "fraction of the true magnitude that latents lack", "", "lower",
           "difference", "linear"),
)  # fmt: skip
"""The scores against features that are known by construction; `evaluation.truth` defines them."""

_PROBED = {name: f"probes of {name} tokens" for name in LABELS} | {"mean": "probes, mean over labels"}
_PROBED_ON = {"1": "1 latent", "5": "5 latents", "all": "all latents"}

_OF_PROBES = tuple(
    Metric(f"probe_{label}_{kind}", f"accuracy of {words} ({latents})", f"accuracy of {words} ({latents})", "",
           "higher", "difference", "linear")
    for label, words in _PROBED.items()
    for kind, latents in _PROBED_ON.items()
)  # fmt: skip
"""The accuracies of probes, which `prolu probe` adds to a study; `evaluation.probes` defines them."""

_OF_ABSORPTION = (
    Metric("absorption_fraction", "absorption", "absorption of first letters (fraction)", "", "lower", "difference",
           "linear"),
    Metric("absorption_full", "full absorption", "full absorption of first letters (fraction)", "", "lower",
           "difference", "linear"),
    Metric("absorption_splits", "latents per letter", "latents per first letter", "", "neither", "difference",
           "linear"),
)  # fmt: skip
"""The absorption of first letters, which `prolu probe` adds too; `evaluation.absorption` defines it."""

_OF_SAE_PROBES = tuple(
    Metric(f"sae_probes_mean_{k}_auc", f"AUC of sae-probes (k = {k})", f"AUC of sae-probes, k = {k}", "", "higher",
           "difference", "linear")
    for k in (1, 5, 16)
)  # fmt: skip
"""Means over data sets of the benchmark sae-probes, which are added by `interop.sae_probes`."""

_TWICE = (*_OF_CODE, *_OF_RECONSTRUCTION, *_OF_PREDICTIONS)
"""The metrics that are recorded over all positions, and once more without position 0 of each block."""


def _without_bos(metric: Metric) -> Metric:
    """Return the metric without position 0 of each block, of which no sums by document are kept for intervals."""
    return metric._replace(
        name=f"{metric.name}_no_bos",
        words=f"{metric.words} without position 0",
        label=f"{metric.label}, without position 0",
        by_document=None,
        in_nats=f"{metric.in_nats}_no_bos" if metric.in_nats else "",
    )


_ONCE = (*_OF_LATENTS, *_OF_THE_RIGHT_L0, *_OF_TRUTH, *_OF_PROBES, *_OF_ABSORPTION, *_OF_SAE_PROBES)

METRICS = {metric.name: metric for metric in (*_TWICE, *_ONCE, *map(_without_bos, _TWICE))}
"""Every metric, by its name in results.jsonl."""


def metric_of(name: str) -> Metric:
    """Return the metric of this name.

    Raises:
        ValueError: there is none.
    """
    return METRICS[one_of("metric", name, METRICS)]


def check_compared(name: str) -> None:
    """Raise ValueError unless this is empty, or names a metric by which families can be compared at an equal L0."""
    if name and metric_of(name).name.startswith("l0"):
        raise ValueError(f"metric {name!r}: families are compared at an equal L0; choose another metric")


def label_of(name: str) -> str:
    """Return the title of the axis of a field of results.jsonl, which is its name if it is no metric."""
    return METRICS[name].label if name in METRICS else name


def main_metric(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the metric by which runs are compared unless another is asked for.

    It is the CE increase, or the FVU where no run was scored in a language model, as those on rows that come from none.
    """
    return CE_INCREASE if any(r.get(CE_INCREASE) is not None for r in records) else "fvu"
