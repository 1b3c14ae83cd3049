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

    A transcoder reads an activation x and writes another one, y: its output is f W_dec + b_out, and with a skip
    connection f W_dec + b_out + x W_skip. An SAE has neither `b_out` nor `skip`, and its d_out is d_in.
    """

    encoder: Float[Tensor, "*stack d_sae d_in"]
    """W_enc transposed."""
    decoder: Float[Tensor, "*stack d_sae d_out"]
    """W_dec. In training its rows have unit norm."""
    b_dec: Float[Tensor, "*stack d_in"]
    """The bias that is subtracted from the input. In an SAE it is tied: it is also added to the output."""
    own: dict[str, Float[Tensor, "*stack d_sae"]]
    """The nonlinearity's own parameters, by name (`b_enc`, ...)."""
    b_out: Float[Tensor, "*stack d_out"] | None = None
    """The bias that a transcoder adds to its output; None for an SAE, which adds b_dec."""
    skip: Float[Tensor, "*stack d_in d_out"] | None = None
    """W_skip of a skip transcoder, which adds x W_skip to its output; otherwise None."""

    @property
    def d_in(self) -> int:
        """The width of the activations."""
        return self.encoder.shape[-1]

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return self.encoder.shape[-2]

    @property
    def d_out(self) -> int:
        """The width of the output: of what f W_dec reconstructs."""
        return self.decoder.shape[-1]

    @property
    def output_bias(self) -> Float[Tensor, "*stack d_out"]:
        """The bias that is added to f W_dec: b_out of a transcoder, the tied b_dec of an SAE."""
        return self.b_dec if self.b_out is None else self.b_out

    def shared(self) -> dict[str, Tensor]:
        """Return the tensors that have no row for each latent, by name: b_dec, and what a transcoder has besides."""
        parts = {"b_dec": self.b_dec, "b_out": self.b_out, "skip": self.skip}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def named(self) -> dict[str, Tensor]:
        """Return all tensors by the names that they have in a checkpoint."""
        # Adam and checkpoints zip lists of tensors with others: two own parameters have one shape, so a wrong order
        # would pass unnoticed. This one is the same for the same nonlinearity.
        own = {f"own.{name}": tensor for name, tensor in self.own.items()}
        return {"encoder": self.encoder, "decoder": self.decoder, "b_dec": self.b_dec} | own | self.shared()

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order of `named`."""
        return list(self.named().values())

    def map(self, f: Callable[[Tensor], Tensor]) -> "Weights":
        """Return `Weights` that hold f(tensor) for each tensor of these."""
        own = {name: f(tensor) for name, tensor in self.own.items()}
        shared = {name: f(tensor) for name, tensor in self.shared().items()}
        return Weights(f(self.encoder), f(self.decoder), own=own, **shared)

    def for_decoder(
        self, acts: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None
    ) -> Float[Tensor, "*stack batch d_out"]:
        """Return what f W_dec + output_bias is to reconstruct of a batch: x for an SAE, y - x W_skip for a transcoder.

        Args:
            acts: the inputs x.
            target: the targets y; None where they are the inputs, as for every SAE.
        """
        wanted = acts if target is None else target
        return wanted if self.skip is None else wanted - acts @ self.skip

    def bias_gradients(self, to_output: Tensor, to_input: Tensor) -> dict[str, Tensor]:
        """Return the gradients of the biases, by name.

        The tied bias of an SAE is added at the output and subtracted at the input, a transcoder has one for each.

        Args:
            to_output: the gradient with respect to a bias added to the output, the sum of the scaled error over tokens.
            to_input: the gradient with respect to the encoder's input x - b_dec, summed over tokens.
        """
        if self.b_out is None:
            return {"b_dec": to_output - to_input}
        return {"b_dec": -to_input, "b_out": to_output}

    def zeros_like(self) -> "Weights":
        """Return zeros of the same shapes."""
        return self.map(torch.zeros_like)


def normalise_rows_(matrix: Float[Tensor, "rows d"]) -> None:
    """Divide each row by its norm, in place. No row may be 0."""
    matrix /= torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
