"""Types of config values, in one sentence each.

`make fuzz` tries many more on RunConfig itself, which pytest's own checks would refuse first.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import pytest

from prolu import RunConfig
from prolu.runtime.checks import check_types
from prolu.training.choices import PRECISIONS, STEP_KINDS


@dataclass(frozen=True)
class Config:
    n: int = 1
    x: float = 0.5
    name: str = "a"
    on: bool = False
    limit: float | None = None
    fractions: tuple[float, ...] = ()
    kind: Literal["round", "square"] = "round"


@dataclass(frozen=True, kw_only=True)
class Unwrapped(RunConfig):
    """A RunConfig whose constructor is not type-checked by pytest, so that its own check answers."""


def test_what_fits_passes():
    check_types(Config())
    check_types(Config(x=1, limit=2, fractions=(0.5, 1), kind="square"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 1.5}, "n 1.5: must be a whole number"), ({"n": True}, "n True: must be a whole number"),
        ({"x": float("nan")}, "x nan: must be a number"), ({"x": "1"}, "x '1': must be a number"),
        ({"name": 3}, "name 3: must be text"), ({"on": 1}, "on 1: must be True or False"),
        ({"limit": "x"}, "limit 'x': must be a number or None"),
        ({"fractions": [0.5]}, r"fractions \[0.5\]: must be a tuple, each a number"),
        ({"fractions": (0.5, "x")}, "must be a tuple"),
        ({"kind": "oval"}, "kind 'oval': choose one of round, square"),
        ({"kind": ["round"]}, r"kind \['round'\]: choose one of round, square"),
    ],
)  # fmt: skip
def test_what_does_not_is_told_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        check_types(replace(Config(), **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"freeze": "both"}, "^freeze 'both': choose one of none, decoder, encoder, soft_decoder$"),
        ({"step": "fast"}, "^step 'fast': choose one of auto, dense, sparse, sparse_torch, stacked$"),
        ({"precision": "fp8"}, "^precision 'fp8': choose one of fp32, tf32, bf16$"),
        ({"normalisation": "layer"}, "^normalisation 'layer': choose one of per_token, none$"),
        ({"resample_second_moment": "median"}, "^resample_second_moment 'median': choose one of mean, zero$"),
        ({"d_sae": 1.5}, "^d_sae 1.5: must be a whole number$"),
    ],
)
def test_a_run_names_the_field_and_the_valid_values(change, words):
    with pytest.raises(ValueError, match=words):
        Unwrapped(**change)


def test_choices_are_those_of_the_fields():
    declared = {field.name: get_args(field.type) for field in fields(RunConfig)}
    assert declared["step"] == ("auto", *STEP_KINDS, "stacked")
    assert declared["precision"] == PRECISIONS
