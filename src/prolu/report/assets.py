"""The files that the pages are made from (templates, styles, scripts), and the function that fills in the templates."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """Return a template of this room filled in with `values`, each of them escaped.

    What a template marks as `safe` is not escaped: our own styles and scripts, and plotly's. Data enter a script
    through the filter `tojson`, which writes `<` as a JSON escape, so that no string can end the script element.
    """
    return _environment().get_template(template).render(values)


def asset(name: str) -> str:
    """Return the text of a file of this room, named from its folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt name is an error, not an empty place on the page
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Jinja would sort keys, but families are shown in the order of their first run.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.globals["asset"] = asset
    return environment
