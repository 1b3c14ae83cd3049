"""A saved SAE in somebody else's forward pass: what a transformers model computes when an SAE stands at a hook."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prolu.activations.hooks import centre, hooked, locate, reads_centred
from prolu.sae.autoencoder import SAE


@contextmanager
def splice(model: torch.nn.Module, sae: SAE, hook: str, *, keep_error: bool = False) -> Iterator[None]:
    """For a while, activations at the hook are the SAE's reconstruction of them, at every position of every pass.

    x becomes x_hat(x - mean x) where the model has LayerNorms (there x_hat has no mean to add, and no reader looks for
    one), else x_hat(x): what an evaluation splices in. The SAE computes in its own number format and on its own
    device; what goes on is the model's. Several can be nested, at one hook or at several; gradients pass.

    Args:
        model: a transformers causal language model (`LanguageModel.model` is one); its own caches may be used.
        sae: of the hook's width.
        hook: as `LanguageModel` takes it.
        keep_error: x_hat + (x - x_hat), the bracket a constant: the values of the clean model, but what is
            differentiated goes through the SAE.

    Raises:
        ValueError: no such hook, or another width.
    """
    site = locate(model, hook).site
    centred = reads_centred(model)

    def replaced(acts: Tensor) -> Tensor:
        x = acts.to(sae.W_dec)
        recon = sae(centre(x) if centred else x)
        if keep_error:
            recon = recon + (x - recon).detach()
        return recon.to(acts)

    with hooked(model, site, replaced):
        yield
