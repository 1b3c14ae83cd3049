"""The runs of studies as families and replicates, with resamples of their held-out documents.

A replicate is one pair of a stream seed and an init seed. Each has its own curve of a family, so that the curves'
spread shows what seeds do; the resamples of documents show what the choice of held-out text does.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from prolu.evaluation.comparison.frontiers import Record, family, grouped, init_seed, pareto_best
from prolu.evaluation.comparison.same_text import ScoredStudy, check_comparable
from prolu.evaluation.document_sums import DocumentSums, read_documents_of
from prolu.runtime.rng import keyed_generator

N_RESAMPLES = 2000
"""The number of times that the documents are resampled."""

MAX_EXTRAPOLATION = 0.05
"""The distance in log L0 up to which a curve is read beyond its ends, since runs with a target L0 end near it only."""

SINGLE_SETTING_TOLERANCE = 0.02
"""The distance in log L0 up to which the CE increase of a family with one setting is used unchanged.

One point has no slope along which it could be extrapolated.
"""


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

    def __init__(self, sums: Sequence[DocumentSums], unit: str):
        """Prepare the sums of all runs for resampling.

        Args:
            sums: the sums of each run, all over the same documents.
            unit: what a document is here: `document`, or `block` where documents are not known.
        """
        self.unit = unit
        first = sums[0]
        self.n_documents = len(first.document)
        self._n_tokens = first.n_tokens
        self._n_predicted = first.n_predicted
        self._l0 = np.stack([s.l0 for s in sums])
        self._ce_increase = np.stack([s.ce_recon - s.ce_clean for s in sums])

    @property
    def n_effective(self) -> float:
        """The effective number of documents: so many of equal length would determine the figures as well.

        (sum w)^2 / sum w^2, where w is a document's number of predicted tokens.
        """
        return float(self._n_predicted.sum() ** 2 / np.square(self._n_predicted).sum())

    @cached_property
    def logs(self) -> tuple[np.ndarray, np.ndarray]:
        """Log L0 and log CE increase in every resample, [n_resamples, n_runs] each.

        The latter is not finite where a CE increase is not above 0.
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
            ce_increase = (counts @ self._ce_increase.T) / (counts @ self._n_predicted)[:, None]
            return np.log(l0), np.log(ce_increase)


class Replicate(NamedTuple):
    """A family's Pareto-best runs under one stream seed and one init seed, in ascending order of L0."""

    stream_seed: int
    init_seed: int | None
    log_l0: np.ndarray
    log_ce_increase: np.ndarray
    rows: list[int]
    """The columns of these runs in `DocumentResamples.logs`."""

    @property
    def l0_range(self) -> tuple[float, float]:
        """The least and the greatest L0 of its runs."""
        return math.exp(self.log_l0[0]), math.exp(self.log_l0[-1])

    def reaches(self, l0: float) -> bool:
        """Return whether its curve may be read at this L0."""
        beyond = MAX_EXTRAPOLATION if len(self.rows) > 1 else SINGLE_SETTING_TOLERANCE
        return bool(self.log_l0[0] - beyond <= math.log(l0) <= self.log_l0[-1] + beyond)

    def read(self, l0: float, log_l0: np.ndarray, log_ce_increase: np.ndarray) -> np.ndarray:
        """Return the log CE increase at an L0, interpolated linearly in log L0, [..., n_runs] to [...].

        Beyond the curve's ends it is extrapolated along the line from the first run to the last.

        Args:
            l0: where to read.
            log_l0: log L0 of this replicate's runs, on all documents or in every resample of them.
            log_ce_increase: their log CE increase, likewise.
        """
        at = math.log(l0)
        last = len(self.rows) - 1
        if last == 0:
            return np.asarray(log_ce_increase[..., 0])
        # self.log_l0, over all documents, decides between which runs to read, so that every resample reads the same
        # piece of the curve, even where it moves the runs past the L0.
        if self.log_l0[0] <= at <= self.log_l0[-1]:
            i = min(int(np.searchsorted(self.log_l0, at, "right")) - 1, last - 1)
            j = i + 1
            anchor = i
        else:
            # The whole curve's slope: two neighbours may lie so close that theirs is mostly noise.
            i = 0
            j = last
            anchor = 0 if at < self.log_l0[0] else last
        slope = (log_ce_increase[..., j] - log_ce_increase[..., i]) / (log_l0[..., j] - log_l0[..., i])
        return np.asarray(log_ce_increase[..., anchor] + slope * (at - log_l0[..., anchor]))


def replicates(
    studies: Sequence[FinishedStudy], *, unconverged: bool = False
) -> tuple[dict[str, list[Replicate]], DocumentResamples | None]:
    """Return the replicates of every family, and the resampled documents of all runs.

    The second is None unless all runs have sums over the same documents. Runs whose L0 or CE increase is not above 0
    have no logarithm and are left out.

    Args:
        studies: studies with the same language model, hook and held-out tokens.
        unconverged: whether runs that have not converged are used too.

    Raises:
        ValueError: the studies were scored with different models, at different hooks or on different tokens.
    """
    check_comparable(studies)
    used: list[tuple[FinishedStudy, Record]] = []
    for study in studies:
        stream_seed = study.stream_seed
        for r in study.records:
            if (r["converged"] or unconverged) and r["l0"] > 0 and r["degradation"] > 0:
                used.append((study, {**r, "stream_seed": stream_seed, "row": len(used)}))
    groups = grouped([r for _, r in used], family, itemgetter("stream_seed"), init_seed)
    by_family: dict[str, list[Replicate]] = {}
    for (name, stream_seed, seed), runs in groups.items():
        by_family.setdefault(name, []).append(_replicate(stream_seed, seed, runs))
    return by_family, _document_resamples(used)


def _replicate(stream_seed: int, seed: int | None, runs: Sequence[Record]) -> Replicate:
    # A run that is worse than another in both figures says nothing about what its family can reach.
    ordered = sorted((r["l0"], r["degradation"], r["row"]) for r in pareto_best(runs))
    # Pareto-best runs of equal L0 are equal in both figures: one stays, since a curve cannot be read between them.
    distinct = [point for i, point in enumerate(ordered) if i == 0 or point[0] > ordered[i - 1][0]]
    log_l0 = np.log([l0 for l0, _, _ in distinct])
    log_ce_increase = np.log([ce_increase for _, ce_increase, _ in distinct])
    return Replicate(stream_seed, seed, log_l0, log_ce_increase, [row for _, _, row in distinct])


def _document_resamples(used: Sequence[tuple[FinishedStudy, Record]]) -> DocumentResamples | None:
    sums: list[DocumentSums] = []
    for study, record in used:
        one = read_documents_of(study.folder / record["run_id"])
        if one is None or (sums and not _same_documents(one, sums[0])):
            return None
        sums.append(one)
    # One document cannot be resampled into another.
    if not sums or len(sums[0].document) < 2:
        return None
    return DocumentResamples(sums, str(used[0][1].get("unit", "document")))


def _same_documents(a: DocumentSums, b: DocumentSums) -> bool:
    # Not by number: a document's number counts all documents that were read before it, those trained on too, and so
    # differs between studies that were scored on the same tokens.
    names: list[str] = ["n_tokens", "n_predicted"]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
