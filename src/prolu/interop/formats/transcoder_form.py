"""A transcoder in terms that SAELens and circuit-tracer share: without a bias at its input.

Both compute y_hat = f W_dec + b_out (+ x W_skip) from pre-activations x W_enc + b. So the bias b_dec that ours
subtracts from x moves into b: (x - b_dec) W_enc + b = x W_enc + (b - b_dec W_enc).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prolu.interop.formats.common_form import NONLINEARITIES, CommonForm, encoder_form_of, untied
from prolu.sae.autoencoder import SAE
from prolu.sae.saved_sae import SAEConfig
from prolu.sae.weights import Weights


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


def transcoder_of(found: TranscoderForm, normalisation: str) -> SAE:
    """Return the transcoder of ours that computes the same, with a b_dec of 0.

    Args:
        found: The transcoder; its form has no bias at the input.
        normalisation: How inputs are scaled first: per_token or none.
    """
    form = found.form
    config = SAEConfig(
        d_in=form.d_in,
        d_sae=form.d_sae,
        d_out=len(found.b_out),
        skip=found.W_skip is not None,
        nonlinearity=NONLINEARITIES[form.architecture],
        normalisation=normalisation,
    )
    skip = None if found.W_skip is None else found.W_skip.contiguous()
    nothing = torch.zeros_like(form.W_enc[:, 0])
    return SAE(
        config, Weights(form.W_enc.T.contiguous(), form.W_dec.contiguous(), nothing, form.own, found.b_out, skip)
    )


def as_saved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: contiguous, outside autograd, on the CPU."""
    return {name: t.detach().to(torch.device("cpu")).contiguous() for name, t in tensors.items()}
