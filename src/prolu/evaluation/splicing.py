"""An SAE in place of the activations at a hook, in any forward pass of a transformers model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prolu.activations.hooks import hooked, locate, reads_centred
from prolu.sae.autoencoder import SAE
from prolu.sae.scaling import centre


@contextmanager
def splice(
    model: torch.nn.Module, sae: SAE, hook: str, *, keep_error: bool = False, hook_out: str = ""
) -> Iterator[None]:
    """Replace the activations at a hook by the SAE's reconstruction, in every forward pass inside the `with` block.

    A transcoder reads the activations at `hook`, and its output replaces those at `hook_out`, which the model must
    reach later.

    All positions are replaced, as in an evaluation: x becomes x_hat(x - mean x) if the SAE was trained on centred
    activations, as in a model with LayerNorms, and x_hat(x) if not. The SAE computes in its own number format and on
    its own device; its output is converted to the model's. Several SAEs can be nested, at one hook or at several.
    Gradients flow through the SAE.

    Args:
        model: a transformers causal language model, for example `LanguageModel.model`. Its key-value cache may be used.
        sae: an SAE whose d_in is the hook's width.
        hook: the name of the hook, as `LanguageModel` takes it.
        keep_error: add the SAE's error, x - x_hat as a constant, to its reconstruction. The model then computes what it
            does without the SAE, but gradients flow through the SAE's latents.
        hook_out: the hook that a transcoder writes at; empty for an SAE.

    Raises:
        ValueError: The model has no such hook, or its width is not the SAE's; or a transcoder has no hook to write at,
            or an SAE has one.
    """
    if sae.is_transcoder != bool(hook_out):
        needs = "a transcoder needs one" if sae.is_transcoder else "an SAE has none, it writes where it reads"
        raise ValueError(f"hook_out {hook_out!r}: {needs}")
    site = locate(model, hook).site
    # An SAE that was never saved does not know what it was trained on: what a LanguageModel hands out by default.
    centred = sae.centred if "centred" in sae.provenance else reads_centred(model)

    def output_for(acts: Tensor) -> Tensor:
        x = acts.to(sae.W_dec)
        # The mean over d_model is not added back: every reader of the residual stream, a LayerNorm, removes it.
        return sae(centre(x) if centred else x)

    def replaced(acts: Tensor, recon: Tensor) -> Tensor:
        if keep_error:
            recon = recon + (acts.to(recon) - recon).detach()
        return recon.to(acts)

    if not hook_out:
        with hooked(model, site, lambda acts: replaced(acts, output_for(acts))):
            yield
        return

    outputs: list[Tensor] = []

    def read(acts: Tensor) -> Tensor:
        outputs[:] = [output_for(acts)]
        return acts

    with hooked(model, site, read), hooked(model, locate(model, hook_out).site, lambda acts: replaced(acts, *outputs)):
        yield
