"""What one run is asked to be: its settings, checked, and what they come to in steps."""

import math
import re
from dataclasses import dataclass

from prolu.runtime.checks import at_least_1, one_of
from prolu.sae.autoencoder import SAEConfig, weights_digest
from prolu.sae.nonlinearities import TAKES_L0, nonlinearity_named
from prolu.sae.penalties import penalty_named
from prolu.training.checks import check_types
from prolu.training.resampling import SECOND_MOMENTS, Resampling
from prolu.training.schedule import Schedule
from prolu.training.target_l0 import Steering

STEERED_FRACTION = 0.7
"""Of a run: so long a steered coefficient may change."""

STEERING_FRACTION = 0.025
"""Of a run: in so many steps a steered coefficient changes by as much as L0 is off."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: which SAE, which loss, how long."""

    nonlinearity: str = "prolu_ste"
    """Activation function: relu, prolu_relu, prolu_ste, gated, jumprelu, topk(k), batchtopk(k), jumprelu(bandwidth), or
    prolu(b_ste,m_ste,m_gg) of the generalised family. With a target L0 also plain topk and batchtopk."""
    penalty: str = "l1"
    """Sparsity penalty: l1, sqrt_l1, l0 (for jumprelu), or none (for topk and batchtopk)."""
    coeff: float = 1.2e-3
    """Penalty coefficient lambda. The MSE is a mean over d_in, so scale it by about 768 / d_in."""
    target_l0: float | None = None
    """L0 to reach: the coefficient is steered by the run's own L0, and frozen for the last 30%; of topk and batchtopk
    the k. None: the coefficient stays as it is, as in the paper."""
    coeff_warmup_fraction: float = 0.0
    """Share of the steps over which the coefficient rises from 0, linearly."""
    d_sae: int = 12_288
    """Number of latents."""
    n_tokens: int = 100_000_000
    """Training tokens; the rest that does not fill a batch is dropped."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup_fraction: float = 0.02
    """Share of the steps over which the learning rate rises."""
    decay_start_fraction: float = 0.8
    """Share of the steps after which the learning rate falls linearly."""
    decay_end_fraction: float = 1.0
    """Share of the steps at which the falling line would reach 0."""
    lr_floor: float = 0.1
    """Lowest factor on the learning rate during the decay."""
    beta1: float = 0.9
    """Adam's decay of the first moment; Gated and JumpReLU SAEs had 0 in their papers."""
    max_grad_norm: float | None = None
    """Largest norm of all gradients together; longer ones are scaled down to it. None: never, as in the paper."""
    init_seed: int = 0
    """Seed of the initial weights."""
    initial_bias: float = 0.0
    """Where the encoder biases start."""
    init_from: str | None = None
    """Folder of a saved SAE whose weights the run starts from; its size, normalisation and kind of nonlinearity must be
    the run's. None: random weights."""
    init_digest: str | None = None
    """SHA-256 of that SAE's weights: found if not given; if given, they must have it."""
    normalisation: str = "per_token"
    """per_token: activations scaled to norm sqrt(d_in); none: as they are."""
    resample_fractions: tuple[float, ...] = ()
    """Shares of the steps after which dead latents are resampled and the warm-up begins anew; none by default."""
    resample_count_fraction: float = 0.128
    """Share of the steps, before each resampling, over which firings are counted."""
    resample_dead_below: float = 3e-6
    """A latent is dead if it fired on a smaller share of those tokens."""
    resample_candidates: int = 819_200
    """Fresh activations among which new directions are drawn."""
    resample_max_raw_norm: float | None = None
    """Activations of this norm or more are no candidates; None: all are. GPT-2's first positions have about 3000."""
    resample_exponent: float = 1.0
    """Candidates are drawn with probability proportional to their squared error to this power."""
    resample_encoder_norm: float = 0.02
    """Norm of a new encoder column, as a share of the mean over living latents."""
    resample_second_moment: str = "mean"
    """Adam's second moment of what is new: mean (over living latents) or zero."""
    aux_dead_tokens: int = 10_000_000
    """AuxK, of topk and batchtopk, trains latents that have been silent for so many tokens."""
    step: str = "auto"
    """Family of training steps: auto (by the density of the last step), dense, sparse or sparse_torch."""
    precision: str = "fp32"
    """Of the matmuls' inputs: fp32, tf32 or bf16; sums, weights and moments are fp32. All but fp32 are for GPUs."""

    def __post_init__(self):
        check_types(self)
        self._check_sparsity()
        self._find_start()
        self._require("coeff", 0 <= self.coeff < math.inf, "0 or more, and finite")
        self._require("lr", 0 < self.lr < math.inf, "more than 0, and finite")
        self._require("initial_bias", math.isfinite(self.initial_bias), "finite")
        self._require("beta1", 0 <= self.beta1 < 1, "0 or more, and less than 1")
        self._require(
            "max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "more than 0, or None for no clip"
        )
        for name in ("d_sae", "n_tokens", "aux_dead_tokens"):
            at_least_1(name, getattr(self, name))
        for name in ("lr_floor", "coeff_warmup_fraction"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        if not 0 <= self.warmup_fraction <= self.decay_start_fraction < self.decay_end_fraction < float("inf"):
            raise ValueError(
                f"schedule: needs 0 <= warmup_fraction {self.warmup_fraction} <= decay_start_fraction "
                f"{self.decay_start_fraction} < decay_end_fraction {self.decay_end_fraction}"
            )
        if self.normalisation not in ("per_token", "none"):
            raise ValueError(f"normalisation {self.normalisation!r}: choose per_token or none")
        one_of("step", self.step, FAMILIES)
        one_of("precision", self.precision, PRECISIONS)
        if self.precision != "fp32" and self.step not in ("auto", "dense"):
            raise ValueError(
                f"precision {self.precision!r}: the {self.step} step computes in fp32; choose auto or dense"
            )
        self._check_resampling()

    def _require(self, name: str, fulfilled: bool, words: str) -> None:
        if not fulfilled:
            raise ValueError(f"{name} {getattr(self, name)}: must be {words}")

    def _check_sparsity(self) -> None:
        target = self.target_l0
        self._require(
            "target_l0", target is None or 0 < target < self.d_sae, "more than 0 and less than d_sae, or None"
        )
        nonlinearity, penalty = nonlinearity_named(self.code), penalty_named(self.penalty)
        if (reason := penalty.check(nonlinearity)) is not None:
            raise ValueError(f"penalty {self.penalty!r}: {reason}; nonlinearity is {self.nonlinearity!r}")
        if self.precision != "fp32" and (nonlinearity.auxiliary or nonlinearity.in_training.selection):
            raise ValueError(f"precision {self.precision!r}: {self.nonlinearity} is trained in fp32")
        if self.is_steered and (self.penalty == "none" or not self.coeff > 0):
            raise ValueError(
                f"target_l0 {self.target_l0}: there must be a penalty to steer, with a coeff above 0 to start from; "
                f"penalty is {self.penalty!r}, coeff {self.coeff}"
            )

    def _find_start(self) -> None:
        if self.init_from is None:
            self._require("init_digest", self.init_digest is None, "None without init_from")
            return
        self._require("initial_bias", self.initial_bias == 0, "0 with init_from, whose biases are kept")
        if self.init_digest is None:
            # What lies in a folder may change; the config of a run may not.
            object.__setattr__(self, "init_digest", weights_digest(self.init_from))

    def _check_resampling(self) -> None:
        for name in ("resample_dead_below", "resample_exponent", "resample_encoder_norm"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        at_least_1("resample_candidates", self.resample_candidates)
        cut = self.resample_max_raw_norm
        self._require("resample_max_raw_norm", cut is None or cut > 0, "more than 0, or None")
        if any(not 0 < fraction < 1 for fraction in (*self.resample_fractions, self.resample_count_fraction)):
            raise ValueError(
                f"resample_fractions {self.resample_fractions}, resample_count_fraction "
                f"{self.resample_count_fraction}: must lie between 0 and 1"
            )
        if self.resample_second_moment not in SECOND_MOMENTS:
            raise ValueError(
                f"resample_second_moment {self.resample_second_moment!r}: choose {' or '.join(SECOND_MOMENTS)}"
            )

    @property
    def code(self) -> str:
        """The nonlinearity with its arguments: topk with a target L0 of 32 is topk(32)."""
        if self.nonlinearity in TAKES_L0 and self.target_l0 is not None:
            return f"{self.nonlinearity}({max(1, round(self.target_l0))})"
        return self.nonlinearity

    @property
    def is_steered(self) -> bool:
        """Whether the coefficient follows the run's L0."""
        return self.target_l0 is not None and self.nonlinearity not in TAKES_L0

    @property
    def family(self) -> str:
        """What is compared."""
        return family_of(self.nonlinearity, self.penalty, fine_tuned=self.init_from is not None)

    @property
    def run_id(self) -> str:
        """Name of the run's folder: what varies within a study."""
        nonlinearity = re.sub(r"[^\w.+-]+", "_", self.nonlinearity).strip("_")
        sparsity = f"{self.coeff:.4g}" if self.target_l0 is None else f"L{self.target_l0:g}"
        start = f"-from{self.init_digest[:8]}" if self.init_digest else ""
        return f"{nonlinearity}-{self.penalty}-{sparsity}-lr{self.lr:.4g}-d{self.d_sae}-s{self.init_seed}{start}"

    def sae_config(self, d_in: int) -> SAEConfig:
        """What its SAE computes, on activations of that width."""
        return SAEConfig(d_in=d_in, d_sae=self.d_sae, nonlinearity=self.code, normalisation=self.normalisation)

    def n_steps(self, batch_size: int) -> int:
        """Full batches in `n_tokens`.

        Raises:
            ValueError: not one.
        """
        at_least_1("batch_size", batch_size)
        if self.n_tokens < batch_size:
            raise ValueError(f"n_tokens {self.n_tokens}: fewer than one batch of {batch_size}")
        return self.n_tokens // batch_size

    def schedule(self, batch_size: int) -> Schedule:
        """The learning-rate schedule in steps."""
        n_steps = self.n_steps(batch_size)
        start = round(self.decay_start_fraction * n_steps)
        return Schedule(
            warmup_steps=round(self.warmup_fraction * n_steps),
            restart_steps=self.resampling(batch_size).steps,
            decay_start_step=start,
            decay_end_step=max(start + 1, round(self.decay_end_fraction * n_steps)),
            floor=self.lr_floor,
        )

    def steering(self, batch_size: int) -> Steering | None:
        """Of the coefficient, in steps: from the end of the warm-up until 70% of the run."""
        if self.target_l0 is None or not self.is_steered:
            return None
        n_steps = self.n_steps(batch_size)
        return Steering(
            target=self.target_l0,
            start_step=round(max(self.warmup_fraction, self.coeff_warmup_fraction) * n_steps),
            end_step=round(STEERED_FRACTION * n_steps),
            steps=max(1.0, STEERING_FRACTION * n_steps),
        )

    def resampling(self, batch_size: int) -> Resampling:
        """Resampling in steps."""
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
        """Steps after which held-out L0 and MSE are compared for the convergence rule.

        They begin and end the last fifth of training at full learning rate.
        """
        end = min(self.schedule(batch_size).decay_start_step, self.n_steps(batch_size))
        return round(0.8 * end), end


def family_of(nonlinearity: str, penalty: str | None, *, fine_tuned: bool = False) -> str:
    """What is compared: nonlinearity and penalty (None: not known), and whether the weights began as a saved SAE's;
    where a nonlinearity says its L0 itself, whichever that is.
    """
    name = nonlinearity.partition("(")[0]
    code = name if name in TAKES_L0 else nonlinearity
    loss = code if penalty in ("none", None) else f"{code} + {penalty}"
    return f"{loss}, fine-tuned" if fine_tuned else loss


PRECISIONS = ("fp32", "tf32", "bf16")
"""Of matmuls: plain; inputs cut to 10 bits of mantissa by the GPU (a CPU computes fp32); inputs rounded to bf16."""


FAMILIES = ("auto", "dense", "sparse", "sparse_torch")
"""What a config may ask for; `auto` changes between dense and sparse."""
