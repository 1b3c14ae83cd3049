"""Numbers of latents that are given as a multiple of the width of the activations, as in 8x."""

import re


class Multiple(str):
    """A number of latents for each dimension of the activations, written as 8x or 1.5x."""

    def __new__(cls, text: str) -> "Multiple":
        """Return the multiple that a text names.

        Raises:
            ValueError: The text is not a number above 0 followed by x.
        """
        if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?x", text) or not float(text[:-1]):
            raise ValueError(f"d_sae {text!r}: must be a whole number, or a multiple of d_in such as 8x")
        return super().__new__(cls, text)

    @property
    def factor(self) -> float:
        """The number of latents per dimension."""
        return float(self[:-1])


DSae = int | Multiple
"""A number of latents, or a multiple of the width of the activations."""


def n_latents(d_sae: DSae, d_in: int) -> int:
    """Return the number of latents of an SAE for activations of width `d_in`, rounded to a whole number."""
    return round(d_sae.factor * d_in) if isinstance(d_sae, Multiple) else d_sae
