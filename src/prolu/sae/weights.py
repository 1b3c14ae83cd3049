"""The tensors of one SAE, both matrices latent-major, so that every kernel walks rows of latents."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """Weights of an SAE, or its gradients, or its Adam moments: they have one shape."""

    encoder: Float[Tensor, "d_sae d_in"]
    """W_enc transposed: one contiguous row per latent."""
    decoder: Float[Tensor, "d_sae d_in"]
    """W_dec."""
    b_dec: Float[Tensor, " d_in"]
    """Decoder bias, tied: subtracted at the input, added at the output."""
    own: dict[str, Float[Tensor, " d_sae"]]
    """The nonlinearity's own parameters (`b_enc`, ...)."""

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.encoder.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.encoder.shape[0]

    def tensors(self) -> list[Tensor]:
        """All tensors in one fixed order."""
        return [self.encoder, self.decoder, self.b_dec, *self.own.values()]

    def named(self) -> dict[str, Tensor]:
        """All tensors by name, as a checkpoint has them."""
        names = ["encoder", "decoder", "b_dec", *(f"own.{name}" for name in self.own)]
        return dict(zip(names, self.tensors(), strict=True))

    def map(self, f: Callable[[Tensor], Tensor]) -> "Weights":
        """The same structure with `f` of each tensor."""
        own = {name: f(tensor) for name, tensor in self.own.items()}
        return Weights(f(self.encoder), f(self.decoder), f(self.b_dec), own)

    def zeros_like(self) -> "Weights":
        """Zeros in the same structure."""
        return self.map(torch.zeros_like)


def normalise_rows_(matrix: Float[Tensor, "rows d"]) -> None:
    """Rows to unit norm, in place."""
    matrix /= torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
