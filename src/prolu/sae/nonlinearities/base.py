"""What an activation function of an SAE is: where it is on, its value, and its perhaps synthetic gradient.

Inside this folder and `steps/`, m is the bias-free pre-activation (x - b_dec) W_enc and b the encoder bias.
All functions work entry by entry on tensors that broadcast: [batch, d_sae] against [d_sae] on the dense
path, [n_pairs] against [n_pairs] where only pairs on the support are kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prolu.runtime.checks import at_least_1
from prolu.runtime.mesh import ALONE, Mesh

Parameters = Mapping[str, Float[Tensor, "..."]]
"""A nonlinearity's own per-latent parameters, by name."""


class Pullback(NamedTuple):
    """A gradient brought back through a function of (m, parameters), entry by entry."""

    m: Float[Tensor, "..."]
    """With respect to m."""
    parameters: dict[str, Float[Tensor, "..."]]
    """With respect to each own parameter, before the sum over tokens; one left out has none."""

    def plus(self, other: "Pullback", factor: float) -> "Pullback":
        """The sum of this and factor * other; a parameter that one of them leaves alone counts 0 there."""
        nothing = torch.zeros_like(self.m)
        parameters = {
            name: self.parameters.get(name, nothing) + factor * other.parameters.get(name, nothing)
            for name in (self.parameters | other.parameters)
        }
        return Pullback(self.m + factor * other.m, parameters)


@dataclass(frozen=True)
class Selection:
    """Of the latents on the support only those are on that lie farthest above their threshold; ties share a place."""

    k: int
    """So many a token."""
    over_batch: bool = False
    """Counted over a whole batch: batch * k of all its pairs."""

    def __post_init__(self):
        at_least_1("k", self.k)

    def bound(self, above: Float[Tensor, "*batch d_sae"], mesh: Mesh = ALONE) -> Float[Tensor, "..."]:
        """The smallest m - threshold that is selected, 0 if there are too few above 0: of each token, or of all.

        Of a mesh, the ranks of a row show each other their best.
        """
        if self.over_batch:
            rows, n = above.flatten(), self.k * above[..., 0].numel()
        else:
            rows, n = above, self.k
        best = rows.topk(min(n, rows.shape[-1]), dim=-1, sorted=False).values
        if mesh.n_latent > 1:
            best = mesh.gathered_over_latents(best, -1, "selection")
            best = best.topk(min(n, best.shape[-1]), dim=-1, sorted=False).values
        return best.amin(-1, keepdim=True).clamp(min=0)


@dataclass(frozen=True)
class Auxiliary:
    """A second reconstruction, from other latents of the same m: coeff * mean (f_aux W_dec - target)^2."""

    nonlinearity: "Nonlinearity"
    """Gives the auxiliary latents; its own parameters are among the SAE's."""
    target: Literal["residual", "centred_input"]
    """x - x_hat, or x - b_dec; a constant either way."""
    coeff: float
    trains_decoder: bool
    """Whether the term moves W_dec."""
    of_dead: bool = False
    """Whether only latents that have long been silent take part; else it is on where the SAE's latents are."""
    among: Bool[Tensor, " d_sae"] | None = field(default=None, compare=False)
    """The latents that take part, if not all do: what a trainer fills in where `of_dead`."""


class Nonlinearity(ABC):
    """Latents as a function of m and own per-latent parameters; everything is zero off the support."""

    selection: Selection | None = None
    """Which entries of the support are on, where that depends on the others; it needs a threshold."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Own per-latent parameters; they start at zero unless `initial` says otherwise."""
        return ("b_enc",)

    def initial(self, name: str) -> float:
        """Value at which an own parameter starts."""
        return 0.0

    @abstractmethod
    def support(self, m: Float[Tensor, "..."], parameters: Parameters) -> Bool[Tensor, "..."]:
        """Entries at which the value or any gradient may be nonzero."""

    def threshold(self, parameters: Parameters) -> Float[Tensor, "..."] | None:
        """Where the support is exactly m > threshold, latent by latent: that threshold; else None."""
        return None

    @abstractmethod
    def value(self, m: Float[Tensor, "..."], parameters: Parameters) -> Float[Tensor, "..."]:
        """The latent, on the support (elsewhere the caller puts 0)."""

    @abstractmethod
    def pullback(self, upstream: Float[Tensor, "..."], m: Float[Tensor, "..."], parameters: Parameters) -> Pullback:
        """The gradient `upstream` on the latent, brought back to m and the parameters, on the support."""

    def gate_pullback(self, m: Float[Tensor, "..."], parameters: Parameters) -> Pullback | None:
        """The pseudo-gradient of [latent > 0], on the support; None if the method defines none."""
        return None

    def penalised(
        self, latents: Float[Tensor, "..."], m: Float[Tensor, "..."], parameters: Parameters
    ) -> Float[Tensor, "..."]:
        """What a sparsity penalty sees of an entry: the latent itself, unless a method says otherwise."""
        return latents

    def penalised_pullback(
        self, upstream: Float[Tensor, "..."], m: Float[Tensor, "..."], parameters: Parameters
    ) -> Pullback:
        """The gradient `upstream` on `penalised`, brought back; asked for only where that is not the latent."""
        return self.pullback(upstream, m, parameters)

    @property
    def in_training(self) -> "Nonlinearity":
        """What stands in its place while an SAE is trained."""
        return self

    @property
    def auxiliary(self) -> Auxiliary | None:
        """A further term of the loss."""
        return None

    def rescaled(self, parameters: Parameters, factor: Float[Tensor, "..."]) -> dict[str, Float[Tensor, "..."]]:
        """Own parameters at which factor * m gives factor times the latent."""
        return {name: factor * parameter for name, parameter in parameters.items()}

    def observe_(self, parameters: Parameters, smallest: Float[Tensor, ""], n_updates: int) -> None:  # noqa: B027
        """Sees, after update number `n_updates` (from 1), the smallest latent that was on; may note it in place."""


def on(
    nonlinearity: Nonlinearity, m: Float[Tensor, "*batch"], parameters: Parameters, mesh: Mesh = ALONE
) -> Bool[Tensor, "*batch"]:
    """The support, cut down to the nonlinearity's selection; of a mesh, `m` is of this rank's latents."""
    support, selection = nonlinearity.support(m, parameters), nonlinearity.selection
    if selection is None:
        return support
    above = distance(nonlinearity, m, parameters)
    return support & (above >= selection.bound(above, mesh))


def distance(nonlinearity: Nonlinearity, m: Float[Tensor, "*batch"], parameters: Parameters) -> Float[Tensor, "*batch"]:
    """What a selection goes by: m - threshold."""
    threshold = nonlinearity.threshold(parameters)
    assert threshold is not None, "a selection needs a threshold"
    return m - threshold


class _Activate(torch.autograd.Function):
    """A nonlinearity as a differentiable function: value forward, pullback backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(nonlinearity: Nonlinearity, names: tuple[str, ...], m: Tensor, *own: Tensor) -> Tensor:
        parameters = dict(zip(names, own, strict=True))
        value = nonlinearity.value(m, parameters)
        return torch.where(on(nonlinearity, m, parameters), value, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.nonlinearity, ctx.names, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        m, *own = ctx.saved_tensors
        parameters = dict(zip(ctx.names, own, strict=True))
        gate = on(ctx.nonlinearity, m, parameters)
        back = ctx.nonlinearity.pullback(upstream, m, parameters)
        to_m = torch.where(gate, back.m, 0)
        own_gradients = (back.parameters.get(name, torch.zeros_like(m)) for name in ctx.names)
        to_own = (torch.where(gate, gradient, 0) for gradient in own_gradients)
        summed = (d.sum_to_size(p.shape) for d, p in zip(to_own, own, strict=True))
        return None, None, to_m, *summed


def activate(nonlinearity: Nonlinearity, m: Float[Tensor, "*batch"], parameters: Parameters) -> Float[Tensor, "*batch"]:
    """Latents, differentiable by the nonlinearity's own pullback."""
    names = tuple(parameters)
    return _Activate.apply(nonlinearity, names, m, *(parameters[name] for name in names))  # pyright: ignore[reportReturnType]
