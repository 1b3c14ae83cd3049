"""Runs sorted into families and replicates, and their held-out documents resampled: what comparisons are made of."""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from prolu.evaluation.comparison.frontiers import Record, family, pareto_best
from prolu.evaluation.document_sums import DocumentSums, read_documents_of
from prolu.runtime.rng import keyed_generator

N_RESAMPLES = 2000

BEYOND = 0.05
"""How far, in log L0, a curve is read beyond its ends, along its chord: where an L0 was asked for, runs end near it."""
NEAR = 0.02
"""The same for a family of one setting, which has no chord and is read as it stands."""


@runtime_checkable
class Study(Protocol):
    """What is needed of a finished study."""

    @property
    def folder(self) -> Path:
        """Its folder."""
        ...

    @property
    def records(self) -> Sequence[Record]:
        """Its runs."""
        ...

    @property
    def stream_seed(self) -> int:
        """Seed of its order of activations."""
        ...


class Resampled:
    """The same held-out documents for all runs, drawn again and again with replacement."""

    def __init__(self, sums: Sequence[DocumentSums], unit: str):
        self.unit = unit
        """What a document is here: `document`, or `block` where documents are not known."""
        first = sums[0]
        self.n_documents = len(first.document)
        self._n_tokens, self._n_predicted = first.n_tokens, first.n_predicted
        self._l0 = np.stack([s.l0 for s in sums])
        self._lost = np.stack([s.ce_recon - s.ce_clean for s in sums])
        self.n_effective = float(self._n_predicted.sum() ** 2 / np.square(self._n_predicted).sum())
        """(sum w)^2 / sum w^2 with w the documents' tokens: as many of one length would say as much."""

    @cached_property
    def logs(self) -> tuple[np.ndarray, np.ndarray]:
        """Log L0 and log degradation [n_resamples, n_runs]; nan where a degradation is not above 0."""
        n = self.n_documents
        drawn = torch.randint(n, (N_RESAMPLES, n), generator=keyed_generator("documents", n)).numpy()
        flat = (drawn + n * np.arange(N_RESAMPLES)[:, None]).ravel()
        counts = np.bincount(flat, minlength=N_RESAMPLES * n).reshape(N_RESAMPLES, n).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            l0 = (counts @ self._l0.T) / (counts @ self._n_tokens)[:, None]
            lost = (counts @ self._lost.T) / (counts @ self._n_predicted)[:, None]
            return np.log(l0), np.log(lost)


class Replicate(NamedTuple):
    """A family's frontier under one stream seed and one init seed, in order of L0."""

    stream_seed: int
    init_seed: int
    log_l0: np.ndarray
    log_lost: np.ndarray
    rows: list[int]
    """Of these runs among the resampled."""

    @property
    def l0_range(self) -> tuple[float, float]:
        """Least and largest L0."""
        return math.exp(self.log_l0[0]), math.exp(self.log_l0[-1])

    def reaches(self, l0: float) -> bool:
        """Whether its curve can be read there."""
        beyond = BEYOND if len(self.rows) > 1 else NEAR
        return bool(self.log_l0[0] - beyond <= math.log(l0) <= self.log_l0[-1] + beyond)

    def read(self, l0: float, log_l0: np.ndarray, log_lost: np.ndarray) -> np.ndarray:
        """Log degradation at an L0, linear in log L0 between the two runs that enclose it; [..., n_runs] to [...].

        Beyond the ends, along the chord. Which runs enclose it is decided on all documents, whatever the resample.
        """
        at, last = math.log(l0), len(self.rows) - 1
        if last == 0:
            return np.asarray(log_lost[..., 0])
        if self.log_l0[0] <= at <= self.log_l0[-1]:
            i = min(int(np.searchsorted(self.log_l0, at, "right")) - 1, last - 1)
            anchor, j = i, i + 1
        else:
            i, j, anchor = 0, last, 0 if at < self.log_l0[0] else last
        slope = (log_lost[..., j] - log_lost[..., i]) / (log_l0[..., j] - log_l0[..., i])
        return np.asarray(log_lost[..., anchor] + slope * (at - log_l0[..., anchor]))


def replicates(
    studies: Sequence[Study], *, unconverged: bool = False
) -> tuple[dict[str, list[Replicate]], Resampled | None]:
    """Every family's replicates, and the documents of all runs; None if not all runs have records of the same.

    In a replicate a family is those of its runs that no other of its runs there beats in L0 and degradation. Runs
    that lose nothing, or have no latent on, have no logarithm and are left out.
    """
    used = [
        (study, r)
        for study in studies
        for r in study.records
        if (r["converged"] or unconverged) and r["l0"] > 0 and r["degradation"] > 0
    ]
    found: dict[tuple[str, int, int], list[tuple[Record, int]]] = {}
    for row, (study, r) in enumerate(used):
        found.setdefault((family(r), study.stream_seed, r.get("init_seed", 0)), []).append((r, row))
    by_family: dict[str, list[Replicate]] = {}
    for (name, stream_seed, init_seed), runs in found.items():
        best = sorted((r["l0"], r["degradation"], r["row"]) for r in pareto_best({**r, "row": row} for r, row in runs))
        best = [point for i, point in enumerate(best) if i == 0 or point[0] > best[i - 1][0]]
        log_l0, log_lost = np.log([l0 for l0, _, _ in best]), np.log([lost for _, lost, _ in best])
        replicate = Replicate(stream_seed, init_seed, log_l0, log_lost, [row for _, _, row in best])
        by_family.setdefault(name, []).append(replicate)
    return by_family, _resampled(used)


def _resampled(used: Sequence[tuple[Study, Record]]) -> Resampled | None:
    sums: list[DocumentSums] = []
    for study, record in used:
        one = read_documents_of(study.folder / record["run_id"])
        if one is None or (sums and not _alike(one, sums[0])):
            return None
        sums.append(one)
    return Resampled(sums, str(used[0][1].get("unit", "document"))) if sums and len(sums[0].document) > 1 else None


def _alike(a: DocumentSums, b: DocumentSums) -> bool:
    names: list[str] = ["document", "n_tokens", "n_predicted"]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
