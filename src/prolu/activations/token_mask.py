"""What of a text is left out of training and of scores: special tokens, positions, roles, and rows of large norm.

It is a file without PyTorch, because it is also a group of options of the command line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """The tokens that are left out, of training and of scores alike."""

    exclude_special_tokens: bool = False
    """Whether to leave out the special tokens of the tokenizer, such as BOS, EOS and the markers of a chat template."""
    exclude_positions: int = 0
    """The number of positions to leave out at the beginning of every token block. The first holds BOS."""
    keep_roles: tuple[str, ...] = ()
    """The roles whose messages are kept, such as assistant; all else in a chat is left out. By default all is kept. The
    text must be chats, see --text-column."""
    max_norm_multiple: float | None = None
    """Leave out activations whose norm is above this multiple of the median norm, such as 10. The median is taken once,
    from 32,768 tokens of the training text, and the threshold is recorded as max_norm."""
    max_norm: float | None = None
    """Leave out activations whose norm is above this number, in the language model's units. It takes the place of
    --max-norm-multiple."""


@dataclass(frozen=True, kw_only=True)
class TokenMask(MaskOptions):
    """Tokens whose activations are left out, of training and of scores alike. By default none is."""

    def check(self) -> None:
        """Raise ValueError if a number is out of its range."""
        if self.exclude_positions < 0:
            raise ValueError(f"exclude_positions {self.exclude_positions}: must be 0 or more")
        if self.max_norm_multiple is not None and not self.max_norm_multiple >= 1:
            raise ValueError(f"max_norm_multiple {self.max_norm_multiple:g}: must be 1 or more")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm {self.max_norm:g}: must be above 0")

    def describe(self) -> dict[str, Any]:
        """Return the fields that leave something out. Without a mask there are none, as in studies of versions without
        masks.
        """
        usual = TokenMask()
        found = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(usual, f.name)}
        return found | ({"keep_roles": list(self.keep_roles)} if self.keep_roles else {})

    @classmethod
    def recorded(cls, description: Mapping[str, Any]) -> "TokenMask":
        """Return the mask that a description has, such as a study's `stream`.

        Raises:
            ValueError: A field has a value that it cannot have.
        """
        usual = cls()
        found: dict[str, Any] = {name: description.get(name, getattr(usual, name)) for name in MASK_FIELDS}
        is_right = (
            isinstance(found["exclude_special_tokens"], bool)
            and type(found["exclude_positions"]) is int
            and isinstance(found["keep_roles"], list | tuple)
            and all(isinstance(role, str) for role in found["keep_roles"])
            and all(type(found[name]) in (int, float, type(None)) for name in ("max_norm_multiple", "max_norm"))
        )
        if not is_right:
            named = ", ".join(f"{name} {value!r}" for name, value in found.items() if value != getattr(usual, name))
            raise ValueError(f"{named}: not a valid value of a token mask")
        found["keep_roles"] = tuple(found["keep_roles"])
        mask = cls(**found)
        mask.check()
        return mask

    def __str__(self) -> str:
        """Return what is left out, in words."""
        parts = []
        if self.exclude_special_tokens:
            parts.append("special tokens")
        if self.exclude_positions:
            n = self.exclude_positions
            parts.append("the first position of every block" if n == 1 else f"the first {n} positions of every block")
        if self.keep_roles:
            parts.append(f"all but the messages of {' and '.join(self.keep_roles)}")
        if self.max_norm is not None:
            of_median = f", {self.max_norm_multiple:g} times the median" if self.max_norm_multiple else ""
            parts.append(f"activations of a norm above {self.max_norm:.4g}{of_median}")
        elif self.max_norm_multiple is not None:
            parts.append(f"activations of a norm above {self.max_norm_multiple:g} times the median")
        return ", ".join(parts)


MASK_FIELDS = tuple(f.name for f in fields(TokenMask))
"""The names of the fields of a mask, in a study's `stream` and in the config of an SAE."""

NO_MASK = TokenMask()
"""The mask that leaves nothing out."""
