"""The command `eval`: saved SAEs are scored on held-out text, that of their training, another, or that of a study."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from prolu.activations.language_model import LanguageModel
from prolu.activations.options import one_or_list
from prolu.activations.packing import POOL_PER_SCORED_TOKEN
from prolu.activations.resolving import check_is_there
from prolu.activations.source import open_language_model, open_text
from prolu.activations.token_blocks import LATER_FACTS, TokenBlocks
from prolu.activations.token_mask import TokenMask
from prolu.cli.job import Job
from prolu.cli.options import Scoring
from prolu.cli.row_scoring import asks_for_rows, rows_to_score_on
from prolu.cli.score_table import score_table
from prolu.evaluation.held_out import AnyHeldOut, HeldOut, HeldOutRows
from prolu.evaluation.scoring import score
from prolu.runtime.checks import at_least_1
from prolu.runtime.files import json_text
from prolu.runtime.progress import Meter
from prolu.sae.autoencoder import SAE
from prolu.sae.saved_sae import read_provenance
from prolu.studies.amounts import check_eval_tokens, tell_eval_tokens
from prolu.studies.folder import read_study
from prolu.studies.scored_study import SavedSAE, ScoredStudy, describe, describe_rows

logger = logging.getLogger(__name__)

EVAL_TOKENS = 32_768
"""The number of held-out tokens to score on where neither the options nor a study set it."""

NEEDED = ("lm", "hook", "data", "ctx")
"""The fields that must be known to score an SAE. All others have a default."""

MASK_OPTIONS = ("exclude_special_tokens", "exclude_positions", "keep_roles", "max_norm")
"""The options that say what is left out of the scores."""

SET_BY_STUDY = (
    "data",
    "text_column",
    "data_config",
    "ctx",
    "split",
    "eval_split",
    "special_tokens",
    "max_train_tokens",
    "eval_tokens",
    *MASK_OPTIONS,
)
"""The options that a study sets with --like: changing one would change the held-out tokens."""

OF_ONE_TEXT = {
    "text_column": "text", "data_config": "", "split": "train", "eval_split": "", "special_tokens": "text",
    "keep_roles": (),
}  # fmt: skip
"""The fields that belong to one text, and their values for another."""

DEFAULTS = OF_ONE_TEXT | {"hook_out": "", "lm_revision": "", "lm_dtype": "fp32", "max_train_tokens": None} | LATER_FACTS
"""The fields that may be missing from an SAE's config, and their values then."""


def prepare_scoring(options: Scoring, runs: Sequence[Path]) -> Job:
    """Check the request, and return the work.

    Raises:
        ValueError: There is no SAE in one of the folders, a field that is needed is not known, or `out` holds
            something else.
    """
    if not runs:
        raise ValueError("runs: name at least one folder")
    if options.converged and options.out is None:
        raise ValueError("converged: only with --out")
    found = [SavedSAE(folder, SAE.load(folder), read_provenance(folder)) for folder in runs]
    study = read_study(options.like) if options.like is not None else None
    usual_tokens = EVAL_TOKENS if study is None else study["eval_tokens"]
    n_tokens = at_least_1("eval_tokens", usual_tokens if options.eval_tokens is None else options.eval_tokens)
    if asks_for_rows(options, found, study):
        blocks = rows_to_score_on(options, found, study, n_tokens)
        described = describe_rows(blocks, n_tokens)
        held_out = partial(HeldOutRows, blocks, n_tokens)
    else:
        place = _common_place(options, found, study)
        lm, blocks = _opened(options, place, study, n_tokens)
        hook_out = place["hook_out"]
        for one in found:
            _check_widths(one, lm, hook_out)
        mask = place["mask"]
        described = describe(lm, blocks, n_tokens, hook_out, mask)
        held_out = partial(HeldOut, lm, blocks, n_tokens, hook_out=hook_out, mask=mask, progress=True)
    # Too few tokens are refused only if the option asks for more. The default number, and that of a study, are upper
    # bounds.
    if options.eval_tokens is not None:
        check_eval_tokens(blocks, n_tokens, options.min_eval_fraction)
    tell_eval_tokens(blocks, n_tokens)
    scored_study = None if options.out is None else ScoredStudy(options.out, described)
    if scored_study is not None:
        scored_study.check(found)
    return [lambda: _score(options, found, held_out(), scored_study)]


def _check_widths(saved: SavedSAE, lm: LanguageModel, hook_out: str) -> None:
    """Raise ValueError unless an SAE's widths are those of the activations, and a transcoder has a hook to write at."""
    sae = saved.sae
    if lm.d_in != sae.d_in:
        raise ValueError(f"{saved.folder}: takes activations of width {sae.d_in}, {lm.name} gives {lm.d_in} there")
    if sae.is_transcoder and not hook_out:
        raise ValueError(f"{saved.folder}: its config does not say hook_out; give --hook-out")
    if hook_out and not sae.is_transcoder:
        raise ValueError(f"{saved.folder}: is no transcoder, and its output replaces its input; leave --hook-out out")
    if hook_out and (width := lm.at(hook_out).d_in) != sae.d_out:
        raise ValueError(f"{saved.folder}: gives activations of width {sae.d_out}, {lm.name} has {width} there")


def _common_place(options: Scoring, found: Sequence[SavedSAE], study: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the model, hook and text on which all these SAEs are to be scored; raise ValueError if they differ."""
    places = [_place(options, one, study) for one in found]
    for one, place in zip(found, places, strict=True):
        if place != places[0]:
            name = next(key for key in place if place[key] != places[0][key])
            raise ValueError(
                f"{one.folder}: {name} is {place[name]!r}, but {places[0][name]!r} for {found[0].folder}; score "
                "them one by one"
            )
    return places[0]


def _place(options: Scoring, saved: SavedSAE, study: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the model, hook and text on which an SAE is to be scored.

    Options come first, then the study of --like or, without one, the SAE's own config, then defaults.
    """
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    given = {name: value for name, value in values.items() if value not in ("", None, ())}
    if options.data:
        given["data"] = one_or_list(options.data)
    if study is None:
        known = dict(saved.provenance)
        if options.data:
            # The splits of the training's text have no meaning for another text.
            known |= {name: usual for name, usual in OF_ONE_TEXT.items() if name != "text_column"}
        if options.data or "max_train_tokens" not in known:
            # The pool of another text follows from the number of tokens to score on, see `_opened`.
            known |= {"max_train_tokens": None, "held_out_pool": None}
    else:
        _check_fits(options, saved, study, given)
        known = dict(study["stream"])
        if "hook" in saved.provenance:
            # A transcoder and an SAE whose outputs replace the same activations may read at two hooks.
            known |= {name: saved.provenance.get(name, "") for name in ("hook", "hook_out")}
    trained_at = saved.provenance.get("hook")
    if trained_at and given.get("hook", trained_at) != trained_at:
        logger.warning("hook: %s was trained at %s, and is scored at %s", saved.folder, trained_at, given["hook"])
    known |= {name: value for name, value in given.items() if name in (*NEEDED, "hook_out", *SET_BY_STUDY)}
    if missing := [name for name in NEEDED if name not in known]:
        flags = " ".join(f"--{name}" for name in missing)
        raise ValueError(f"{saved.folder}: its config does not say {', '.join(missing)}; give {flags}")
    # Always the SAE's: whether its inputs are centred is a fact about the SAE, not about the study's stream.
    centred = options.centred if options.centred is not None else saved.provenance.get("centred")
    if options.max_norm is not None:
        known["max_norm_multiple"] = None  # the threshold is not that of the training
    place = {name: known.get(name, DEFAULTS.get(name)) for name in (*NEEDED, *DEFAULTS)} | {"centred": centred}
    return place | {"mask": TokenMask.recorded(known)}


def _check_fits(options: Scoring, saved: SavedSAE, study: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError if an option or the SAE's hook contradicts the study of --like."""
    if contradicting := [name for name in SET_BY_STUDY if name in given]:
        flag = f"--{contradicting[0].replace('_', '-')}"
        raise ValueError(f"like: the study sets {contradicting[0]} itself; leave {flag} out")
    own = _replaced(saved.provenance)
    theirs = _replaced(study["stream"])
    flag = "--hook-out" if saved.sae.is_transcoder else "--hook"
    if own is not None and own != theirs and not (options.hook_out if saved.sae.is_transcoder else options.hook):
        raise ValueError(
            f"{saved.folder}: was trained at {own}, and the study at {theirs}; give {flag} {theirs} to score it "
            "there anyway"
        )


def _replaced(stream: Mapping[str, Any]) -> str | None:
    """Return the hook whose activations are replaced: that of an SAE, or the one that a transcoder writes at."""
    return stream.get("hook_out") or stream.get("hook")


def _opened(
    options: Scoring, place: Mapping[str, Any], study: Mapping[str, Any] | None, n_tokens: int
) -> tuple[LanguageModel, TokenBlocks]:
    """Open the language model and the text of a place."""
    description = dict(place)
    if study is not None:
        # Then the model and the text must be those of the study, to the bit.
        description |= {name: study["stream"][name] for name in ("lm_digest", "data_digest")}
    if place["max_train_tokens"] is None:
        description["max_train_tokens"] = place["ctx"]
    if place["held_out_pool"] is None:
        description["held_out_pool"] = POOL_PER_SCORED_TOKEN * n_tokens
    elif place["held_out_pool"] and study is None:
        # More may be asked for here than in the training.
        description["held_out_pool"] = max(place["held_out_pool"], n_tokens)
    described_by = f"the study {options.like}"
    check_is_there(description["data"])
    lm = open_language_model(description, described_by=described_by)
    if lm.centred and place["centred"] is None:
        raise ValueError(
            f"lm {place['lm']!r}: a LayerNorm model, and the SAE's config does not say whether its inputs lack "
            "their mean over d_model; give --centred True or --centred False"
        )
    at_least_1("max_train_tokens", description["max_train_tokens"])
    return lm, open_text(description, lm, described_by=described_by)


def _score(options: Scoring, found: Sequence[SavedSAE], held_out: AnyHeldOut, scored_study: ScoredStudy | None) -> None:
    """Score SAEs one by one, keep the scores of each as soon as they are known, and print all of them."""
    table = []
    with Meter("evaluating", held_out.n_tokens * len(found)) as meter:
        for saved, name in zip(found, _names(found), strict=True):
            scores = score(saved.sae, held_out)
            if scored_study is not None:
                # None and not False, because without the flag it is not known whether they have converged.
                scored_study.keep(saved, scores, held_out, converged=True if options.converged else None)
            if options.json:
                print(json_text(scores.figures), flush=True)
            # What needs a language model is nan where there is none.
            table.append((name, {figure: value for figure, value in scores.figures.items() if not math.isnan(value)}))
            meter.advance(held_out.n_tokens)
    if not options.json:
        print("\n".join(score_table(table, Console().width)))


def _names(found: Sequence[SavedSAE]) -> list[str]:
    """Return the names of SAEs for a table: those of their folders, or the whole paths if two have the same."""
    names = [saved.run_id for saved in found]
    return names if len(set(names)) == len(names) else [str(saved.folder) for saved in found]
