"""Which runs of a study get pages of their latents, and the model and text that these are made from."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prolu.activations.language_model import LanguageModel
from prolu.activations.source import open_source
from prolu.activations.token_blocks import TokenBlocks
from prolu.evaluation.comparison.frontiers import pareto_best
from prolu.evaluation.held_out import choose_blocks
from prolu.report.latents.browser import FEATURES_FOLDER, INDEX_FILE, PageSource, was_made, write_browser
from prolu.report.latents.firings import HeldText
from prolu.runtime.progress import Meter
from prolu.sae.autoencoder import WEIGHTS_FILE, read_provenance
from prolu.studies.results import Results, Run

Which = Literal["frontier", "all", "none"]

FORMAT = 1
"""Of the pages; raised when older ones should be made anew."""


def chosen_runs(results: Results, which: Which) -> list[Run]:
    """The runs on the frontier of L0 and degradation (of the converged runs, or of all if none is), all, or none."""
    if which == "none":
        return []
    if which == "all":
        return results.runs
    best = pareto_best([r for r in results.records if r["converged"]] or results.records)
    return [Run(results.folder / r["run_id"], r) for r in best]


@dataclass(frozen=True)
class LatentPages:
    """The pages of the latents of some of a study's runs; those that are there already are kept."""

    results: Results
    which: Which
    n_tokens: int
    """Held-out tokens to look at, if there are so many."""
    n_examples: int
    """Strongest examples of a latent."""

    def missing(self) -> list[Run]:
        """Runs whose pages are still to be made."""
        runs = chosen_runs(self.results, self.which)
        return [run for run in runs if not was_made(run.folder / FEATURES_FOLDER, self._made(run))]

    def open_source(self) -> tuple[LanguageModel, TokenBlocks]:
        """The study's language model and text.

        Raises:
            ValueError: they cannot be read, or the model is another one now.
        """
        folder = self.results.folder
        try:
            description = self.results.config["stream"]
            lm, blocks = open_source(description, described_by=f"the study {folder}", held_out_only=True)
        except KeyError as problem:
            raise ValueError(f"{folder}: its config does not say {problem}") from None
        except ValueError as problem:
            raise ValueError(f"{problem}; --latent-pages none draws the report without it") from None
        return lm, blocks

    def write(self, runs: Sequence[Run], lm: LanguageModel, blocks: TokenBlocks) -> None:
        """Makes the pages of some runs, each whole before the next is begun."""
        size = len(choose_blocks(blocks, self.n_tokens)) * blocks.ctx
        with Meter("looking at latents", size * (1 + 3 * len(runs))) as meter:
            text = HeldText.read(lm, blocks, self.n_tokens, meter.advance)
            for run in runs:
                source = PageSource(run.load(), text, lm, self.n_examples, _facts(run))
                write_browser(run.folder / FEATURES_FOLDER, source, self._made(run), meter.advance)

    def _made(self, run: Run) -> dict[str, Any]:
        stream = self.results.config["stream"]
        return {
            "format": FORMAT,
            "weights": hashlib.sha256((run.folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
            "stream": {name: stream.get(name) for name in ("lm_digest", "hook", "data_digest")},
            "n_tokens": self.n_tokens,
            "n_examples": self.n_examples,
        }


def page_of(run: Run) -> Path | None:
    """The page of a run's latents, if it has one."""
    page = run.folder / FEATURES_FOLDER / INDEX_FILE
    return page if page.is_file() else None


def _facts(run: Run) -> Mapping[str, Any]:
    record, names = run.record, {"l0": "L0", "degradation": "nats lost", "recovered": "recovered", "mse": "MSE"}
    figures = {title: record[name] for name, title in names.items()}
    state = {"converged": {True: "yes", False: "no", None: "not known"}[record["converged"]]}
    return {"name": record["run_id"], "figures": figures | state, "config": read_provenance(run.folder)}
