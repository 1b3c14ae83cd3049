"""The interface of an activation function of an SAE: its support, its value, and its perhaps synthetic gradient.

Here and in `training/steps`, m is the pre-activation (x - b_dec) W_enc, to which no encoder bias has been added. In
equations, [condition] is 1 (or True) where the condition holds and 0 (or False) elsewhere.

Every function works entry by entry on tensors that broadcast. The dense step passes m [batch, d_sae] with parameters
[d_sae]; the sparse steps pass m [n_pairs] with parameters [n_pairs], one entry for each (token, latent) pair that is on
the support.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prolu.runtime.checks import at_least_1

Parameters = Mapping[str, Float[Tensor, "..."]]
"""A nonlinearity's own per-latent parameters, by name."""

Gather = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]
"""A function that joins the parts of a tensor that several processes hold, along its last dimension. A selection needs
it where each process holds some of the latents; the caller provides it, so that the method knows of no processes."""


class Pullback(NamedTuple):
    """A gradient brought back through a function of (m, parameters), entry by entry."""

    m: Float[Tensor, "..."]
    """The gradient with respect to m."""
    parameters: dict[str, Float[Tensor, "..."]]
    """The gradient with respect to each own parameter, not yet summed over tokens. A parameter that is missing here has
    the gradient 0."""

    def plus(self, other: "Pullback", factor: float | Tensor) -> "Pullback":
        """Return self + factor * other, where a parameter that one of them lacks counts as 0 there."""
        nothing = torch.zeros_like(self.m)
        parameters = {
            name: self.parameters.get(name, nothing) + factor * other.parameters.get(name, nothing)
            for name in (self.parameters | other.parameters)
        }
        return Pullback(self.m + factor * other.m, parameters)


@dataclass(frozen=True)
class Selection:
    """The rule that only the entries of the support that lie farthest above their threshold are active.

    All entries that tie with the last one selected are active too, so the choice does not depend on the order in which
    entries are compared, and every kind of step makes the same one.
    """

    k: int
    """The number of latents that are kept per token."""
    over_batch: bool = False
    """Whether k is a mean: the k * n_tokens largest entries of the whole batch are kept, wherever they are."""

    def __post_init__(self):
        at_least_1("k", self.k)

    def bound(self, above: Float[Tensor, "*batch d_sae"], gather: Gather | None = None) -> Float[Tensor, "..."]:
        """Return the smallest m - threshold that is selected; 0 if fewer than k entries are above 0.

        Args:
            above: m - threshold of every entry.
            gather: joins candidates along the last dimension where other processes hold the other latents.

        Returns:
            One bound for each token, [*batch, 1], or [1] for a selection over the batch.
        """
        if self.over_batch:
            candidates = above.flatten()
            n = self.k * above[..., 0].numel()
        else:
            candidates = above
            n = self.k
        best = _largest(candidates, n)
        if gather is not None:
            # The n best of all latents are among the n best of each process, so only these are sent.
            best = _largest(gather(best), n)
        # Never below 0: entries that are not on the support must not become active to make up the number.
        return best.amin(-1, keepdim=True).clamp(min=0)


def _largest(candidates: Tensor, n: int) -> Tensor:
    """Return the n largest entries along the last dimension, in no order, or all if there are fewer."""
    return candidates.topk(min(n, candidates.shape[-1]), dim=-1, sorted=False).values


@dataclass(frozen=True)
class Auxiliary:
    """An auxiliary term of the loss: coeff * mean over batch and d_in of (f_aux W_dec - target)^2.

    It is a second reconstruction, from latents f_aux that another nonlinearity makes of the same m. Without a target it
    is coeff * the sum of f_aux over latents / d_in, as a mean over the batch.
    """

    nonlinearity: "Nonlinearity"
    """The nonlinearity that gives f_aux. Its own parameters are among those of the SAE."""
    target: Literal["residual", "centred_target"] | None
    """What f_aux W_dec reconstructs: the residual x - x_hat, or x - b_dec; of a transcoder y - y_hat, or
    y - b_out - x W_skip. No gradient flows into it. None: nothing is reconstructed."""
    coeff: float
    """The weight of the term in the loss."""
    trains_decoder: bool
    """Whether the term has a gradient with respect to W_dec."""
    of_dead: bool = False
    """Whether only latents that have been silent for long take part. Otherwise f_aux is active where f is."""
    # Not compared: objectives are compared as wholes, and two tensors compare entry by entry.
    among: Bool[Tensor, "*stack d_sae"] | None = field(default=None, compare=False)
    """The latents that take part; None for all. A trainer fills this in at each step if `of_dead`."""


class Nonlinearity(ABC):
    """Latents as a function of m and of own per-latent parameters.

    The value and all gradients are exactly 0 off the support. The sparse steps rest on this: they leave out every other
    entry and approximate nothing.
    """

    selection: Selection | None = None
    """The rule by which entries of the support compete to be active, if there is one. It requires a `threshold`."""

    usual_penalty: str = "l1"
    """The penalty that a run has unless another is named."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of the own parameters, each of shape [d_sae]."""
        return ("b_enc",)

    def initial(self, name: str) -> float:
        """Return the value at which an own parameter starts."""
        return 0.0

    @abstractmethod
    def support(self, m: Float[Tensor, "..."], parameters: Parameters) -> Bool[Tensor, "..."]:
        """Return which entries may have a value or a gradient that is not 0."""

    def threshold(self, parameters: Parameters) -> Float[Tensor, "..."] | None:
        """Return t if the support is exactly [m > t], to the bit, for some t of each latent; otherwise None.

        The sparse steps then find the support with one comparison per entry, and no mask.
        """
        return None

    @abstractmethod
    def value(self, m: Float[Tensor, "..."], parameters: Parameters) -> Float[Tensor, "..."]:
        """Return f on the support. Elsewhere the result means nothing, and the caller puts 0 there."""

    @abstractmethod
    def pullback(self, upstream: Float[Tensor, "..."], m: Float[Tensor, "..."], parameters: Parameters) -> Pullback:
        """Return upstream * df/dm and upstream * df/d(parameter), on the support.

        `upstream` is the gradient of the loss with respect to f. The derivatives may be synthetic.
        """

    def gate_pullback(self, m: Float[Tensor, "..."], parameters: Parameters) -> Pullback | None:
        """Return the pseudo-derivatives of [f > 0], on the support; None if the method defines none.

        The true derivative is 0 almost everywhere. The L0 penalty needs one that is not.
        """
        return None

    def penalised(
        self, latents: Float[Tensor, "..."], m: Float[Tensor, "..."], parameters: Parameters
    ) -> Float[Tensor, "..."]:
        """Return the quantity that a sparsity penalty acts on: f itself, unless the method says otherwise."""
        return latents

    def penalised_pullback(
        self, upstream: Float[Tensor, "..."], m: Float[Tensor, "..."], parameters: Parameters
    ) -> Pullback:
        """Return `upstream`, a gradient with respect to `penalised`, brought back to m and the parameters.

        It is called only where `penalised` is not f itself.
        """
        return self.pullback(upstream, m, parameters)

    @property
    def in_training(self) -> "Nonlinearity":
        """The nonlinearity that takes this one's place while an SAE is trained."""
        return self

    def check_width(self, d_sae: int) -> None:
        """Raise ValueError if the nonlinearity selects more latents per token than there are."""
        selection = self.in_training.selection
        if selection is not None and selection.k > d_sae:
            raise ValueError(f"k {selection.k}: must be at most d_sae, which is {d_sae}")

    @property
    def auxiliary(self) -> Auxiliary | None:
        """The auxiliary term that training adds to the loss, if there is one."""
        return None

    def rescaled(self, parameters: Parameters, factor: Float[Tensor, "..."]) -> dict[str, Float[Tensor, "..."]]:
        """Return own parameters with which the pre-activation factor * m gives the latent factor * f, for factor > 0.

        This is for decoder rows that are scaled to unit norm: their norms move into the latents.
        """
        return {name: factor * parameter for name, parameter in parameters.items()}

    def observe_(self, parameters: Parameters, smallest: Float[Tensor, "*stack 1"], n_updates: int) -> None:  # noqa: B027
        """Take note of an update, in place, in own parameters that are not trained by gradients, or have bounds.

        Args:
            parameters: the own parameters of the SAE.
            smallest: the smallest active latent of the batch, which broadcasts against parameters; 0 if there was none.
            n_updates: the number of updates so far, this one included.
        """


def active_mask(
    nonlinearity: Nonlinearity, m: Float[Tensor, "*batch"], parameters: Parameters, gather: Gather | None = None
) -> Bool[Tensor, "*batch"]:
    """Return the support, cut down to the nonlinearity's selection: the entries that are active, or have a gradient.

    Args:
        nonlinearity: the nonlinearity.
        m: the pre-activations; where processes share the latents, those of this process.
        parameters: the own parameters of the same latents.
        gather: see `Selection.bound`.
    """
    support = nonlinearity.support(m, parameters)
    selection = nonlinearity.selection
    if selection is None:
        return support
    above = distance(nonlinearity, m, parameters)
    # The bound is 0 where too few entries are above 0, and >= would then let through m = threshold: hence the support.
    return support & (above >= selection.bound(above, gather))


def distance(nonlinearity: Nonlinearity, m: Float[Tensor, "*batch"], parameters: Parameters) -> Float[Tensor, "*batch"]:
    """Return m - threshold, by which a selection compares entries."""
    threshold = nonlinearity.threshold(parameters)
    assert threshold is not None, "a selection needs a threshold"
    return m - threshold


class _Activate(torch.autograd.Function):
    """A nonlinearity as a differentiable function: its value forward, its pullback backward."""

    # torch.vmap can then derive the batched function by itself; it requires `setup_context` apart from `forward`.
    generate_vmap_rule = True

    @staticmethod
    def forward(nonlinearity: Nonlinearity, names: tuple[str, ...], m: Tensor, *own: Tensor) -> Tensor:
        parameters = dict(zip(names, own, strict=True))
        value = nonlinearity.value(m, parameters)
        return torch.where(active_mask(nonlinearity, m, parameters), value, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.nonlinearity, ctx.names, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        m, *own = ctx.saved_tensors
        parameters = dict(zip(ctx.names, own, strict=True))
        mask = active_mask(ctx.nonlinearity, m, parameters)
        back = ctx.nonlinearity.pullback(upstream, m, parameters)
        own_gradients = []
        for name, parameter in parameters.items():
            gradient = back.parameters.get(name, torch.zeros_like(m))
            # Selected, not multiplied by the mask: 0 * inf would be NaN. A parameter that was broadcast against m then
            # gets the sum over all entries that it was used for.
            own_gradients.append(torch.where(mask, gradient, 0).sum_to_size(parameter.shape))
        return None, None, torch.where(mask, back.m, 0), *own_gradients


def activate(nonlinearity: Nonlinearity, m: Float[Tensor, "*batch"], parameters: Parameters) -> Float[Tensor, "*batch"]:
    """Return the latents f, differentiable by the nonlinearity's own pullback."""
    names = tuple(parameters)
    return _Activate.apply(nonlinearity, names, m, *(parameters[name] for name in names))  # pyright: ignore[reportReturnType]
