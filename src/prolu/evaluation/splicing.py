"""An SAE in place of the activations at a hook, with edits of its latents, in any forward pass of a transformers model.

`splice` puts the SAE there and edits its latents, `steer` adds the direction that a latent writes. Both are built on
`replaced`, as attribution is, and on the hooks of `prolu.activations.hooks`, as the splices of an evaluation are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.hooks import hooked, locate, reads_centred
from prolu.activations.language_model import LanguageModel
from prolu.evaluation.edits import Edit, check_edits, check_latent, edited
from prolu.sae.autoencoder import SAE
from prolu.sae.latents import Latents, RowScale
from prolu.sae.scaling import centre


@contextmanager
def splice(
    model: torch.nn.Module | LanguageModel,
    sae: SAE,
    hook: str = "",
    *,
    edit: Edit | Sequence[Edit] | None = None,
    keep_error: bool | None = None,
    hook_out: str = "",
) -> Iterator[None]:
    """Put an SAE in place of the activations at a hook, in every forward pass inside the `with` block.

    With f = encode(x), the activations x become

        decode(edit(f))                         if the error is dropped,
        x + (decode(edit(f)) - decode(f))       if it is kept: this is decode(edit(f)) plus the error x - decode(f).

    A transcoder reads x at `hook`, and the activations y at `hook_out`, which the model must reach later, become
    decode(edit(f)), or y + (decode(edit(f)) - decode(f)).

    All positions are replaced, as in an evaluation, also those of padding. In `generate` with a key-value cache, a pass
    after the first has one position, the newest. x is given without its mean to an SAE that was trained on centred
    activations, as in a model with LayerNorms. The SAE computes in its own number format and on its own device; its
    output is converted to the model's. Several splices can be nested, at one hook or at several. Gradients flow through
    the SAE, and the error is a constant.

    Args:
        model: a transformers causal language model, or a `LanguageModel`. Its key-value cache may be used.
        sae: an SAE whose d_in is the hook's width.
        hook: the name of the hook, as `LanguageModel` takes it; by default where the SAE was trained.
        edit: what becomes of the latents that `sae.encode` gives, [batch, position, d_sae]: a function that returns
            latents of the same shape, such as those of `prolu.evaluation.edits`, or several, applied in order.
        keep_error: whether the SAE's error is kept. By default it is kept if there is an edit, so that the edit is all
            that changes, and dropped if there is none, since the model would then compute what it does without the SAE.
        hook_out: the hook that a transcoder writes at; by default, if `hook` is not given either, where it was trained
            to write. Empty for an SAE.

    Raises:
        ValueError: The model has no such hook, or its width is not the SAE's; a latent is out of range, or an edit
            changes the shape; a transcoder has no hook to write at, or an SAE has one.
    """
    edits = [] if edit is None else [edit] if callable(edit) else list(edit)
    check_edits(edits, sae.d_sae)
    if keep_error is None:
        keep_error = bool(edits)

    def output_for(coded: Coded, acts: Tensor) -> Tensor:
        recon = coded.decode()
        output = coded.decode(edited(coded.latents, edits)) if edits else recon
        if keep_error:
            # In this order: without an edit the difference is 0, and the model computes its own numbers to the bit.
            change = output - recon.detach()
            output = acts.detach() + change.to(acts.device)
        return output

    with replaced(model, sae, hook, hook_out, output_for):
        yield


@contextmanager
def steer(
    model: torch.nn.Module | LanguageModel, sae: SAE, latent: int, scale: float, *, hook: str = ""
) -> Iterator[None]:
    """Add `scale` times the direction that a latent writes to the activations, in every pass inside the `with` block.

    x becomes x + scale W_dec[latent], at every position. `scale` is in the units of the model's activations: a trained
    SAE's rows of W_dec have norm 1, so x moves by that distance. Latents of an SAE that scales its input are in other
    units: a latent of value v stands for v norm(x) / sqrt(d_in) in these.

    The SAE itself does not run, and the activations keep what it cannot reconstruct. `splice` with the edit `add`
    moves a latent in its own units.

    Args:
        model: a transformers causal language model, or a `LanguageModel`.
        sae: an SAE, or a transcoder.
        latent: the number of the latent.
        scale: how far the activations are moved, and against the direction if it is negative.
        hook: the hook to add at; by default where the SAE was trained to write.

    Raises:
        ValueError: the SAE has no such latent, the model no such hook, or its width is not the SAE's.
    """
    check_latent(latent, sae.d_sae)
    hook = hook or sae.hook_out
    if not hook:
        raise ValueError("hook: this SAE does not know where it was trained, so a hook must be named")
    inner = transformers_model(model)
    step = scale * sae.W_dec[latent].detach()

    def moved(acts: Tensor) -> Tensor:
        _check_width(hook, acts, "d_out" if sae.is_transcoder else "d_in", sae.d_out)
        return acts + step.to(acts)

    with hooked(inner, locate(inner, hook).site, moved):
        yield


class Coded(NamedTuple):
    """The latents of activations in a forward pass, and what takes them back to activations."""

    sae: SAE
    latents: Float[Tensor, "*batch d_sae"]
    """f as `SAE.encode` gives it, as a plain tensor."""
    row_scale: RowScale

    @staticmethod
    def of(sae: SAE, acts: Float[Tensor, "*batch d_in"], centred: bool) -> "Coded":
        """Encode activations of a language model, in the SAE's number format and on its device."""
        x = acts.to(sae.W_dec)
        # The mean over d_model is not added back: every reader of the residual stream, a LayerNorm, removes it.
        latents = sae.encode(centre(x) if centred else x)
        assert isinstance(latents, Latents)
        return Coded(sae, latents.as_subclass(Tensor), latents.row_scale)

    def decode(self, latents: Tensor | None = None) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction from these latents, or from others of the same tokens."""
        return self.row_scale.restore(self.sae.decode_normalised(self.latents if latents is None else latents))


@contextmanager
def replaced(
    model: torch.nn.Module | LanguageModel,
    sae: SAE,
    hook: str,
    hook_out: str,
    output_for: Callable[[Coded, Tensor], Tensor],
) -> Iterator[None]:
    """Replace the activations that an SAE reconstructs, in every forward pass within this context.

    Args:
        model: a transformers model, or a `LanguageModel`.
        sae: an SAE, or a transcoder.
        hook: where the SAE reads; empty for where it was trained.
        hook_out: where a transcoder writes; empty for an SAE, and for where the transcoder was trained to write if
            `hook` is empty too.
        output_for: from the latents and the activations to be replaced, what takes the place of the latter.

    Raises:
        ValueError: the model has no such hook, its width is not the SAE's, or a hook is lacking.
    """
    if not hook and not hook_out:
        hook = sae.hook
        hook_out = sae.hook_out if sae.is_transcoder else ""
        if not hook:
            raise ValueError("hook: this SAE does not know where it was trained, so a hook must be named")
    if sae.is_transcoder != bool(hook_out):
        needs = "a transcoder needs one" if sae.is_transcoder else "an SAE has none, it writes where it reads"
        raise ValueError(f"hook_out {hook_out!r}: {needs}")
    inner = transformers_model(model)
    # An SAE without provenance does not record whether it was trained on centred activations; it is then taken to have
    # been trained on what a LanguageModel gives by default.
    by_default = model.centred if isinstance(model, LanguageModel) else reads_centred(inner)
    centred = sae.centred if "centred" in sae.provenance else by_default

    def coded(acts: Tensor) -> Coded:
        _check_width(hook, acts, "d_in", sae.d_in)
        return Coded.of(sae, acts, centred)

    site = locate(inner, hook).site
    if not hook_out:
        with hooked(inner, site, lambda acts: output_for(coded(acts), acts).to(acts)):
            yield
        return

    read: list[Coded] = []

    def note(acts: Tensor) -> Tensor:
        read[:] = [coded(acts)]
        return acts

    def write(acts: Tensor) -> Tensor:
        _check_width(hook_out, acts, "d_out", sae.d_out)
        if not read:
            raise ValueError(f"hook_out {hook_out!r}: the model reaches it before the hook {hook!r}")
        return output_for(read.pop(), acts).to(acts)

    with hooked(inner, site, note), hooked(inner, locate(inner, hook_out).site, write):
        yield


def transformers_model(model: torch.nn.Module | LanguageModel) -> Any:
    """Return the transformers model of a `LanguageModel`, or the model itself."""
    return model.model if isinstance(model, LanguageModel) else model


def _check_width(hook: str, acts: Tensor, name: str, width: int) -> None:
    if acts.shape[-1] != width:
        raise ValueError(
            f"hook {hook!r}: its activations have width {acts.shape[-1]}, but the SAE has {name} = {width}"
        )
