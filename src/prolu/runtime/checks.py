"""Checks of what a user asks for. Each raises ValueError with one sentence: the field, its value, the valid values."""

import math
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False", Path: "a path", NoneType: "None"}
"""The words for each type in a message."""


def at_least_1(name: str, value: int) -> int:
    """Return a value if it is at least 1. `name` is its name in messages.

    Raises:
        ValueError: The value is less than 1.
    """
    if value < 1:
        raise ValueError(f"{name} {value}: must be at least 1")
    return value


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """Return a value if it is one of the choices. `name` is its name in messages.

    Raises:
        ValueError: The value is not among the choices.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} {value!r}: choose one of {', '.join(choices)}")
    return value


def check_types(config: Any) -> None:
    """Raise ValueError for the first field of a dataclass whose value is not of its declared type."""
    for field in fields(config):
        check_type(field.name, getattr(config, field.name), field.type)


def check_type(name: str, value: Any, declared: Any) -> None:
    """Raise ValueError unless a value is of the declared type. `name` is its name in messages.

    It knows the types int, float (which a whole number fits too, but not NaN), str, bool and Path, a tuple of any
    number of one of these, a union of any of them with None, and a `Literal` of texts.
    """
    if not _fits(value, declared):
        verb = "choose" if get_origin(declared) is Literal else "must be"
        raise ValueError(f"{name} {value!r}: {verb} {_in_words(declared)}")


def _fits(value: Any, declared: Any) -> bool:
    if isinstance(declared, UnionType):
        return any(_fits(value, one) for one in get_args(declared))
    if get_origin(declared) is Literal:
        # The type is checked first, because comparing another type with a text may not give a bool, as for an array.
        return isinstance(value, str) and value in get_args(declared)
    if get_origin(declared) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(declared)[0]) for one in value)
    if declared is float:
        # NaN does not equal itself, so a run with it would never be recognised as the run that its folder holds.
        return type(value) in (int, float) and not math.isnan(value)
    # Not isinstance: True would pass for a whole number.
    return type(value) is declared


def _in_words(declared: Any) -> str:
    if isinstance(declared, UnionType):
        return " or ".join(map(_in_words, get_args(declared)))
    if get_origin(declared) is Literal:
        return f"one of {', '.join(get_args(declared))}"
    if get_origin(declared) is tuple:
        return f"a tuple, each {_in_words(get_args(declared)[0])}"
    return WORDS[declared]
