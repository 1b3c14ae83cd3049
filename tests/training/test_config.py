"""Types of config values. `make fuzz` tries them on RunConfig itself, which pytest's own checks would refuse first."""

from dataclasses import dataclass, replace

import pytest

from prolu.training.checks import check_types


@dataclass(frozen=True)
class Config:
    n: int = 1
    x: float = 0.5
    name: str = "a"
    on: bool = False
    limit: float | None = None
    shares: tuple[float, ...] = ()


def test_what_fits_passes():
    check_types(Config())
    check_types(Config(x=1, limit=2, shares=(0.5, 1)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 1.5}, "n 1.5: must be a whole number"), ({"n": True}, "n True: must be a whole number"),
        ({"x": float("nan")}, "x nan: must be a number"), ({"x": "1"}, "x '1': must be a number"),
        ({"name": 3}, "name 3: must be text"), ({"on": 1}, "on 1: must be True or False"),
        ({"limit": "x"}, "limit 'x': must be a number or None"),
        ({"shares": [0.5]}, r"shares \[0.5\]: must be a tuple, each a number"),
        ({"shares": (0.5, "x")}, "must be a tuple"),
    ],
)  # fmt: skip
def test_what_does_not_is_told_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        check_types(replace(Config(), **change))
