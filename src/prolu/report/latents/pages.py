"""Which runs of a study get pages of their latents, and the model and text that these are made from."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from prolu.activations.language_model import LanguageModel
from prolu.activations.row_files import open_rows
from prolu.activations.rows import ActivationRows
from prolu.activations.source import open_source
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.token_mask import TokenMask
from prolu.evaluation.comparison.frontiers import pareto_best
from prolu.evaluation.comparison.metric_catalog import main_metric
from prolu.evaluation.held_out import choose_blocks
from prolu.report.latents.browser import FEATURES_FOLDER, INDEX_FILE, PageSource, was_made, write_browser
from prolu.report.latents.firings import HeldOutText
from prolu.report.latents.row_examples import RowExamples, digests_of
from prolu.runtime.progress import Meter
from prolu.sae.saved_sae import WEIGHTS_FILE, read_provenance
from prolu.studies.results import Results
from prolu.studies.runs import Run

FORMAT = 2
"""The version of the pages, which is kept with them."""

FIGURES = {"l0": "L0", "degradation": "CE increase (nats)", "recovered": "recovered", "mse": "MSE"}
"""The scores of the run at the top of its page, with their titles."""

CONVERGED = {True: "yes", False: "no", None: "not known"}


def chosen_runs(results: Results, which: str) -> list[Run]:
    """Return the runs that get pages.

    Args:
        results: the runs to choose among.
        which: `frontier` for the runs on the frontier of L0 and CE increase, or FVU where the study has no language
            model; `all`, `none`, or the name of a run, in which * stands for any characters. The frontier is that of
            the converged runs, or of all runs if none has converged, so that a short trial has pages.
    """
    if which == "none":
        return []
    if which == "all":
        return results.runs
    if which != "frontier":
        return [run for run in results.runs if run.run_id == which or fnmatchcase(run.run_id, which)]
    records = results.records
    best = pareto_best([r for r in records if r["converged"]] or records, y=main_metric(records))
    return [Run(results.folder / r["run_id"], r) for r in best]


@dataclass(frozen=True)
class LatentPages:
    """The pages of latents that a study should have. Those that are there already are kept."""

    results: Results
    which: str
    """The runs that get pages, as in `chosen_runs`."""
    n_tokens: int
    """The number of held-out tokens to look at, or all if there are fewer."""
    n_examples: int
    """The number of strongest examples per latent."""
    labels: Path | None = None
    """Of a study of rows: the file with a label for each row."""
    images: Path | None = None
    """Of a study of rows: the images that the rows belong to."""

    def missing(self) -> list[Run]:
        """Return the runs whose pages are not there, or were made of other weights, text or settings."""
        runs = chosen_runs(self.results, self.which)
        return [run for run in runs if not was_made(run.folder / FEATURES_FOLDER, self._made(run))]

    def open_source(self) -> tuple[LanguageModel, TokenBlocks]:
        """Return the study's language model and its text.

        Raises:
            ValueError: they cannot be read, or the model is not the one that the study was trained on.
        """
        folder = self.results.folder
        try:
            description = self.results.config["stream"]
            described_by = f"the study {folder}"
            lm, blocks = open_source(description, described_by=described_by, held_out_tokens=self.n_tokens)
        except KeyError as problem:
            raise ValueError(f"{folder}: its config has no {problem}, so no pages of latents can be made") from None
        except ValueError as problem:
            raise ValueError(f"{problem}; --latent-pages none draws the report without pages of latents") from None
        return lm, blocks

    def open_rows(self) -> tuple[RowExamples, ActivationRows]:
        """Return the rows of a study without a language model, and how they are shown.

        Raises:
            ValueError: the rows cannot be read or are not those of the study, or labels or images do not fit them.
        """
        stream = self.results.config["stream"]
        rows = open_rows(stream["data"], stream.get("max_train_tokens", 1), stream.get("held_out_pool", self.n_tokens))
        if rows.digest() != stream["data_digest"]:
            raise ValueError(f"activations {stream['data']!r}: are not the rows of the study {self.results.folder}")
        return RowExamples.open(self.labels, self.images, rows), rows

    def write_of_rows(self, runs: Sequence[Run], examples: RowExamples, rows: ActivationRows) -> None:
        """Write the pages of latents of rows into the folder of each run; existing pages are replaced."""
        size = len(choose_blocks(rows, self.n_tokens)) * rows.ctx
        with Meter("looking at latents", size * (1 + 3 * len(runs)), unit="rows") as meter:
            text = HeldOutText.of_rows(rows, self.n_tokens, meter.advance)
            for run in runs:
                source = PageSource(run.load(), text, examples, self.n_examples, _facts(run))
                write_browser(run.folder / FEATURES_FOLDER, source, self._made(run), meter.advance)

    def write(self, runs: Sequence[Run], lm: LanguageModel, blocks: TokenBlocks) -> None:
        """Write the pages of latents into the folder of each run, one run at a time; existing pages are replaced.

        Args:
            runs: the runs whose latents are shown.
            lm: the language model at the hook of the study, at which latents read.
            blocks: the text; its held-out blocks are looked at.
        """
        hook_out = self._hook_out
        # The tokens that latents promote depend on the decoder, which writes at this hook.
        lm_out = lm.at(hook_out) if hook_out else lm
        size = len(choose_blocks(blocks, self.n_tokens)) * blocks.ctx
        # The text passes through the model once, and through each SAE twice; writing counts as a third time.
        with Meter("looking at latents", size * (1 + 3 * len(runs))) as meter:
            # Once for all runs: their activations at a hook are the same.
            text = HeldOutText.read(lm, blocks, self.n_tokens, meter.advance, self._mask)
            for run in runs:
                source = PageSource(run.load(), text, lm_out, self.n_examples, _facts(run))
                write_browser(run.folder / FEATURES_FOLDER, source, self._made(run), meter.advance)

    @property
    def _hook_out(self) -> str:
        """The hook that the transcoders of the study write at; empty for SAEs."""
        return self.results.config["stream"].get("hook_out", "")

    @property
    def _mask(self) -> TokenMask:
        """What the study leaves out, which the pages leave out too."""
        return TokenMask.recorded(self.results.config["stream"])

    def _made(self, run: Run) -> dict[str, Any]:
        """Return everything that decides the pages of a run."""
        stream = self.results.config["stream"]
        return {
            "format": FORMAT,
            # A digest of the weights, because a run that was trained anew or further has the same run_id.
            "weights": hashlib.sha256((run.folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
            "stream": {name: stream.get(name) for name in ("lm_digest", "hook", "data_digest")}
            | ({"hook_out": self._hook_out} if self._hook_out else {})
            | self._mask.describe(),
            "n_tokens": self.n_tokens,
            "n_examples": self.n_examples,
            **digests_of(self.labels, self.images),
        }


def page_of(run: Run) -> Path | None:
    """Return the page of a run's latents, or None if it has none."""
    page = run.folder / FEATURES_FOLDER / INDEX_FILE
    return page if page.is_file() else None


def _facts(run: Run) -> Mapping[str, Any]:
    # Rows come from no language model, so there is no CE increase.
    figures = {title: run.record[name] for name, title in FIGURES.items() if run.record.get(name) is not None}
    return {
        "name": run.record["run_id"],
        "figures": figures | {"converged": CONVERGED[run.record["converged"]]},
        "config": read_provenance(run.folder),
    }
