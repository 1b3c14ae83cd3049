"""A transcoder in terms that SAELens and circuit-tracer share: without a bias at its input.

Both compute y_hat = f W_dec + b_out (+ x W_skip) from pre-activations x W_enc + b. So the bias b_dec that ours
subtracts from x moves into b: (x - b_dec) W_enc + b = x W_enc + (b - b_dec W_enc).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prolu.interop.formats.common_form import CommonForm, encoder_form_of, untied
from prolu.sae.autoencoder import SAE


@dataclass(frozen=True)
class TranscoderForm:
    """A transcoder with latents f that its architecture gives from pre = x W_enc + b, as in `CommonForm`."""

    form: CommonForm
    """The encoder, its parameters and the decoder; its b_dec is no part of the transcoder any more."""
    b_out: Tensor
    """What is added to the output, [d_out]."""
    W_skip: Tensor | None
    """The skip connection, [d_in, d_out], or None."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what both formats name alike: W_enc as [d_in, d_sae], W_dec, b_enc, and b_out as b_dec."""
        form = self.form
        return {"W_enc": form.W_enc, "W_dec": form.W_dec, "b_enc": form.own["b_enc"], "b_dec": self.b_out}

    def skip(self) -> dict[str, Tensor]:
        """Return the skip connection as both formats have it, [d_out, d_in], by its name; nothing without one."""
        return {} if self.W_skip is None else {"W_skip": self.W_skip.T}


def transcoder_form_of(sae: SAE) -> TranscoderForm:
    """Return one of our transcoders without a bias at its input.

    Biases are shifted in fp64 and rounded once, so that latents are the same up to rounding.

    Raises:
        ValueError: No other library has its nonlinearity.
    """
    weights = sae.weights
    assert weights.b_out is not None, "an SAE is no transcoder"
    return TranscoderForm(untied(encoder_form_of(sae)), weights.b_out, weights.skip)


def as_saved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: contiguous, outside autograd, on the CPU."""
    return {name: t.detach().to(torch.device("cpu")).contiguous() for name, t in tensors.items()}
