"""Latents that remember which scale and mean belong to each of their rows, so that they can be decoded."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

KEEPS_ROWS = frozenset({
    "__add__", "__mul__", "__neg__", "__radd__", "__rmul__", "__rsub__", "__sub__", "__truediv__",
    "abs", "add", "div", "mul", "neg", "rsub", "sub", "true_divide",
    "clamp", "clamp_max", "clamp_min", "clip", "masked_fill", "maximum", "minimum", "relu", "where",
    "clone", "contiguous", "cpu", "cuda", "detach", "double", "float", "to",
})  # fmt: skip
"""The operations whose result has the rows of their operands, each in its place. All others may move or mix rows."""


class RowScale(NamedTuple):
    """What takes a reconstruction of scaled activations back to where the activations came from."""

    scale: Float[Tensor, "*batch 1"] | float
    """The factor of each row: its norm divided by sqrt(d_in), or 1.0 for an SAE that does not scale its input."""
    offset: Float[Tensor, "*batch d_or_1"] | float
    """What is added to each row: its mean, or 0.0 for an SAE that was not trained on centred activations. Of a skip
    transcoder it is what the skip connection adds."""

    def restore(self, recon: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        """Return recon * scale + offset.

        Raises:
            ValueError: these are the scales of other rows than the reconstruction has.
        """
        for kept in self:
            if isinstance(kept, Tensor) and kept.shape[:-1] != recon.shape[:-1]:
                raise ValueError(
                    f"latents with rows {tuple(recon.shape[:-1])}, and activations with rows {tuple(kept.shape[:-1])}: "
                    "must be activations of the same rows"
                )
        scale, offset = (kept.to(recon) if isinstance(kept, Tensor) else kept for kept in self)
        return recon * scale + offset


class Latents(Tensor):
    """Latents f, [..., d_sae], and the scale and mean of each row of the activations that they were encoded from.

    It is a tensor in all respects. An operation that leaves every row in its place, such as `latents * mask`,
    `latents.clamp(max=1)` or `latents[:, 5] = 0`, gives latents that can still be decoded; anything else, such as
    `latents[perm]`, gives a plain tensor, because its rows may be other ones.
    """

    row_scale: RowScale

    @staticmethod
    def of(latents: Tensor, row_scale: RowScale) -> "Latents":
        """Return latents with the scale of their rows; the memory is shared, and gradients flow."""
        kept = latents.as_subclass(Latents)
        kept.row_scale = row_scale
        return kept

    def __deepcopy__(self, memo: dict[Any, Any]) -> "Latents":
        return Latents.of(deepcopy(self.as_subclass(Tensor), memo), self.row_scale)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        operands = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Latents) and hasattr(a, "row_scale")]
        # Two different sets of rows have two scales, neither of which is that of a sum.
        if not operands or any(a.row_scale is not operands[0].row_scale for a in operands):
            if args and isinstance(args[0], Latents) and (result is args[0] or func.__name__ == "__setitem__"):
                vars(args[0]).pop("row_scale", None)
            return result
        # An operation in place returns its operand, which has its scale already. What is converted is the first one.
        if (
            type(result) is not Tensor
            or func.__name__ not in KEEPS_ROWS
            or (func.__name__ == "to" and args[0] is not operands[0])
        ):
            return result
        return Latents.of(result, operands[0].row_scale) if result.shape == operands[0].shape else result
