"""One SAE in training: its state, and a step."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prolu.runtime.mesh import ALONE, Mesh
from prolu.runtime.rng import keyed_generator
from prolu.sae.autoencoder import SAE
from prolu.sae.nonlinearities import nonlinearity_named, on
from prolu.sae.penalties import penalty_named
from prolu.sae.weights import Weights
from prolu.training.config import STEP_KINDS, RunConfig
from prolu.training.resampling import ResampledCounts, Resampler
from prolu.training.starting_weights import starting_weights
from prolu.training.steps import AdamConfig, Objective, Steps, StepStats, crossover_density, next_step_kind
from prolu.training.target_l0 import L0ControllerState


class StepReport(NamedTuple):
    """What one training step did."""

    stats: StepStats
    lr: float
    """Learning rate of the update."""
    n_on: Float[Tensor, ""]
    """Pairs of token and latent that were on, in the whole batch."""


class TrainerState(NamedTuple):
    """All that a trainer changes: what a checkpoint holds. On a mesh, of this rank's latents."""

    weights: Weights
    first: Weights
    """Adam's first moments."""
    second: Weights
    """Adam's second moments."""
    last_fired: Int[Tensor, " d_sae"]
    """Number of updates after which each latent was last seen on; 0 if never."""
    fired: Float[Tensor, " d_sae"]
    """Tokens on which each latent was on since the count for the next resampling began."""
    n_updates: int
    step: str
    """The step kind of the next update."""
    l0_controller: L0ControllerState
    """The penalty's coefficient, and what the L0 controller remembers where there is a target L0."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        parts = {"weights": self.weights, "first": self.first, "second": self.second}
        named = {f"{part}.{name}": t for part, weights in parts.items() for name, t in weights.named().items()}
        return named | {"last_fired": self.last_fired, "fired": self.fired}

    def counters(self) -> dict[str, Any]:
        """Return the numbers and names beside the tensors, as a checkpoint holds them."""
        # "steered" is the key of checkpoints since the first version; it stays, so that they can still be resumed.
        return {"n_updates": self.n_updates, "step": self.step, "steered": list(self.l0_controller)}


class Trainer:
    """Trains one SAE, a batch at a time. It never sees a language model."""

    def __init__(
        self,
        config: RunConfig,
        d_in: int,
        batch_size: int,
        *,
        steps: Steps | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        mesh: Mesh = ALONE,
    ):
        """Args:
            batch_size: tokens per step, of all ranks together.
            steps: lets trainers of one shape share buffers; it does not change a bit.
            mesh: this trainer's place among those that hold the SAE's other latents and see the batch's other rows.

        Raises:
            ValueError: the SAE that the run starts from does not fit it, or it cannot be split so.
        """
        check_mesh(config, batch_size, mesh)
        self._mesh = mesh
        self.config = config
        self.batch_size = batch_size
        self.n_steps = config.n_steps(batch_size)
        self.sae_config = config.sae_config(d_in)
        code = nonlinearity_named(config.resolved_nonlinearity).in_training
        self._latents = mesh.latents(config.d_sae)
        self._objective = Objective(code, penalty_named(config.penalty), config.coeff, code.auxiliary)
        self._schedule = config.schedule(batch_size)
        self._l0_controller = config.l0_controller(batch_size)
        self._coeff_warmup_steps = round(config.coeff_warmup_fraction * self.n_steps)
        self._adam = AdamConfig(beta1=config.beta1, max_grad_norm=config.max_grad_norm)
        self.resampling = config.resampling(batch_size)
        weights = self._part(starting_weights(config, d_in, dtype)).map(lambda t: t.to(device))
        never = torch.zeros(weights.d_sae, dtype=torch.int64, device=device)
        moments = weights.zeros_like(), weights.zeros_like()
        self.state = TrainerState(
            weights, *moments, never, never.double(), 0, config.step, L0ControllerState(config.coeff)
        )
        if config.step == "auto":
            self.state = self.state._replace(step="dense")
        self.crossover = 0.0
        if config.precision == "fp32" and not needs_dense(config, mesh):
            self.crossover = crossover_density(torch.device(device).type, d_in, config.d_sae)
        self.steps = steps or Steps(weights, batch_size // mesh.n_data, config.precision, mesh)

    def step(self, acts: Float[Tensor, "batch d_in"]) -> StepReport:
        """One update on normalised activations; on a mesh, on this rank's rows of the batch.

        Raises:
            ValueError: no activations, or of another width, dtype or device than the SAE.
        """
        acts = self._checked(acts)
        weights, first, second, last_fired, fired, n_updates, step_kind, controller = self.state
        lr = self.config.lr * self._schedule.factor(n_updates)
        stats = self.steps[step_kind].update_(
            weights, first, second, acts, self._objective_now(), n_updates=n_updates, lr=lr, adam=self._adam
        )
        stats, n_on = self._of_whole_batch(stats)
        n_tokens = len(acts) * self._mesh.n_data
        last_fired[stats.fired > 0] = n_updates + 1
        nonlinearity_named(self.config.resolved_nonlinearity).observe_(weights.own, stats.smallest, n_updates + 1)
        if self.resampling.steps:
            if self.resampling.restarts_count(n_updates):
                fired.zero_()
            fired += stats.fired
        if self.config.step == "auto" and self.crossover:
            step_kind = next_step_kind(step_kind, float(n_on / self.config.d_sae) / n_tokens, self.crossover)
        if self._l0_controller is not None:
            controller = self._l0_controller.after(controller, float(n_on) / n_tokens, n_updates + 1)
        self.state = self.state._replace(n_updates=n_updates + 1, step=step_kind, l0_controller=controller)
        return StepReport(stats, lr, n_on)

    def _of_whole_batch(self, stats: StepStats) -> tuple[StepStats, Tensor]:
        """Statistics of all rows, `fired` still of the latents here; and how many pairs were on."""
        mesh, n_on = self._mesh, stats.fired.sum()
        if mesh.n_ranks == 1:
            return stats, n_on
        mse, auxiliary = (value / mesh.n_latent for value in (stats.mse, stats.auxiliary))  # every rank of a row has it
        sums = torch.stack([mse.double(), stats.penalty.double(), auxiliary.double(), n_on.double()])
        mse, penalty, auxiliary, n_on = mesh.sum_over_all_(sums, "scalars")
        fired = mesh.sum_over_data_(stats.fired, "fired")
        smallest = stats.smallest
        if self._objective.nonlinearity.selection is not None:
            smallest = mesh.least_of_all_(smallest.where(smallest > 0, torch.inf))
            smallest = smallest.where(smallest.isfinite(), 0)
        return StepStats(mse, penalty, auxiliary, fired, smallest), n_on

    @property
    def coeff(self) -> float:
        """The penalty's coefficient in the next update."""
        n_updates = self.state.n_updates
        state = self.state.l0_controller
        coeff = state.coeff if self._l0_controller is None else self._l0_controller.coeff(state, n_updates)
        return coeff * min(1.0, (n_updates + 1) / self._coeff_warmup_steps) if self._coeff_warmup_steps else coeff

    def _objective_now(self) -> Objective:
        """With this step's coefficient, and the latents that an auxiliary term is to revive."""
        objective, n_updates = self._objective, self.state.n_updates
        if (coeff := self.coeff) != objective.coeff:
            objective = replace(objective, coeff=coeff)
        if (term := objective.auxiliary) is not None and term.of_dead:
            dead = (n_updates - self.state.last_fired) * self.batch_size >= self.config.aux_dead_tokens
            some = self._mesh.any(bool(dead.any()))
            objective = replace(objective, auxiliary=replace(term, among=dead) if some else None)
        return objective

    @property
    def resamples_now(self) -> bool:
        """Whether dead latents are resampled before the next update."""
        return self.state.n_updates in self.resampling.steps

    def resampler(self) -> Resampler:
        """Resampling at this step, to be shown fresh activations and then finished; the same on all ranks."""
        n_updates = self.state.n_updates
        since = n_updates - max(0, n_updates - self.resampling.count_steps)
        dead = self.state.fired < self.resampling.dead_below * since * self.batch_size
        dead = self._mesh.gathered_over_latents(dead, 0, "resampling")
        generator = keyed_generator(self.config.run_id, "resample", n_updates)
        return Resampler(self.resampling, dead, self._reconstruct, generator, self._mesh)

    def _reconstruct(self, x: Tensor) -> Tensor:
        """As the SAE does; on a mesh with the latents of all ranks."""
        if self._mesh.n_latent == 1:
            sae = self.sae()
            return sae.decode(sae.encode_normalised(x)).detach()
        weights, code = self.state.weights, nonlinearity_named(self.config.resolved_nonlinearity)
        m = (x - weights.b_dec) @ weights.encoder.T
        latents = torch.where(on(code, m, weights.own, self._mesh), code.value(m, weights.own), 0)
        return self._mesh.sum_over_latents_(latents @ weights.decoder, "resampling") + weights.b_dec

    def resample_(self, resampler: Resampler) -> ResampledCounts:
        """Gives dead latents their new directions, in place."""
        code = nonlinearity_named(self.config.resolved_nonlinearity)
        starts = {name: code.initial(name) for name in code.parameter_names}
        return resampler.finish_(self.state.weights, self.state.first, self.state.second, starts)

    def _checked(self, acts: Tensor) -> Tensor:
        like = self.state.weights.encoder
        if acts.ndim != 2 or acts.shape[1] != like.shape[1] or not len(acts):
            raise ValueError(f"acts of shape {tuple(acts.shape)}: must be [batch, d_in] with d_in = {like.shape[1]}")
        if acts.dtype != like.dtype or acts.device != like.device:
            raise ValueError(f"acts are {acts.dtype} on {acts.device}: the trainer is {like.dtype} on {like.device}")
        return acts.detach().contiguous()

    def summary(self, report: StepReport) -> dict[str, float | int]:
        """A line of `metrics.jsonl`: figures of the last step, and latents silent for a tenth of the run."""
        stats, done = report.stats, self.state.n_updates
        silent_since = done - max(1, self.n_steps // 10)
        dead = self._mesh.sum_over_latents_((self.state.last_fired <= silent_since).sum(), "curve")
        return {
            "step": done,
            "tokens": done * self.batch_size,
            "mse": float(stats.mse),
            "penalty": float(stats.penalty),
            "l0": float(report.n_on) / self.batch_size,
            "dead": int(dead) if silent_since >= 0 else 0,
            "lr": report.lr,
            "coeff": self.coeff,
        }

    def restore_(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Takes up a state that `whole_state` and `TrainerState.counters` gave, in place; of a mesh, a rank its part.

        Raises:
            ValueError: it is not a state of this trainer.
        """
        own = self.state.tensors()
        if tensors.keys() != own.keys():
            raise ValueError(f"a state of {sorted(tensors)}, needed are {sorted(own)}")
        for name, tensor in own.items():
            if tensors[name].shape != self._whole_shape(name, tensor) or tensors[name].dtype != tensor.dtype:
                raise ValueError(f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)}")
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} holds values that are not finite")
        n_updates, step = counters["n_updates"], counters["step"]
        if not isinstance(n_updates, int) or not 0 <= n_updates <= self.n_steps or step not in STEP_KINDS:
            raise ValueError(f"n_updates {n_updates!r}, step {step!r}")
        steered = counters["steered"]
        if len(steered) != len(L0ControllerState._fields) or not all(0 <= value < math.inf for value in steered):
            raise ValueError(f"the state of the L0 controller is {steered!r}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name][self._latents] if _is_split(name) else tensors[name])
        self.state = self.state._replace(n_updates=n_updates, step=step, l0_controller=L0ControllerState(*steered))

    def whole_state(self) -> dict[str, Tensor]:
        """`TrainerState.tensors` of all latents. On a mesh all ranks ask together, and only the first gets any."""
        tensors = self.state.tensors()
        if self._mesh.n_ranks == 1:
            return tensors
        found = {name: self._mesh.whole(t) if _is_split(name) else t for name, t in tensors.items()}
        return {name: t for name, t in found.items() if t is not None} if self._mesh.is_first else {}

    def sae(self) -> SAE:
        """The SAE as it is now; shares the trainer's memory. Of a mesh, `whole_sae` is asked."""
        return SAE(self.sae_config, self.state.weights)

    def whole_sae(self) -> SAE | None:
        """The SAE as it is now. On a mesh all ranks ask together, and only the first gets it."""
        if self._mesh.n_latent == 1:
            return self.sae() if self._mesh.is_first else None
        weights = self.state.weights
        parts = [self._mesh.whole(t) for t in (weights.encoder, weights.decoder, *weights.own.values())]
        if not self._mesh.is_first:
            return None
        encoder, decoder, *own = [part for part in parts if part is not None]
        whole = Weights(encoder, decoder, weights.b_dec.cpu(), dict(zip(weights.own, own, strict=True)))
        return SAE(self.sae_config, whole.map(lambda t: t.to(weights.b_dec)))

    def all_finite(self) -> bool:
        """Whether every weight is, on every rank."""
        return not self._mesh.any(not all(bool(t.isfinite().all()) for t in self.state.weights.tensors()))

    def _part(self, weights: Weights) -> Weights:
        """What is here of whole weights."""
        own = {name: t[self._latents] for name, t in weights.own.items()}
        part = Weights(weights.encoder[self._latents], weights.decoder[self._latents], weights.b_dec, own)
        return weights if self._mesh.n_latent == 1 else part.map(torch.clone)

    def _whole_shape(self, name: str, t: Tensor) -> torch.Size:
        return torch.Size([self.config.d_sae, *t.shape[1:]]) if _is_split(name) else t.shape

    def describe(self) -> dict[str, Any]:
        """The resolved config of this run, for its folder."""
        return asdict(self.config) | {
            "d_in": self.sae_config.d_in,
            "n_steps": self.n_steps,
            "crossover": self.crossover,
        }


def _is_split(name: str) -> bool:
    """Whether a tensor of a state has a row for each latent."""
    return not name.endswith(".b_dec")


def needs_dense(config: RunConfig, mesh: Mesh) -> bool:
    """Whether only the dense step can train this run on a mesh: it knows how ranks select latents together."""
    selection = nonlinearity_named(config.resolved_nonlinearity).in_training.selection
    return selection is not None and (mesh.n_latent > 1 or (selection.over_batch and mesh.n_data > 1))


def check_mesh(config: RunConfig, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless a run can be trained on a mesh."""
    mesh.check("d_sae", config.d_sae, "latent")
    mesh.check("batch_size", batch_size, "data")
    if config.step in ("sparse", "sparse_torch") and needs_dense(config, mesh):
        raise ValueError(f"step {config.step!r}: {config.nonlinearity} on several ranks needs the dense step")
