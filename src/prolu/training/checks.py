"""Whether a config's values are of the types that its fields declare."""

import math
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False", NoneType: "None"}


def check_types(config: Any) -> None:
    """Raises ValueError for the first field whose value is not of its declared type; NaN is no number.

    Knows int, float (an int will do), str, bool, tuples of these, and any of them or None.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if not _fits(value, field.type):
            raise ValueError(f"{field.name} {value!r}: must be {_in_words(field.type)}")


def _fits(value: Any, declared: Any) -> bool:
    if isinstance(declared, UnionType):
        return any(_fits(value, one) for one in get_args(declared))
    if get_origin(declared) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(declared)[0]) for one in value)
    if declared is float:
        return type(value) in (int, float) and not math.isnan(value)
    return type(value) is declared


def _in_words(declared: Any) -> str:
    if isinstance(declared, UnionType):
        return " or ".join(map(_in_words, get_args(declared)))
    if get_origin(declared) is tuple:
        return f"a tuple, each {_in_words(get_args(declared)[0])}"
    return WORDS[declared]
