"""Several SAEs of one shape and family, trained in one step: on a GPU many small SAEs take little longer than one."""

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.sae.weights import Weights
from prolu.training.dead_latents import DeadLatents
from prolu.training.moments import Moments
from prolu.training.steps.cuda import CudaStep
from prolu.training.steps.stacked import member
from prolu.training.target_l0 import L0ControllerState
from prolu.training.trainer import StepReport, Trainer
from prolu.training.trainer_state import TrainerState

SPEEDUPS = Path(__file__).parent / "stack_speedups.json"
"""Measured ratios of the time of SAEs one after the other to that of a stack of them. A table, because a run that timed
itself would not be the same run twice."""

LEAST_SPEEDUP = 1.1
"""The speedup from which on stacks are made without being asked for."""

MOST_ENTRIES = 2**30
"""The number of entries of m, over all tokens and SAEs of a stack, beyond which there are several stacks. Matrices of
this size take about 16 GB together."""


class TrainerStack:
    """Trainers whose SAEs are updated together. Each keeps its state, whose tensors are now parts of larger ones.

    Coefficients, learning rates, seeds and target L0s may differ. The numbers are those of each trainer alone up to
    rounding, because a matmul of a stack may add in another order.
    """

    def __init__(self, trainers: Sequence[Trainer]):
        """Copy the states of the trainers into larger tensors, of which theirs are then parts.

        Args:
            trainers: of SAEs that `stack_key` calls alike, all after the same number of updates.

        Raises:
            ValueError: there is no trainer, or they are not alike.
        """
        if not trainers or len({(stack_key(trainer), trainer.state.n_updates) for trainer in trainers}) != 1:
            raise ValueError("trainers: those of a stack may differ in coefficient, rate, target L0 and seed only")
        self.trainers = tuple(trainers)
        first = trainers[0]
        states = [trainer.state for trainer in trainers]
        controllers = [[float(number) for number in state.l0_controller] for state in states]
        numbers = torch.tensor(controllers, dtype=torch.float64, device=first.state.fired.device)
        self._state = TrainerState(
            _stacked([state.weights for state in states]),
            Moments(_stacked([s.moments.first for s in states]), _stacked([s.moments.second for s in states])),
            last_fired=torch.stack([state.last_fired for state in states]),
            fired=torch.stack([state.fired for state in states]),
            n_updates=first.state.n_updates,
            step="dense",
            l0_controller=L0ControllerState(*numbers.T),
        )
        self._losses_finite = torch.stack([trainer.losses_finite_ for trainer in trainers])
        self._l0_controller = first.l0_controller
        if self._l0_controller is not None:
            targets = torch.tensor([trainer.config.target_l0 for trainer in trainers]).to(numbers)
            self._l0_controller = replace(self._l0_controller, target=targets)
        self._dead_latents = DeadLatents(
            first.objective.auxiliary, first.config.aux_dead_tokens, first.batch_size, first.mesh
        )
        like = first.state.weights
        self._step = CudaStep(like, first.batch_size, first.config.precision, n_saes=len(trainers))
        for i, trainer in enumerate(trainers):
            trainer.losses_finite_ = self._losses_finite[i]
            trainer.state = trainer.state._replace(
                weights=member(self._state.weights, i),
                moments=Moments(*(member(moment, i) for moment in self._state.moments)),
                last_fired=self._state.last_fired[i],
                fired=self._state.fired[i],
                step="dense",
            )

    def step(
        self, acts: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> list[StepReport]:
        """Make one update of every SAE on the same normalised activations; return what each did.

        The arguments are those of `Trainer.step`.

        Raises:
            ValueError: as `Trainer.step`.
        """
        first = self.trainers[0]
        acts, target = first.checked(acts, target)
        state = self._state
        updates = [trainer.update_now() for trainer in self.trainers]
        term = self._dead_latents.term_now(state.last_fired, state.n_updates)
        objective = replace(first.objective, coeff=self._coeffs(), auxiliary=term)
        stats = self._step.update_stack_(state.weights, state.moments, acts, objective, updates, target)
        for trainer in self.trainers:
            trainer.frozen_parts.hold_(trainer.state.weights)
        self._losses_finite.logical_and_(stats.mse.isfinite())
        state.observe_(stats, first.nonlinearity, first.resampling)
        n_active = stats.fired.sum(-1)
        n_updates = state.n_updates + 1
        controller = state.l0_controller
        if self._l0_controller is not None:
            controller = self._l0_controller.after(controller, n_active.double() / len(acts), n_updates)
        self._state = state._replace(n_updates=n_updates, l0_controller=controller)
        self._give_states_back()
        return [StepReport(stats.of_member(i), update.lr, n_active[i]) for i, update in enumerate(updates)]

    def _coeffs(self) -> Float[Tensor, " n_saes"]:
        """Return the coefficient of the penalty of each SAE in the next update."""
        if self._l0_controller is None:
            return torch.tensor([trainer.coeff for trainer in self.trainers], dtype=torch.float64)
        coeffs = self._l0_controller.coeff(self._state.l0_controller, self._state.n_updates)
        return torch.as_tensor(coeffs) * self.trainers[0].warmup_factor

    def _give_states_back(self) -> None:
        """Tell each trainer what has changed in its state beside its tensors, which are parts of the stack's."""
        n_updates = self._state.n_updates
        coeffs, l0s = map(torch.as_tensor, self._state.l0_controller)
        for i, trainer in enumerate(self.trainers):
            controller = trainer.state.l0_controller
            if self._l0_controller is not None:
                controller = L0ControllerState(coeffs[i], l0s[i])
            trainer.state = trainer.state._replace(n_updates=n_updates, l0_controller=controller)


def stacks_pay(device: str, d_in: int, d_sae: int) -> bool:
    """Return whether a stack of SAEs of this shape was measured to be faster than one SAE after the other.

    The nearest shape in the table decides; without an entry for the device, there are no stacks.
    """
    rows = [row for row in json.loads(SPEEDUPS.read_text()) if row["device"] == device]
    if not rows:
        return False
    nearest = min(rows, key=lambda row: abs(math.log(row["d_in"] / d_in)) + abs(math.log(row["d_sae"] / d_sae)))
    return nearest["speedup"] >= LEAST_SPEEDUP


def stack_key(trainer: Trainer) -> Hashable:
    """Return what must be equal for SAEs to be trained in one stack."""
    config = trainer.config
    weights = trainer.state.weights
    return (
        (
            weights.d_in,
            weights.d_sae,
            tuple((name, tensor.shape) for name, tensor in weights.shared().items()),
            weights.encoder.dtype,
            weights.encoder.device,
        ),
        (config.resolved_nonlinearity, config.trained_penalty, config.precision, config.normalisation),
        (trainer.adam, trainer.n_steps, trainer.batch_size, trainer.resampling),
        (config.aux_dead_tokens, trainer.coeff_warmup_steps, config.freeze, config.matryoshka),
        None if trainer.l0_controller is None else replace(trainer.l0_controller, target=0.0),
    )


def _stacked(parts: Sequence[Weights]) -> Weights:
    """Return weights with one dimension more, in front: that of the parts."""
    own = {name: torch.stack([part.own[name] for part in parts]) for name in parts[0].own}
    shared = {name: torch.stack([part.shared()[name] for part in parts]) for name in parts[0].shared()}
    encoder = torch.stack([part.encoder for part in parts])
    decoder = torch.stack([part.decoder for part in parts])
    return Weights(encoder, decoder, own=own, **shared)
