"""One run while it trains: its trainer, and what the world sees of it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from prolu.activations.stream import Batch
from prolu.evaluation.comparison.frontiers import is_converged
from prolu.evaluation.held_out import HeldOut, probe, score
from prolu.runtime.files import write_atomically
from prolu.studies.checkpoints import RunState
from prolu.studies.folder import CURVES_FILE
from prolu.studies.trackers import Follower
from prolu.training.config import RunConfig
from prolu.training.trainer import Trainer

LINES_PER_CURVE = 100
"""Lines of metrics.jsonl that a run writes."""


class ActiveRun:
    """A trainer with what the world sees of it: its folder, its curve, its probes."""

    def __init__(self, trainer: Trainer, folder: Path, provenance: dict[str, Any]):
        self.trainer, self.folder = trainer, folder
        self._provenance = provenance | {"run": trainer.describe()}
        self.resampled: list[dict[str, int]] = []
        self._probes: dict[int, dict[str, float]] = {}
        self._curve: list[str] = []
        self._follower: Follower | None = None
        self._probe_steps = trainer.config.probe_steps(trainer.batch_size)
        self._every = max(1, trainer.n_steps // LINES_PER_CURVE)

    @property
    def run_id(self) -> str:
        """Name of its folder."""
        return self.trainer.config.run_id

    @property
    def finished(self) -> bool:
        """Whether all its steps are made."""
        return self.trainer.state.n_updates >= self.trainer.n_steps

    def step(self, batch: Batch, held_out: HeldOut | None) -> None:
        """One step and what follows it; of a mesh, only the first rank needs what is held out.

        Raises:
            FloatingPointError: the loss is not finite; the weights may not be either.
        """
        report = self.trainer.step(batch.acts)
        if not math.isfinite(float(report.stats.mse)):
            raise FloatingPointError("the loss is not finite")
        n_updates = self.trainer.state.n_updates
        if n_updates % self._every == 0 or self.finished:
            line = self.trainer.summary(report)
            self._curve.append(json.dumps(line) + "\n")
            if self._follower is not None:
                self._follower.log(line)
        if n_updates in self._probe_steps and (sae := self.trainer.whole_sae()) is not None:
            assert held_out is not None
            self._probes[n_updates] = probe(sae, held_out)
        if self.finished and not self.trainer.all_finite():
            raise FloatingPointError("the weights are not finite")

    def saved(self) -> RunState:
        """All that it takes to go on. On a mesh all ranks ask together, and only the first gets the tensors."""
        seen = {"curve": self._curve, "probes": sorted(self._probes.items()), "resampled": self.resampled}
        return RunState(self.trainer.whole_state(), self.trainer.state.counters() | seen)

    def restore_(self, saved: RunState) -> None:
        """Takes up what `saved` gave.

        Raises:
            ValueError, KeyError, TypeError: it is not a state of this run.
        """
        self.trainer.restore_(saved.tensors, saved.facts)
        self._curve, self._probes = list(saved.facts["curve"]), {int(n): p for n, p in saved.facts["probes"]}
        self.resampled = list(saved.facts["resampled"])

    def follow(self, follower: Follower) -> None:
        """Tells a follower the curve so far, and from now on every line as it comes."""
        for line in self._curve:
            follower.log(json.loads(line))
        self._follower = follower

    def tell_result(self, record: Mapping[str, Any]) -> None:
        """Tells it the held-out figures, once they are on the disk."""
        if self._follower is not None:
            known = {field.name for field in fields(RunConfig)}
            self._follower.finish({k: v for k, v in record.items() if isinstance(v, int | float) and k not in known})

    def finish(self, held_out: HeldOut | None) -> dict[str, Any] | None:
        """Saves the SAE, what it does to documents and by latent, and its curve; returns its line of results.

        On a mesh all ranks call it together, and only the first does it.
        """
        config, sae = self.trainer.config, self.trainer.whole_sae()
        if sae is None:
            return None
        assert held_out is not None
        figures, documents, latents = score(sae, held_out)
        start, end = (self._probes.get(n, figures) for n in self._probe_steps)
        sae.save(self.folder, self._provenance)
        documents.save(self.folder)
        latents.save(self.folder)
        write_atomically(self.folder / CURVES_FILE, "".join(self._curve))
        facts = asdict(config) | {"run_id": config.run_id, "converged": is_converged(start, end)}
        facts["coeff"] = self.trainer.coeff  # what it was steered to, if it was
        facts |= {"resampled": self.resampled, "density_histogram": latents.density_histogram()}
        probes = {
            f"{name}_probe_{when}": p[name] for when, p in (("start", start), ("end", end)) for name in ("l0", "mse")
        }
        return facts | {"eval_tokens": held_out.n_tokens, "unit": held_out.unit} | figures | probes
