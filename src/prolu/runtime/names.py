"""Names and texts from files that somebody else may have written: what is taken for a name, and how text is shown."""

import os
from pathlib import Path
from typing import Any

RESERVED = frozenset('<>:"/\\|?*`')
"""The characters that some file system does not allow in a name, and the backtick, which would end code in Markdown.

Without a slash no name leads elsewhere, and without a colon none is taken for an address such as `javascript:...`.
"""

LONGEST_NAME = 200
"""The most bytes of a name. File systems allow 255, and a file that is being written has a longer name for a while."""


def is_plain_name(name: Any) -> bool:
    """Return whether a value is the name of a file or folder, and cannot be anything else.

    It is not empty, does not begin with a dot, is printable, and has neither a separator nor a reserved character.
    """
    return (
        isinstance(name, str)
        and name.strip() == name != ""
        and not name.startswith(".")
        # Not printable are control characters, lone surrogates, and the marks that turn the direction of text.
        and name.isprintable()
        and not RESERVED & set(name)
        and len(name.encode()) <= LONGEST_NAME
    )


def plain_name(name: Any, where: object) -> str:
    """Return a name that was read from a file, if it is one plain component of a path.

    Args:
        name: The name.
        where: Where it was read: a file, and what the name is called there.

    Raises:
        ValueError: It is empty, too long, hidden, or has separators, control characters or other reserved ones.
    """
    if not is_plain_name(name):
        raise ValueError(
            f"{where} {shortened(name)}: not a plain name; it must be printable text of 1 to {LONGEST_NAME} bytes that "
            f"does not begin with a dot and has none of {' '.join(sorted(RESERVED))}"
        )
    return name


def folder_name(folder: Path) -> str:
    """Return the name of a folder, also of `.`; a link keeps its own name, by which its user knows it."""
    return Path(os.path.abspath(folder)).name


def check_inside(folder: Path, name: str) -> None:
    """Raise ValueError if a file or folder of this name is a link that leads out of `folder`."""
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / name}: a link that leads out of {folder}; copy what it leads to instead")


def shown(text: str) -> str:
    """Return text as a terminal may be sent it: what is not printable is written as an escape, line ends are kept.

    A terminal takes a control character for a command, and could be made to hide or to fake what is on it.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def shortened(value: Any) -> str:
    """Return how a value that was read from a file is repeated in a message: on one line, and not in full if long."""
    text = repr(value)
    return shown(text if len(text) <= 80 else f"{text[:77]}...")
