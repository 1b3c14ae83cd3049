"""One SAE in training: `Trainer.step` makes one update."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE
from prolu.sae.nonlinearities import active_mask, nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.training.config import RunConfig
from prolu.training.config_checks import check_precision
from prolu.training.dead_latents import DeadLatents
from prolu.training.frozen_parts import FrozenParts
from prolu.training.mesh_parts import check_mesh, needs_dense, part_of, stats_of_batch, whole_weights
from prolu.training.nested_prefixes import prefixes_now
from prolu.training.resampling import ResampledCounts, Resampler
from prolu.training.starting_weights import starting_weights
from prolu.training.steps import AdamConfig, Objective, Steps, StepStats, Update, crossover_density, next_step_kind
from prolu.training.steps.base import gather_of
from prolu.training.trainer_state import TrainerState

logger = logging.getLogger(__name__)

NORM_TOLERANCE = 0.01
"""The relative distance of a norm from sqrt(d_in) that activations in bf16 or fp16 may have."""


class StepReport(NamedTuple):
    """What one training step did."""

    stats: StepStats
    """Statistics of the batch, from before the update."""
    lr: float
    """The learning rate of the update."""
    n_active: Float[Tensor, ""]
    """The number of active (token, latent) pairs in the whole batch."""


class Trainer:
    """Trains one SAE, a batch at a time. It never sees a language model."""

    def __init__(
        self,
        config: RunConfig,
        d_in: int,
        batch_size: int,
        *,
        d_out: int | None = None,
        steps: Steps | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        mesh: Mesh = ALONE,
        crossover: float | None = None,
    ):
        """Args:
            config: the settings of the run.
            d_in: the width of the activations.
            batch_size: the number of tokens per step, of all ranks together.
            d_out: the width of the target of a transcoder; None for an SAE, whose target is its input.
            steps: those of another trainer of the same shape, whose buffers are then shared; no bit depends on it.
            dtype: the number format of weights and activations.
            device: where the SAE is trained.
            mesh: the ranks that share the SAE: each holds some of its latents and sees some rows of every batch.
            crossover: the density below which a step of the kind `auto` is sparse; None for that of the measured table.

        Raises:
            ValueError: the SAE in `config.init_from` does not fit the run, or the run cannot be trained on the mesh.
        """
        check_precision(config, torch.device(device).type)
        check_mesh(config, batch_size, mesh)
        self.config = config
        self.batch_size = batch_size
        self.n_steps = config.n_steps(batch_size)
        self.sae_config = config.sae_config(d_in, d_out)
        self.resampling = config.resampling(batch_size)
        self.mesh = mesh
        self._schedule = config.schedule(batch_size)
        self.l0_controller = config.l0_controller(batch_size)
        self.coeff_warmup_steps = round(config.coeff_warmup_fraction * self.n_steps)
        # Some SAEs are used with another nonlinearity than they are trained with: BatchTopK is used with a threshold.
        self.nonlinearity = nonlinearity_named(config.resolved_nonlinearity)
        trained = self.nonlinearity.in_training
        penalty = penalty_named(config.trained_penalty)
        self.objective = Objective(
            trained,
            penalty,
            config.coeff,
            trained.auxiliary,
            config.matryoshka,
            prefixes_are_drawn=config.matryoshka_drawn > 0,
        )
        self.dead_latents = DeadLatents(trained.auxiliary, config.aux_dead_tokens, batch_size, mesh)
        weights = part_of(starting_weights(config, d_in, dtype, d_out), mesh).map(lambda t: t.to(device))
        self.frozen_parts = FrozenParts(config.freeze, weights)
        self.adam = AdamConfig(
            beta1=config.beta1, max_grad_norm=config.max_grad_norm, frozen=self.frozen_parts.untrained
        )
        self.state = TrainerState.start(weights, config)
        self.losses_finite_ = torch.ones((), dtype=torch.bool, device=device)
        self._saw_scale = config.normalisation == "none"
        if crossover is None:
            crossover = crossover_density(torch.device(device).type, d_in, config.d_sae, config.precision)
        # In tf32 there is no sparse step.
        self.crossover = 0.0 if config.precision == "tf32" or needs_dense(config, mesh) else crossover
        self.steps = steps or Steps(weights, batch_size // mesh.n_data, config.precision, mesh)

    def step(self, acts: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None) -> StepReport:
        """Make one update on normalised activations; on a mesh, on this rank's rows of the batch.

        Each row must be scaled to norm sqrt(d_in), as `ActivationStream` does, unless the config says
        `normalisation="none"`; rows of other norms are trained on after a warning.

        Args:
            acts: the activations x.
            target: the activations y that a transcoder is to give, each scaled by the factor of its x; None for an SAE.

        Raises:
            ValueError: there are no activations, their width, dtype or device is not the SAE's, or all steps of the
                config have been made; or a transcoder has no target, or an SAE has one.
        """
        acts, target = self.checked(acts, target)
        state = self.state
        update = self.update_now()
        step = self.steps[state.step]
        stats = step.update_(state.weights, state.moments, acts, self._objective_now(), update, target)
        self.frozen_parts.hold_(state.weights)
        stats, n_active = stats_of_batch(stats, self.objective.nonlinearity, self.mesh)
        self.losses_finite_.logical_and_(stats.mse.isfinite())
        self.state.observe_(stats, self.nonlinearity, self.resampling)
        self.state = self._state_after(n_active, n_tokens=len(acts) * self.mesh.n_data)
        return StepReport(stats, update.lr, n_active)

    def update_now(self) -> Update:
        """Return what the next update of the weights is: its number, learning rate and constants.

        Raises:
            ValueError: all steps of the config have been made.
        """
        n_updates = self.state.n_updates
        if n_updates == self.n_steps:
            raise ValueError(
                f"step {self.n_steps + 1}: the run has {self.n_steps} steps, n_tokens // batch_size, and all are made"
            )
        return Update(n_updates, self.config.lr * self._schedule.factor(n_updates), self.adam)

    @property
    def coeff(self) -> float | Tensor:
        """The penalty's coefficient in the next update; a tensor where a GPU computes it, for a target L0."""
        n_updates = self.state.n_updates
        state = self.state.l0_controller
        coeff = state.coeff if self.l0_controller is None else self.l0_controller.coeff(state, n_updates)
        return coeff * self.warmup_factor if self.coeff_warmup_steps else coeff

    @property
    def warmup_factor(self) -> float:
        """The factor by which the coefficient is still smaller in the next update, while it warms up."""
        if not self.coeff_warmup_steps:
            return 1.0
        return min(1.0, (self.state.n_updates + 1) / self.coeff_warmup_steps)

    def _objective_now(self) -> Objective:
        """Return the loss of the next update: its coefficient, its prefixes, and the dead latents that AuxK revives."""
        term = self.dead_latents.term_now(self.state.last_fired, self.state.n_updates)
        prefixes = prefixes_now(self.config, self.state.n_updates)
        return replace(self.objective, coeff=self.coeff, auxiliary=term, prefixes=prefixes)

    def _state_after(self, n_active: Tensor, n_tokens: int) -> TrainerState:
        """Return the state after an update, whose numbers decide how the next one is made."""
        n_updates = self.state.n_updates + 1
        step_kind = self.state.step
        controller = self.state.l0_controller
        # n_active is read only where something depends on it: on a GPU a reading waits until the step is done.
        if self.config.step == "auto" and self.crossover:
            step_kind = next_step_kind(step_kind, float(n_active / self.config.d_sae) / n_tokens, self.crossover)
        if self.l0_controller is not None:
            l0 = (n_active.double() if n_active.is_cuda else float(n_active)) / n_tokens
            controller = self.l0_controller.after(controller, l0, n_updates)
        return self.state._replace(n_updates=n_updates, step=step_kind, l0_controller=controller)

    def checked(self, acts: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return activations and targets as a step takes them; raise ValueError, as `step` does, if they do not fit."""
        if self.sae_config.is_transcoder != (target is not None):
            needs = "a transcoder needs one" if target is None else "an SAE has none, only a transcoder with a d_out"
            raise ValueError(f"target: {needs}")
        acts = self._fitting("acts", acts, "d_in", self.sae_config.d_in)
        if target is not None:
            target = self._fitting("target", target, "d_out", self.sae_config.width_out)
            if len(target) != len(acts):
                raise ValueError(f"target has {len(target)} rows: must have those of acts, which are {len(acts)}")
        if not self._saw_scale:
            # Checked only once, because reading a number from a GPU waits until the device is done.
            self._saw_scale = True
            _warn_if_not_scaled(acts)
        return acts, target

    def _fitting(self, name: str, rows: Tensor, width: str, n: int) -> Tensor:
        if not isinstance(rows, Tensor):
            raise ValueError(f"{name}: a {type(rows).__name__}; pass a tensor, as torch.from_numpy makes of an array")
        like = self.state.weights.encoder
        if rows.ndim != 2 or rows.shape[1] != n or not len(rows):
            raise ValueError(f"{name} of shape {tuple(rows.shape)}: must be [batch, {width}] with {width} = {n}")
        if rows.dtype != like.dtype or rows.device != like.device:
            raise ValueError(f"{name} are {rows.dtype} on {rows.device}: the trainer is {like.dtype} on {like.device}")
        return rows.detach().contiguous()

    @property
    def resamples_now(self) -> bool:
        """Whether dead latents are resampled before the next update."""
        return self.state.n_updates in self.resampling.steps

    def resampler(self) -> Resampler:
        """Return this step's resampling, the same on all ranks: show it fresh activations, then call `resample_`."""
        n_updates = self.state.n_updates
        counted_steps = n_updates - max(0, n_updates - self.resampling.count_steps)
        dead = self.state.fired < self.resampling.dead_below * counted_steps * self.batch_size
        dead = self.mesh.gathered_over_latents(dead, 0, "resampling")
        # Keyed by run and step: a run draws the same alone, in a sweep, and after it was resumed.
        generator = keyed_generator(self.config.run_id, "resample", n_updates)
        return Resampler(self.resampling, dead, self._reconstruct, generator, self.mesh)

    def resample_(self, resampler: Resampler) -> ResampledCounts:
        """Give dead latents their new directions, in place; a frozen matrix keeps its own."""
        starts = {name: self.nonlinearity.initial(name) for name in self.nonlinearity.parameter_names}
        counts = resampler.finish_(self.state.weights, self.state.moments, starts)
        self.frozen_parts.hold_(self.state.weights)
        return counts

    def _reconstruct(self, x: Tensor) -> Tensor:
        """Return the SAE's reconstruction of normalised activations; on a mesh with the latents of all ranks."""
        if self.mesh.n_latent == 1:
            sae = self.sae()
            return sae.reconstruct_normalised(sae.encode_normalised(x), x).detach()
        weights = self.state.weights
        m = (x - weights.b_dec) @ weights.encoder.T
        active = active_mask(self.nonlinearity, m, weights.own, gather_of(self.mesh))
        latents = torch.where(active, self.nonlinearity.value(m, weights.own), 0)
        recon = self.mesh.sum_over_latents_(latents @ weights.decoder, "resampling") + weights.output_bias
        return recon if weights.skip is None else recon + x @ weights.skip

    def sae(self) -> SAE:
        """Return the SAE as it is now; it shares the trainer's memory. On a mesh use `whole_sae`."""
        return SAE(self.sae_config, self.state.weights)

    def whole_sae(self) -> SAE | None:
        """Return the SAE as it is now.

        On a mesh all ranks ask together; only the first gets it, the others get None.
        """
        weights = whole_weights(self.state.weights, self.mesh)
        return None if weights is None else SAE(self.sae_config, weights)

    def losses_finite(self) -> bool:
        """Return whether the loss of every step since the start, or since the last `restore_`, was finite."""
        return bool(self.losses_finite_)

    def all_finite(self) -> bool:
        """Return whether every weight is finite, on every rank."""
        return not self.mesh.any(not all(bool(t.isfinite().all()) for t in self.state.weights.tensors()))

    def summary(self, report: StepReport) -> dict[str, float | int]:
        """Return a line of `metrics.jsonl`: figures of the last step, and latents silent for a tenth of the run."""
        stats = report.stats
        n_updates = self.state.n_updates
        silent_since = n_updates - max(1, self.n_steps // 10)
        dead = self.mesh.sum_over_latents_((self.state.last_fired <= silent_since).sum(), "curve")
        return {
            "step": n_updates,
            "tokens": n_updates * self.batch_size,
            "mse": float(stats.mse),
            "penalty": float(stats.penalty),
            "l0": float(report.n_active) / self.batch_size,
            # Before a tenth of the run no latent can have been silent that long.
            "dead": int(dead) if silent_since >= 0 else 0,
            "lr": report.lr,
            "coeff": float(self.coeff),
        }

    def whole_state(self) -> dict[str, Tensor]:
        """Return `TrainerState.tensors` of all latents. On a mesh all ranks ask together; only the first gets any."""
        return self.state.whole_tensors(self.mesh)

    def restore_(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Resume from a state that `whole_state` and `TrainerState.counters` returned, in place.

        Raises:
            ValueError: it is not a state of this trainer.
        """
        self.state = self.state.restored_(tensors, counters, self.n_steps, self.mesh)
        self.dead_latents.forget()
        self.losses_finite_.fill_(True)

    def describe(self) -> dict[str, Any]:
        """Return the resolved config of this run, for its folder."""
        return self.config.describe() | {
            "d_in": self.sae_config.d_in,
            **({"d_out": self.sae_config.d_out} if self.sae_config.is_transcoder else {}),
            "n_steps": self.n_steps,
            # It decides when a step changes its kind, and so its rounding.
            "crossover": self.crossover,
        }


def _warn_if_not_scaled(acts: Tensor) -> None:
    norms = torch.linalg.vector_norm(acts, dim=1)
    norms = norms[norms > 0]  # a row of zeros stays one
    expected = math.sqrt(acts.shape[1])
    if len(norms) and ((norms / expected - 1).abs() > NORM_TOLERANCE).any():
        logger.warning(
            "acts have norms from %.4g to %.4g, and are trained on as they are; the trainer expects rows scaled to "
            "norm sqrt(d_in) = %.4g, or a config with normalisation='none'",
            norms.min(),
            norms.max(),
            expected,
        )
