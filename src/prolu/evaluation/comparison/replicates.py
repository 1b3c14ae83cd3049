"""The runs of studies as families and replicates, with resamples of their held-out documents.

A replicate is one pair of a stream seed and an init seed. Each has its own curve of a family, so that the curves'
spread shows what seeds do; the resamples of documents show what the choice of held-out text does.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from prolu.evaluation.comparison.curves import Curve, curve_of
from prolu.evaluation.comparison.frontiers import Record, budget, family, grouped, replicate, variant
from prolu.evaluation.comparison.metric_catalog import CE_INCREASE, METRICS, Metric
from prolu.evaluation.comparison.same_text import ScoredStudy, check_comparable
from prolu.evaluation.document_sums import DocumentSums, read_documents_of
from prolu.runtime.rng import keyed_generator

N_RESAMPLES = 2000
"""The number of times that the documents are resampled."""


@runtime_checkable
class FinishedStudy(ScoredStudy, Protocol):
    """What a comparison needs to know about a study; `prolu.Results` is one."""

    @property
    def records(self) -> Sequence[Record]:
        """The finished runs."""
        ...

    @property
    def stream_seed(self) -> int:
        """The seed of the order in which the runs saw the activations."""
        ...


class DocumentResamples:
    """The held-out documents of some runs, drawn `N_RESAMPLES` times with replacement.

    The draws are the same for all runs, so what makes a document hard for every family cancels in their difference.
    """

    def __init__(self, sums: Sequence[DocumentSums], unit: str, metric: Metric = METRICS[CE_INCREASE]):
        """Prepare the sums of all runs for resampling.

        Args:
            sums: the sums of each run, all over the same documents.
            unit: what a document is here: `document`, or `block` where documents are not known.
            metric: the metric on the vertical axis, one that follows from sums over documents.
        """
        assert metric.by_document is not None
        self.unit = unit
        first = sums[0]
        self.n_documents = len(first.document)
        self._metric = metric
        self._n_tokens = first.n_tokens
        self._n_predicted = first.n_predicted
        self._denominator: np.ndarray = getattr(first, metric.by_document.denominator)
        self._l0 = np.stack([s.l0 for s in sums])
        self._numerator = np.stack([metric.by_document.numerator(s) for s in sums])

    @property
    def n_effective(self) -> float:
        """The effective number of documents: that of documents of equal length that would determine the figures as
        precisely.

        (sum w)^2 / sum w^2, where w is a document's number of predicted tokens, or of rows where no language model
        predicts any.
        """
        weights = self._n_predicted if self._n_predicted.any() else self._n_tokens
        return float(weights.sum() ** 2 / np.square(weights).sum())

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Log L0 and the metric's height in every resample, [n_resamples, n_runs] each.

        The latter is not finite where it is the log of what is not above 0.
        """
        n = self.n_documents
        drawn = torch.randint(n, (N_RESAMPLES, n), generator=keyed_generator("documents", n)).numpy()
        # counts[i, j] is how often resample i contains document j; numbers are shifted by n per resample, so that one
        # bincount makes all rows. With counts, a resample's sums over documents are one matrix product.
        shifted = (drawn + n * np.arange(N_RESAMPLES)[:, None]).ravel()
        counts = np.bincount(shifted, minlength=N_RESAMPLES * n).reshape(N_RESAMPLES, n).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            # A ratio of resampled sums, not a mean of documents' ratios: a figure is a mean over tokens.
            l0 = (counts @ self._l0.T) / (counts @ self._n_tokens)[:, None]
            values = (counts @ self._numerator.T) / (counts @ self._denominator)[:, None]
            return np.log(l0), np.log(values) if self._metric.compared_as == "ratio" else values


class Curves(NamedTuple):
    """The curves of some studies, and what they are made of."""

    by_family: dict[str, list[Curve]]
    """The curves of each family: one for every replicate, budget and variant."""
    runs: list[Record]
    """The runs that have a place on a curve; `Curve.rows` counts in these."""
    left_out: list[Record]
    """The runs that have none, by `Metric.has_place`."""
    resamples: DocumentResamples | None
    """The resampled documents of all runs; None unless all have sums over the same documents, which give the metric."""


def curves_of(studies: Sequence[FinishedStudy], metric: Metric, *, unconverged: bool = True) -> Curves:
    """Return the curves of every family through all its runs.

    Args:
        studies: studies with the same language model, hook and held-out tokens.
        metric: the metric on the vertical axis.
        unconverged: whether runs that have not converged are used too.

    Raises:
        ValueError: the studies were scored with different models, at different hooks or on different tokens.
    """
    check_comparable(studies)
    used: list[tuple[FinishedStudy, Record]] = []
    left_out: list[Record] = []
    for study in studies:
        stream_seed = study.stream_seed
        for r in study.records:
            if not (unconverged or r["converged"]):
                continue
            if metric.has_place(r):
                used.append((study, {**r, "stream_seed": stream_seed, "row": len(used)}))
            else:
                left_out.append({**r, "stream_seed": stream_seed})
    runs = [r for _, r in used]
    by_family: dict[str, list[Curve]] = {}
    for (name, seeds, n_tokens, settings), some in grouped(runs, family, replicate, budget, variant).items():
        points = [(r["l0"], r[metric.name], r["row"]) for r in some]
        by_family.setdefault(name, []).append(curve_of(points, seeds, n_tokens, settings, metric))
    return Curves(by_family, runs, left_out, _document_resamples(used, metric) if metric.by_document else None)


def _document_resamples(used: Sequence[tuple[FinishedStudy, Record]], metric: Metric) -> DocumentResamples | None:
    sums: list[DocumentSums] = []
    for study, record in used:
        one = read_documents_of(study.folder / record["run_id"])
        if one is None or (sums and not _same_documents(one, sums[0])):
            return None
        sums.append(one)
    # One document cannot be resampled into another.
    if not sums or len(sums[0].document) < 2:
        return None
    return DocumentResamples(sums, str(used[0][1].get("unit", "document")), metric)


def _same_documents(a: DocumentSums, b: DocumentSums) -> bool:
    # Not by number: a document's number counts all documents that were read before it, those trained on too, and so
    # differs between studies that were scored on the same tokens.
    names: list[str] = ["n_tokens", "n_predicted"]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
