"""How dataclasses become flags: fields of several in one group, help texts, and the names of other libraries."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from types import MappingProxyType
from typing import Any, get_origin

from prolu.studies.widths import DSae

ALIASES: Mapping[str, str] = {
    "--model": "--lm",
    "--model-name": "--lm",
    "--hook-name": "--hook",
    "--dataset": "--data",
    "--dataset-path": "--data",
    "--l1-coefficient": "--coeff",
    "--l1-penalty": "--coeff",
    "--k": "--target-l0",
    "--dict-size": "--d-sae",
    "--num-latents": "--d-sae",
    "--training-tokens": "--n-tokens",
    "--learning-rate": "--lr",
}
"""The names of flags in SAELens, dictionary_learning and sparsify, and our name for each."""


def without_aliases(args: Sequence[str]) -> list[str]:
    """Return command-line arguments in which a flag of another library, such as --dict-size, has our name for it."""
    own = []
    for word in args:
        flag, equals, value = word.partition("=")
        # Flags may be written with underscores too, as in --l1_coefficient: tyro accepts its own flags so.
        own.append(ALIASES.get(flag.replace("_", "-"), flag) + equals + value)
    return own


def option_group(
    name: str,
    described: str,
    owners: Mapping[type, Sequence[str]],
    changed: Mapping[type, Callable[[str, Any, Any], tuple[Any, Any]]] = MappingProxyType({}),
) -> Any:
    """Return a dataclass with some fields of other dataclasses, each with its type, default and help text.

    Args:
        name: The name of the new dataclass.
        described: The title of the group in the help.
        owners: The names of the fields to take from each dataclass.
        changed: For an owner, a function of a field's name, type and default, which returns the type and the default
            to use in place of these.
    """
    made = []
    for owner, names in owners.items():
        by_name = {f.name: f for f in fields(owner)}
        helps = field_helps(owner)
        for field_name in names:
            known = by_name[field_name]
            # tyro reads help texts from the source of a class, which a class made here does not have.
            metadata = {"help": helps[field_name]}
            if known.default_factory is not MISSING:
                made.append((field_name, known.type, field(default_factory=known.default_factory, metadata=metadata)))
                continue
            kind, default = known.type, known.default
            if owner in changed:
                kind, default = changed[owner](field_name, kind, default)
            made.append((field_name, kind, field(default=default, metadata=metadata)))
    return make_dataclass(name, made, namespace={"__doc__": described}, frozen=True, kw_only=True)


def or_multiple(name: str, kind: Any, default: Any) -> tuple[Any, Any]:
    """Return the type and default of a field of RunConfig as an option: d_sae may be a multiple of d_in."""
    return (DSae if name == "d_sae" else kind), default


def several(name: str, kind: Any, default: Any) -> tuple[Any, Any]:
    """Return the type and default of a field as an option that takes one or several values.

    A field that is a list itself, or a switch, takes one value.
    """
    kind, default = or_multiple(name, kind, default)
    if kind is bool or get_origin(kind) is tuple:
        return kind, default
    return tuple[kind, ...], () if default is MISSING else (default,)


def add_helps(owner: type) -> None:
    """Give each field of a dataclass its docstring as help text, in one paragraph.

    tyro finds the docstrings itself, but keeps the line breaks of the source, which then stand in the middle of a line.
    """
    helps = field_helps(owner)
    for known in fields(owner):
        if known.name in helps:
            known.metadata = MappingProxyType({**known.metadata, "help": helps[known.name]})


def field_helps(owner: type) -> dict[str, str]:
    """Return the help text of each field of a dataclass, inherited ones too: the docstring that stands below it."""
    helps: dict[str, str] = {}
    # From the oldest ancestor on (`object` left out), so that a class that declares a field again replaces its help.
    for cls in reversed(owner.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                # Python keeps no docstring of a field, so it is read from the statement below the field in the source.
                match below:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        helps[statement.target.id] = " ".join(text.split())
    return helps


def values_of(owner: type, *groups: Any) -> dict[str, Any]:
    """Return the values of a dataclass's fields by name, collected from the option groups that hold them."""
    names = {f.name for f in fields(owner)}
    return {f.name: getattr(group, f.name) for group in groups for f in fields(group) if f.name in names}
