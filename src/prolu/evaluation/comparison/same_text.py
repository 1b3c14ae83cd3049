"""Which studies may be compared: those with one language model, one hook and the same held-out tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

MODEL_FACTS = ("lm_digest", "lm_dtype", "ctx")
"""The fields of a study's stream that decide the language model and how it reads the held-out tokens."""

TEXT_FACTS = ("data_digest", "eval_tokens")
"""What decides the held-out tokens of a study of version 0.1.0, whose config has no digest of them."""


@runtime_checkable
class ScoredStudy(Protocol):
    """What must be known of a study in order to say what it was scored on."""

    @property
    def folder(self) -> Path:
        """The folder of the study, with one folder per run."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The study's config.json."""
        ...


def check_comparable(studies: Sequence[ScoredStudy], *, hooks_apart: bool = False) -> None:
    """Raise ValueError unless all studies were scored with the same language model, at one hook, on the same tokens.

    A CE increase depends on the text that it is measured on, far more than on the family. Figures that were taken on
    two texts therefore differ even where the families do not, and no interval over seeds or documents covers that.

    Args:
        studies: the studies that are to be compared.
        hooks_apart: whether each hook is shown by itself, so that hooks may differ.
    """
    first, *others = studies
    for other in others:
        if found := _difference(first.config, other.config, hooks_apart=hooks_apart):
            raise ValueError(
                f"studies {first.folder} and {other.folder} cannot be compared: {found}; `prolu eval RUN ... --like "
                f"{first.folder} --out NEW` scores SAEs of the same model and hook on the tokens of the first"
            )


def _difference(a: Mapping[str, Any], b: Mapping[str, Any], *, hooks_apart: bool) -> str:
    """Return what differs between the models, hooks and held-out tokens of two studies; empty if nothing does."""
    for name in MODEL_FACTS if hooks_apart else (*MODEL_FACTS, "hook", "hook_out"):
        pair = [_stream(config).get(name) for config in (a, b)]
        # Rows come from no language model, and are compared by their own digest.
        is_unknown = name == "lm_digest" and None in pair and not all("rows" in _stream(config) for config in (a, b))
        if pair[0] != pair[1] or is_unknown:
            return _in_words(name, pair)
    digests = [config.get("held_out_digest") for config in (a, b)]
    if None not in digests:
        return _in_words("held_out_digest", digests) if digests[0] != digests[1] else ""
    for name in TEXT_FACTS:
        pair = [(_stream(config) | dict(config)).get(name) for config in (a, b)]
        if pair[0] != pair[1] or None in pair:
            return f"nothing shows that their held-out tokens are the same, and {_in_words(name, pair)}"
    return ""


def _stream(config: Mapping[str, Any]) -> dict[str, Any]:
    stream = config.get("stream")
    return dict(stream) if isinstance(stream, dict) else {}


def _in_words(name: str, pair: Sequence[Any]) -> str:
    shown = ["not recorded" if value is None else f"{value!r:.40}" for value in pair]
    return f"{name} is {shown[0]} there and {shown[1]} here" if shown[0] != shown[1] else f"{name} is {shown[0]}"
