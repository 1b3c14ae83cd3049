"""A study of SAEs that were scored here and trained elsewhere."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prolu.activations.harvesting import describe_activations
from prolu.activations.language_model import LanguageModel
from prolu.activations.token_blocks import TokenBlocks
from prolu.evaluation.held_out import HeldOut, Scores
from prolu.runtime.files import read_json_lines, write_atomically
from prolu.sae.autoencoder import SAE, WEIGHTS_FILE
from prolu.studies.folder import RESULTS_FILE, holds_study, read_study, versions, write_study
from prolu.training.config import RunConfig


class SavedSAE(NamedTuple):
    """An SAE on the disk."""

    folder: Path
    sae: SAE
    made: dict[str, Any]
    """Where it comes from."""


def describe(lm: LanguageModel, blocks: TokenBlocks, n_tokens: int) -> dict[str, Any]:
    """What decides scores, as a study's config has it."""
    return {
        "stream": describe_activations(lm, blocks) | {"hook": lm.hook},
        "eval_tokens": n_tokens,
        "n_threads": torch.get_num_threads(),
        "runs": [],
        "versions": versions(),
    }


@dataclass(frozen=True)
class ScoredStudy:
    """A study's folder for SAEs that were scored, not trained, here; it grows."""

    folder: Path
    config: dict[str, Any]

    def check(self, found: Sequence[SavedSAE]) -> None:
        """Raises ValueError unless the folder is new, or of scores on the same tokens, and has room for these SAEs."""
        names = [run_id(saved) for saved in found]
        if len(set(names)) < len(names):
            raise ValueError(f"runs {', '.join(names)}: two have one name; rename a folder")
        if not holds_study(self.folder):
            return
        held, asked = read_study(self.folder), json.loads(json.dumps(self.config))
        for part in ("stream", "eval_tokens"):
            if _without_paths(held.get(part)) != _without_paths(asked[part]):
                raise ValueError(f"out {str(self.folder)!r}: another study, or scores on other tokens; choose another")
        for saved, name in zip(found, names, strict=True):
            weights = self.folder / name / WEIGHTS_FILE
            if weights.is_file() and weights.read_bytes() != saved.sae.files()[WEIGHTS_FILE]:
                raise ValueError(f"out {str(self.folder)!r}: holds another SAE named {name}; rename {saved.folder}")

    def keep(self, saved: SavedSAE, scores: Scores, held_out: HeldOut, *, converged: bool | None) -> None:
        """The SAE, its sums by document and numbers by latent, and its line of results."""
        name = run_id(saved)
        saved.sae.save(self.folder / name, saved.made)
        scores.documents.save(self.folder / name)
        scores.latents.save(self.folder / name)
        found = settings(saved) | {"run_id": name, "converged": converged}
        found |= {"resampled": [], "density_histogram": scores.latents.density_histogram()}
        found |= {"eval_tokens": held_out.n_tokens, "unit": held_out.unit} | scores.figures
        others = [r for r in read_json_lines(self.folder / RESULTS_FILE) if r["run_id"] != name]
        records = [*others, found]
        write_study(self.folder, self.config | {"runs": [{"run_id": r["run_id"]} for r in records]})
        write_atomically(self.folder / RESULTS_FILE, "".join(json.dumps(r) + "\n" for r in records))


def run_id(saved: SavedSAE) -> str:
    """Its folder's name."""
    return saved.folder.resolve().name


def settings(saved: SavedSAE) -> dict[str, Any]:
    """The settings of a run as its config has them; null where nothing is known, as of an import.

    An import's nonlinearity is named with its library, as in `saelens: jumprelu`: it was trained otherwise than ours.
    """
    names = [f.name for f in fields(RunConfig)]
    run, origin = saved.made.get("run"), saved.made.get("origin")
    known = {name: run[name] for name in names if name in run} if isinstance(run, dict) else {}
    if known.get("target_l0") is not None:
        known["coeff"] = None  # what it was steered to is not in the config
    config = saved.sae.config
    found = {"nonlinearity": config.nonlinearity, "d_sae": config.d_sae, "normalisation": config.normalisation} | known
    if isinstance(origin, dict):
        found["nonlinearity"] = f"{origin['format']}: {origin['architecture']}"
    return dict.fromkeys(names) | found


def _without_paths(part: Any) -> Any:
    return {k: v for k, v in part.items() if k not in ("lm", "data")} if isinstance(part, dict) else part
