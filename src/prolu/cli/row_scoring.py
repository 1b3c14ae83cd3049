"""The rows on which `eval` scores SAEs of activations that come from no language model."""

from collections.abc import Mapping, Sequence
from typing import Any

from prolu.activations.row_files import open_rows
from prolu.activations.rows import ActivationRows
from prolu.cli.options import Scoring
from prolu.studies.scored_study import SavedSAE

OF_LANGUAGE_MODELS = (
    "lm",
    "hook",
    "hook_out",
    "data",
    "text_column",
    "data_config",
    "split",
    "eval_split",
    "special_tokens",
    "ctx",
    "max_train_tokens",
    "centred",
    "exclude_special_tokens",
    "exclude_positions",
    "keep_roles",
    "max_norm",
)
"""The options that have no meaning for rows."""


def asks_for_rows(options: Scoring, found: Sequence[SavedSAE], study: Mapping[str, Any] | None) -> bool:
    """Return whether SAEs are to be scored on rows: those named, those of the study, or those of their training.

    An SAE that was trained on rows may be scored in a language model all the same, if the options say in which, where,
    and on which text.
    """
    if options.activations:
        return True
    if options.lm and options.hook and options.data:
        return False
    streams = [saved.provenance for saved in found] if study is None else [study["stream"]]
    return any("rows" in stream for stream in streams)


def rows_to_score_on(
    options: Scoring, found: Sequence[SavedSAE], study: Mapping[str, Any] | None, n_tokens: int
) -> ActivationRows:
    """Open the rows of which those that are held out are scored.

    Raises:
        ValueError: an option is given that has no meaning for rows, the rows cannot be found or are not those of the
            study or of the training, SAEs were trained on different rows and none are named, or an SAE has another
            width.
    """
    for name in OF_LANGUAGE_MODELS:
        if getattr(options, name) not in ("", None, ()):
            raise ValueError(
                f"{name}: not for SAEs of rows, which come from no language model, unless --lm, --hook and --data say "
                "in which to score them"
            )
    streams = [saved.provenance for saved in found] if study is None else [study["stream"]]
    stream = streams[0]
    if not options.activations and any(other.get("data_digest") != stream.get("data_digest") for other in streams):
        raise ValueError("runs: were trained on different rows; name those to score on with --activations")
    name = options.activations or stream["data"]
    # Synthetic rows depend on how many are asked for.
    is_own = name == stream.get("data")
    counts = (stream.get("max_train_tokens", 1), stream.get("held_out_pool", n_tokens)) if is_own else (1, n_tokens)
    try:
        rows = open_rows(name, *counts)
    except ValueError as problem:
        if options.activations:
            raise
        raise ValueError(f"{problem}; name the rows with --activations") from None
    # Without a study, any rows may be named.
    if (study is not None or not options.activations) and rows.digest() != stream["data_digest"]:
        whose = f"the study {options.like}" if study is not None else f"the training of {found[0].folder}"
        raise ValueError(f"activations {name!r}: are not the rows of {whose}")
    for saved in found:
        if (saved.sae.d_in, saved.sae.d_out) != (rows.d_in, rows.d_in):
            raise ValueError(
                f"{saved.folder}: takes activations of width {saved.sae.d_in}, and the rows have {rows.d_in}"
            )
    return rows
