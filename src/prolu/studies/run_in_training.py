"""One run while it trains: its trainer, its curve, the probes that decide convergence, and its result."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from prolu.evaluation.comparison.frontiers import is_converged
from prolu.evaluation.held_out import AnyHeldOut
from prolu.evaluation.scoring import probe, score, score_prefix
from prolu.runtime.files import json_text, write_atomically
from prolu.sae.autoencoder import SAE
from prolu.studies.checkpoints import RunState
from prolu.studies.records import CURVES_FILE, scores_lacking
from prolu.studies.trackers import Follower
from prolu.training.config import RunConfig
from prolu.training.nested_prefixes import scored_prefixes
from prolu.training.refitting import GainRefit
from prolu.training.target_l0 import MISSED_TARGET
from prolu.training.trainer import StepReport, Trainer

logger = logging.getLogger(__name__)

LINES_PER_CURVE = 100
"""Lines of metrics.jsonl that a run writes."""

CONFIG_FIELDS = {field.name for field in fields(RunConfig)}


class RunInTraining:
    """A trainer with what its folder will hold: the training curve, probes on held-out text, resampling counts."""

    def __init__(self, trainer: Trainer, folder: Path, provenance: dict[str, Any]):
        self.trainer = trainer
        self.folder = folder
        self._provenance = provenance | {"run": trainer.describe()}
        self._resampled: list[dict[str, int]] = []
        self._probes: dict[int, dict[str, float]] = {}
        self._refit: GainRefit | None = None
        self._curve: list[str] = []
        self._follower: Follower | None = None
        self._probe_steps = trainer.config.probe_steps(trainer.batch_size)
        self._steps_per_line = max(1, trainer.n_steps // LINES_PER_CURVE)

    @property
    def run_id(self) -> str:
        """The name of the run, and of its folder."""
        return self.trainer.config.run_id

    @property
    def n_updates(self) -> int:
        """The number of steps made so far, which is the index of the next step."""
        return self.trainer.state.n_updates

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return self.n_updates >= self.trainer.n_steps

    def record_step(self, report: StepReport, held_out: AnyHeldOut | None) -> None:
        """Record what the trainer's last step did: a line of the curve, and a probe where one is due.

        Args:
            report: of the step.
            held_out: the held-out text; None on all ranks of a mesh but the first, which need none.

        Raises:
            FloatingPointError: the loss is not finite (the weights may not be either), or the final weights are not.
        """
        line_due = self.n_updates % self._steps_per_line == 0 or self.finished
        probe_due = self.n_updates in self._probe_steps
        # Reading a number from a GPU waits until the step is done: there it is read only now and then.
        if line_due or probe_due or not report.stats.mse.is_cuda:
            self.check_losses()
        if line_due:
            line = self.trainer.summary(report)
            self._curve.append(json_text(line) + "\n")
            if self._follower is not None:
                self._follower.log(line)
        # All ranks of a mesh ask for the whole SAE together; only the first gets it.
        if probe_due and (sae := self.trainer.whole_sae()) is not None:
            assert held_out is not None
            self._probes[self.n_updates] = probe(sae, held_out)
        if self.finished and not self.trainer.all_finite():
            raise FloatingPointError("the weights are not finite")

    def check_losses(self) -> None:
        """Raise FloatingPointError if the loss of a step since the start, or since `restore_`, was not finite."""
        if not self.trainer.losses_finite():
            raise FloatingPointError("the loss is not finite")

    def record_resampling(self, step: int, counts: Mapping[str, int]) -> None:
        """Record how many latents were dead at a resampling, and how many were replaced."""
        self._resampled.append({"step": step} | dict(counts))

    def state(self) -> RunState:
        """Return all that is needed to resume. On a mesh all ranks ask together, and only the first gets tensors."""
        seen = {"curve": self._curve, "probes": sorted(self._probes.items()), "resampled": self._resampled}
        return RunState(self.trainer.whole_state(), self.trainer.state.counters() | seen)

    def restore_(self, state: RunState) -> None:
        """Resume from what `state` returned, in place.

        Raises:
            ValueError, KeyError, TypeError: it is not a state of this run.
        """
        self.trainer.restore_(state.tensors, state.facts)
        self._curve = list(state.facts["curve"])
        self._probes = {int(n): figures for n, figures in state.facts["probes"]}
        self._resampled = list(state.facts["resampled"])

    def note_stack(self, run_ids: Sequence[str]) -> None:
        """Record which runs this one is trained in one step with, itself included: its rounding depends on them."""
        self._provenance["run"]["stack"] = list(run_ids)

    def follow(self, follower: Follower) -> None:
        """Send the curve to a follower: the lines so far now, and from then on every line as it is recorded."""
        for line in self._curve:
            follower.log(json.loads(line))
        self._follower = follower

    def report_result(self, record: Mapping[str, Any]) -> None:
        """Send the held-out figures to the follower, once they are on the disk."""
        if self._follower is not None:
            figures = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in CONFIG_FIELDS}
            self._follower.finish(figures)

    def refit(self, acts: Tensor, target: Tensor | None) -> None:
        """Take training activations into account for the gains that the decoder gets after the last step."""
        if self._refit is None:
            self._refit = GainRefit(self.trainer.sae())
        self._refit.add_(acts, target)

    def finish(self, held_out: AnyHeldOut | None) -> dict[str, Any] | None:
        """Score the SAE, save all files of the run, and return its line of results.

        On a mesh all ranks call it together, and only the first does it; the others get None.
        """
        sae = self.trainer.whole_sae() if self._refit is None else self._refit.refitted()
        if sae is None:
            return None
        assert held_out is not None
        return self._save(sae, held_out)

    def _tell_missed_target(self, l0: float) -> None:
        config = self.trainer.config
        if config.has_target_l0 and config.target_l0 and abs(l0 / config.target_l0 - 1) > MISSED_TARGET:
            logger.warning("%s: its L0 is %.1f, and its target was %g", config.run_id, l0, config.target_l0)

    def _save(self, sae: SAE, held_out: AnyHeldOut) -> dict[str, Any]:
        scores = score(sae, held_out)
        figures = scores.figures
        # Before anything is written: such a run could neither be compared nor trained any further.
        if reason := scores_lacking(figures):
            raise FloatingPointError(reason)
        sae.save(self.folder, self._provenance)
        scores.save(self.folder)
        write_atomically(self.folder / CURVES_FILE, "".join(self._curve))
        self._tell_missed_target(figures["l0"])
        # A run that ends where its last probe would be has no probe there: its final score is one.
        start, end = (self._probes.get(n, figures) for n in self._probe_steps)
        config = self.trainer.config
        prefixes = [{"d_sae": n} | score_prefix(sae, held_out, n) for n in scored_prefixes(config)]
        return (
            config.describe()
            | {"run_id": config.run_id, "converged": is_converged(start, end, self._probe_steps[1])}
            | {"coeff": float(self.trainer.coeff)}  # the final value of the L0 controller, where there is one
            | {"resampled": self._resampled, "density_histogram": scores.latents.density_histogram()}
            | {"eval_tokens": held_out.n_tokens, "unit": held_out.unit}
            | figures
            | ({"prefixes": prefixes} if prefixes else {})
            | {
                "l0_probe_start": start["l0"],
                "mse_probe_start": start["mse"],
                "l0_probe_end": end["l0"],
                "mse_probe_end": end["mse"],
            }
        )
