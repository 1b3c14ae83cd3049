"""The `eval` command: saved SAEs scored on held-out text, their own, another, or that of a study."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prolu.activations.language_model import LanguageModel
from prolu.activations.source import open_language_model, open_text
from prolu.activations.token_blocks import TokenBlocks
from prolu.evaluation.held_out import HeldOut, score
from prolu.runtime.checks import at_least_1
from prolu.sae.autoencoder import SAE, read_provenance
from prolu.studies.folder import read_study
from prolu.studies.scored_study import SavedSAE, ScoredStudy, describe

EVAL_TOKENS = 32_768

NEEDED = ("lm", "hook", "data", "ctx")
"""What must be known to score an SAE. Everything else has a default."""

SAID_BY_A_STUDY = ("data", "text_column", "ctx", "split", "eval_split", "max_train_tokens", "eval_tokens")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The model and the text on which SAEs are scored. What no flag gives is taken from the SAE's own config."""

    lm: str = ""
    """Language model, if it has moved or the SAE's config does not name it."""
    hook: str = ""
    """Hook at which activations are read and replaced, if the SAE's config does not name it."""
    data: str = ""
    """Text to score on instead of the text that the SAE was trained on."""
    text_column: str = ""
    """Column of the text, if it is not the one of training."""
    split: str = ""
    """Rows of the other text: a split, or a slice of one. By default train."""
    eval_split: str = ""
    """Rows to score on. By default a tenth of the documents of the split."""
    ctx: int | None = None
    """Tokens per token block."""
    max_train_tokens: int | None = None
    """Without --eval-split: training tokens to read before enough documents are held out. By default as many as the
    SAE was trained on, or ten times those scored."""
    eval_tokens: int | None = None
    """Held-out tokens to score on. By default 32,768, or as many as the study."""
    centred: bool | None = None
    """For an SAE of a LayerNorm model whose config does not tell: whether it takes activations minus their mean over
    d_model."""
    like: Path | None = None
    """Folder of a study: score on its model, its hook and exactly its held-out tokens."""
    out: Path | None = None
    """Folder of a study in which to keep the SAEs and their scores; later calls add to it. `prolu report STUDY OUT`
    shows them beside a trained study."""
    converged: bool = False
    """With --out: treat these SAEs as converged although this cannot be verified, so that they enter frontiers and
    verdicts."""
    json: bool = False
    """Print one JSON object per SAE instead of a table."""

    def prepare(self, runs: Sequence[Path]) -> list[Callable[[], int | None]]:
        """Check the request, and return the work.

        Raises:
            ValueError: no SAE there, something needed is not known, or a folder holds something else.
        """
        if not runs:
            raise ValueError("runs: name at least one folder")
        if self.converged and self.out is None:
            raise ValueError("converged: only with --out")
        found = [SavedSAE(folder, SAE.load(folder), read_provenance(folder)) for folder in runs]
        study = read_study(self.like) if self.like is not None else None
        places = [self._place(one, study) for one in found]
        for one, place in zip(found, places, strict=True):
            if place != places[0]:
                name = next(key for key in place if place[key] != places[0][key])
                raise ValueError(
                    f"{one.folder}: {name} is {place[name]!r}, of {found[0].folder} it is {places[0][name]!r}; score "
                    "them one by one"
                )
        usual = EVAL_TOKENS if study is None else study["eval_tokens"]
        n_tokens = usual if self.eval_tokens is None else self.eval_tokens
        lm, blocks = self._opened(places[0], study, at_least_1("eval_tokens", n_tokens))
        for one in found:
            if lm.d_in != one.sae.config.d_in:
                raise ValueError(
                    f"{one.folder}: takes activations of width {one.sae.config.d_in}, {lm.name} gives {lm.d_in} there"
                )
        scored_study = None if self.out is None else ScoredStudy(self.out, describe(lm, blocks, n_tokens))
        if scored_study is not None:
            scored_study.check(found)
        return [lambda: self._score(found, HeldOut(lm, blocks, n_tokens), scored_study)]

    def _place(self, saved: SavedSAE, study: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the model, hook and text on which an SAE is to be scored."""
        asked = {name: value for f in fields(self) if (value := getattr(self, name := f.name)) not in ("", None)}
        if study is None:
            made = saved.provenance | ({"split": "train", "eval_split": ""} if self.data else {})
        else:
            if said := [name for name in SAID_BY_A_STUDY if name in asked]:
                raise ValueError(f"like: a study says {said[0]} itself; leave it out")
            made = dict(study["stream"])
            own, theirs = saved.provenance.get("hook"), made.get("hook")
            if own is not None and own != theirs and not self.hook:
                raise ValueError(
                    f"{saved.folder}: reads {own}, the study {theirs}; --hook {theirs} scores it there all the same"
                )
        made |= {name: asked[name] for name in asked.keys() & {*NEEDED, *SAID_BY_A_STUDY}}
        if missing := [name for name in NEEDED if name not in made]:
            flags = " ".join(f"--{name}" for name in missing)
            raise ValueError(f"{saved.folder}: its config does not say {', '.join(missing)}; give {flags}")
        usual = {
            "text_column": "text",
            "split": "train",
            "eval_split": "",
            "lm_dtype": "fp32",
            "max_train_tokens": None,
        }
        centred = self.centred if self.centred is not None else saved.provenance.get("centred")
        return {name: made.get(name, usual.get(name)) for name in (*NEEDED, *usual)} | {"centred": centred}

    def _opened(
        self, place: Mapping[str, Any], study: Mapping[str, Any] | None, n_tokens: int
    ) -> tuple[LanguageModel, TokenBlocks]:
        description = dict(place)
        if study is not None:  # then the model and the text must be those of the study, to the bit
            description |= {name: study["stream"][name] for name in ("lm_digest", "data_digest")}
        if place["max_train_tokens"] is None:
            description["max_train_tokens"] = 10 * n_tokens
        described_by = f"the study {self.like}"
        lm = open_language_model(description, described_by=described_by)
        if lm.centred and place["centred"] is None:
            raise ValueError(
                f"lm {place['lm']!r}: a LayerNorm model, and the SAE's config does not say whether its inputs lack "
                "their mean over d_model; give --centred True or --centred False"
            )
        at_least_1("max_train_tokens", description["max_train_tokens"])
        return lm, open_text(description, lm, described_by=described_by)

    def _score(self, found: Sequence[SavedSAE], held_out: HeldOut, scored_study: "ScoredStudy | None") -> None:
        for saved in found:
            scores = score(saved.sae, held_out)
            if scored_study is not None:
                scored_study.keep(saved, scores, held_out, converged=True if self.converged else None)
            if self.json:
                print(json.dumps(scores.figures))
            else:
                title = [str(saved.folder)] if len(found) > 1 else []
                print("\n".join([*title, *(f"{k:24} {v:.6g}" for k, v in scores.figures.items())]))
