"""Groups of options that only the command line has: pages of latents, and what SAEs are scored on."""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from prolu.runtime.checks import at_least_1
from prolu.studies.settings import MIN_EVAL_FRACTION

if TYPE_CHECKING:
    from prolu.activations.rows import ActivationRows
    from prolu.activations.token_blocks import TokenBlocks

KINDS_OF_PAGES = ("frontier", "all", "none")
"""The choices of runs that get pages of latents; anything else names a run."""


@dataclass(frozen=True, kw_only=True)
class LatentPageOptions:
    """Pages of latents: for each latent, texts on which it is active, and the tokens that it makes more likely."""

    # The aliases are the names that these options had in an older version.
    latent_pages: Annotated[str, arg(aliases=["--features"])] = "frontier"
    """Which runs get pages of their latents: frontier (those on the frontier of L0 and CE increase), all, none, or the
    name of a run, in which * stands for any characters."""
    latent_tokens: Annotated[int, arg(aliases=["--feature-tokens"])] = 200_000
    """The number of held-out tokens to look at, or all if there are fewer. Their activations are held in memory."""
    examples: int = 15
    """The number of texts with a latent's strongest activations to show. About as many more are drawn over the whole
    range of its activations."""
    labels: Path | None = None
    """For studies of rows (--activations): a text file with a label for each row of the file, one a line, to show with
    the examples. By default rows are shown by their numbers."""
    images: Path | None = None
    """For studies of rows: the images that the rows come from, a folder of PNGs in the order of their names or a .npy
    file [n, h, w] or [n, h, w, 3]. There is one for each row, or for each so many rows that follow one another."""

    def check(self) -> None:
        """Raise ValueError unless the numbers are 1 or more."""
        at_least_1("latent_tokens", self.latent_tokens)
        at_least_1("examples", self.examples)

    def check_rows(self, blocks: "TokenBlocks | ActivationRows") -> None:
        """Raise ValueError if there are labels or images that do not fit the rows of a study, or it has no rows."""
        from prolu.activations.rows import ActivationRows
        from prolu.report.latents.row_examples import RowExamples

        if isinstance(blocks, ActivationRows):
            RowExamples.open(self.labels, self.images, blocks)
        elif self.labels or self.images:
            raise ValueError("labels and images: only for rows, with --activations")

    def check_named(self, run_ids: Collection[str]) -> None:
        """Raise ValueError if a run is named of which there is none among these."""
        named = self.latent_pages
        if named not in (*KINDS_OF_PAGES, *run_ids) and not any(fnmatchcase(one, named) for one in run_ids):
            raise ValueError(f"latent_pages {named!r}: choose frontier, all, none, or one of {', '.join(run_ids)}")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The language model and the text on which SAEs are scored. What no flag sets is read from the SAE's own config."""

    lm: str = ""
    """The language model, if it has moved or the SAE's config does not name it."""
    hook: str = ""
    """The hook at which activations are read and replaced, if the SAE's config does not name it."""
    hook_out: str = ""
    """The hook at which the output of a transcoder replaces activations, if its config does not name it."""
    data: tuple[str, ...] = ()
    """Another text to score on than the one that the SAE was trained on: a file, several files, a folder, a dataset
    on the Hugging Face hub, or `builtin`."""
    activations: str = ""
    """Rows to score on, in place of a language model and its text: a .npy or .safetensors file, a folder of such files,
    or synthetic rows, as in training; those that are held out are scored. SAEs that were trained on rows are scored on
    the held-out rows of their training by default, where these are in files."""
    text_column: str = ""
    """The column of the text, if it is not that of the training."""
    data_config: str = ""
    """The configuration of the other text, if it is a dataset that has several."""
    split: str = ""
    """The rows of the other text: a split, or a slice of one such as 'train[0:40%]'. By default train."""
    eval_split: str = ""
    """The rows to score on. By default a tenth of the documents of the split."""
    special_tokens: Literal["text", "parsed"] | None = None
    """What becomes of the name of a special token inside a text. By default as in the training, or text for another
    text."""
    ctx: int | None = None
    """The number of tokens per block."""
    exclude_special_tokens: bool | None = None
    """Whether special tokens are left out of the scores. By default as in the training."""
    exclude_positions: int | None = None
    """The number of positions at the beginning of every token block that are left out. By default as in the
    training."""
    keep_roles: tuple[str, ...] = ()
    """The roles whose messages are scored; all else in a chat is left out. By default as in the training, or all for
    another text."""
    max_norm: float | None = None
    """The norm above which activations are left out. By default as in the training."""
    max_train_tokens: int | None = None
    """The number of training tokens to read beside the held-out ones. It changes what is scored only for SAEs of
    studies whose config.json has no held_out_pool. By default as many as the SAE was trained on, or for another text
    one block."""
    eval_tokens: int | None = None
    """The number of held-out tokens to score on. By default 32,768, or with --like as many as the study."""
    min_eval_fraction: float = MIN_EVAL_FRACTION
    """With --eval-tokens: the least fraction of them that the text must have."""
    centred: bool | None = None
    """Whether the SAE takes activations minus their mean over d_model. Needed for an SAE of a LayerNorm model whose
    config does not say so."""
    like: Path | None = None
    """The folder of a study: score on its language model, at its hook, and on exactly its held-out tokens."""
    out: Path | None = None
    """The folder of a study in which to keep the SAEs and their scores, or to which to add them. `prolu report STUDY
    OUT` shows them beside a trained study."""
    converged: bool = False
    """With --out: treat these SAEs as converged, although this cannot be verified here, so that they enter
    frontiers."""
    json: bool = False
    """Print one line per SAE, a JSON object with its scores, instead of a table with a column per SAE."""
