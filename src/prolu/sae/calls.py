"""Names with arguments in brackets, as in `topk(32)`, by which configs and files name nonlinearities and penalties."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

Made = TypeVar("Made")

CALL = re.compile(r"(\w+)\(([^()]*)\)")
"""A name with arguments in brackets."""


def made_by_call(field: str, text: str, makers: Mapping[str, Callable[..., Made]]) -> Made | None:
    """Return what a maker makes of the arguments in brackets; None if the text is no such call.

    Args:
        field: what is named, for messages.
        text: the name with its arguments.
        makers: by name; each takes its arguments as texts.

    Raises:
        ValueError: the arguments are wrong.
    """
    written = CALL.fullmatch(text)
    if not written or written[1] not in makers:
        return None
    try:
        return makers[written[1]](*written[2].split(","))
    except TypeError:
        # The arguments are texts, which int and float take: only their number can be wrong.
        form = form_of(written[1], makers)
        raise ValueError(f"{field} {text!r}: wrong number of arguments, write {form}") from None
    except ValueError as problem:
        raise ValueError(f"{field} {text!r}: {problem}") from None


def form_of(name: str, makers: Mapping[str, Callable[..., object]]) -> str:
    """Return a name with arguments as it is written, as in `topk(k)`."""
    return f"{name}({','.join(inspect.signature(makers[name]).parameters)})"
