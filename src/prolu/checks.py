"""Whether a config's values are of the types that its fields declare."""

import math
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin


def check_types(config: Any) -> None:
    """Raises ValueError for the first field whose value is not of its declared type; NaN is no number.

    Knows int, float (an int will do), str, bool, tuples of these, and any of them or None.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if not _fits(value, field.type):
            name = getattr(field.type, "__name__", None) if get_origin(field.type) is None else None
            raise ValueError(f"{field.name} {value!r}: must be {name or field.type}")


def _fits(value: Any, declared: Any) -> bool:
    if isinstance(declared, UnionType):
        return any(_fits(value, one) for one in get_args(declared))
    if get_origin(declared) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(declared)[0]) for one in value)
    if declared is float:
        return type(value) in (int, float) and not math.isnan(value)
    return type(value) is (NoneType if declared is None else declared)
