"""The tensors of one SAE, both matrices with one row per latent, because every kernel walks rows of latents."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """The weights of an SAE; or their gradients, or one of Adam's moments of them, which have the same shapes.

    Those of a stack of SAEs, which are trained in one step, have one dimension more, in front.
    """

    encoder: Float[Tensor, "*stack d_sae d_in"]
    """W_enc transposed."""
    decoder: Float[Tensor, "*stack d_sae d_in"]
    """W_dec. In training its rows have unit norm."""
    b_dec: Float[Tensor, "*stack d_in"]
    """The decoder bias. It is tied: subtracted from the input and added to the output."""
    own: dict[str, Float[Tensor, "*stack d_sae"]]
    """The nonlinearity's own parameters, by name (`b_enc`, ...)."""

    @property
    def d_in(self) -> int:
        """The width of the activations."""
        return self.encoder.shape[-1]

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return self.encoder.shape[-2]

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the same order for the same nonlinearity."""
        # Adam and checkpoints zip these lists with others: two own parameters have one shape, so a wrong order would
        # pass unnoticed.
        return [self.encoder, self.decoder, self.b_dec, *self.own.values()]

    def named(self) -> dict[str, Tensor]:
        """Return all tensors by the names that they have in a checkpoint."""
        names = ["encoder", "decoder", "b_dec", *(f"own.{name}" for name in self.own)]
        return dict(zip(names, self.tensors(), strict=True))

    def map(self, f: Callable[[Tensor], Tensor]) -> "Weights":
        """Return `Weights` that hold f(tensor) for each tensor of these."""
        own = {name: f(tensor) for name, tensor in self.own.items()}
        return Weights(f(self.encoder), f(self.decoder), f(self.b_dec), own)

    def zeros_like(self) -> "Weights":
        """Return zeros of the same shapes."""
        return self.map(torch.zeros_like)


def normalise_rows_(matrix: Float[Tensor, "rows d"]) -> None:
    """Divide each row by its norm, in place. No row may be 0."""
    matrix /= torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
