"""Labels of the tokens of Python source that are true by construction: Python's own tokenizer says what a token is.

No person and no model has labelled anything, so a probe that fails says something about the latents, not the labels.
"""

import ast
import io
import tokenize
import warnings
from tokenize import COMMENT, DEDENT, ENDMARKER, INDENT, NEWLINE, NL, NUMBER, STRING
from typing import NamedTuple

import numpy as np

NAMES = {getattr(tokenize, f"FSTRING_{part}", STRING): "string" for part in ("START", "MIDDLE", "END")} | {
    STRING: "string",
    COMMENT: "comment",
    NUMBER: "number",
}
"""The labels that follow from the type of Python's token; from Python 3.12 on, f-strings have types of their own."""

NO_CODE = (COMMENT, NL, NEWLINE, INDENT, DEDENT, ENDMARKER)
"""The types of Python's tokens that a line without code may have."""

DEEP = 2
"""The number of levels of indentation from which on a token counts as deeply indented."""

LABELS = ("string", "comment", "number", "indented")
"""What a token may be: inside a string, inside a comment, a part of a number, or on a line of code with two or more
levels of indentation."""


class PythonLabels(NamedTuple):
    """What each character of a Python source is, by `LABELS`."""

    inside: dict[str, np.ndarray]
    """Whether each character is of each label, [n_characters] of bool."""
    without_code: np.ndarray
    """Whether each character is on a line without code, of which no indentation is said."""
    is_space: np.ndarray
    """Whether each character is white space."""

    def of_tokens(self, spans: np.ndarray) -> dict[str, np.ndarray]:
        """Return 1 for the tokens that are of each label, 0 for those that are not, and -1 for those that are in part.

        White space in a token that has other characters too does not count: a byte-level tokenizer joins a space to the
        word that follows it.

        Args:
            spans: the first character of each token and the one behind its last, [n_tokens, 2].
        """
        starts = spans[:, 0]
        ends = spans[:, 1]
        n_text = _counts(~self.is_space, starts, ends)
        n_all = np.where(n_text > 0, n_text, ends - starts)
        found = {}
        for name, inside in self.inside.items():
            n_inside = np.where(
                n_text > 0, _counts(inside & ~self.is_space, starts, ends), _counts(inside, starts, ends)
            )
            found[name] = np.where(n_inside == 0, 0, np.where(n_inside == n_all, 1, -1))
            # A token without characters is a part of one that is spread over several tokens.
            found[name][n_all == 0] = -1
        found["indented"][_counts(self.without_code, starts, ends) > 0] = -1
        return found


def _counts(mask: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return for each span from `starts` to `ends` how many of its characters are True in the mask."""
    before = np.concatenate([[0], np.cumsum(mask)])
    return before[ends] - before[starts]


def is_python(text: str) -> bool:
    """Return whether a text is Python source: it parses, and does something besides naming values.

    A single English word or a number parses too, as an expression; so at least one statement of another kind is asked
    for, such as an import, an assignment or a definition.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in the text, which do not matter here
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(not isinstance(statement, ast.Expr) for statement in tree.body)


def python_labels(source: str) -> PythonLabels | None:
    """Return what each character of a Python source is; None if Python's tokenizer does not take it."""
    # Lines as Python divides them: str.splitlines also divides at form feeds, and would shift all that follows.
    lines = list(io.StringIO(source, newline=""))
    lengths = [len(line) for line in lines]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    try:
        tokens = list(tokenize.generate_tokens(iter([*lines, ""]).__next__))
    except (tokenize.TokenError, SyntaxError):
        return None
    inside = {name: np.zeros(len(source), bool) for name in LABELS}
    depth_of_line = np.full(len(lines) + 1, -1)
    depth = 0
    for token in tokens:
        depth += (token.type == INDENT) - (token.type == DEDENT)
        (first, column), (last, end) = token.start, token.end
        if token.type in NAMES:
            inside[NAMES[token.type]][starts[first - 1] + column : starts[last - 1] + end] = True
        # A line that holds only a comment may begin at any column, so its indentation means nothing.
        if token.type not in NO_CODE:
            depth_of_line[first - 1 : last] = depth
    depths = np.repeat(depth_of_line[: len(lines)], lengths)
    inside["indented"] = depths >= DEEP
    return PythonLabels(inside, depths < 0, np.array([c.isspace() for c in source], bool))
