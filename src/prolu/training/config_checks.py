"""Checks that every value of a config has the type that its field declares."""

import math
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False", NoneType: "None"}


def check_types(config: Any) -> None:
    """Raise ValueError for the first field whose value is not of its declared type.

    The types that are known: int, float (a whole number fits too, NaN does not), str, bool, a `Literal` of texts,
    a tuple of any number of these, and any of them or None.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if not _fits(value, field.type):
            raise ValueError(f"{field.name} {value!r}: must be {_in_words(field.type)}")


def _fits(value: Any, declared: Any) -> bool:
    if isinstance(declared, UnionType):
        return any(_fits(value, one) for one in get_args(declared))
    if get_origin(declared) is Literal:
        # The type first: a value of another type may compare with a text in ways of its own (an array does).
        return isinstance(value, str) and value in get_args(declared)
    if get_origin(declared) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(declared)[0]) for one in value)
    if declared is float:
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
