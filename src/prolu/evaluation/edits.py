"""Edits of latents for `splice`: ablate, clamp, scale, add. Any function from latents to latents can be used too."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""A function from the latents of some tokens, [..., d_sae], to latents of the same shape."""

Numbers = SupportsIndex | Iterable[Any]
"""The number of a latent, or several, also as an array or a tensor."""


@dataclass(frozen=True)
class LatentEdit:
    """An edit of some latents that leaves all others as they are."""

    latents: tuple[int, ...]
    """The numbers of the latents that are changed."""
    change: Callable[[Tensor], Tensor]
    """What becomes of their values, [..., n]."""

    def __call__(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the edited latents. The argument is not changed."""
        self.check(latents.shape[-1])
        columns = torch.tensor(self.latents, dtype=torch.long, device=latents.device)
        return latents.index_copy(-1, columns, self.change(latents.index_select(-1, columns)))

    def check(self, d_sae: int) -> None:
        """Raise ValueError if an SAE of this many latents lacks one of those that are changed."""
        for latent in self.latents:
            check_latent(latent, d_sae)


def check_latent(latent: int, d_sae: int) -> None:
    """Raise ValueError unless an SAE of d_sae latents has this one."""
    # A negative number would count from the end, which is more often a mistake than a wish.
    if not 0 <= latent < d_sae:
        raise ValueError(f"latent {latent}: this SAE has the latents 0-{d_sae - 1}")


def ablate(latents: Numbers) -> LatentEdit:
    """Return the edit that sets latents to 0 on every token."""
    return LatentEdit(_numbers(latents), torch.zeros_like)


def clamp(latents: Numbers, value: float) -> LatentEdit:
    """Return the edit that sets latents to a value on every token, whether they are active on it or not."""
    return LatentEdit(_numbers(latents), lambda values: torch.full_like(values, value))


def scale(latents: Numbers, factor: float) -> LatentEdit:
    """Return the edit that multiplies latents by a factor. Where they are 0, they stay 0."""
    return LatentEdit(_numbers(latents), lambda values: values * factor)


def add(latents: Numbers, amount: float) -> LatentEdit:
    """Return the edit that adds an amount to latents on every token. The result may be negative."""
    return LatentEdit(_numbers(latents), lambda values: values + amount)


def check_edits(edits: Sequence[Edit], d_sae: int) -> None:
    """Raise ValueError if one of the edits names a latent that an SAE of d_sae latents lacks."""
    for edit in edits:
        # What another function does to latents is not known before it is called.
        if isinstance(edit, LatentEdit):
            edit.check(d_sae)


def edited(latents: Float[Tensor, "*batch d_sae"], edits: Sequence[Edit]) -> Float[Tensor, "*batch d_sae"]:
    """Return what edits make of latents, one after the other.

    Raises:
        ValueError: an edit returns something else than latents of the shape that it was given.
    """
    # An edit may write into what it is given, and the unedited latents are needed for the error term.
    result = latents.clone()
    for edit in edits:
        result = edit(result)
        if not isinstance(result, Tensor) or result.shape != latents.shape:
            given = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"edit: it must return latents of shape {tuple(latents.shape)}, as it got, not {given}")
    return result.to(latents)


def _numbers(latents: Numbers) -> tuple[int, ...]:
    several: Iterable[Any] = latents if isinstance(latents, Iterable) and getattr(latents, "ndim", 1) else [latents]
    try:
        # Each once: what two values at one place would give is not defined.
        return tuple(dict.fromkeys(operator.index(latent) for latent in several))
    except TypeError:
        raise ValueError(f"latents {latents!r}: must be the number of a latent, or several of them") from None
