"""The settings of a run as its panel on the page lists them: those that differ from the defaults, and the others."""

from dataclasses import fields
from typing import Any, NamedTuple

from prolu.evaluation.comparison.frontiers import Record
from prolu.runtime.files import through_json
from prolu.training.config import LATER_FIELDS, RunConfig

USUAL: dict[str, Any] = {f.name: through_json(f.default) for f in fields(RunConfig) if f.name != "named"}
"""The default of every setting, as JSON writes it, without `named`, which only changes the run's name."""

UNUSED = frozenset(name for name in USUAL.keys() & LATER_FIELDS if through_json(LATER_FIELDS[name]) == USUAL[name])
"""The settings whose absence from a line of results means that they have their defaults."""


class Settings(NamedTuple):
    """The settings of one run, by their names in `RunConfig`."""

    changed: dict[str, Any]
    """Those that differ from the defaults."""
    unknown: list[str]
    """Those that were not recorded, as of an SAE that another library trained."""


def settings_of(record: Record) -> Settings:
    """Return the settings that a line of results records."""
    recorded = {name: through_json(record[name]) for name in USUAL if name in record}
    changed = {name: value for name, value in recorded.items() if value != USUAL[name]}
    return Settings(changed, [name for name in USUAL if name not in recorded and name not in UNUSED])
