"""The settings of one run: every field with its default and its help, checked when the config is made."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prolu.runtime.checks import at_least_1
from prolu.runtime.notebooks import changed_fields, html_facts
from prolu.sae.choices import TAKES_L0, TAKES_TARGET, Normalisation
from prolu.training.choices import Freeze, Precision, SecondMoment, StepKind
from prolu.training.config_checks import check_run
from prolu.training.naming import family_of, run_name
from prolu.training.schedule import Schedule
from prolu.training.target_l0 import CONTROLLED_FRACTION, INTEGRATION_FRACTION, L0Controller

# The command line makes its help from this file, so what needs PyTorch is imported where it is used.
if TYPE_CHECKING:
    from prolu.sae.saved_sae import SAEConfig
    from prolu.training.resampling import Resampling

BY_NONLINEARITY = "auto"
"""The penalty that suits the nonlinearity."""

LATER_FIELDS: dict[str, Any] = {
    "l0_integration_steps": 1.0,
    "l0_braking": False,
    "freeze": "none",
    "skip": False,
    "matryoshka": (),
    "matryoshka_drawn": 0,
    "refit_tokens": 0,
    "named": (),
}
"""Fields that runs recorded by version 0.1.0 lack, with the values that reproduce these runs."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: which SAE, which loss, how long."""

    nonlinearity: str = "prolu_ste"
    """The activation function: relu, prolu_relu, prolu_ste, gated, jumprelu or 'jumprelu(bandwidth)', jumprelu_plain
    (whose threshold is trained itself, not its logarithm), jumprelu_ste (whose straight-through gradients reach all
    weights; for the penalty tanh), 'topk(k)', 'batchtopk(k)', or 'prolu(b_ste,m_ste,m_gg)',
    ProLU with the gradient of these three weights (docs, The method). With a target L0, or --k, topk and batchtopk are
    given without k."""
    penalty: str = BY_NONLINEARITY
    """The sparsity penalty: l1, sqrt_l1, l0 (for a jumprelu only), tanh or 'tanh(scale)', quadratic_l0 (which draws L0
    to the target L0, at a fixed coefficient), frequency_l0 or 'frequency_l0(scale)' (which penalises most the latents
    that are active often), quadratic_tanh and frequency_tanh (the same for every nonlinearity), none, or auto, which
    suits the nonlinearity: none for topk and batchtopk, which set their L0 by k, l0 for a jumprelu, tanh for
    jumprelu_ste, and l1 for all others."""
    coeff: float = 1.2e-3
    """The coefficient lambda of the penalty; where there is none, leave it out. The loss takes the mean of the squared
    error over d_in, so multiply values that were tuned on GPT-2 (d_in = 768) by 768 / d_in. The ProLU paper's first
    sweep, on GPT-2, has 3e-4 to 4.8e-3 for l1 and sqrt_l1. An l0 penalty, which counts latents, needs about a ninth of
    the coefficient of l1 for the same L0. With a target L0, it is the value to start from."""
    target_l0: float | None = None
    """The target L0, in active latents per token. A controller adjusts the coefficient by the run's own L0 and freezes
    it for the last 30% of the steps; topk and batchtopk take the target as their k. None: the coefficient stays as it
    is, as in the paper."""
    l0_integration_steps: float = 10.0
    """The shortest integration time of the controller of L0, in steps. The time is 2.5% of the run's steps, so this
    decides in runs of fewer than 400 steps, where L0 cannot follow a controller that acts faster. 1 is what studies of
    version 0.1.0 had, whose configs lack this field."""
    l0_braking: bool = True
    """Under the penalty l0, but for jumprelu_ste, whether the L0 controller lowers the coefficient while L0 falls, so
    that it is not too large when L0 reaches its target. Without, as earlier studies were trained, whose configs lack
    this field, JumpReLUs may end at half their target."""
    coeff_warmup_fraction: float = 0.0
    """The fraction of the steps over which the coefficient rises linearly from 0."""
    d_sae: int = 12_288
    """The number of latents. The paper has 12,288 = 16 d_in."""
    matryoshka: tuple[int, ...] = ()
    """A nested (Matryoshka) loss: the numbers of latents, from the smallest on, such that the first 512, the first
    2,048 ... of them reconstruct well by themselves, as all d_sae do. Empty: only all of them together are trained to
    reconstruct."""
    matryoshka_drawn: int = 0
    """A nested loss whose prefixes are drawn anew for every batch: their number, besides all d_sae latents. The paper
    that draws them has 9. 0: they are those of matryoshka."""
    n_tokens: int = 100_000_000
    """The number of training tokens; a remainder that does not fill a batch is dropped. The paper has 400 million."""
    lr: float = 1e-3
    """The peak learning rate. The paper has 1e-3 and 3e-4."""
    warmup_fraction: float = 0.02
    """The fraction of the steps over which the learning rate rises linearly from 0."""
    decay_start_fraction: float = 0.8
    """The fraction of the steps after which the learning rate falls linearly."""
    decay_end_fraction: float = 1.0
    """The fraction of the steps at which the falling learning rate would reach 0."""
    lr_floor: float = 0.1
    """The fraction of the peak learning rate below which the decay does not go."""
    beta1: float = 0.9
    """The decay rate of Adam's first moment. The papers of Gated and JumpReLU SAEs use 0."""
    max_grad_norm: float | None = None
    """The largest allowed norm of all gradients together; a longer gradient is scaled down to it. None: gradients are
    never clipped, as in the paper."""
    init_seed: int = 0
    """The seed of the starting weights."""
    initial_bias: float = 0.0
    """The value at which the encoder biases start."""
    init_from: str | Path | None = None
    """The folder of a run or of another saved SAE, whose weights the run starts from. It must have the run's d_sae,
    normalisation and nonlinearity; only the arguments of the nonlinearity, such as k, may differ. None: the starting
    weights are drawn at random."""
    init_digest: str | None = None
    """The SHA-256 digest that the weights in init_from must have. None: it is computed from them, and only a resumed
    run is checked against it."""
    freeze: Freeze = "none"
    """The matrix that stays as it started, so that the run is a random baseline: decoder, encoder, soft_decoder (every
    decoder row keeps a cosine of at least 0.8 with its start), or none. Biases and thresholds are always trained. An
    SAE that does not beat its random baselines has learned no directions worth having."""
    refit_tokens: int = 0
    """After training, multiply each decoder row by the gain with which all latents together reconstruct this many
    training tokens best: least squares, with a prior that keeps gains near 1 for latents that are active on few tokens.
    Which latents are active stays the same, so this takes away suppression, and nothing else. 0: decoder rows stay as
    they were trained, as in the paper."""
    normalisation: Normalisation = "per_token"
    """How activations are scaled: per_token scales each to norm sqrt(d_in), none leaves them as they are. The target of
    a transcoder is scaled by the factor of its input, so that its output needs no more than its input to be scaled
    back."""
    skip: bool = False
    """Train a skip transcoder: a matrix W_skip besides, so that x W_skip is added to the output. This is for
    transcoders only (--hook-out)."""
    resample_fractions: tuple[float, ...] = ()
    """The fractions of the steps after which dead latents are resampled and the learning rate warms up again. Empty:
    never. The paper has 0.256 and 0.512."""
    resample_count_fraction: float = 0.128
    """The fraction of the steps, before each resampling, over which the activity of latents is counted."""
    resample_dead_below: float = 3e-6
    """A latent is dead if it was active on less than this fraction of the counted tokens."""
    resample_candidates: int = 819_200
    """The number of fresh activations among which new directions are drawn."""
    resample_max_raw_norm: float | None = None
    """Activations whose norm before scaling is this large or larger are no candidates; the paper has 2500, because
    GPT-2's first positions have a norm of about 3000. None: all are candidates."""
    resample_exponent: float = 1.0
    """Candidates are drawn with probability proportional to their squared error to the power of this exponent."""
    resample_encoder_norm: float = 0.02
    """The norm of a resampled encoder column, as a fraction of the mean norm over living latents. The paper has 0.02
    and 0.2."""
    resample_second_moment: SecondMoment = "mean"
    """What Adam's second moment of a resampled latent is set to: mean (the mean over living latents) or zero."""
    aux_dead_tokens: int = 10_000_000
    """The number of tokens without activity after which a latent of topk, batchtopk or jumprelu_ste is trained by the
    auxiliary term (AuxK, or the pre-activation loss) that revives dead latents."""
    step: Literal["auto", StepKind, "stacked"] = "auto"
    """How a training step is computed: dense, sparse, sparse_torch (sparse without numba), stacked (dense, in one step
    with all runs of the study that differ in coefficient, learning rate, target L0 or seed only; meant for many small
    SAEs on a GPU), or auto. On a CPU auto takes sparse if the last step had few active latents, else dense; on a GPU it
    takes stacked for small SAEs, else dense. The limits are from tables of measurements, not from the clock, so that a
    run is the same twice."""
    precision: Precision = "fp32"
    """The precision of the inputs of matmuls; sums, weights and moments are always fp32. tf32 is for GPUs. bf16 is
    faster on CPUs too that multiply such numbers themselves (AMX). Other CPUs compute in fp32 instead."""
    named: tuple[str, ...] = ()
    """Further fields whose values the run's name holds, such as ('beta1',). The name has what usually differs within a
    study: nonlinearity, penalty, coefficient or target L0, learning rate, number of latents, seed. `prolu.grid` sets
    this where it is needed."""

    def __post_init__(self):
        if isinstance(self.init_from, os.PathLike):
            # Recorded as text; a path is taken because that is what other functions here return.
            object.__setattr__(self, "init_from", os.fspath(self.init_from))
        check_run(self)
        self._find_start()

    def __repr__(self) -> str:
        return f"RunConfig({', '.join(f'{name}={value!r}' for name, value in changed_fields(self).items())})"

    def _repr_html_(self) -> str:
        changed = changed_fields(self)
        others = {f.name: repr(getattr(self, f.name)) for f in fields(self) if f.name not in changed}
        facts = {name: repr(value) for name, value in changed.items()}
        return html_facts(f"RunConfig of {self.family}, with {len(others)} defaults", facts, others)

    def _find_start(self) -> None:
        if self.init_from is not None and self.init_digest is None:
            from prolu.sae.saved_sae import weights_digest

            # Found now and not when training starts: what lies in a folder may change, the config of a run may not,
            # and the digest is part of the run's name.
            try:
                digest = weights_digest(self.init_from)
            except ValueError as problem:
                raise ValueError(f"init_from {self.init_from!r}: {problem}") from None
            object.__setattr__(self, "init_digest", digest)

    @property
    def resolved_nonlinearity(self) -> str:
        """The nonlinearity with its arguments: topk with a target L0 of 32 is topk(32)."""
        if self.nonlinearity in TAKES_L0 and self.target_l0 is not None:
            return f"{self.nonlinearity}({max(1, round(self.target_l0))})"
        return self.nonlinearity

    @property
    def resolved_penalty(self) -> str:
        """The penalty: the one that was named, or for auto the one that suits the nonlinearity."""
        if self.penalty != BY_NONLINEARITY:
            return self.penalty
        from prolu.sae.nonlinearities import nonlinearity_named

        return nonlinearity_named(self.resolved_nonlinearity).usual_penalty

    def describe(self) -> dict[str, Any]:
        """Return all fields as they are recorded: with the penalty by name, so that no reader must know the rule.

        The `LATER_FIELDS` are left out where they have the values that their absence means, and those of the L0
        controller also where none uses them.
        """
        recorded = asdict(self) | {"penalty": self.resolved_penalty}
        unused = {name for name, value in LATER_FIELDS.items() if recorded[name] == value}
        unused |= self.unused_by_controller
        return {name: value for name, value in recorded.items() if name not in unused}

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Return the config that `describe` recorded, as JSON gave it back; what does not belong to it is left out."""
        known = {f.name for f in fields(cls)}
        # JSON has no tuples. Fields that an earlier version lacked have the values that their absence means.
        settings: dict[str, Any] = dict(LATER_FIELDS) | {
            name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known
        }
        config = cls(**settings)
        for name in config.unused_by_controller - values.keys():
            # The field was left out because it was not used, so a run that is derived from this config gets today's
            # default.
            object.__setattr__(config, name, getattr(cls, name))
        return config

    @property
    def trained_penalty(self) -> str:
        """The penalty with its arguments: quadratic_l0 with a target L0 of 32 is quadratic_l0(32)."""
        if self.resolved_penalty in TAKES_TARGET and self.target_l0 is not None:
            return f"{self.resolved_penalty}({self.target_l0!r})"
        return self.resolved_penalty

    @property
    def ignores_coeff(self) -> bool:
        """Whether a coefficient other than the default was given, and there is no penalty that it could weigh."""
        return self.resolved_penalty == "none" and self.coeff != RunConfig.coeff

    @property
    def has_target_l0(self) -> bool:
        """Whether the coefficient is adjusted to reach a target L0.

        topk and batchtopk reach theirs by their k, and a quadratic penalty draws to it.
        """
        return (
            self.target_l0 is not None
            and self.nonlinearity not in TAKES_L0
            and self.resolved_penalty not in TAKES_TARGET
        )

    @property
    def unused_by_controller(self) -> set[str]:
        """The fields of the L0 controller that decide nothing in this run."""
        if not self.has_target_l0:
            return {"l0_integration_steps", "l0_braking"}
        # The pseudo-gradients of jumprelu_ste reach all weights, and it meets its targets without braking.
        has_slow_gate = self.resolved_penalty == "l0" and self.nonlinearity != "jumprelu_ste"
        return set() if has_slow_gate else {"l0_braking"}

    @property
    def family(self) -> str:
        """The family that this run belongs to, as comparisons name it."""
        return family_of(self.describe())

    @property
    def run_id(self) -> str:
        """The name of the run's folder, made from the settings in which the runs of a study usually differ."""
        return run_name(self)

    def sae_config(self, d_in: int, d_out: int | None = None) -> "SAEConfig":
        """Return the config of the run's SAE for activations of width `d_in`.

        With a `d_out` it is that of a transcoder, whose target has this width.
        """
        from prolu.sae.saved_sae import SAEConfig

        return SAEConfig(
            d_in=d_in,
            d_sae=self.d_sae,
            nonlinearity=self.resolved_nonlinearity,
            normalisation=self.normalisation,
            d_out=d_out,
            skip=self.skip,
        )

    # Schedule, controller and resampling are held as fractions, so that a run at another length keeps its shape. The
    # methods below turn them into steps.

    def n_steps(self, batch_size: int) -> int:
        """Return the number of full batches in `n_tokens`.

        Raises:
            ValueError: there is not one.
        """
        at_least_1("batch_size", batch_size)
        if self.n_tokens < batch_size:
            raise ValueError(f"n_tokens {self.n_tokens}: fewer than one batch of {batch_size}")
        return self.n_tokens // batch_size

    def schedule(self, batch_size: int) -> Schedule:
        """Return the learning-rate schedule in steps."""
        n_steps = self.n_steps(batch_size)
        start = round(self.decay_start_fraction * n_steps)
        return Schedule(
            warmup_steps=round(self.warmup_fraction * n_steps),
            restart_steps=self.resampling(batch_size).steps,
            decay_start_step=start,
            decay_end_step=max(start + 1, round(self.decay_end_fraction * n_steps)),
            floor=self.lr_floor,
        )

    def l0_controller(self, batch_size: int) -> L0Controller | None:
        """Return the controller of the coefficient, in steps; None if the coefficient is not adjusted."""
        if self.target_l0 is None or not self.has_target_l0:
            return None
        n_steps = self.n_steps(batch_size)
        return L0Controller(
            target=self.target_l0,
            # The controller waits until both warm-ups are over, because until then L0 depends little on the
            # coefficient.
            start_step=round(max(self.warmup_fraction, self.coeff_warmup_fraction) * n_steps),
            end_step=round(CONTROLLED_FRACTION * n_steps),
            steps=max(self.l0_integration_steps, INTEGRATION_FRACTION * n_steps),
            # Braking was tried for all penalties: those that change all weights, whose L0 falls by itself at first,
            # then missed their targets in short runs.
            brakes=self.l0_braking and "l0_braking" not in self.unused_by_controller,
        )

    def resampling(self, batch_size: int) -> "Resampling":
        """Return when and how dead latents are resampled, with fractions of the run turned into numbers of steps."""
        from prolu.training.resampling import Resampling

        n_steps = self.n_steps(batch_size)
        return Resampling(
            steps=tuple(round(fraction * n_steps) for fraction in self.resample_fractions),
            count_steps=max(1, round(self.resample_count_fraction * n_steps)),
            dead_below=self.resample_dead_below,
            n_candidates=self.resample_candidates,
            max_raw_norm=self.resample_max_raw_norm,
            exponent=self.resample_exponent,
            encoder_norm=self.resample_encoder_norm,
            second_moment=self.resample_second_moment,
        )

    def probe_steps(self, batch_size: int) -> tuple[int, int]:
        """Return the two numbers of steps made after which held-out L0 and MSE are measured for the convergence rule.

        The second is the number of steps until the learning rate begins to fall; the first is 80% of it.
        """
        end = min(self.schedule(batch_size).decay_start_step, self.n_steps(batch_size))
        return round(0.8 * end), end
