"""A study of SAEs that were scored here and trained elsewhere: `prolu eval --out`.

Its folder has the files of any study, so that `prolu report` shows it beside the one that its SAEs are compared with.
It grows: every call of `prolu eval` may add SAEs that are scored on the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prolu.activations.harvesting import describe_activations
from prolu.activations.language_model import LanguageModel
from prolu.activations.rows import ActivationRows
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.token_mask import NO_MASK, TokenMask
from prolu.evaluation.held_out import AnyHeldOut, held_out_digest
from prolu.evaluation.scoring import Scores
from prolu.runtime.files import through_json
from prolu.runtime.names import check_inside, folder_name, plain_name
from prolu.sae.autoencoder import SAE
from prolu.sae.saved_sae import WEIGHTS_FILE
from prolu.studies.amounts import text_amounts
from prolu.studies.folder import (
    PATH_FIELDS,
    holds_study,
    read_results,
    read_study,
    versions,
    write_results,
    write_study,
)
from prolu.training.config import RunConfig


class SavedSAE(NamedTuple):
    """An SAE that was loaded from the disk."""

    folder: Path
    """The folder that it was loaded from."""
    sae: SAE
    """The SAE."""
    provenance: dict[str, Any]
    """Where it comes from: the language model, hook, text, and the run or the other library's config."""

    @property
    def run_id(self) -> str:
        """The name of the SAE in a scored study, which is that of its folder."""
        return folder_name(self.folder)


def describe(
    lm: LanguageModel, blocks: TokenBlocks, n_tokens: int, hook_out: str = "", mask: TokenMask = NO_MASK
) -> dict[str, Any]:
    """Return the config of a scored study: everything that decides the scores.

    Args:
        lm: the language model at the hook.
        blocks: the text.
        n_tokens: the number of tokens to score on.
        hook_out: the hook that transcoders write at; empty for SAEs.
        mask: what is left out of the scores.
    """
    hooks = {"hook": lm.hook} | ({"hook_out": hook_out} if hook_out else {})
    return _described(describe_activations(lm, blocks) | hooks | mask.describe(), blocks, n_tokens, mask)


def describe_rows(rows: ActivationRows, n_tokens: int) -> dict[str, Any]:
    """Return the config of a study of SAEs that are scored on `n_tokens` held-out rows."""
    return _described(rows.describe(), rows, n_tokens)


def _described(
    stream: dict[str, Any], blocks: TokenBlocks | ActivationRows, n_tokens: int, mask: TokenMask = NO_MASK
) -> dict[str, Any]:
    return {
        "stream": stream,
        "eval_tokens": n_tokens,
        "held_out_digest": held_out_digest(blocks, n_tokens, mask),
        "amounts": text_amounts(blocks, n_tokens),
        "n_threads": torch.get_num_threads(),
        "runs": [],
        "versions": versions(),
    }


@dataclass(frozen=True)
class ScoredStudy:
    """The folder of a scored study, to which SAEs are added."""

    folder: Path
    """The folder."""
    config: dict[str, Any]
    """The study's config, as `describe` returns it."""

    def check(self, found: Sequence[SavedSAE]) -> None:
        """Raise ValueError unless the scores of these SAEs can be added to the study.

        The folder must be new, or hold scores on the same tokens, and no other SAE in it may have one of their names.
        """
        names = [plain_name(saved.run_id, "runs: the folder") for saved in found]
        if len(set(names)) < len(names):
            raise ValueError(f"runs {', '.join(names)}: two folders have the same name; rename one of them")
        if not holds_study(self.folder):
            return
        held = read_study(self.folder)
        asked = through_json(self.config)
        is_same = held.get("eval_tokens") == asked["eval_tokens"]
        if not is_same or _without_paths(held["stream"]) != _without_paths(asked["stream"]):
            raise ValueError(
                f"out {str(self.folder)!r}: holds another study, or scores on other tokens; choose another folder"
            )
        for saved in found:
            check_inside(self.folder, saved.run_id)
            weights = self.folder / saved.run_id / WEIGHTS_FILE
            if weights.is_file() and weights.read_bytes() != saved.sae.files()[WEIGHTS_FILE]:
                raise ValueError(
                    f"out {str(self.folder)!r}: holds another SAE named {saved.run_id}; rename {saved.folder}"
                )

    def keep(self, saved: SavedSAE, scores: Scores, held_out: AnyHeldOut, *, converged: bool | None) -> None:
        """Write an SAE, its scores per document and per latent, and its line of results into the folder.

        Args:
            saved: The SAE.
            scores: Its scores.
            held_out: The tokens that it was scored on.
            converged: Whether it counts as converged; None where nobody knows.
        """
        run_id = saved.run_id
        saved.sae.save(self.folder / run_id, saved.provenance)
        scores.save(self.folder / run_id)
        record = settings(saved) | {"run_id": run_id, "converged": converged}
        record |= {"resampled": [], "density_histogram": scores.latents.density_histogram()}
        record |= {"eval_tokens": held_out.n_tokens, "unit": held_out.unit} | scores.figures
        # An SAE that is scored again keeps one line, the new one.
        others = [r for r in read_results(self.folder) if r["run_id"] != run_id]
        records = [*others, record]
        write_study(self.folder, self.config | {"runs": [{"run_id": r["run_id"]} for r in records]})
        # The results come last: a run that they name has all its files.
        write_results(self.folder, records)


def settings(saved: SavedSAE) -> dict[str, Any]:
    """Return the settings of an SAE's run, by the names of RunConfig; None where a setting is not known.

    Of an imported SAE most are not known. Its nonlinearity is given with the library, as in `saelens: jumprelu`,
    because it was trained in another way than ours and is a family of its own.
    """
    names = [f.name for f in fields(RunConfig)]
    run = saved.provenance.get("run")
    origin = saved.provenance.get("origin")
    known = {name: run[name] for name in names if name in run} if isinstance(run, dict) else {}
    if known.get("target_l0") is not None:
        known["coeff"] = None  # the L0 controller has changed it, and the config has the one that it started from
    config = saved.sae.config
    found = {"nonlinearity": config.nonlinearity, "d_sae": config.d_sae, "normalisation": config.normalisation} | known
    if isinstance(origin, dict):
        found["nonlinearity"] = f"{origin['format']}: {origin['architecture']}"
    return dict.fromkeys(names) | found


def _without_paths(stream: Any) -> Any:
    """Return the description of a stream without its paths: a model or a text may be moved, but not changed."""
    return {k: v for k, v in stream.items() if k not in PATH_FIELDS} if isinstance(stream, dict) else stream
