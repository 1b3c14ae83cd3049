"""Checks of what a user asks for: each raises ValueError with one sentence that names field and valid values."""

from collections.abc import Iterable


def at_least_1(name: str, value: int) -> int:
    """Return `value`, which is called `name` where the user sets it.

    Raises:
        ValueError: It is less than 1.
    """
    if value < 1:
        raise ValueError(f"{name} {value}: must be at least 1")
    return value


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value`, which is called `name` where the user sets it.

    Raises:
        ValueError: It is not among the choices.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} {value!r}: choose one of {', '.join(choices)}")
    return value
