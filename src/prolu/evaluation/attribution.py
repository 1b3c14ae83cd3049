"""What each latent contributes to a number that a language model computes, such as a logit difference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prolu.activations.language_model import LanguageModel, TokenIds
from prolu.activations.tokenizers import as_token_ids
from prolu.evaluation.splicing import Coded, replaced, transformers_model
from prolu.sae.autoencoder import SAE

Metric = Callable[[Float[Tensor, "n ctx n_vocabulary"]], Tensor]
"""A function from logits to the number that is attributed, or to one number for each row."""


@dataclass(frozen=True)
class Attribution:
    """Activation times gradient, for each latent and for what an SAE does not represent, at each token.

    With the gradient g of the metric with respect to the activations y at the hook where the SAE writes, and
    y = sum_i f_i d_i + bias + error, where d_i is W_dec[i] in the scale of y, y . g is divided into

        latents = f_i (d_i . g),    bias = bias . g,    error = error . g.

    For a model that is linear above the hook, their sum over all tokens is exactly how much the metric changes if y is
    set to 0 everywhere, and each latent's is what ablating it takes away. For any other it is the first-order estimate.
    """

    value: Tensor
    """The value of the metric: one number, or one for each row."""
    latents: Float[Tensor, "*n ctx d_sae"]
    """The attribution of each latent at each token; 0 where it is not active."""
    bias: Float[Tensor, "*n ctx"]
    """The attribution of the decoder's bias, of the mean that a centred SAE adds again, and of a skip connection."""
    error: Float[Tensor, "*n ctx"]
    """The attribution of the SAE's error, y minus its reconstruction."""

    @property
    def total(self) -> Float[Tensor, "*n ctx"]:
        """The attribution of all of y at each token, y . g: the sum of the three parts."""
        return self.latents.sum(-1) + self.bias + self.error

    @property
    def parts(self) -> dict[str, float]:
        """The sum over all tokens of each part, by name, and of all."""
        parts = {"latents": self.latents, "bias": self.bias, "error": self.error, "total": self.total}
        return {name: part.double().sum().item() for name, part in parts.items()}


def logit_difference(answer: int | Tensor, other: int | Tensor, position: int = -1) -> Metric:
    """Return the metric logit(answer) - logit(other).

    Args:
        answer: a token id, or one for each row, [n].
        other: the token id, or ids, to compare with.
        position: the position whose prediction is looked at; rows that are padded on the left all end at -1.
    """

    def difference(logits: Tensor) -> Tensor:
        last = logits[:, position]
        rows = torch.arange(len(last), device=last.device)
        return last[rows, answer] - last[rows, other]

    return difference


def attribute(
    model: torch.nn.Module | LanguageModel,
    sae: SAE,
    tokens: str | TokenIds | Mapping[str, Tensor],
    metric: Metric,
    *,
    hook: str = "",
    hook_out: str = "",
) -> Attribution:
    """Return the attribution of a metric of the logits to an SAE's latents, from one forward and one backward pass.

    The model computes its own logits, to the bit, since the SAE's error is kept. Where an SAE scales its input, the
    scale of each token counts as a constant.

    Args:
        model: a transformers causal language model, or a `LanguageModel`.
        sae: an SAE, or a transcoder.
        tokens: token ids [n, ctx] or [ctx]; or what a tokenizer returns, with an attention mask; or, for a
            `LanguageModel`, a text, before which BOS is put.
        metric: a function from the logits, [n, ctx, n_vocabulary], to one number, or to one for each row, as
            `logit_difference` returns it. The attributions of a row are those of its own number.
        hook: as for `splice`.
        hook_out: as for `splice`.

    Returns:
        An `Attribution`. Its tensors are without their first dimension if `tokens` is one row or a text.

    Raises:
        ValueError: as for `splice`; the model's forward pass never reaches the hook, or the metric is not
            differentiable or depends on nothing that the hook can reach.
    """
    inputs, is_one_row = _inputs(model, tokens)
    seen: list[tuple[Coded, Tensor, Tensor]] = []

    def noted(coded: Coded, acts: Tensor) -> Tensor:
        coded = coded._replace(latents=coded.latents.detach().requires_grad_())
        recon = coded.decode()
        # The gradient with respect to `nudge` is that with respect to the activations. Both added terms are 0, so the
        # model computes its own numbers.
        nudge = torch.zeros_like(acts, requires_grad=True)
        seen[:] = [(coded, acts.detach(), nudge)]
        return acts.detach() + nudge + (recon - recon.detach()).to(acts.device)

    with torch.enable_grad(), replaced(model, sae, hook, hook_out, noted):
        value = metric(transformers_model(model)(**inputs, use_cache=False).logits)
        if not seen:
            raise ValueError(f"hook {hook or sae.hook!r}: the model's forward pass never reaches it")
        if not value.requires_grad:
            raise ValueError("metric: it must be differentiable, and depend on the logits that the hook can change")
        ((coded, acts, nudge),) = seen
        by_latent, by_acts = torch.autograd.grad(value.sum(), [coded.latents, nudge])
    with torch.no_grad():
        # The output of the decoder with all latents at 0: biases, means and skip connections.
        bias = coded.decode(torch.zeros_like(coded.latents))
        by_output = by_acts.to(bias)
        found = Attribution(
            value=value.detach(),
            latents=coded.latents.detach() * by_latent,
            bias=(bias * by_output).sum(-1),
            error=((acts.to(bias) - coded.decode()) * by_output).sum(-1),
        )
    if not is_one_row:
        return found
    return Attribution(found.value.squeeze(0), found.latents[0], found.bias[0], found.error[0])


def _inputs(model: Any, tokens: str | TokenIds | Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], bool]:
    """Return what the model is called with, and whether it is one row without a dimension for rows."""
    if isinstance(tokens, Mapping):
        return tokens, False
    if isinstance(tokens, str):
        if not isinstance(model, LanguageModel):
            raise ValueError(
                "tokens: a text needs a LanguageModel, which has a tokenizer; give a transformers model ids"
            )
        tokens = model.token_ids(tokens)
    ids = as_token_ids(tokens)
    if isinstance(model, LanguageModel):
        model.check_tokens(ids)
    device = next(transformers_model(model).parameters()).device
    return {"input_ids": torch.atleast_2d(ids).to(device)}, ids.ndim == 1
