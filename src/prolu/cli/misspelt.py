"""Commands, studies and options that are missing or do not exist: one sentence says so, and names those that exist."""

import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

ALIKE = 0.75
"""How alike two names must be, from 0 to 1, for one to be suggested in place of the other."""


def no_such_name(field: str, words: Sequence[str], known: Collection[str]) -> str:
    """Return the sentence about the first word of some arguments, if it is not one of the known names; else "".

    Args:
        field: What is named, as in "command".
        words: The arguments, of which the first should be the name. Help may be asked for instead.
        known: The names that exist.
    """
    if words and (words[0] in known or words[0] in ("-h", "--help")):
        return ""
    if not words or words[0].startswith("-"):
        return f"{field}: name one of {', '.join(known)}, before any option"
    return f"{field} {words[0]!r}: choose one of {', '.join(known)}{_suggestion(words[0], known)}"


def no_such_option(command: str, args: Sequence[str], help_text: str) -> str:
    """Return the sentence about the first option among a command's arguments that it does not have; else "".

    Args:
        command: The command as it is called, as in "prolu train".
        args: The arguments that stand after it.
        help_text: What the command prints for --help, which has its options at the beginning of lines.
    """
    known = set(_options_in(help_text))
    for word in args:
        option = word.partition("=")[0]
        # Options may be written with underscores too, as in --d_sae: tyro accepts its own so.
        with_hyphens = option.replace("_", "-")
        if re.match(r"--\w", option) and with_hyphens not in known:
            suggestion = _suggestion(with_hyphens, known)
            return f"option {option!r}: not an option of `{command}`{suggestion}; `{command} --help` lists all of them"
    return ""


def _options_in(help_text: str) -> Iterable[str]:
    for line in help_text.splitlines():
        # The explanation of an option stands on the same line, after two spaces, and may name options of others.
        if found := re.match(r"\W*(--[a-z].*?)(  |$|│)", line):
            yield from re.findall(r"--[a-z][\w-]*", found[1])


def _suggestion(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name, sorted(known), cutoff=ALIKE)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
